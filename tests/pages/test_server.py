"""The server of pages over real sockets: who is answered, with what, and that it ends cleanly."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dimefm.errors import DimefmError
from dimefm.pages.server import MOST_BODY, PageServer, Request, Response, as_json, as_text


def _fails(request: Request) -> Response:
    if request.query.get("how") == "bug":
        raise KeyError("a secret")
    raise DimefmError("no such row", remedy="give another")


ROUTES = {
    ("GET", "/"): lambda request: Response(b"<p>page</p>"),
    ("GET", "/fields"): lambda request: as_json(dict(request.query)),
    ("POST", "/count"): lambda request: as_text(f"{len(request.body)}"),
    ("GET", "/fails"): _fails,
}


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer(ROUTES, 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


class Answer:
    """An answer to a request, sent as it is."""

    def __init__(self, server: PageServer, request: str, body: bytes = b"") -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(request.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            whole = b"".join(iter(lambda: connection.recv(2**16), b""))
        head, _, self.body = whole.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = dict(line.split(": ", 1) for line in rest)


def get(server: PageServer, path: str, *, method: str = "GET", host: str = "127.0.0.1", more: str = "") -> Answer:
    return Answer(server, f"{method} {path} HTTP/1.1\nHost: {host}:{server.port}{more}")


def test_routes_are_answered_with_headers_that_keep_others_out(server: PageServer) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST"):
        answer = get(server, "/", host=host)
        assert (answer.status, answer.body) == (200, b"<p>page</p>")
    assert (
        answer.headers.items()
        >= {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": "11",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
        }.items()
    )
    assert json.loads(get(server, "/fields?a=1&a=2&b=%3Cx%3E&c=").body) == {"a": "2", "b": "<x>", "c": ""}


def test_head_is_answered_as_get_without_a_body(server: PageServer) -> None:
    answer = get(server, "/", method="HEAD")
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "11")


@pytest.mark.parametrize(
    "path",
    ["/other", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/fields/", "/?/../", "*", "/count"],
)
def test_nothing_else_is_served(server: PageServer, path: str) -> None:
    answer = get(server, path)
    if path == "/?/../":  # the page, with a query
        assert answer.body == b"<p>page</p>"
    else:
        assert (answer.status, answer.body) == (404, b"there is nothing here\n")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "<script>"])
def test_other_methods_are_refused(server: PageServer, method: str) -> None:
    answer = get(server, "/", method=method)
    assert answer.status == 501
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "Host: evil.example:{0}",
        "Host: 127.0.0.1",
        "Host: 127.0.0.1:1",
        "Host: [::1]:{0}",
        "Host: 127.0.0.1:{0}.evil.example",
        "Host: 127.0.0.1:{0}\nHost: evil.example",
    ],
)
def test_another_host_is_refused(server: PageServer, lines: str) -> None:
    """A page of evil.example may have made its name lead to 127.0.0.1."""
    answer = Answer(server, f"GET / HTTP/1.1\n{lines.format(server.port)}".rstrip("\n"))
    assert answer.status == 403
    assert f"ssh -L {server.port}:localhost:{server.port}" in answer.body.decode()


def test_another_origin_is_refused(server: PageServer) -> None:
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{server.port}", "http://127.0.0.1:1", ""):
        answer = get(server, "/count", method="POST", more=f"\nOrigin: {origin}\nContent-Length: 0")
        assert answer.status == 403, origin
        assert "Access-Control-Allow-Origin" not in answer.headers
    own = f"\nOrigin: http://localhost:{server.port}\nContent-Length: 0"
    assert get(server, "/count", method="POST", more=own).status == 200


def test_a_body_of_a_known_and_bounded_length_is_taken(server: PageServer) -> None:
    def post(body: bytes) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/count", body)
        answer = connection.getresponse()
        return answer.status, answer.read()

    assert post(b"x" * MOST_BODY) == (200, f"{MOST_BODY}\n".encode())
    assert post(b"x" * (MOST_BODY + 1)) == (413, f"more than {MOST_BODY:,} bytes are not taken\n".encode())
    for length in (
        "",
        "\nContent-Length: -1",
        "\nContent-Length: 1e3",
        "\nTransfer-Encoding: chunked\nContent-Length: 0",
    ):
        assert get(server, "/count", method="POST", more=length).status == 411, length


def test_errors_are_told_without_what_is_within(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    answer = get(server, "/fails")
    assert (answer.status, answer.body) == (400, b"no such row\n  remedy: give another\n")
    assert capfd.readouterr().err == ""  # nor are requests logged
    answer = get(server, "/fails?how=bug")
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert "KeyError: 'a secret'" in capfd.readouterr().err
    assert get(server, "/fields?" + "&".join("abcde" * 21)).status == 400


def test_a_browser_that_goes_away_is_no_error(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    for sent in (
        b"",
        b"GET / HT",
        b"POST /count HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 9\r\n\r\nx" % server.port,
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends with a reset
            connection.sendall(sent)
    assert get(server, "/").status == 200
    assert capfd.readouterr().err == ""


def test_only_this_machine_is_listened_to(server: PageServer) -> None:
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    ours = [address for address in listening if address.endswith(f":{server.port:04X}")]
    assert ours == [f"0100007F:{server.port:04X}"]
    assert f":{server.port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_a_port_that_is_in_use_is_an_error_with_a_remedy(server: PageServer) -> None:
    with pytest.raises(DimefmError, match=rf"port {server.port} of 127.0.0.1 is in use\n  remedy: give another --port"):
        PageServer(ROUTES, server.port)


def test_a_signal_ends_it_and_frees_its_port() -> None:
    code = """if True:
        import sys
        from dimefm.pages.server import serve
        from dimefm.system import stopping
        stopping.listen()
        try:
            serve({}, 0, ready=lambda url: print(url, flush=True))
        except KeyboardInterrupt as error:
            print(stopping.message(error, stopping.signal_of(error)))
            sys.exit(7)"""
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = int(process.stdout.readline().rstrip("/\n").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):  # a connection that asks nothing does not hold it up
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
    assert (out, err, process.returncode) == ("Stopped by SIGTERM: the page is served no more\n", "", 7)
    PageServer({}, port).server_close()
