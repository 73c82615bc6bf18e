"""A stand-in for the Hub of Hugging Face on loopback: the HTTP calls that huggingface_hub makes to write a repository.

Large files go by Git LFS to another port, as they go to another host in truth; half of them in parts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, USER = "hf_secret_of_the_test", "me"
LARGE, PART = 100_000, 1_500_000


@dataclass
class Repository:
    """The files of each branch by path, with their ids; the messages of all commits."""

    private: bool
    branches: dict[str, dict[str, str]] = field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in has, what it was asked, and how it misbehaves."""

    endpoint: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: dict[str, set[str | None]] = field(default_factory=dict)
    refuse_uploads_after: int | None = None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers."""
        path = path.partition("?")[0]
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": USER, "orgs": [{"name": "org"}]}, {}
        if path == "/api/validate-yaml":
            errors = [{"message": one} for one in wrong_metadata(json.loads(body)["content"])]
            return 400 if errors else 200, {"errors": errors, "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(**json.loads(body))
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?(?:/(\w+)(?:/([^/]+))?)?", path
        )
        assert found, path
        name, action, revision = found.groups()
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        repository = self.repositories[name]
        if action in (None, "revision"):
            return 200, {"id": name, "sha": _sha(repository), "private": repository.private, "siblings": []}, {}
        if action == "refs":
            listed = [
                {"name": one, "ref": f"refs/heads/{one}", "targetCommit": _sha(repository)}
                for one in repository.branches
            ]
            return 200, {"branches": listed, "tags": [], "converts": []}, {}
        if action == "batch":
            return 200, {"transfer": "multipart", "objects": list(map(self._upload, json.loads(body)["objects"]))}, {}
        return getattr(self, f"_{action}")(name, repository.branches[str(revision)], body)  # type: ignore[no-any-return]

    def _create(self, name: str, organization: str, **facts: Any) -> tuple[int, Any, dict[str, str]]:
        full = f"{organization}/{name}"
        if organization not in (USER, "org"):
            return 403, {"error": f"You don't have the rights to create a model under {organization}"}, {}
        if full in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{full}"}, {}
        self.repositories[full] = Repository(private=facts.get("visibility") == "private" or bool(facts.get("private")))
        return 200, {"url": f"{self.endpoint}/{full}"}, {}

    def _preupload(self, name: str, files: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(body)["files"]
        modes = ["lfs" if one["size"] > LARGE else "regular" for one in asked]
        return 200, {"files": [
            {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": files.get(one["path"])}
            for one, mode in zip(asked, modes, strict=True)
        ]}, {}  # fmt: skip

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        if oid in self.objects:
            return {"oid": oid, "size": size}
        places = {str(number + 1): f"{self.storage}/{oid}/{number}" for number in range(-(-size // PART))}
        header = {"chunk_size": str(PART), **places} if len(places) > 1 else {}
        href = f"{self.endpoint}/complete/{oid}" if header else places["1"]
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}}}

    def _commit(self, name: str, files: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        for kind, value in ((one["key"], one["value"]) for one in map(json.loads, body.splitlines())):
            if kind == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.objects[oid], files[value["path"]] = content, oid
            elif kind == "lfsFile":
                assert value["oid"] in self.objects, "a commit names a file that was not uploaded"
                files[value["path"]] = value["oid"]
            else:
                message = value["summary"]
        commits = self.repositories[name].commits
        commits.append((hashlib.sha1(body).hexdigest(), message))
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/x", "commitOid": commits[-1][0]}, {}

    def store(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """PUT of a large file, or a part of it."""
        if self.refuse_uploads_after is not None:
            self.refuse_uploads_after -= 1
            if self.refuse_uploads_after < 0:
                return 400, {"error": "the upload has expired"}, {}
        oid, _, number = path[1:].partition("/")
        self.parts[f"{oid}/{number}"] = body
        if len(body) < PART and number == "0":
            self.objects[oid] = body
        return 200, {}, {"ETag": f'"{number}"'}

    def complete(self, oid: str) -> tuple[int, Any, dict[str, str]]:
        """The end of an upload in parts."""
        whole = b"".join(self.parts[f"{oid}/{n}"] for n in range(sum(key.startswith(oid) for key in self.parts)))
        assert hashlib.sha256(whole).hexdigest() == oid
        self.objects[oid] = whole
        return 200, {}, {}

    def content(self, name: str, path: str, branch: str = "main") -> bytes:
        """A file of a repository."""
        return self.objects[self.repositories[name].branches[branch][path]]


def wrong_metadata(card: str) -> list[str]:
    """What the Hub would find wrong with the metadata of a card, as its documentation of model cards says."""
    from dimefm.export.licences import LICENCES

    found = re.match(r"\s*---\n(.*?)\n---", card, re.DOTALL)
    head = yaml.safe_load(found[1]) if found else {}
    wrong = [] if head.get("license", "mit") in LICENCES else ['"license" must be one of a list']
    for index in head.get("model-index", []):
        for result in index["results"]:
            values = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
            values += tuple(value for one in result["metrics"] for value in (one["type"], one["value"]))
            wrong += [f'"model-index" has {value!r}' for value in values if value in (None, "")]
    return wrong


def _sha(repository: Repository) -> str:
    return repository.commits[-1][0] if repository.commits else "0" * 40


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that answers."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self._body()
            port = "api" if self.server is servers[0] else "storage"
            hub.requests.append(f"{self.command} {self.path}")
            token = self.headers["Authorization"]
            hub.tokens.setdefault(port, set()).add(token)
            if port == "storage":
                status, answer, headers = hub.store(self.path, body)
            elif self.path.startswith("/complete/"):
                status, answer, headers = hub.complete(self.path.rpartition("/")[2])
            elif token != f"Bearer {TOKEN}":
                status, answer, headers = 401, {"error": "Invalid credentials in Authorization header"}, {}
            else:
                status, answer, headers = hub.answer(self.command, self.path, body)
            sent = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(sent))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _do

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def log_message(self, *_: Any) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{one.server_port}" for one in servers)
    threads = [threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}) for one in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for one, thread in zip(servers, threads, strict=True):
            one.shutdown()
            thread.join()
            one.server_close()
