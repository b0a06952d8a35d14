"""The adaptive share and the replay buffer on two processes: one branch for both, each its own rows, an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dts_hf.errors import UserError
from tests.support.launching import WORKERS
from tests.support.warm import run_warm
from tests.workers import replay_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
of_strategy = pytest.mark.parametrize("strategy", replay_worker.STRATEGIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes trains under all strategies; it is killed where it hangs."""
    out = tmp_path_factory.mktemp("replay")
    done = run_warm(WORKERS / "replay_worker.py", 2, [str(out), *replay_worker.STRATEGIES], timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def ranks(folder: Path, strategy: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in (0, 1)]


@of_strategy
def test_both_processes_take_the_same_branches(folder: Path, strategy: str) -> None:
    one, other = (found["straight"] for found in ranks(folder, strategy))
    assert one["world"] == other["world"] == 2
    branches = [branch for branch, _ in one["seen"]]
    assert branches == [branch for branch, _ in other["seen"]] and {*branches} == {"data", "generate", "replay"}
    assert one["phi"] == other["phi"] and one["state"] == other["state"] and one["phi"][-1] > 0.6
    assert len(one["rows"]) == len(other["rows"]) == 4  # half of the capacity each
    assert not {*map(tuple, one["rows"].values())} & {*map(tuple, other["rows"].values())}, "each keeps its own rows"


@of_strategy
def test_a_resume_goes_on_with_the_buffer_of_each_process(folder: Path, strategy: str) -> None:
    for found in ranks(folder, strategy):
        straight, resumed = found["straight"], found["resumed"]
        assert resumed["seen"] == straight["seen"][replay_worker.SAVED :]
        for key in ("phi", "state", "rows", "states", "weights"):
            assert resumed[key] == straight[key], key


def test_another_number_of_processes_is_refused_by_name(folder: Path) -> None:
    alone = replay_worker.trainer_of("single", folder / "ddp", world=1)
    with pytest.raises(
        UserError, match=r"written by 2 processes, each of which keeps the rows .* this is 1\. Start it"
    ):
        alone.check_resumable(folder / "ddp" / f"checkpoint-{replay_worker.SAVED}")
