"""Random moments: 40 kills and 20 signals, after each of which a run ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dts_hf.errors import ExitCode
from tests.support.launching import deepspeed_config, environment
from tests.training.test_faults import STEPS, Life, Lives, assert_same_end, lives, root

__all__ = ["lives", "root"]  # fixtures

pytestmark = pytest.mark.soak
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


@pytest.mark.parametrize("strategy", CAMPAIGN)
def test_kills_at_random_moments(lives: Lives, strategy: str) -> None:
    world, kills, training = CAMPAIGN[strategy]
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    training = training | {"per_device_train_batch_size": 4 // world}
    faults: dict[str, Any] = {"fsdp2": True} if strategy == "fsdp2" else {}
    straight = lives.folder(**training)
    warm = lives.context.Process(target=time.sleep, args=(0,))
    warm.start(), warm.join()  # the imports are no part of a life here
    began = time.monotonic()
    both = lives.start(straight, world=world, **faults)
    assert [one.wait(200) for one in both] == [ExitCode.DONE] * world, both[0].err
    seconds, moments = time.monotonic() - began, random.Random(strategy)
    hit = 0
    for kill in range(kills):
        folder = lives.folder(**training)
        both = lives.start(folder, world=world, **faults)
        moment, victim = moments.uniform(0.05, 0.95) * seconds, moments.randrange(world)
        time.sleep(moment)
        if both[victim].process.exitcode is None:
            both[victim].kill(signal.SIGKILL)
        statuses = ended(both)
        hit += statuses[victim] == -signal.SIGKILL
        assert "Traceback" not in "".join(one.err for one in both), both[0].err
        again = lives.start(folder, "--resume", world=world, **faults)
        assert [one.wait(200) for one in again] == [ExitCode.DONE] * world, again[0].err
        assert_same_end(folder / "run", straight / "run")
        print(f"{strategy} kill {kill}: {moment:.2f} of {seconds:.2f} s, process {victim}: {statuses}")
    assert hit > kills // 2


def test_sigterm_at_20_moments_of_the_command(lives: Lives) -> None:
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
    statuses = []
    for place in range(20):
        folder = lives.folder(max_steps=STEPS * 3)
        moment = 0.1 + (place + moments.random()) / 20 * seconds  # 0.1 s: what comes before our first line
        process = start(folder)
        time.sleep(moment)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        print(f"SIGTERM after {moment:.2f} of {seconds:.2f} s: {process.returncode}: {err.splitlines()[-1:]}")
        statuses.append(process.returncode)
        assert process.returncode in (ExitCode.INTERRUPTED, ExitCode.DONE) and "Traceback" not in err, err
        assert process.returncode == ExitCode.DONE or err.splitlines()[-1].startswith("Stopped: SIGTERM"), err
        assert lives.one(folder, "--resume").wait(100) == ExitCode.DONE
        assert_same_end(folder / "run", straight / "run")
    assert statuses.count(ExitCode.INTERRUPTED) > 10
