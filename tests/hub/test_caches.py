"""``dts-hf push-cache`` and ``pull-cache`` over HTTP against a Hub in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.files import file_sha256
from dts_hf.teachers.cached.layout import MANIFEST
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.compact import CompactFormat, ErrorAt
from tests.support.cached import cache_of, edit_manifest
from tests.support.fake_hub import TOKEN, FakeHub, Fault, fake_hub
from tests.support.tiny import TINY_VOCAB, tiny_llama
from tests.support.trainers import ROWS, encoded, trainer_for


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return cache_of(
        tmp_path / "secretplace" / "mine", tiny_llama(seed=1), name=str(tmp_path / "teacher"), shard_bytes=6000
    )


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_goes_there_and_back(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    done = invoke("push-cache", cache)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"{hub.endpoint}/datasets/me/mine" and "the repository is private" in done.output
    assert [*hub.repositories] == ["datasets:me/mine"]
    assert {*hub.files("datasets:me/mine")} == {*files(cache), "README.md"}
    assert MANIFEST not in hub.commits[0].added and MANIFEST in hub.commits[-1].added  # no manifest: unfinished
    pulled = invoke("pull-cache", "me/mine", tmp_path / "back")
    assert pulled.exit_code == 0, pulled.output
    assert "16 rows in float32" in pulled.stdout and "teacher: teacher (float32)" in pulled.stdout
    back = files(tmp_path / "back")
    card = back.pop("README.md").decode()
    assert back == files(cache) and "kind: cached" in card
    trainer = trainer_for(tmp_path / "run", teacher=CachedTeacher(tmp_path / "back"))
    trainer.train()


def test_neither_rows_nor_paths_nor_tokens_are_sent(tmp_path: Path, hub: FakeHub) -> None:
    rows = [{**row, "id": f"patient-{n}", "output": f"secret {row['output']}"} for n, row in enumerate(ROWS)]
    folder = tmp_path / "secretplace" / "mine"
    cache_of(folder, tiny_llama(seed=1), encoded(rows), name=str(tmp_path / "teacher"))
    assert invoke("push-cache", folder).exit_code == 0
    private = [TOKEN, str(tmp_path), "secretplace", "patient", "secret yes", "Say it"]
    assert not [text for text in private if text.encode() in hub.bodies]
    tokens = encoded(rows).ids[3]
    assert tokens.tobytes() not in hub.bodies and tokens[:8].tobytes() not in hub.bodies


def test_an_upload_that_broke_off_is_no_cache(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    hub.faults.append(Fault("POST /lfs|PUT /lfs", 0, 10**9))
    done = invoke("push-cache", cache)
    assert done.exit_code == 69 and "retry: dts-hf push-cache" in done.output
    pulled = invoke("pull-cache", "me/mine", tmp_path / "back")
    assert pulled.exit_code == 2 and "holds no manifest.json" in pulled.output
    hub.faults.clear()
    assert invoke("push-cache", cache).exit_code == 0
    assert invoke("pull-cache", "me/mine", tmp_path / "back").exit_code == 0


def test_stale_shards_go(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    invoke("push-cache", cache)
    fewer = cache_of(tmp_path / "fewer", tiny_llama(seed=1))
    assert invoke("push-cache", fewer, "--repo", "me/mine").exit_code == 0
    assert {*hub.files("datasets:me/mine")} == {*files(fewer), "README.md"}


def test_a_damaged_cache_is_neither_sent_nor_taken(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    invoke("push-cache", cache)
    stored = hub.repositories["datasets:me/mine"].branches["main"]
    shard = bytearray(stored["states-00000.safetensors"])
    shard[-3] ^= 1
    stored["states-00000.safetensors"] = bytes(shard)
    pulled = invoke("pull-cache", "me/mine", tmp_path / "back")
    assert pulled.exit_code == 2 and "states-00000.safetensors: sha256" in pulled.output
    (cache / "states-00000.safetensors").write_bytes(bytes(shard))
    before = len(hub.commits)
    done = invoke("push-cache", cache)
    assert done.exit_code == 2 and "states-00000.safetensors: sha256" in done.output and len(hub.commits) == before


def test_what_is_no_cache(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    assert "no such folder" in invoke("push-cache", tmp_path / "nowhere").output
    assert "--repo: got 'a/b/c'" in invoke("push-cache", cache, "--repo", "a/b/c").output
    assert "404" in invoke("pull-cache", "me/nothing", tmp_path / "back").output
    edit_manifest(cache, lambda manifest: manifest["made_with"].update(device="hf_" + "a" * 34))
    done = invoke("push-cache", cache)
    assert done.exit_code == 2 and "holds a Hugging Face token" in done.output


def test_a_compact_cache_goes_there_and_back(tmp_path: Path, hub: FakeHub) -> None:
    """It has no head, and its card says what was lost."""
    form, error = CompactFormat(40, TINY_VOCAB), ErrorAt(0.5, 0.97, 0.01, 0.02, 100)
    cache = cache_of(tmp_path / "small", tiny_llama(seed=1), compact=form, errors=[error])
    done = invoke("push-cache", cache)
    assert done.exit_code == 0, done.output
    assert {*hub.files("datasets:me/small")} == {*files(cache), "README.md"}
    pulled = invoke("pull-cache", "me/small", tmp_path / "back")
    assert pulled.exit_code == 0, pulled.output
    back = files(tmp_path / "back")
    card = back.pop("README.md").decode()
    assert back == files(cache) and "40 of 320 a label in float16" in card and "mass 0.9700" in card
    assert "head.safetensors" not in card


def test_a_manifest_uploads_no_file_but_its_own(tmp_path: Path, hub: FakeHub, cache: Path) -> None:
    """What it names may have been written by somebody else: neither a path, nor a link, nor a file beside it goes out."""
    private = tmp_path / "private.txt"
    private.write_text("PRIVATE KEY")
    (cache / "beside.txt").write_text("PRIVATE KEY")
    digest = file_sha256(private)
    for name in (str(private), "beside.txt", "../../private.txt"):
        edit_manifest(cache, lambda manifest, name=name: manifest["files"].update({name: digest}))
        done = invoke("push-cache", cache)
        assert done.exit_code == 2 and "files: got " in done.output, done.output
        edit_manifest(cache, lambda manifest, name=name: manifest["files"].pop(name))
    edit_manifest(cache, lambda manifest: manifest["shards"][0].update(file="../mine/states-00000.safetensors"))
    done = invoke("push-cache", cache)
    assert done.exit_code == 2 and "expected states-00000.safetensors" in done.output
    edit_manifest(cache, lambda manifest: manifest["shards"][0].update(file="states-00000.safetensors"))
    (cache / "index.safetensors").rename(tmp_path / "moved")
    (cache / "index.safetensors").symlink_to(tmp_path / "moved")
    done = invoke("push-cache", cache)
    assert done.exit_code == 2 and "index.safetensors: is a link" in done.output
    assert not hub.repositories and b"PRIVATE KEY" not in hub.bodies
