"""``teacher.kind: remote`` with a cache: no row is asked twice, whoever asks, and what a kill leaves is whole or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dts_hf.errors import RunError, UserError
from dts_hf.files import json_text, sealed
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.kept_answers import KeptAnswers
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.cached import cache_of
from tests.support.cached_runs import invoke, log_of, quick
from tests.support.daily import one_in
from tests.support.launching import WORKERS
from tests.support.recipes import recipe, write_rows
from tests.support.served import running, served_tiny
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, encoded, losses, trainer_for
from tests.support.warm import run_warm

LABELS = sum(encoded().target_counts)


@contextlib.contextmanager
def server(
    model: Any = None, then: Callable[[int], None] = lambda labels: None, name: str = "some/teacher"
) -> Iterator[tuple[str, list[int]]]:
    """A URL, and the labels of each question that came; ``then`` is called with them before it is answered."""
    asked: list[int] = []
    served = served_tiny(model, name)
    own = served.forward

    def forward(question: Any) -> Any:
        asked.append(question.labels)
        then(question.labels)
        return own(question)

    with running(dataclasses.replace(served, forward=forward)) as url:
        yield url, asked


def met(url: str, asked: list[int], folder: Path) -> RemoteTeacher:
    """The teacher, its self-test not counted."""
    teacher = RemoteTeacher(url, cache=folder)
    asked.clear()
    return teacher


def trained(folder: Path, teacher: Any, **more: Any) -> Any:
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
    trainer = trainer_for(folder, teacher=teacher, options={**options, **more.pop("options", {})}, **more)
    trainer.train()
    return trainer


def same_run(one: Any, other: Any) -> None:
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(other)), rtol=1e-6, atol=1e-6)
    weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in weights) < 1e-6


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*.rows"))


@pytest.mark.parametrize("workers", one_in(2, [2, 0]))
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_three_epochs_and_another_run_ask_once(tmp_path, packing, workers):
    options = {"packing": packing, "options": {"dataloader_num_workers": workers}}
    live = trained(tmp_path / "live", tiny_llama(seed=1, layers=3), **options)
    with server() as (url, asked):
        first = trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), **options)
        assert sum(asked) == LABELS
        again = trained(tmp_path / "again", met(url, asked, tmp_path / "kept"), **options)
        assert asked == []
    same_run(first, live)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_what_two_processes_were_answered_is_kept_for_one(tmp_path):
    with server() as (url, asked):
        done = run_warm(WORKERS / "remote_worker.py", 2, [tmp_path, url, "8", "remote", tmp_path / "kept"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / "0.json").read_text())["world"] == 2
        # 16 labels of each of two rows of the self-test, of two processes, padded and packed
        assert sum(asked) == LABELS + 2 * 2 * 2 * 16
        assert len(records(tmp_path / "kept")) >= 2
        alone = trained(tmp_path / "alone", met(url, asked, tmp_path / "kept"))
        assert asked == []
    same_run(alone, trained(tmp_path / "live", tiny_llama(seed=1, layers=3)))


@pytest.mark.parametrize("seed", range(4))
def test_what_a_kill_cuts_off_is_asked_again(tmp_path, seed):
    """Any number of bytes may be missing at the end of a file, for a process only ever appends to it."""
    with server() as (url, asked):
        live = trained(tmp_path / "live", tiny_llama(seed=1, layers=3))
        trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), options={"max_steps": 4})
        (path,) = records(tmp_path / "kept")
        whole = path.read_bytes()
        cut = random.Random(seed).randrange(len(whole))
        path.write_bytes(whole[:cut])
        again = met(url, asked, tmp_path / "kept")
        assert isinstance(again.asking, KeptAnswers)
        again.asking._look_again()
        kept = sum(place.labels for places in again.asking._places.values() for place in places)
        resumed = trained(tmp_path / "again", again)
        # Threads write in any order, so the cut may be in the first record
        assert sum(asked) == LABELS - kept > 0
        assert whole.startswith(path.read_bytes())  # somebody else's file is left as it is
        same_run(resumed, live)
        trained(tmp_path / "third", met(url, asked, tmp_path / "kept"), options={"max_steps": 4})
        assert asked == []


def test_a_flipped_bit_is_found_and_asked_again(tmp_path):
    with server() as (url, asked):
        live = trained(tmp_path / "live", tiny_llama(seed=1, layers=3))
        trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), options={"max_steps": 4})
        (path,) = records(tmp_path / "kept")
        content = bytearray(path.read_bytes())
        content[200] ^= 4
        path.write_bytes(content)
        again = trained(tmp_path / "again", met(url, asked, tmp_path / "kept"))
        assert 0 < sum(asked) < LABELS / 4
        same_run(again, live)
        trained(tmp_path / "third", met(url, asked, tmp_path / "kept"))
        assert asked == []  # the good one is found behind the bad one


def test_rows_that_nobody_has_asked_about_are_asked_alone(tmp_path):
    with server() as (url, asked):
        trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), rows=ROWS[:6], options={"max_steps": 2})
        assert sum(asked) == sum(encoded(ROWS[:6]).target_counts)
        trained(tmp_path / "all", met(url, asked, tmp_path / "kept"))
        assert sum(asked) == LABELS - sum(encoded(ROWS[:6]).target_counts)


def test_another_teacher_is_refused_by_its_name(tmp_path):
    with server() as (url, asked):
        trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), options={"max_steps": 1})
    with server(tiny_llama(seed=5, layers=3)) as (url, asked):
        with pytest.raises(
            UserError, match=r"teacher\.cache: .*answers\.json is of another teacher than the one at .*weights"
        ):
            RemoteTeacher(url, cache=tmp_path / "kept")
        finished = cache_of(tmp_path / "finished", tiny_llama(seed=1, layers=3))
        with pytest.raises(UserError, match=r"teacher\.cache: .*finished is of another teacher"):
            RemoteTeacher(url, cache=finished)


def test_a_folder_that_is_not_as_it_was_written_is_refused(tmp_path):
    with server() as (url, asked):
        trained(tmp_path / "first", met(url, asked, tmp_path / "kept"), options={"max_steps": 1})
        path = tmp_path / "kept" / "answers.json"
        good = json.loads(path.read_text())
        for content in (
            "{",
            "[]",
            json.dumps({**good, "format": 2}),
            json_text(sealed({"format": 1, "identity": {}})),
        ):
            path.write_text(content)
            with pytest.raises(UserError, match=r"answers\.json"):
                RemoteTeacher(url, cache=tmp_path / "kept")
        path.unlink()
        with pytest.raises(UserError, match=r"answers\.json is missing, and it alone says whose"):
            RemoteTeacher(url, cache=tmp_path / "kept")


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", "has states in bfloat16"), ("int8", "has states in int8")])
def test_a_finished_cache_that_has_lost_something_is_refused(tmp_path, dtype, said):
    folder = cache_of(tmp_path / "kept", tiny_llama(seed=1, layers=3), dtype=dtype)
    with server() as (url, _), pytest.raises(UserError, match=said):
        RemoteTeacher(url, cache=folder)


def test_a_finished_cache_is_read_and_what_it_lacks_is_kept_beside_it(tmp_path):
    folder = cache_of(tmp_path / "kept", tiny_llama(seed=1, layers=3), encoded(ROWS[:9]))
    with server() as (url, asked):
        first = trained(tmp_path / "first", met(url, asked, folder))
        assert sum(asked) == LABELS - sum(encoded(ROWS[:9]).target_counts)
        trained(tmp_path / "again", met(url, asked, folder))
        assert asked == []
    same_run(first, trained(tmp_path / "live", tiny_llama(seed=1, layers=3)))


class FullDisk:
    """A file that takes seven bytes more."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 7

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left, taken = 0, self.left
        return int(self.file.write(bytes(content[:taken])))


def test_a_full_disk_ends_the_run_and_leaves_whole_records(tmp_path):
    with server() as (url, asked):
        teacher = met(url, asked, tmp_path / "kept")
        trained(tmp_path / "first", teacher, options={"max_steps": 2})
        (path,) = records(tmp_path / "kept")
        whole = path.read_bytes()
        teacher.asking._own = FullDisk(teacher.asking._own)
        with pytest.raises(OSError, match="No space left"):
            trained(tmp_path / "again", teacher)
        assert path.read_bytes() == whole


def test_a_run_that_is_killed_has_kept_what_it_was_answered(tmp_path):
    """By SIGKILL, while a question is open."""
    killed: list[int] = []

    def kill(labels: int) -> None:
        if sum(asked) > LABELS / 2 and not killed:
            killed.append(labels)
            process.kill()
            process.wait()

    with server(then=kill) as (url, asked):
        words = [str(WORKERS / "remote_worker.py"), str(tmp_path), url, "50", "remote", str(tmp_path / "kept")]
        environment = {**os.environ, "PYTHONPATH": str(WORKERS.parents[1])}
        process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE)
        assert process.wait(120) == -signal.SIGKILL, process.stderr and process.stderr.read().decode()[-2000:]
        told, live = sum(asked), trained(tmp_path / "live", tiny_llama(seed=1, layers=3))
        resumed = trained(tmp_path / "again", met(url, asked, tmp_path / "kept"))
        assert 0 < sum(asked) <= LABELS - (told - 2 * 16 - killed[0])  # but for the self-test and the open question
        same_run(resumed, live)


def test_answers_that_do_not_fit_the_head_name_the_folder_that_has_them(tmp_path):
    with server() as (url, asked):
        teacher = met(url, asked, tmp_path / "kept")
        teacher._head = dataclasses.replace(teacher.head, weight=teacher.head.weight.flip(0))
        with pytest.raises(RunError, match=r"self-test failed.*Remove .*kept as well"):
            trained(tmp_path / "run", teacher)


# ------------------------------------------------------------------------------------------------------------ by recipe


@pytest.fixture
def student(workplace: Path) -> dict[str, str]:
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    return {"model": "student"}


def test_cache_teacher_finishes_what_a_run_has_kept(student):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("teacher").eval()
    live = quick(folder="live", student=student)
    with server(model, name="teacher") as (url, asked):
        remote = {"model": "teacher", "dtype": "float32", "kind": "remote", "url": url, "cache": "kept"}
        far = quick(remote, "far", student=student)
        torch.testing.assert_close(log_of(far, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)
        assert records(Path("kept"))
        told = RemoteTeacher(url, cache="kept")
        key = next(iter(_all_keys(told)))
        before = told.asking._kept(key, _all_keys(told)[key])
        values = recipe(student=student, teacher=remote)
        Path("recipe.yaml").write_text(values.to_yaml())
        asked.clear()
        done = invoke("cache-teacher", "recipe.yaml")
        assert done.exit_code == 0, done.output
        labels = StateCache("kept").manifest.labels
        # The self-test, and the held-out rows, which this run has not looked at
        assert sum(asked) < labels
        assert not records(Path("kept")) and not Path("kept/answers.json").exists()
        cache = StateCache("kept")
        row = cache.find(key)
        assert before is not None and row is not None and torch.equal(cache.row(row), before.states)
        asked.clear()
        again = quick(remote, "again", student=student)
        assert sum(asked) == 2 * 16  # of the self-test
        torch.testing.assert_close(log_of(again, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)
    cached = quick(
        {"model": "teacher", "dtype": "float32", "kind": "cached", "cache": "kept"}, "cached", student=student
    )
    torch.testing.assert_close(log_of(cached, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)


def _all_keys(teacher: RemoteTeacher) -> dict[bytes, int]:
    teacher.asking._look_again()
    return {key: places[0].labels for key, places in teacher.asking._places.items()}


def test_a_folder_of_somebody_else_is_left_alone(student):
    Path("kept").mkdir()
    Path("kept/answers-0123456789abcdef.rows").write_bytes(b"mine")
    Path("kept/answers.json").write_text("{}")
    write_rows(Path("train.jsonl"), 0, 4)
    Path("recipe.yaml").write_text(recipe(student=student).to_yaml())
    done = invoke("cache-teacher", "recipe.yaml", "--output", "kept")
    assert done.exit_code == 2 and "answers.json" in done.output
    assert Path("kept/answers-0123456789abcdef.rows").read_bytes() == b"mine"
