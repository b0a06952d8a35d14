"""``alignment: dual_space`` on two processes: under DDP it is the run of one process, where weights are sharded refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.launching import WORKERS
from tests.support.warm import run_warm
from tests.workers import dual_space_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHARDED = ("zero3", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dual_space")
    done = run_warm(WORKERS / "dual_space_worker.py", 2, [str(out), "ddp", *SHARDED], timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    dual_space_worker.main(["single"], out)
    return out


def test_two_processes_train_as_one(folder: Path) -> None:
    one, two, other = (json.loads((folder / f"{name}.json").read_text()) for name in ("single 0", "ddp 0", "ddp 1"))
    assert (two["wrapper"], two["world"], one["world"]) == ("DistributedDataParallel", 2, 1)
    assert len(one["lines"]) == len(two["lines"]) == 3
    for alone, together in zip(one["lines"], two["lines"], strict=True):
        assert {*alone} == {*together}
        assert together == pytest.approx(alone, rel=1e-8, abs=1e-10)
    weights = [np.array(record["weights"]) for record in (one, two, other)]
    assert np.array_equal(weights[1], weights[2])  # the maps among them
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strategy", SHARDED)
def test_sharded_weights_are_refused_by_name(folder: Path, strategy: str) -> None:
    for rank in (0, 1):
        refused = json.loads((folder / f"{strategy} {rank}.json").read_text())["refused"]
        assert "dual_space" in refused and strategy in refused and "DDP" in refused
