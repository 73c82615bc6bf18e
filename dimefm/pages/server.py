"""A small server of pages, for a browser on this machine.

It listens at 127.0.0.1 alone and answers exactly the routes that it is given: nothing is read from the disk by a path
that somebody asks for. Any page that is open in the same browser can send requests here. So a request is refused whose
Host is another (a name of a stranger that leads to 127.0.0.1) or whose Origin is another.
"""

from __future__ import annotations

import errno
import json
import socketserver
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from cache_schemas import SchemaError
from dimefm.errors import DimefmError
from dimefm.system.inert_text import text
from dimefm.system.stopping import holding

MOST_BODY = 50 * 2**20  # bytes of a request: a picture that somebody asks with

_ADDRESS, _PATIENCE = "127.0.0.1", 30.0  # seconds for each read and write of a request
_DISCARDED = 200 * 2**20  # of a body that is too large: a browser shows an answer only when it has sent all of it
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Request:
    """What was asked: the fields of the query, the last one of a name that is repeated, and the body."""

    query: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Response:
    """What is answered."""

    body: bytes
    content_type: str = "text/html; charset=utf-8"
    status: int = HTTPStatus.OK


Routes = Mapping[tuple[str, str], Callable[[Request], Response]]
"""By method, GET or POST, and path, such as ("GET", "/"). A GET also answers HEAD. They run on threads, several at
once. A DimefmError is answered with its message as plain text and status 400."""


def as_json(value: Any) -> Response:
    """An answer for a script. Raises ValueError for NaN or infinity, which JSON lacks."""
    return Response(json.dumps(value, allow_nan=False).encode(), "application/json")


def as_text(words: str, status: int = HTTPStatus.OK) -> Response:
    """An answer in words."""
    return Response(f"{text(words)}\n".encode(), "text/plain; charset=utf-8", status)


def serve(routes: Routes, port: int, *, ready: Callable[[str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM, which end it as any command. Calls `ready` with the URL once it listens.

    Port 0 is any free one. Raises DimefmError where the port cannot be had.
    """
    with holding(lambda: "the page is served no more"), PageServer(routes, port) as server:
        ready(server.url)
        server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """The server itself. Raises DimefmError where the port cannot be had."""

    daemon_threads = True  # a request that lasts does not keep the program from its end

    def __init__(self, routes: Routes, port: int) -> None:
        self.routes = routes
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "is not for this user"
            remedy = "give another --port, or none: a free one is taken then"
            raise DimefmError(f"port {port} of {_ADDRESS} {why}", remedy=remedy) from error
        self.port: int = self.server_address[1]
        names = [f"{name}:{self.port}" for name in (_ADDRESS, "localhost")]
        self.hosts = {*names, _ADDRESS, "localhost"} if self.port == 80 else set(names)
        self.url = f"http://{_ADDRESS}:{self.port}/"

    def server_bind(self) -> None:
        """Bind, without looking up a name for the address: that may take long, and no one needs it."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away, or is silent, is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Refusal(Exception):
    def __init__(self, status: HTTPStatus, words: str) -> None:
        self.answer = as_text(words, status)
        super().__init__(words)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._send(self._answer("GET"))

    def do_HEAD(self) -> None:
        self._send(self._answer("GET"))

    def do_POST(self) -> None:
        self._send(self._answer("POST"))
        self._discard()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses itself, such as another method."""
        self._send(as_text(message or HTTPStatus(code).phrase, code))

    def version_string(self) -> str:
        """What the Server header says."""
        return "dimefm"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def _answer(self, method: str) -> Response:
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
        try:
            self._require_own_page()
            path, _, query = self.path.partition("?")
            route = self.server.routes.get((method, path))
            body = self._body(length) if method == "POST" else b""
            if route is None:
                raise _Refusal(HTTPStatus.NOT_FOUND, "there is nothing here")
            return route(Request(_fields(query), body))
        except _Refusal as refusal:
            return refusal.answer
        except (DimefmError, SchemaError) as error:
            return as_text(str(error), HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            return as_text(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
        except Exception:
            traceback.print_exc()
            return as_text("this is a bug in dimefm; the terminal shows where", HTTPStatus.INTERNAL_SERVER_ERROR)

    def _require_own_page(self) -> None:
        hosts = [host.lower() for host in self.headers.get_all("Host", [])]
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            port = self.server.port
            words = f"only {self.server.url} and http://localhost:{port}/ lead here"
            raise _Refusal(HTTPStatus.FORBIDDEN, f"{words}; through ssh: ssh -L {port}:localhost:{port} MACHINE")
        origins = {f"http://{host}" for host in self.server.hosts}
        if not all(origin.lower() in origins for origin in self.headers.get_all("Origin", [])):
            raise _Refusal(HTTPStatus.FORBIDDEN, "a page from elsewhere may not ask here")

    def _body(self, length: str) -> bytes:
        if length != str(self.unread) or "Transfer-Encoding" in self.headers:
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if self.unread > MOST_BODY:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BODY:,} bytes are not taken")
        body = self.rfile.read(self.unread)
        self.unread = 0
        if len(body) != int(length):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the request was cut short")
        return body

    def _discard(self) -> None:
        left = min(self.unread, _DISCARDED)
        while left and (part := self.rfile.read(min(left, 2**16))):
            left -= len(part)

    def _send(self, answer: Response) -> None:
        self.send_response(answer.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def _fields(query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=100))
    except ValueError:
        raise _Refusal(HTTPStatus.BAD_REQUEST, "more than 100 fields") from None
