"""A student that teaches itself on two processes: the same teacher on both, and the same as on one."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.support.launching import WORKERS
from tests.support.warm import run_warm

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    (found,) = results(tmp_path_factory.mktemp("alone"), "single", 1)
    return found


def results(folder, strategy, world):
    done = run_warm(WORKERS / "self_worker.py", world, [str(folder), strategy], strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{strategy} {world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="no deepspeed"))],
)
def test_two_processes_have_one_teacher(tmp_path, alone, strategy):
    first, second = results(tmp_path, strategy, 2)
    for case, expected in alone.items():
        assert len(expected["losses"]) == 3
        if strategy != "ddp" and "lora" in case:
            assert "adapter shares the student's model" in first[case]
            continue
        assert first[case]["mean"] == second[case]["mean"] and first[case]["losses"] == second[case]["losses"]
        assert first[case]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert first[case]["mean"] == pytest.approx(expected["mean"], abs=1e-6)
        assert bool(expected["mean"]) == case.startswith("ema")
