"""Downloads of data_prep: continued after a break, never mixed, complete or absent; the Hub's commit is recorded."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import read_manifest


@pytest.fixture(scope="module")
def fetcher() -> ModuleType:
    return importlib.import_module("dts_hf.data_prep.download")


class Server(ThreadingHTTPServer):
    """Serves ``files``; the n-th answer ends after ``breaks[n]`` bytes without a word."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.requests: list[str | None] = []
        self.etag: str | None = '"one"'
        self.ranges = True
        self.statuses: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        if self.server.statuses and (status := self.server.statuses.pop(0)) != 200:
            self.send_error(status)
            return
        content = self.server.files.get(self.path.partition("?")[0].lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        # Without If-Range, or with an empty one, a server sends the range whatever became of the file.
        start, matches = 0, self.headers.get("If-Range") in (None, "", self.server.etag)
        if asked and self.server.ranges and matches:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.breaks.pop(0) if self.server.breaks else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(fetcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetcher, "PAUSE_SECONDS", 0.0)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


CONTENT = random.Random(1).randbytes(300_000)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_broken_download_goes_on_where_it_stopped(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    server.files["file"], server.breaks = CONTENT, [100_000, 1, 0, 70_000]
    target = fetcher.download(server.url + "file", tmp_path / "cache" / "file", hashlib.sha256(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT and leftovers(target.parent) == ["file"]
    assert server.requests == [None, "bytes=100000-", "bytes=100001-", "bytes=100001-", "bytes=170001-"]


def test_the_next_run_goes_on(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    server.files["file"], server.breaks = CONTENT, [50_000, *[0] * 5]
    with pytest.raises(UserError, match=r"file: the download broke after 50,000 bytes .* run the command again"):
        fetcher.download(server.url + "file", tmp_path / "file")
    assert leftovers(tmp_path) == ["file.part", "file.part.json"]  # no file under its own name
    server.requests.clear()
    assert fetcher.download(server.url + "file", tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == ["bytes=50000-"] and leftovers(tmp_path) == ["file"]


@pytest.mark.parametrize("how", ["another version", "no ranges", "no validator"])
def test_parts_of_two_versions_are_never_glued(fetcher: ModuleType, server: Server, tmp_path: Path, how: str) -> None:
    server.files["file"], server.breaks = CONTENT, [50_000, *[0] * 5]
    if how == "no validator":
        server.etag = None
    with pytest.raises(UserError):
        fetcher.download(server.url + "file", tmp_path / "file")
    other = CONTENT[::-1]
    server.files["file"], server.breaks = other, []
    server.etag = '"two"' if how == "another version" else server.etag
    server.ranges = how != "no ranges"
    assert fetcher.download(server.url + "file", tmp_path / "file").read_bytes() == other


def test_a_part_that_is_already_whole(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    server.files["file"] = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.part.json").write_text(json.dumps({"validator": '"one"'}))
    assert fetcher.download(server.url + "file", tmp_path / "file").read_bytes() == CONTENT
    (tmp_path / "file").rename(tmp_path / "file.part")  # longer than the server's file: not the same one
    (tmp_path / "file.part.json").write_text(json.dumps({"validator": '"one"'}))
    server.files["file"] = CONTENT[:-1]
    assert fetcher.download(server.url + "file", tmp_path / "file").read_bytes() == CONTENT[:-1]


def test_wrong_checksum_leaves_nothing(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    server.files["file"] = CONTENT
    with pytest.raises(UserError, match=r"/file: wrong checksum: sha256 [0-9a-f]{64}, expected 0{64}"):
        fetcher.download(server.url + "file", tmp_path / "file", "0" * 64)
    assert leftovers(tmp_path) == []


def test_answers_of_the_server(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    server.files["file"] = CONTENT
    with pytest.raises(UserError, match="the server answers 404"):
        fetcher.download(server.url + "nothing", tmp_path / "file")
    server.statuses = [503, 200]
    assert fetcher.download(server.url + "file", tmp_path / "file").read_bytes() == CONTENT
    server.statuses = [500] * 5
    with pytest.raises(UserError, match=r"broke after 0 bytes \(500"):
        fetcher.download(server.url + "file", tmp_path / "second")
    assert leftovers(tmp_path) == ["file"]


def test_a_set_from_a_url(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    vicuna = importlib.import_module("dts_hf.data_prep.vicuna")
    rows = [{"instruction": f"Do {k}", "output": "Done"} for k in range(80)]
    server.files["folder/valid.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    server.breaks = [1_000]
    url = server.url + "folder/valid.jsonl?token=secret"
    assert vicuna.main(["--source", url, "--output", str(tmp_path)]) == 0
    manifest = read_manifest(tmp_path / "vicuna")
    assert manifest["source"]["name"] == server.url + "folder/valid.jsonl" and "secret" not in json.dumps(manifest)
    assert manifest["source"]["files"][0]["sha256"] == hashlib.sha256(server.files["folder/valid.jsonl"]).hexdigest()
    server.requests.clear()
    assert vicuna.main(["--source", url, "--output", str(tmp_path)]) == 0
    assert server.requests == []  # what is there is not fetched again


def test_task_files_from_a_base_url(fetcher: ModuleType, server: Server, tmp_path: Path) -> None:
    script = importlib.import_module("dts_hf.data_prep.s_ni")
    server.files["repo/splits/default/test_tasks.txt"] = b"task1_x\n"
    task = {"Definition": ["Do."], "Instances": [{"id": "task1-a", "input": "i", "output": ["one and a half", "two"]}]}
    server.files["repo/tasks/task1_x.json"] = json.dumps(task).encode()
    options = ["--output", str(tmp_path), "--tokenizer", "none", "--allow-other-counts"]
    assert script.main(["--source", server.url + "repo/", *options]) == 0
    assert json.loads((tmp_path / "s_ni" / "test.jsonl").read_text())["output"] == ["one and a half", "two"]
    assert [file["name"] for file in read_manifest(tmp_path / "s_ni")["source"]["files"]] == [
        "splits/default/test_tasks.txt", "tasks/task1_x.json",
    ]  # fmt: skip


def test_the_hub(fetcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "valid.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    asked = []

    def fake(repo: str, name: str, repo_type: str, revision: str | None) -> str:
        asked.append((repo, name, repo_type, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    source = fetcher.Source("some/data@main", tmp_path / "cache")
    assert source.find("raw.jsonl") is None
    assert source.get("raw.jsonl", "valid.jsonl") == folder / "valid.jsonl"
    assert asked[0] == ("some/data", "raw.jsonl", "dataset", "main")
    assert source.describe()["name"] == "some/data" and source.describe()["revision"] == commit
    with pytest.raises(UserError, match=r"there is no raw\.jsonl or other\.jsonl in it"):
        source.get("raw.jsonl", "other.jsonl")

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match=r"valid\.jsonl cannot be fetched from the Hub: .*--source PATH or URL"):
        fetcher.Source("some/data", tmp_path).get("valid.jsonl")
