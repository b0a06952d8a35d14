"""A Hub in a thread: the endpoints that ``huggingface_hub`` uses for an upload and a download, over real HTTP.

It keeps every request with its body, so that a test can say what has left the machine, and it fails when asked to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_" + "OfMyOwnAndOfNobodyElse0"
USER = "me"


@dataclass
class Request:
    method: str
    path: str
    body: bytes
    token: str | None


@dataclass
class Fault:
    """Answers with ``status`` (0: the connection is cut) where ``pattern`` is found in ``METHOD path``, ``times`` times."""

    pattern: str
    status: int
    times: int = 10**9
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    repository: str
    revision: str
    message: str
    added: dict[str, bytes]
    deleted: list[str]


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def sha(self, revision: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[revision].items())).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.branches.items():
            if revision in (name, self.sha(name)):
                return files
        return None


class FakeHub:
    """``repositories`` by full name; ``commits`` and ``requests`` in order; ``blobs`` of large files by sha256."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.commits: list[Commit] = []
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.blobs: dict[str, bytes] = {}
        self.who: dict[str, Any] = {
            "name": USER,
            "orgs": [{"name": "team"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """For a process of its own."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip

    @property
    def bodies(self) -> bytes:
        """Everything that was sent, with what base64 hides."""
        return b"\n".join(body for request in self.requests for body in (request.body, *_decoded(request.body)))

    def files(self, repository: str, revision: str = "main") -> list[str]:
        return sorted(self.repositories[repository].branches[revision])

    def text(self, repository: str, name: str, revision: str = "main") -> str:
        return self.repositories[repository].branches[revision][name].decode()

    def sent(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]


def _decoded(body: bytes) -> Iterator[bytes]:
    for content in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]*)"', body):
        yield base64.b64decode(content)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization") or ""
        request = Request(self.command, path, body, authorization.removeprefix("Bearer ") or None)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next(
                (f for f in self.hub.faults if f.times and re.search(f.pattern, f"{self.command} {path}")), None
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == 0:
            self.close_connection = True
            self.connection.close()
        elif fault is not None:
            self._send(fault.status, {"error": "out of order"}, fault.headers)
        elif request.token != TOKEN and not path.startswith("/lfs/") and not self._is_public(path):
            self._send(401, {"error": "Invalid username or password."})
        else:
            with self.hub.lock:
                self._route(request)

    def _is_public(self, path: str) -> bool:
        return self.command in ("GET", "HEAD") and any(
            not repository.private and name in path for name, repository in self.hub.repositories.items()
        )

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("transfer-encoding") or ""):
            pieces = []
            while size := int(self.rfile.readline().strip(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        data = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._send(404, {"error": "not found"}, {"X-Error-Code": code})

    # ------------------------------------------------------------------------------------------------- the endpoints

    def _route(self, request: Request) -> None:
        path, hub = request.path, self.hub
        if path == "/api/whoami-v2":
            return self._send(200, hub.who)
        if path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            hub.blobs[found[1]] = request.body
            return self._send(200, {})
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(request.body))
        if path.startswith("/api/datasets/"):  # a repository of its own, also where a model has the same name
            path = f"/api/models/datasets:{path.removeprefix('/api/datasets/')}"
        if path.startswith("/datasets/"):
            path = f"/datasets:{path.removeprefix('/datasets/')}"
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path):
            return self._repository(request, *found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        return self._missing("EntryNotFound")

    def _create(self, values: dict[str, Any]) -> None:
        name = f"{values.get('organization') or USER}/{values['name']}"
        prefix = "datasets/" if values.get("type") == "dataset" else ""
        name, url = f"{prefix.replace('/', ':')}{name}", f"{prefix}{name}"
        there = name in self.hub.repositories
        if not there:
            self.hub.repositories[name] = Repository(private=values.get("visibility") != "public")
        self._send(409 if there else 200, {"url": f"{self.hub.endpoint}/{url}"})

    def _batch(self, values: dict[str, Any]) -> None:
        objects = []
        for entry in values["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.hub.blobs else {**entry, "actions": actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _repository(
        self, request: Request, name: str, what: str | None, revision: str | None, rest: str | None
    ) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        if what == "branch":
            repository.branches.setdefault(str(revision), dict(repository.branches["main"]))
            return self._send(200, {})
        files = repository.files(revision or "main")
        if files is None:
            return self._missing("RevisionNotFound")
        if what == "preupload":
            return self._preupload(json.loads(request.body), files)
        if what == "commit":
            return self._commit(request.body, name, str(revision), files)
        if what == "tree":
            inside = [path for path in sorted(files) if not rest or path.startswith(f"{rest}/")]
            if rest and not inside:
                return self._missing("EntryNotFound")
            return self._send(200, [_entry(path, files[path]) for path in inside])
        branch = next(key for key, value in repository.branches.items() if value is files)
        return self._send(
            200,
            {
                "_id": "1", "id": name.removeprefix("datasets:"),
                "modelId": name, "private": repository.private, "sha": repository.sha(branch),
                "siblings": [{"rfilename": path} for path in sorted(files)], "tags": [], "downloads": 0,
                "cardData": _metadata(files.get("README.md", b"").decode()),
            },
        )  # fmt: skip

    def _preupload(self, values: dict[str, Any], files: dict[str, bytes]) -> None:
        answers = []
        for file in values["files"]:
            path = file["path"]
            large = path.endswith((".safetensors", ".png"))
            oid = _oid(path, files[path]) if path in files else None
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._send(200, {"files": answers})

    def _commit(self, body: bytes, name: str, revision: str, files: dict[str, bytes]) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        commit = Commit(name, revision, lines[0]["value"]["summary"], {}, [])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                commit.added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                commit.added[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                commit.deleted.append(value["path"])
        for path in commit.deleted:
            files.pop(path)
        files.update(commit.added)
        self.hub.commits.append(commit)
        oid = self.hub.repositories[name].sha(revision)
        self._send(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.endpoint}/{name.replace('datasets:', 'datasets/')}/commit/{oid}",
            },
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        files = repository.files(revision)
        if files is None:
            return self._missing("RevisionNotFound")
        if path not in files:
            return self._missing("EntryNotFound")
        branch = next(key for key, value in repository.branches.items() if value is files)
        headers = {"ETag": f'"{_oid(path, files[path])}"', "X-Repo-Commit": repository.sha(branch)}
        return self._send(200, files[path], headers)


def _metadata(card: str) -> Any:
    parts = card.split("---")
    return yaml.safe_load(parts[1]) if len(parts) > 2 else None


def _oid(path: str, data: bytes) -> str:
    if path.endswith((".safetensors", ".png")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
    if path.endswith((".safetensors", ".png")):
        entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[FakeHub]:
    """A Hub that this process, too, takes for the real one; nobody waits between two tries."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from dts_hf.hub import faults

    with FakeHub().running() as hub:
        for name, value in {
            "ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name, value in hub.environment(home).items():
            monkeypatch.setenv(name, value)
        for module in (http, faults):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        close_session()
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's own way to send a file
        try:
            yield hub
        finally:
            close_session()
