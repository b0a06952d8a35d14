"""Starts of one run directory, several at a time: whoever holds the lock is never hurt, in any order of their stages."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dts_hf.errors import UserError
from dts_hf.runs import lock as locks
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import LOCK, holds, lock, unlock
from dts_hf.runs.start import find_start, open_run
from tests.support.daily import one_in
from tests.support.warm import fork_server
from tests.workers.start_worker import ARGS, STEPS, recipe, start

GATES = 17  # of a whole life


class Started:
    """A process that stands at a gate, or has ended."""

    def __init__(self, process: Any, gates: Connection) -> None:
        self.process, self.gates, self.pid = process, gates, process.pid
        self.gate: str | None = None
        self.outcome = ""
        self._receive()

    def _receive(self) -> None:
        assert self.gates.poll(60), f"nothing heard since {self.gate}"
        self.gate, outcome = self.gates.recv()
        if self.gate is None:
            self.outcome = outcome
            self.leave()

    def leave(self) -> None:
        """Wait for its end, and give back what a thousand starts would use up."""
        self.process.join(60)
        self.gates.close()
        self.process.close()
        self.gate = None

    def kill(self) -> None:
        if self.gate is not None:
            self.process.kill()
            self.leave()

    def step(self, count: int = 1) -> Started:
        """Let it pass so many gates, if it has so many to pass."""
        for _ in range(count):
            if self.gate is not None:
                self.gates.send("go")
                self._receive()
        return self

    def to(self, gate: str) -> Started:
        while self.gate != gate:
            assert self.gate is not None, f"{gate} is not reached: {self.outcome}"
            self.step()
        return self

    def end(self) -> str:
        while self.gate is not None:
            self.step()
        return self.outcome


Start = Callable[[Path, str], Started]


@pytest.fixture(scope="module")
def begin() -> Iterator[Start]:
    """Starts a process, forked from one that has everything imported, up to its first gate."""
    context = fork_server()
    started: list[Started] = []

    def make(folder: Path, how: str = "resume") -> Started:
        ours, theirs = context.Pipe()
        process = context.Process(target=start, args=(str(folder), how, theirs))
        process.start()
        theirs.close()
        started.append(Started(process, ours))
        return started[-1]

    yield make
    for one in started:
        one.kill()


def whole(run: Path) -> int:
    """Which process made the run, all of which is there, and nothing of another's."""
    assert sorted(os.listdir(run)) == [
        "data_manifest.json", "environment.json", "final", "final.json", "log.jsonl", "metrics.json", "recipe.yaml",
    ]  # fmt: skip
    process = json.loads((run / "metrics.json").read_text())["process"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "process": process} for step in range(STEPS)]
    assert (run / "final" / "weights").read_text() == str(process)
    return int(process)


def busy(outcome: str) -> bool:
    return outcome.startswith("refused: output.dir: another process is working on this run")


# ------------------------------------------------------------------------------------------------------ the four races


def test_a_life_has_so_many_stages(begin: Start, tmp_path: Path) -> None:
    life, count = begin(tmp_path / "x", "plain"), 0
    while life.gate is not None:
        life.step()
        count += 1
    assert count == GATES


def test_two_resumes_before_the_folder_is_there(begin: Start, tmp_path: Path) -> None:
    """The later one is refused; it used to remove the half-written student of the first, which then died."""
    run = tmp_path / "runs" / "x"
    first, second = begin(run, "resume"), begin(run, "resume")
    second.to("_make")  # it has looked, and there was nothing
    first.to("save")
    assert (run / ".final.unfinished").is_dir()
    assert busy(second.end())
    assert (run / ".final.unfinished").is_dir()
    assert first.end() == "trained"
    assert whole(run) == first.pid


def test_a_resume_that_comes_late_does_not_train_again(begin: Start, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    first, second = begin(run, "resume"), begin(run, "resume")
    second.to("_make")
    assert first.end() == "trained"
    assert second.end() == "finished"
    assert whole(run) == first.pid


def test_a_new_run_that_comes_late_is_refused_before_it_loads(begin: Start, tmp_path: Path) -> None:
    second = begin(tmp_path / "x", "plain").to("_make")
    assert begin(tmp_path / "x", "plain").end() == "trained"
    while second.gate is not None:
        assert second.step().gate != "load"
    assert "is not empty" in second.outcome


def test_a_lock_file_that_its_last_owner_has_removed_is_no_lock(begin: Start, tmp_path: Path) -> None:
    first, second = begin(tmp_path, "wrong").to("load"), begin(tmp_path, "plain").to("_take")
    assert first.end() == "refused: the rows are wrong"
    second.to("load")
    assert busy(begin(tmp_path, "plain").end())
    assert second.end() == "trained"
    assert whole(tmp_path) == second.pid


@pytest.mark.parametrize("how", ["overwrite", "resume", "plain"])
def test_a_run_at_work_is_not_overwritten(begin: Start, tmp_path: Path, how: str) -> None:
    run = tmp_path / "x"
    first = begin(run, "plain").to("step")
    outcome = begin(run, how).end()
    assert busy(outcome) or (how == "plain" and "is not empty" in outcome)
    assert first.end() == "trained"
    assert whole(run) == first.pid


def test_a_folder_that_was_made_for_nothing_goes_and_harms_nobody(begin: Start, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "of" / "mine"
    first = begin(run, "wrong").to("load")
    assert os.listdir(run) == [LOCK]
    assert first.end() == "refused: the rows are wrong"
    assert os.listdir(tmp_path) == []
    for gate in ("open_nofollow", "_remove_empty"):  # the second one has the folder that the first one removes
        first, second = begin(run, "wrong").to("_remove_empty"), begin(run, "plain").to("open_nofollow")
        if gate == "_remove_empty":
            second.to("check_content")  # and has locked it
        assert first.end() == "refused: the rows are wrong"
        assert second.end() == "trained"
        assert whole(run) == second.pid
        shutil.rmtree(tmp_path / "runs")


# -------------------------------------------------------------------------------------------------- every interleaving


def check_race(begin: Start, run: Path, hows: list[str], turns: list[tuple[int, int]]) -> None:
    """Start ``hows``, let number ``who`` pass ``count`` gates for each of ``turns``, then all to their ends."""
    old = [begin(run, "plain")] if "overwrite" in hows else []
    assert [life.end() for life in old] == ["trained"] * len(old)
    lives = [begin(run, how) for how in hows]
    for who, count in turns:
        lives[who].step(count)
    for life in lives:
        life.end()
    about = f"{hows} {turns}: {[life.outcome for life in lives]}"
    trained = [life for life in lives if life.outcome == "trained"]
    allowed = ("trained", "finished", "refused: the rows are wrong", "refused: output.dir: ")
    assert all(life.outcome.startswith(allowed) for life in lives), about
    if {*hows} == {"wrong"}:
        # Where one had made the folder that the other was refused in, it stays, empty
        assert not trained and (not run.exists() or os.listdir(run) == []), about
        return
    assert trained or old or "wrong" in hows, about
    assert len(trained) <= 1 or old, about
    if trained or old:
        assert whole(run) in [life.pid for life in trained or old], about


#: Both starts of the same kind, and of kinds that differ.
KINDS = (
    ["resume", "resume"],
    ["plain", "plain"],
    ["overwrite", "overwrite"],
    ["resume", "overwrite"],
    ["wrong", "plain"],
)


@pytest.mark.parametrize("hows", one_in(2, KINDS), ids="-".join)
def test_one_stops_at_every_stage_while_the_other_lives(begin: Start, tmp_path: Path, hows: list[str]) -> None:
    for count in range(GATES):
        check_race(begin, tmp_path / str(count) / "run", hows, [(0, count), (1, 99)])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hows", [*KINDS, ["wrong", "wrong"], ["plain", "wrong"]], ids="-".join)
def test_both_stop_at_every_stage(
    begin: Start, tmp_path: Path, hows: list[str], record_property: Callable[[str, object], None]
) -> None:
    record_property("campaign", f"two starts of one directory, {GATES * GATES} interleavings for each pair of kinds: the "
                                "holder of the lock is never hurt")  # fmt: skip
    for first in range(GATES):
        for second in range(GATES):
            run = tmp_path / f"{first}-{second}" / "run"
            check_race(begin, run, hows, [(0, first), (1, second), ((first + second) % 2, 99)])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(40))
def test_random_starts(
    begin: Start, tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Three at a time, gate by gate in any order; a start that was killed at any gate may have come before."""
    record_property("campaign", "three starts of one directory in 5 random interleavings, after one that was killed")
    draw = random.Random(seed)
    for number in range(5):
        run = tmp_path / str(number) / "runs" / "x"
        killed = begin(run, "resume").step(draw.randrange(GATES))
        killed.kill()
        finished = (run / "metrics.json").is_file()
        hows = [draw.choice(["resume", "resume", "overwrite"]) for _ in range(3)]
        turns = [(draw.randrange(3), draw.randrange(1, 5)) for _ in range(40)]
        lives = [begin(run, how) for how in hows]
        for who, count in turns:
            lives[who].step(count)
        outcomes = [life.end() for life in lives]
        about = f"{hows} {turns}: {outcomes}"
        assert all(outcome in ("trained", "finished") or "another process" in outcome or "is not empty" in outcome
                   for outcome in outcomes), about  # fmt: skip
        assert finished or "trained" in outcomes, about
        whole(run)


# ------------------------------------------------------------------------------------------------------ one at a time


@pytest.fixture
def unlocked() -> Iterator[None]:
    yield
    unlock()


def test_a_run_whose_folder_is_taken_away_while_it_loads_is_refused(tmp_path: Path, unlocked: None) -> None:
    run = tmp_path / "x"
    made = recipe(str(run), False)
    begun = find_start(made, ARGS, False)
    assert holds(run)
    shutil.rmtree(run)
    assert not holds(run)
    for again in (False, True):
        if again:  # by somebody else
            RunDirectory.create(run).append_log({"step": 1})
            (run / LOCK).write_text("process 7 on earth")
        with pytest.raises(UserError, match="was removed or replaced since this run began"):
            open_run(made, begun, {}, ARGS)
    unlock()
    assert sorted(os.listdir(run)) == [LOCK, "log.jsonl"]


def test_what_was_there_before_stays(tmp_path: Path, unlocked: None) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    lock(tmp_path / "runs" / "x")
    lock(tmp_path / "runs" / "y" / "z")
    unlock()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["runs", "runs/x"]


def test_a_folder_of_somebody_else_gets_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = tmp_path.stat().st_mtime_ns
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty"):
            find_start(recipe(str(tmp_path), True), ARGS, resume)
    assert tmp_path.stat().st_mtime_ns == before


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place, says in (
        (Path("/proc/x/y"), r"cannot write in /proc \(no folder lasts there"),
        (tmp_path / "file" / "x", "is a file"),
    ):
        with pytest.raises(UserError, match=says):
            find_start(recipe(str(place), False), ARGS, False)
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files are another user's: there to be read, not to be written."""
    original = locks.open_nofollow

    def opened(path: Path, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_RDWR and path.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, mode)

    monkeypatch.setattr(locks, "open_nofollow", opened)


def test_the_lock_of_another_user_holds(begin: Start, tmp_path: Path, not_ours: None) -> None:
    """It used to be none: --overwrite then took the run away from the one who was at work on it."""
    first = begin(tmp_path / "x", "plain").to("step")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"another process is working on this run, .* \(process {first.pid} on "):
            find_start(recipe(str(tmp_path / "x"), overwrite), ARGS, not overwrite)
    assert first.end() == "trained" and whole(tmp_path / "x") == first.pid


def test_what_another_user_has_left_is_named(tmp_path: Path, not_ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text("process 7 on earth")
    with pytest.raises(UserError, match=r"\.lock is not yours to write \(Permission denied\), and no process is work"):
        lock(tmp_path)

    def closed(path: Path, *_: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(locks, "open_nofollow", closed)
    with pytest.raises(UserError, match=r"nor to read, so another process may be working on this run"):
        lock(tmp_path)
    assert os.listdir(tmp_path) == [LOCK]


def test_people_who_share_a_folder_share_its_lock(tmp_path: Path, unlocked: None) -> None:
    umask = os.umask(0o002)
    try:
        lock(tmp_path)
    finally:
        os.umask(umask)
    assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o664


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, expected the lock file of a run"):
        lock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_where_there_are_no_locks_it_is_said_once(
    tmp_path: Path, number: int, unlocked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", none)
    monkeypatch.setattr(fcntl, "lockf", none)
    lock(tmp_path)
    lock(tmp_path)
    assert holds(tmp_path)
    assert capsys.readouterr().err.count(f"{tmp_path}: no lock here ({os.strerror(number)})") == 1


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="locks of open files are Linux's")
def test_reading_the_lock_file_does_not_drop_the_lock(begin: Start, tmp_path: Path, unlocked: None) -> None:
    """As a callback does that copies or uploads the run directory."""
    lock(tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "copy")
    assert busy(begin(tmp_path / "x", "resume").end())


def test_a_forked_child_takes_nothing_away_and_keeps_nothing(tmp_path: Path, begin: Start, unlocked: None) -> None:
    lock(tmp_path / "x")
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        unlock()
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert holds(tmp_path / "x") and busy(begin(tmp_path / "x", "plain").end())
    unlock()
    assert begin(tmp_path / "x", "plain").end() == "trained"  # the child is there still
    os.write(go[1], b".")
    os.waitpid(child, 0)
    for descriptor in (*ready, *go):
        os.close(descriptor)
