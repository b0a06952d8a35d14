"""A teacher with another tokenizer on two processes, under DDP, ZeRO-3 and FSDP2, is the one on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.launching import WORKERS
from tests.support.warm import run_warm
from tests.workers import alignment_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WRAPPERS = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPLlamaForCausalLM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alignment")
    done = run_warm(WORKERS / "alignment_worker.py", 2, [str(out), *WRAPPERS], timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    alignment_worker.main(["single"], out)
    return out


@pytest.mark.parametrize("name", alignment_worker.CASES)
@pytest.mark.parametrize("strategy", WRAPPERS)
def test_two_processes_train_as_one(folder: Path, strategy: str, name: str) -> None:
    def found(strategy: str, rank: int) -> dict[str, Any]:
        return json.loads((folder / f"{strategy} {name} {rank}.json").read_text())

    one, two, other = found("single", 0), found(strategy, 0), found(strategy, 1)
    assert (two["wrapper"], two["world"], other["world"]) == (WRAPPERS[strategy], 2, 2)
    assert len(one["lines"]) == len(two["lines"]) == 3
    for alone, together in zip([*one["lines"], one["held_out"]], [*two["lines"], two["held_out"]], strict=True):
        assert {*alone} == {*together}
        assert together == pytest.approx(alone, rel=2e-4, abs=1e-6)
    assert [line["temperature"] for line in other["lines"]] == [line["temperature"] for line in two["lines"]]
    assert 0 < one["lines"][0]["aligned_share"] < 1
    first, second = np.array(one["weights"]), np.array(two["weights"])
    assert first.shape == second.shape and np.linalg.norm(first - second) / np.linalg.norm(first) < 1e-5
