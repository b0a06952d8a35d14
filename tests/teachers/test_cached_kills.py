"""A cache that was killed while it was written, by any number of processes, has the same bytes in the end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import CacheOptions, cache_teacher
from dts_hf.recipe.loading import load_recipe
from dts_hf.teachers.cached.layout import MANIFEST
from dts_hf.teachers.cached.reader import StateCache
from tests.support.cached import cache_of
from tests.support.launching import WORKERS, command, environment, launch
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.warm import run_warm

OPTIONS = {"shard_bytes": 1, "batch_tokens": 64}  # a shard a row


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder: Path) -> None:
    torch.set_num_threads(1)
    cache_of(folder, tiny_llama(seed=1), **OPTIONS)


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_it_writes(tmp_path, seed):
    """SIGKILL at five random moments of a run, one after the other; what is there already is kept."""
    draw = random.Random(seed)
    began = time.monotonic()
    write(tmp_path / "whole")
    seconds = time.monotonic() - began
    folder = tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    kept: list[int] = []
    for _ in range(5):
        writer = context.Process(target=write, args=(folder,))
        writer.start()
        time.sleep(draw.uniform(0, seconds))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        kept.append(len(list(folder.glob("states-*"))))
        if not (folder / MANIFEST).is_file():
            with pytest.raises(UserError):
                StateCache(folder)
    assert kept == sorted(kept)  # nothing that was finished is lost
    write(folder)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.fixture
def recipe_file(workplace: Path) -> str:
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    Path("recipe.yaml").write_text(recipe(student={"model": "student"}).to_yaml())
    return "recipe.yaml"


def test_two_processes_write_the_bytes_of_one(recipe_file, tmp_path):
    cache_teacher(load_recipe(recipe_file), Path("by1"), CacheOptions(shard_bytes=4000, batch_tokens=256))
    done = run_warm(WORKERS / "cache_worker.py", 2, [recipe_file, "by2"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = contents(Path("by1")), contents(Path("by2"))
    assert one.keys() == two.keys() and len(one) >= 6
    assert one == two
    assert json.loads(one[MANIFEST])["rows"] == 17


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_the_command_killed_ten_times(recipe_file, tmp_path, world, record_property):
    """``kill -9`` of all its processes at 10 random moments between its first sign of life and its end."""
    worker = WORKERS / "cache_worker.py"
    began = time.monotonic()
    assert launch(worker, world, [recipe_file, "whole"], cwd=tmp_path).returncode == 0
    seconds, draw = time.monotonic() - began, random.Random(world)
    for _ in range(10):
        process = subprocess.Popen(
            command(worker, world, [recipe_file, "killed"]), env=environment(), cwd=tmp_path, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(0.3 * seconds, 1.1 * seconds))
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()
    assert launch(worker, world, [recipe_file, "killed"], cwd=tmp_path).returncode == 0
    assert contents(Path("killed")) == contents(Path("whole"))
    record_property("campaign", "cache-teacher: kill -9 at 10 random moments, the same bytes in the end")


def kill_tree(pid: int) -> None:
    """Torchrun's workers lead sessions of their own, so a group is not enough."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else []:
        kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
