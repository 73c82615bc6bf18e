"""An object store on this machine that answers as one far away: S3's reads, over the files of a folder.

`python -m benchmarks.distant_s3 FOLDER LATENCY BYTES_PER_SECOND` serves until its standard input is closed. Each
request waits for a round trip; all of them share the bytes per second. It knows nothing of signatures: for measuring
alone.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import fsspec

_PIECE = 256 * 1024  # bytes that are sent at once
_COUNTS = "/-counts"
_PEOPLE = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def distant_s3(folder: Path, latency: float, bytes_per_second: float) -> Iterator[str]:
    """Serve `folder` as s3:// in the block, to this process and those that it starts; the address of the server."""
    words = [sys.executable, "-m", "benchmarks.distant_s3", str(folder), f"{latency}", f"{bytes_per_second}"]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    try:
        with patch.dict(os.environ, {**_PEOPLE, "AWS_ENDPOINT_URL": address}):
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield address
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.kill()
        server.wait()


def counts(address: str) -> tuple[int, int]:
    """Requests and bytes since the server began."""
    with urllib.request.urlopen(address + _COUNTS) as answer:
        found = json.load(answer)
    return found["requests"], found["bytes"]


class _Server:
    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        self.folder, self.latency, self.rate = folder, latency, rate
        self.requests = self.bytes = 0
        self.free_at = 0.0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                method, target, _ = lines[0].split(" ")
                await reader.readexactly(int(fields.get("content-length", 0)))
                await self._answer(writer, method, target, fields.get("range", ""))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, target: str, span: str) -> None:
        url = urlsplit(target)
        if url.path == _COUNTS:
            await self._send(writer, "200 OK", json.dumps({"requests": self.requests, "bytes": self.bytes}).encode())
            return
        self.requests += 1
        await asyncio.sleep(self.latency)
        query, path = parse_qs(url.query), self.folder / unquote(url.path).lstrip("/")
        if "list-type" in query:
            body = _listing(path, query.get("prefix", [""])[0], "delimiter" in query)
            await self._send(writer, "200 OK", body)
        elif not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"
            await self._send(writer, "404 Not Found", b"" if method == "HEAD" else body)
        else:
            await self._file(writer, method, path, span)

    async def _file(self, writer: asyncio.StreamWriter, method: str, path: Path, span: str) -> None:
        size = path.stat().st_size
        begin, _, end = span.removeprefix("bytes=").partition("-")
        first, last = (int(begin or 0), min(size - 1, int(end or size - 1))) if span else (0, size - 1)
        if span and first >= size:
            body = b"<Error><Code>InvalidRange</Code><Message>none</Message></Error>"
            await self._send(writer, "416 Requested Range Not Satisfiable", body)
            return
        fields = {"ETag": f'"{size:x}"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        if method == "HEAD":
            await self._send(writer, "200 OK", b"", {**fields, "Content-Length": f"{size}"})
            return
        if span:
            fields["Content-Range"] = f"bytes {first}-{last}/{size}"
        with path.open("rb") as file:
            file.seek(first)
            await self._send(writer, "206 Partial Content" if span else "200 OK", file.read(last - first + 1), fields)

    async def _send(
        self, writer: asyncio.StreamWriter, status: str, body: bytes, fields: dict[str, str] | None = None
    ) -> None:
        fields = {"Content-Length": f"{len(body)}", **(fields or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode())
        for at in range(0, len(body), _PIECE):
            piece = body[at : at + _PIECE]
            self.bytes += len(piece)
            self.free_at = max(time.monotonic(), self.free_at) + len(piece) / self.rate
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(max(0.0, self.free_at - time.monotonic()))
        await writer.drain()


def _listing(bucket: Path, prefix: str, by_folder: bool) -> bytes:
    """ListObjectsV2, all in one page."""
    keys, folders = [], set()
    base = bucket / prefix if (bucket / prefix).is_dir() else (bucket / prefix).parent
    for path in sorted(base.rglob("*")):
        key = path.relative_to(bucket).as_posix()
        if not path.is_file() or not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        if by_folder and "/" in rest:
            folders.add(prefix + rest.partition("/")[0] + "/")
        else:
            found = path.stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.st_mtime))
            facts = f"<Size>{found.st_size}</Size><LastModified>{when}</LastModified><ETag>x</ETag>"
            keys.append(f"<Contents><Key>{escape(key)}</Key>{facts}</Contents>")
    common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
    names = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    whole = f"<ListBucketResult {names}><IsTruncated>false</IsTruncated>{''.join(keys)}{common}</ListBucketResult>"
    return whole.encode()


async def _serve(folder: str, latency: str, rate: str) -> None:
    found = _Server(Path(folder), float(latency), float(rate))
    server: Any = await asyncio.start_server(found.talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
