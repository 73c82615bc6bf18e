"""An S3 server on this machine, moto's, for tests that read and write s3:// URLs.

A test module takes the fixtures with `pytest_plugins = ["tests.s3"]`, and must not import this module itself: pytest
would then not see its assertions. tests.making.upload puts files there.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "",  # nothing of whoever runs the tests
    "AWS_SHARED_CREDENTIALS_FILE": "",
}
_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
_NUMBERS = itertools.count()


@dataclass
class S3Requests:
    """What the server was asked since `clear`: method, path with query, Range header (empty without), bytes sent; and
    how many requests it had at once, at most. It answers after `latency` seconds. From the request number `expires` on
    it answers as to a token that has run out; 0: never."""

    expires: int = 0
    seen: list[tuple[str, str, str, int]] = field(default_factory=list)
    at_once: int = 0
    latency: float = 0.0
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        with self.lock:
            self.seen.clear()
            self.expires = self.at_once = 0

    def of(self, method: str, part: str = "") -> list[tuple[str, str, str, int]]:
        """The requests of this method whose path holds `part`."""
        with self.lock:
            return [request for request in self.seen if request[0] == method and part in request[1]]

    def recording(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """A WSGI application that keeps a record of what is asked of `application`."""

        def record(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            with self.lock:
                self.waiting += 1
                self.at_once = max(self.at_once, self.waiting)
            time.sleep(self.latency)
            with self.lock:
                self.waiting -= 1
            if self.expires and len(self.seen) + 1 >= self.expires:
                start_response("400 Bad Request" if environ["REQUEST_METHOD"] == "GET" else "403 Forbidden", [])
                body = [_EXPIRED] if environ["REQUEST_METHOD"] == "GET" else []
            else:
                body = list(application(environ, start_response))
            path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
            request = (environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", ""), sum(map(len, body)))
            with self.lock:
                self.seen.append(request)
            return body

        return record


@pytest.fixture(scope="session")
def s3_requests() -> Iterator[S3Requests]:
    """The server, by the requests it gets. The environment leads to it, for processes started by a test too."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request, in whatever test fails
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    requests = S3Requests()
    server._server.app = requests.recording(server._server.app)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield requests
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3(s3_requests: S3Requests) -> str:
    """The URL of an empty bucket, another one for every test."""
    import s3fs

    name = f"bucket-{next(_NUMBERS)}"
    s3fs.S3FileSystem().mkdir(name)
    s3_requests.clear()
    return f"s3://{name}"
