"""Signals, lost processes, full disks, numbers that are none: the run ends as promised and what it has saved is whole.

Each test is a real run of the command line in a process of its own; ``Life.wait`` bounds its time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dts_hf.distributed.processes import on_first_process
from dts_hf.errors import ExitCode, Interrupted, RunError, UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs import failures, stopping
from dts_hf.runs.checkpoints import newest_complete, why_incomplete
from dts_hf.runs.directory import RunDirectory
from dts_hf.training import signals as interruption
from tests.support.launching import WORKERS, deepspeed_config, environment
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.warm import fork_server, free_port
from tests.workers.fault_worker import agent, life, starved

pytestmark = pytest.mark.slow

STEPS = 6
RECIPE: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 1}},
    "teacher": {"model": "../teacher", "dtype": "float32"},
    "data": {"train": "../rows.jsonl", "validation": "../rows.jsonl", "prompt_template": "chat"},
    "temperature": {"name": "dts"},
    "training": {"use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1,
                 "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "disable_tqdm": True,
                 "learning_rate": 1e-3, "save_total_limit": 2},
    "evaluation": {"rows": 3, "max_new_tokens": 4, "models": ["student_before", "student"]},
    "output": {"dir": "run", "report": False},
}  # fmt: skip


class Life:
    """One process of a run, started by ``Lives``."""

    def __init__(self, process: Any, folder: Path, rank: str) -> None:
        self.process, self.folder, self.rank = process, folder, rank

    def until_reached(self, timeout: float = 60) -> Life:
        """Wait until this process stands at its gate."""
        return self._until(lambda: (self.folder / f"reached.{self.rank}").exists(), timeout)

    def kill(self, number: int = signal.SIGTERM) -> Life:
        os.kill(self.process.pid, number)
        return self

    def open_gate(self) -> Life:
        (self.folder / "go").touch()
        return self

    def wait(self, timeout: float = 60) -> int:
        """The exit status; negative: the signal that ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s:\n{self.err}"
        return int(self.process.exitcode)

    @property
    def err(self) -> str:
        return (self.folder / f"err.{self.rank}").read_text(errors="replace")

    def _until(self, true: Callable[[], bool], timeout: float) -> Life:
        end = time.monotonic() + timeout
        while not true():
            assert self.process.exitcode is None and time.monotonic() < end, self.err
            time.sleep(0.01)
        return self


class Lives:
    """Starts runs in processes that are forked from one that has everything imported (6 s of imports, once)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.context = fork_server()
        self.started: list[Life] = []
        self.launched: list[Launched] = []
        self.count = 0

    def folder(self, recipe: dict[str, Any] | None = None, folder: Path | None = None, **training: Any) -> Path:
        """A folder with ``recipe.yaml``; beside it are the teacher and the rows of all runs."""
        if folder is None:
            self.count += 1
            folder = self.root / f"life{self.count}"
            folder.mkdir()
        recipe = recipe or RECIPE
        recipe = {**recipe, "training": {**recipe["training"], **training}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return folder

    def start(self, folder: Path, *argv: str, world: int = 1, **faults: Any) -> list[Life]:
        """``dts-hf train recipe.yaml ARGV`` on ``world`` processes."""
        for name in ("go", *(f"reached.{rank}" for rank in range(world))):
            (folder / name).unlink(missing_ok=True)
        lives = []
        port = str(free_port())
        for rank in map(str, range(world)):
            variables = {} if world == 1 else {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            }  # fmt: skip
            arguments = (str(folder), ["train", "recipe.yaml", *argv], variables, faults)
            process = self.context.Process(target=life, args=arguments)
            process.start()
            lives.append(Life(process, folder, rank))
        self.started += lives
        return lives

    def launch(self, folder: Path, **faults: Any) -> Launched:
        """``dts-hf train recipe.yaml`` on two processes under torch's agent."""
        process = self.context.Process(target=agent, args=(str(folder), 2, ["train", "recipe.yaml"], faults))
        process.start()
        self.launched.append(Launched(process, lambda: process.exitcode, folder))
        return self.launched[-1]

    def one(self, folder: Path, *argv: str, **faults: Any) -> Life:
        return self.start(folder, *argv, **faults)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_llama(seed=0, layers=2).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    rows = [
        {"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": "yes " * (1 + i % 5) + str(i)}
        for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def lives(root: Path) -> Iterator[Lives]:
    made = Lives(root)
    yield made
    for one in made.started:
        if one.process.exitcode is None:
            one.process.kill()
    for run in made.launched:
        run.kill()


@pytest.fixture(scope="module")
def straight(lives: Lives) -> Path:
    """A run that nothing happened to."""
    folder = lives.folder()
    run = lives.one(folder)
    assert run.wait() == ExitCode.DONE, run.err
    return folder / "run"


def records(run: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clock = ("_per_second", "_runtime")
    return [{key: value for key, value in line.items() if not key.endswith(clock)} for line in lines]


def assert_same_end(run: Path, straight: Path) -> None:
    ours, theirs = (load_file(str(path / "final" / "model.safetensors")) for path in (run, straight))
    assert ours.keys() == theirs.keys() and all(bool((ours[key] == theirs[key]).all()) for key in ours)
    assert records(run) == records(straight)


def goes_on(lives: Lives, folder: Path, straight: Path, world: int = 1) -> None:
    """``--resume`` ends where the undisturbed run did."""
    again = lives.start(folder, "--resume", world=world)
    assert [one.wait() for one in again] == [ExitCode.DONE] * world, again[0].err
    assert_same_end(folder / "run", straight)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_leaves_with_75(lives: Lives, straight: Path, number: int) -> None:
    folder = lives.folder()
    run = lives.one(folder, step=2).until_reached().kill(number).open_gate()
    assert run.wait() == ExitCode.INTERRUPTED == 75
    last = run.err.splitlines()[-1]
    assert last.startswith(f"Stopped: {signal.Signals(number).name}: stopped after step 3") and "--resume" in last
    assert "Traceback" not in run.err and not (folder / "run" / "final").exists()
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-3"
    if number == signal.SIGTERM:
        goes_on(lives, folder, straight)


def test_one_signalled_process_stops_both_at_the_same_step(lives: Lives, straight_two: Path) -> None:
    folder = lives.folder(per_device_train_batch_size=2)
    first, second = lives.start(folder, world=2, step=3)
    first.until_reached(), second.until_reached().kill()
    first.open_gate()
    assert (first.wait(), second.wait()) == (ExitCode.INTERRUPTED, ExitCode.INTERRUPTED), first.err + second.err
    assert "another process was asked to stop: stopped after step 4" in first.err
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-4"
    goes_on(lives, folder, straight_two, world=2)


def test_a_signal_after_training_ends_it_quickly(lives: Lives, straight: Path) -> None:
    folder = lives.folder()
    run = lives.one(folder, scoring=2).until_reached().kill()
    assert run.wait(10) == ExitCode.INTERRUPTED, run.err
    assert not (folder / "run" / "final").exists() and newest_complete(folder / "run") is not None
    goes_on(lives, folder, straight)


def test_a_second_signal_ends_at_once(lives: Lives) -> None:
    """The gate stays closed: the step never ends. What follows within a moment is the same request (srun + torchrun)."""
    folder = lives.folder()
    run = lives.one(folder, step=2, same_request=1.0).until_reached().kill()
    time.sleep(0.1)
    run.kill()
    time.sleep(1.2)
    assert run.process.exitcode is None
    assert run.kill().wait(5) == ExitCode.INTERRUPTED
    assert "for the second time: stopped at once" in run.err
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"


def test_data_loader_workers_outlive_a_signal_to_the_group(lives: Lives) -> None:
    folder = lives.folder(dataloader_num_workers=1, dataloader_persistent_workers=True)
    run = lives.one(folder, step=2).until_reached()
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.open_gate().wait() == ExitCode.INTERRUPTED, run.err
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-3"


def test_ctrl_c(lives: Lives) -> None:
    folder = lives.folder()
    run = lives.one(folder, step=2).until_reached().kill(signal.SIGINT).open_gate()
    assert run.wait(60) == ExitCode.CTRL_C == 130
    assert "Traceback" not in run.err
    assert "Ctrl-C: this optimizer step and a checkpoint, then the run stops (once more: it ends unsaved)" in run.err
    assert "stopped after step 3" in run.err and "Go on with the same command and --resume" in run.err
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-3"
    assert lives.one(folder, "--resume").wait() == ExitCode.DONE


def test_ctrl_c_twice(lives: Lives) -> None:
    """The second one does not wait: it is a person who presses it."""
    folder = lives.folder()
    run = lives.one(folder, step=3).until_reached().kill(signal.SIGINT)
    end = time.monotonic() + 30
    while "Ctrl-C: this optimizer step" not in run.err and time.monotonic() < end:
        time.sleep(0.02)
    assert run.kill(signal.SIGINT).wait(10) == ExitCode.CTRL_C
    assert (
        "Ctrl-C for the second time: stopped at once. Go on with the same command and --resume: from the last"
        in run.err
    )
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"


# ------------------------------------------------------------------------------------------------------ lost processes


@pytest.fixture(scope="module")
def straight_two(lives: Lives) -> Path:
    folder = lives.folder(per_device_train_batch_size=2)
    both = lives.start(folder, world=2)
    assert [one.wait() for one in both] == [ExitCode.DONE] * 2, both[0].err
    return folder / "run"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(lives: Lives, straight_two: Path, victim: int) -> None:
    """Started without a launcher, so that nobody but the other process can notice."""
    folder = lives.folder(per_device_train_batch_size=2)
    both = lives.start(folder, world=2, step=3)
    for one in both:
        one.until_reached()
    both[victim].kill(signal.SIGKILL).open_gate()
    other = both[1 - victim]
    assert other.wait(60) == ExitCode.FAILED, other.err
    assert "Traceback" not in other.err and "--resume" in other.err.splitlines()[-1]
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"
    assert not (folder / "run" / "checkpoint-4").exists() or why_incomplete(folder / "run" / "checkpoint-4")
    goes_on(lives, folder, straight_two, world=2)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_process_that_does_not_answer_ends_the_other(lives: Lives, straight_two: Path, victim: int) -> None:
    """Stopped, not dead: its connections stay open, and only the timeout of the collective can tell."""
    folder = lives.folder(per_device_train_batch_size=2, ddp_timeout=6)
    both = lives.start(folder, world=2, step=3)
    for one in both:
        one.until_reached()
    both[victim].kill(signal.SIGSTOP).open_gate()
    other = both[1 - victim]
    began = time.monotonic()
    assert other.wait(60) == ExitCode.FAILED, other.err
    assert time.monotonic() - began < 30
    assert "Traceback" not in other.err
    last = other.err.splitlines()[-1]
    assert f"process {victim} has not answered for 6 s (training.ddp_timeout) after step 3" in last, other.err
    assert "--resume" in last
    assert f"process {1 - victim}: nothing has happened for" in other.err and ", after step 3; a coll" in other.err
    both[victim].kill(signal.SIGKILL).wait()
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"
    goes_on(lives, folder, straight_two, world=2)


def test_a_process_that_never_joins_ends_the_other(lives: Lives) -> None:
    """It died before. The store of the launch is there, as with an agent; torch would wait for half an hour on a CPU."""
    store = torch.distributed.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    launch = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    folder = lives.folder(ddp_timeout=3)
    process = lives.context.Process(target=life, args=(str(folder), ["train", "recipe.yaml"], launch, {}))
    process.start()
    lives.started.append(Life(process, folder, "1"))
    assert lives.started[-1].wait(60) == ExitCode.FAILED
    err = lives.started[-1].err
    assert "Traceback" not in err, err
    assert "Error (process 1): another process of this run has not answered for 3 s (training.ddp_timeout)" in err


# Under a launcher: torchrun, and accelerate launch, which is the same agent. It looks after the processes of its machine.
# Where nobody needs to be killed the agent runs here over processes that are forked from the warm one.

#: From a fault of one process until all are gone, seconds; the agent looks ten times a second.
SOON = 20.0


def test_a_bug_on_one_process_ends_all(lives: Lives) -> None:
    folder = lives.folder(per_device_train_batch_size=2)
    run = lives.launch(folder, bug=3, only="1").until_reached("1")
    (folder / "go").touch()
    run.ends(SOON)
    assert run.status(1) == ExitCode.FAILED and "ZeroDivisionError: a bug" in run.err(1)
    assert "Traceback" not in run.err(0)
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"


def test_a_signal_to_one_process_before_training_ends_all(lives: Lives, straight_two: Path) -> None:
    """Nothing has been trained, so nothing is saved."""
    folder = lives.folder(per_device_train_batch_size=2)
    run = lives.launch(folder, scoring=1).until_reached()
    os.kill(run.pid(1), signal.SIGTERM)
    run.ends(SOON)
    assert run.status(1) == ExitCode.INTERRUPTED and newest_complete(folder / "run") is None
    goes_on(lives, folder, straight_two, world=2)


def test_wrong_input_that_one_process_finds(lives: Lives) -> None:
    """A file that is missing on the second machine, say: somebody must say so, and it is not the first process."""
    run = lives.launch(lives.folder(), only="1", wrong={"1": 0.0})
    run.ends(60)
    assert run.status(1) == ExitCode.WRONG_INPUT and "Error (process 1): teacher.model: not here" in run.err(1)
    assert "not here" not in run.err(0)


@pytest.mark.parametrize("seconds", [{"0": 0.0, "1": 1.0}, {"0": 1.0, "1": 0.0}])
def test_wrong_input_that_all_find_is_said_once(lives: Lives, seconds: dict[str, float]) -> None:
    run = lives.launch(lives.folder(), wrong=seconds)
    run.ends(60)
    assert run.status(0) == ExitCode.WRONG_INPUT
    assert run.err(0).count("Error: teacher.model: not here") == 1 and "Error" not in run.err(1)


class Launched:
    """A run of two processes under a launcher; ``Lives`` kills what is left of it at the end."""

    def __init__(self, process: Any, exit_code: Callable[[], int | None], folder: Path) -> None:
        self.process, self.folder = process, folder
        self.exit_code = exit_code  # of the launcher; None while it runs

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid.{rank}").read_text())

    def status(self, rank: int) -> int | None:
        """With which ``rank`` left by itself; None where a signal ended it."""
        path = self.folder / f"status.{rank}"
        return int(path.read_text()) if path.exists() else None

    def err(self, rank: int) -> str:
        return (self.folder / f"err.{rank}").read_text(errors="replace")

    def until_reached(self, ranks: str = "01", timeout: float = 120) -> Launched:
        """Wait until each of ``ranks`` stands at its gate."""
        end = time.monotonic() + timeout
        while not all((self.folder / f"reached.{rank}").exists() for rank in ranks):
            assert self.exit_code() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)
        return self

    def ends(self, timeout: float) -> float:
        """Assert that the launcher returns 1 within ``timeout`` seconds and that no process is left; the seconds."""
        began = time.monotonic()
        while self.exit_code() is None:
            assert time.monotonic() - began < timeout, self.said()
            time.sleep(0.02)
        seconds = time.monotonic() - began
        assert self.exit_code() == 1, self.said()
        assert not [rank for rank in (0, 1) if _is_running(self.pid(rank))]
        return seconds

    def said(self) -> str:
        """What launcher and processes have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("err.*")))

    def kill(self) -> None:
        for path in self.folder.glob("pid.*"):
            if _is_running(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
        if self.exit_code() is None:
            self.process.kill()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2",
                   "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


@contextlib.contextmanager
def launched_by(launcher: str, folder: Path, grace: int = 30, **faults: Any) -> Iterator[Launched]:
    """The same by the real command line, in fresh processes; asked to stop, they have ``grace`` seconds."""
    arguments = [str(folder), json.dumps(["train", "recipe.yaml"]), json.dumps(faults)]
    variables = environment("ddp", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)})
    with (folder / "err.agent").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], str(WORKERS / "fault_worker.py"), *arguments],
            env=variables, start_new_session=True, stdout=err, stderr=err,
        )  # fmt: skip
    run = Launched(process, process.poll, folder)
    try:
        yield run
    finally:
        run.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_ends_the_others_of_a_killed_process(lives: Lives, straight_two: Path, launcher: str) -> None:
    folder = lives.folder(per_device_train_batch_size=2, ddp_backend="gloo")
    with launched_by(launcher, folder, step=3) as run:
        run.until_reached()
        os.kill(run.pid(1), signal.SIGKILL)
        (folder / "go").touch()
        run.ends(SOON)
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"
    goes_on(lives, folder, straight_two, world=2)


@pytest.mark.soak
def test_torchrun_kills_what_does_not_answer(lives: Lives) -> None:
    """As in a collective of NCCL that never ends: no Python runs, so a handler of ours would wait for ever."""
    folder = lives.folder(per_device_train_batch_size=2, ddp_backend="gloo")
    with launched_by("torchrun", folder, grace=3, deaf_step=3) as run:
        run.until_reached()
        run.process.send_signal(signal.SIGTERM)
        assert run.ends(SOON) > 2
        assert [run.status(rank) for rank in (0, 1)] == [None, None]  # neither has left by itself
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"


@pytest.mark.soak
def test_torchrun_hands_a_signal_on(lives: Lives) -> None:
    """Its own status is 1 whatever its processes return: a SLURM script must look for the checkpoint, not at 75."""
    folder = lives.folder(per_device_train_batch_size=2, ddp_backend="gloo")
    with launched_by("torchrun", folder, step=3) as run:
        run.until_reached()
        run.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        (folder / "go").touch()
        run.ends(60)
        assert [run.status(rank) for rank in (0, 1)] == [ExitCode.INTERRUPTED] * 2
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-4"


# ------------------------------------------------------------------------------------------------- at random moments

#: How long one process may outlive another that was killed; then it is ended, as a launcher would.
GRACE = 10.0
FSDP2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
#: What is run: processes, kills, and what the recipe says of it.
CAMPAIGN: dict[str, tuple[int, int, dict[str, Any]]] = {
    "single": (1, 20, {}),
    "ddp": (2, 8, {}),
    "zero3": (2, 6, {"deepspeed": deepspeed_config(3)}),
    "fsdp2": (2, 6, {"fsdp": True, "fsdp_config": FSDP2, "ddp_backend": "gloo"}),
}


def ended(processes: list[Life]) -> list[int]:
    for one in processes:
        one.process.join(GRACE)
        if one.process.exitcode is None:
            one.kill(signal.SIGKILL)
    return [one.wait() for one in processes]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", CAMPAIGN)
def test_kills_at_random_moments(lives: Lives, strategy: str, record_property: Callable[[str, object], None]) -> None:
    """So many kills of a process at work: a life that has ended before is no kill, and says how long a life takes now."""
    world, kills, training = CAMPAIGN[strategy]
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    # So many steps that most kills find a checkpoint: what comes before and after training takes a part of a second
    training = training | {"per_device_train_batch_size": 4 // world, "max_steps": 40}
    faults: dict[str, Any] = {"fsdp2": True} if strategy == "fsdp2" else {}
    warm = lives.context.Process(target=time.sleep, args=(0,))
    warm.start(), warm.join()  # the imports are no part of a life here

    def whole_life(folder: Path, *argv: str) -> float:
        began = time.monotonic()
        both = lives.start(folder, *argv, world=world, **faults)
        assert [one.wait(200) for one in both] == [ExitCode.DONE] * world, both[0].err
        return time.monotonic() - began

    straight = lives.folder(**training)
    seconds, moments = whole_life(straight), random.Random(strategy)
    hit = resumed = late = 0
    while hit < kills:
        assert late < 3 * kills, "the machine is too uneven: most lives ended before their kill"
        folder = lives.folder(**training)
        began = time.monotonic()
        both = lives.start(folder, world=world, **faults)
        moment, victim = moments.uniform(0.02, 1.0) * seconds, moments.randrange(world)
        both[victim].process.join(moment)
        taken = time.monotonic() - began
        if both[victim].process.exitcode is None:
            both[victim].kill(signal.SIGKILL)
        statuses = ended(both)
        assert "Traceback" not in "".join(one.err for one in both), both[0].err
        if statuses[victim] == -signal.SIGKILL:
            hit += 1
        else:
            late, seconds = late + 1, taken
        saved = newest_complete(folder / "run")
        again = whole_life(folder, "--resume")
        assert_same_end(folder / "run", straight / "run")
        print(f"{strategy} kill {hit}: {moment:.2f} of {seconds:.2f} s, process {victim}: {statuses}, {saved}")
        if statuses[victim] == -signal.SIGKILL:
            resumed += saved is not None
            seconds = seconds if saved is not None else again
    record_property("campaign", f"{strategy}: {hit} of {kills} kills at random moments resumed and bit-equal ({resumed} "
                                f"from a checkpoint); {late} more lives had ended before")  # fmt: skip
    assert resumed >= kills // 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sigterm_at_20_moments_of_the_command(lives: Lives, record_property: Callable[[str, object], None]) -> None:
    """Always 75 or a finished run. A fresh process each: its imports take most of the time."""
    straight = lives.folder(max_steps=STEPS * 3)

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dts_hf", "train", "recipe.yaml"], cwd=folder, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    began = time.monotonic()
    process = start(straight)
    output = process.communicate(timeout=200)
    seconds = time.monotonic() - began
    assert process.returncode == ExitCode.DONE, output
    moments = random.Random("signals")
    statuses: list[int] = []
    late = 0
    while len(statuses) < 20:
        assert late < 60, "the machine is too uneven: most lives ended before their signal"
        folder = lives.folder(max_steps=STEPS * 3)
        moment = 0.1 + (len(statuses) + moments.random()) / 20 * seconds  # 0.1 s: what comes before our first line
        process, began = start(folder), time.monotonic()
        while time.monotonic() - began < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:  # the machine has become faster
            late, seconds = late + 1, min(seconds, time.monotonic() - began)
            assert process.returncode == ExitCode.DONE, process.communicate()
            process.communicate()
            continue
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        print(f"SIGTERM after {moment:.2f} of {seconds:.2f} s: {process.returncode}: {err.splitlines()[-1:]}")
        statuses.append(process.returncode)
        assert process.returncode in (ExitCode.INTERRUPTED, ExitCode.DONE) and "Traceback" not in err, err
        assert process.returncode == ExitCode.DONE or err.splitlines()[-1].startswith("Stopped: SIGTERM"), err
        assert lives.one(folder, "--resume").wait(100) == ExitCode.DONE
        assert_same_end(folder / "run", straight / "run")
    stopped = statuses.count(ExitCode.INTERRUPTED)
    record_property("campaign", f"SIGTERM at 20 moments from the first line to the last: {stopped} ended with 75, "
                                f"{20 - stopped} had finished; all 20 went on and are bit-equal")  # fmt: skip
    assert stopped >= 15


# --------------------------------------------------------------------------------------------- disks and directories


class Disk:
    """A small file system of its own at ``folder/run``, where an error of the disk is a real one."""

    SIZE = 12 << 20

    def __init__(self, folder: Path, inodes: int = 0) -> None:
        self.run, self.inodes = folder / "run", inodes  # 0: as many as there may be
        self.ballast = self.run / "ballast"

    def __enter__(self) -> Disk:
        self.run.mkdir()
        if (
            os.geteuid()
            or self._mount("-t", "tmpfs", "-o", f"size={self.SIZE},nr_inodes={self.inodes}", "tmpfs").returncode
        ):
            pytest.skip("needs the right to mount a file system")
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["umount", "-l", str(self.run)], check=False)

    def _mount(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["mount", *words, str(self.run)], capture_output=True, check=False)

    def fill(self, left: int) -> None:
        """Leave so many bytes free."""
        with self.ballast.open("wb") as file:
            file.write(bytes(max(shutil.disk_usage(self.run).free - left, 0)))

    def read_only(self, yes: bool) -> None:
        """By a second mount on top: the kernel does not turn a file system over while the run's lock is open in it."""
        if not yes:
            subprocess.run(["umount", str(self.run)], check=True)
            return
        assert not self._mount("--bind", str(self.run)).returncode
        assert not self._mount("-o", "remount,bind,ro").returncode


def assert_one_message(run: Life, *words: str) -> None:
    """On a failure of the machine: status 1, a sentence, no traceback, and no half file under its final name."""
    assert run.wait() == ExitCode.FAILED, run.err
    assert "Traceback" not in run.err, run.err
    last = run.err.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), run.err


#: What of a checkpoint still fits when the disk is full, as a share of it.
@pytest.mark.parametrize("share", [None, 0.02, 0.4, 0.7, 0.98])
def test_a_full_disk(lives: Lives, straight: Path, share: float | None) -> None:
    folder = lives.folder()
    size = sum(path.stat().st_size for path in (straight / "checkpoint-4").rglob("*"))
    with Disk(folder) as disk:
        run = lives.one(folder, step=3).until_reached()
        disk.fill(0 if share is None else int(share * size) + (16 << 10))
        run.open_gate()
        assert_one_message(run, "cannot write run", " kB free in ", "Free some space", "--resume")
        saved = newest_complete(disk.run)
        assert saved is not None and saved.name == "checkpoint-2"
        assert not (disk.run / "final").exists()
        disk.ballast.unlink()
        if share in (None, 0.7):  # the others leave the same behind
            goes_on(lives, folder, straight)


def test_a_log_line_that_finds_no_space(tmp_path: Path) -> None:
    """The library's error names no file; half a line is cut off by the next one that fits."""
    with Disk(tmp_path) as disk:
        run = RunDirectory(disk.run)
        run.append_log({"step": 1})
        disk.fill(0)
        with pytest.raises(OSError, match="No space") as caught:
            run.append_log({"step": 2, "text": "x" * 9000})
        said = failures.one_sentence(caught.value) or ""
        assert said.startswith(f"{disk.run / 'log.jsonl'}: No space left on device (0 kB free in {disk.run})"), said
        outside, inside = failures.writing(tmp_path / "outside"), failures.writing(tmp_path / "inside")
        with pytest.raises(RunError) as wrapped, outside, inside:
            run.append_log({"step": 2, "text": "x" * 9000})
        assert str(wrapped.value).count("cannot write") == 1 and "log.jsonl" in str(wrapped.value)
        disk.ballast.unlink()
        run.append_log({"step": 2})
        assert [line["step"] for line in run.read_log()] == [1, 2]


def test_what_a_full_disk_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library has lost the path: what was written most likely went here, or is a temporary file."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    said = failures.one_sentence(rust) or ""
    assert f"free in {Path.cwd()} and " in said and f"free in {tmp_path}); free some space" in said
    says = rf"cannot write {tmp_path}/final: No space .*free in {tmp_path}"
    with pytest.raises(RunError, match=says), failures.writing(tmp_path / "final"):
        raise rust
    quota = OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "x"))
    assert "x: Disk quota exceeded (" in (failures.one_sentence(quota) or "")
    assert f"free in {tmp_path}, of which a quota holds back the rest)" in (failures.one_sentence(quota) or "")
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result((1, 1024, 9, 9, 5000, 40, 0, 0, 0, 255)))
    assert "5.1 MB free in" in (failures.one_sentence(rust) or "")
    assert ", and 0 of 40 inodes" in (failures.one_sentence(rust) or "")


def test_a_disk_that_is_full_at_the_end(lives: Lives, straight: Path) -> None:
    folder = lives.folder()
    with Disk(folder) as disk:
        run = lives.one(folder, scoring=2).until_reached()
        disk.fill(64 << 10)
        run.open_gate()
        assert_one_message(run, f"cannot write {Path('run', 'final')}", " free in ", "Free some space", "--resume")
        assert not (disk.run / "final").exists()
        disk.ballast.unlink()
        goes_on(lives, folder, straight)


def test_no_inodes(lives: Lives, straight: Path) -> None:
    """There is space, and every file takes an inode: a checkpoint has a dozen."""
    folder = lives.folder()
    with Disk(folder, inodes=40) as disk:
        run = lives.one(folder, step=3).until_reached()
        while os.statvfs(disk.run).f_favail > 3:
            (disk.run / f"small-{os.statvfs(disk.run).f_favail}").touch()
        run.open_gate()
        assert_one_message(run, "cannot write ", "No space left", " MB free in ", " of 40 inodes", "--resume")
        saved = newest_complete(disk.run)
        assert saved is not None and saved.name == "checkpoint-2"
        for small in disk.run.glob("small-*"):
            small.unlink()
        again = lives.one(folder, "--resume")  # with fewer checkpoints than it would keep it has room
        assert again.wait() == ExitCode.FAILED or (disk.run / "final").is_dir(), again.err


def test_a_disk_that_turns_read_only(lives: Lives, straight: Path) -> None:
    folder = lives.folder()
    with Disk(folder) as disk:
        run = lives.one(folder, step=3).until_reached()
        disk.read_only(True)
        run.open_gate()
        assert_one_message(run, "Read-only file system", "--resume")
        disk.read_only(False)
        goes_on(lives, folder, straight)


def test_one_full_disk_of_two_processes(lives: Lives, straight_two: Path) -> None:
    """The first process writes; the second one would wait for it."""
    folder = lives.folder(per_device_train_batch_size=2)
    with Disk(folder) as disk:
        both = lives.start(folder, world=2, step=3)
        for one in both:
            one.until_reached()
        disk.fill(64 << 10)
        both[0].open_gate()
        assert_one_message(both[0], "--resume")
        assert both[1].wait(30) == ExitCode.FAILED and "Traceback" not in both[1].err
        disk.ballast.unlink()
        goes_on(lives, folder, straight_two, world=2)


def test_a_file_in_the_way(lives: Lives, straight: Path) -> None:
    folder = lives.folder()
    run = lives.one(folder, step=3).until_reached()
    (folder / "run" / "checkpoint-4").write_text("mine")
    assert run.open_gate().wait() == ExitCode.DONE, run.err
    assert (
        "run/checkpoint-4 was not written by dts_hf and is in the way of a checkpoint: it is checkpoint-4.other"
        in run.err
    )
    assert (folder / "run" / "checkpoint-4.other").read_text() == "mine"
    assert_same_end(folder / "run", straight)


def test_a_limit_on_file_sizes(lives: Lives) -> None:
    """What a quota feels like to a user who may not mount anything."""
    folder = lives.folder()
    assert_one_message(lives.one(folder, file_size=60_000), "File too large", "--resume")
    assert newest_complete(folder / "run") is None and not (folder / "run" / "final").exists()


# ------------------------------------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_no_number_stops_both_processes(lives: Lives) -> None:
    folder = lives.folder(per_device_train_batch_size=2, save_steps=1, save_total_limit=1)
    both = lives.start(folder, world=2, weights=2)
    assert [one.wait() for one in both] == [ExitCode.FAILED] * 2, both[0].err
    assert "for 3 steps in a row" in both[0].err and both[1].err.count("Error") == 0
    rows = [json.loads((folder / "run" / f"broken_step-5.rank{rank}.json").read_text())["rows"] for rank in (0, 1)]
    assert [len(of_rank) for of_rank in rows] == [2, 2] and len({row["id"] for part in rows for row in part}) == 4
    saved = newest_complete(folder / "run")
    assert saved is not None and saved.name == "checkpoint-2"
    weights = load_file(str(saved / "model.safetensors"))
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_weights_that_are_no_number_are_not_saved(lives: Lives, strategy: str) -> None:
    """An infinite gradient under a finite loss: the next loss would tell, but the checkpoint would be written before."""
    step = 2 if strategy == "steps" else 5  # 20 rows, 4 a step
    folder = lives.folder(save_strategy=strategy, save_steps=1, save_total_limit=1, max_steps=8)
    run = lives.one(folder, update=step)
    assert_one_message(run, f"step {step}: the student has non-finite weights")
    saved = newest_complete(folder / "run")
    assert saved is None if strategy == "epoch" else saved is not None and saved.name == "checkpoint-1"


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_that_does_not_suffice_for_the_loss(lives: Lives) -> None:
    """Under a real limit on the address space: the budget is halved until a chunk fits, and the numbers stay."""
    folder = lives.folder()
    process = lives.context.Process(target=starved, args=(str(folder),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    found = json.loads((folder / "starved.json").read_text())
    assert "out of memory in the loss" in (folder / "err.0").read_text()
    assert found["budget"] < 512 and found["loss"] == pytest.approx(found["wanted"], rel=1e-6)
    assert found["gradient_error"] < 1e-5


# --------------------------------------------------------------------------------------------------------- in words


def test_what_a_failure_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "log.jsonl"))
    assert "log.jsonl: No space left on device (" in (failures.one_sentence(full) or "")
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left" in (failures.one_sentence(rust) or "")
    with pytest.raises(RunError, match=r"cannot write .*: File too large .*GB free"), failures.writing(tmp_path):
        raise OSError(27, "File too large")
    with pytest.raises(ZeroDivisionError), failures.writing(tmp_path):
        raise ZeroDivisionError
    try:
        try:
            raise OSError(30, "Read-only file system")
        finally:
            raise RuntimeError("while cleaning up")
    except RuntimeError as error:
        assert "Read-only" in (failures.one_sentence(error) or "")
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    assert failures.one_sentence(lost) is None  # of one process there is no other
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process of this run has ended" in (failures.one_sentence(lost) or "")
    assert failures.one_sentence(BrokenPipeError(32, "Broken pipe")) is None  # dts-hf list | head
    memory = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
    assert "per_device_train_batch_size" in (failures.one_sentence(memory) or "")
    assert failures.one_sentence(RuntimeError("shape mismatch")) is None
    assert failures.one_sentence(ValueError("a bug")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
            "another process of this run has ended, ",
        ),
        (
            "The client socket has timed out after 600000ms while trying to connect to (node1, 29500).",
            "another process of this run has not answered for 600 s (training.ddp_timeout), ",
        ),
    ],
)
def test_a_process_that_is_gone_before_all_are_joined_is_no_wrong_input(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """``TrainingArguments`` joins them, and whatever it raises otherwise is a matter of the recipe."""

    def join(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistNetworkError(text)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dts_hf.distributed.launch.watch_collectives", lambda *_: None)  # it sets variables
    groups = torch.distributed.distributed_c10d
    monkeypatch.setattr(groups, "default_pg_timeout", groups.default_pg_timeout)  # limit_joining sets it
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", join)
    recipe = Recipe.from_dict(RECIPE, deep=False)
    with pytest.raises(torch.distributed.DistNetworkError) as caught:
        training_arguments(recipe, Path("run"))
    assert said in (failures.one_sentence(caught.value) or "")


def _raised(work: Callable[[], None]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


def test_a_bug_is_no_disk_error(tmp_path: Path) -> None:
    """It must keep its traceback, also where an error of the operating system was handled on the way."""

    def looked_for_a_file() -> None:
        try:
            (tmp_path / "none").read_text()
        except OSError:
            {}["key"]

    def hid_the_disk() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise KeyError("key") from None

    def missing() -> None:
        (tmp_path / "none").read_text()

    def from_rust() -> None:
        raise RuntimeError("No such file or directory (os error 2)")

    def not_connected() -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    for bug in (looked_for_a_file, hid_the_disk, missing, from_rust, not_connected):
        assert failures.one_sentence(_raised(bug)) is None, bug

        def within(bug: Callable[[], None] = bug) -> None:
            with failures.writing(tmp_path):
                bug()

        assert not isinstance(_raised(within), RunError), bug


@pytest.mark.parametrize("error", [UserError("no room"), RunError("no room")])
def test_what_fails_on_the_first_process_is_known_to_be_everywhere(
    monkeypatch: pytest.MonkeyPatch, error: UserError | RunError
) -> None:
    told: list[Any] = []

    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", told.extend)
    assert getattr(_raised(lambda: on_first_process(fail, 0, 2)), "everywhere", None) is True
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda to: to.__setitem__(slice(None), told))
    on_second = _raised(lambda: on_first_process(fail, 1, 2))
    assert type(on_second) is type(error) and getattr(on_second, "everywhere", None) is True
    assert str(on_second) == "no room"


def test_handlers_are_put_back_and_the_exception_is_an_exit() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]

    @interruption.stops_on_signal
    def work() -> None:
        assert all(signal.getsignal(number) not in before for number in stopping.SIGNALS)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)

    with pytest.raises(Interrupted, match="SIGUSR1 outside of training") as caught:
        work()
    assert isinstance(caught.value, SystemExit) and caught.value.code == 75
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_off_the_main_thread_there_are_no_handlers() -> None:
    found: list[Any] = []
    work = interruption.stops_on_signal(lambda: found.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_that_nobody_acted_on_is_raised_after_training() -> None:
    @interruption.stops_on_signal
    def work() -> None:
        with interruption.at_step_end():
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.asked_to_stop() == "SIGTERM"

    with pytest.raises(Interrupted, match="at the end of training"):
        work()
    assert interruption.asked_to_stop() is None  # the next run is not asked
