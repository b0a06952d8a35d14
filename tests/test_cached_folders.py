"""The folder of a cache: nothing that is in it is lost to a command that fails, and nothing of somebody else's at all."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dts_hf.errors import UserError
from dts_hf.language_modeling import caching
from dts_hf.language_modeling.caching import CacheOptions
from dts_hf.teachers.cached.folder import held
from tests.support.cached_runs import cache, invoke
from tests.support.recipes import recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def written(workplace) -> Path:
    cache()
    Path("recipe.yaml").write_text(recipe().to_yaml())
    return Path("states")


@pytest.mark.parametrize(
    "wrong",
    [
        ["data.train=nowhere.jsonl"],
        ["teacher.model=nowhere"],
        ["--compact", "3"],
        ["--compact", "1000000"],
        ["data.max_length=8"],
    ],
    ids=" ".join,
)
def test_a_refused_overwrite_leaves_the_old_cache(written, wrong) -> None:
    before = contents(written)
    done = invoke("cache-teacher", "recipe.yaml", "--output", written, "--overwrite", *wrong)
    assert done.exit_code == 2, done.output
    assert contents(written) == before


def test_a_full_disk_leaves_the_old_cache(written, monkeypatch) -> None:
    """What the old one takes will be free; what the head and the index take is counted."""
    before = contents(written)
    room = sum(map(len, before.values()))
    usage = shutil.disk_usage(written)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage._replace(free=0))
    monkeypatch.setattr(caching, "own_bytes", lambda _: room // 2)
    with pytest.raises(UserError, match="--output: the cache takes"):
        cache(options=CacheOptions(overwrite=True))
    assert contents(written) == before
    monkeypatch.setattr(caching, "own_bytes", lambda _: 2 * room)
    cache(options=CacheOptions(overwrite=True))


def test_a_folder_of_somebody_else_is_left_alone(written) -> None:
    made = {
        "site": {"manifest.json": '{"my": "web app"}'},
        "head": {"head.safetensors": "my head"},
        "named": {"states-mine.safetensors": "my own data"},
        "run": {"recipe.yaml": "student: {}", "log.jsonl": ""},
        "temporary": {".notes.tmp": "mine", "notes.txt": "mine"},
    }
    for name, files in made.items():
        Path(name).mkdir()
        for file, text in files.items():
            (Path(name) / file).write_text(text)
    Path("shards").mkdir()
    save_file({"a": torch.zeros(1)}, "shards/states-00000.safetensors")
    Path("linked").mkdir()
    (Path("linked") / "manifest.json").symlink_to(written.resolve() / "manifest.json")
    for name in (*made, "shards", "linked"):
        before = contents(Path(name))
        for more in ([], ["--overwrite"]):
            done = invoke("cache-teacher", "recipe.yaml", "--output", name, *more)
            assert done.exit_code == 2 and f"--output: {name}/" in done.output, done.output
            assert contents(Path(name)) == before


def test_hidden_files_and_the_card_stay(written) -> None:
    for name in (".notes.tmp", "README.md"):
        (written / name).write_text("mine")
    (written / ".index.safetensors.77-0a0b0c0d.tmp").write_text("of a killed process")
    before = contents(written)
    cache(options=CacheOptions(overwrite=True))
    assert {*before} - {*contents(written)} == {".index.safetensors.77-0a0b0c0d.tmp"}
    assert (written / ".notes.tmp").read_text() == (written / "README.md").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_said_first(written) -> None:
    Path("file").write_text("x")
    Path("dangling").symlink_to("nowhere")
    Path("data.jsonl").write_text("")
    for output, said in (("file", "a file"), ("file/below", "a file"), ("dangling", "a link to nothing")):
        done = invoke("cache-teacher", "recipe.yaml", "--output", output, "data.train=nowhere.jsonl")
        assert done.exit_code == 2 and f"is {said}, expected a folder" in " ".join(done.output.split()), done.output
    done = invoke("train", "recipe.yaml", "teacher.kind=cached", "teacher.cache=file")
    assert done.exit_code == 2 and "file: is a file, expected a folder" in " ".join(done.output.split()), done.output


def test_two_writers_do_not_share_a_folder(written) -> None:
    before = contents(written)
    with held(written):
        done = invoke("cache-teacher", "recipe.yaml", "--output", written, "--overwrite")
    assert done.exit_code == 2 and "another process is writing the cache states" in " ".join(done.output.split())
    assert contents(written) == before
    found: list[str] = []
    started = threading.Barrier(2)

    def write() -> None:
        started.wait()
        try:
            with held(Path("new")):
                started.wait()
                started.wait()
        except UserError as error:
            found.append(str(error))
            started.wait()
            started.wait()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 1 and "another process" in found[0]
    assert not Path("new").exists()  # nothing was written into it
