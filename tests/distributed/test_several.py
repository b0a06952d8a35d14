"""Several teachers on two processes are those on one: one denominator, one state, and every forward on every process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import WORKERS
from tests.support.warm import run_warm
from tests.workers import several_worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several")
    done = run_warm(WORKERS / "several_worker.py", 2, [str(out), "ddp"])
    assert done.returncode == 0, done.stderr[-3000:]
    several_worker.main(str(out), "single")
    return out


@pytest.mark.parametrize("name", several_worker.CASES)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    def found(world: int, rank: int) -> dict[str, Any]:
        return json.loads((folder / f"{name} {world}-{rank}.json").read_text())

    one, two, other = found(1, 0), found(2, 0), found(2, 1)
    assert (one["world"], two["world"], other["world"]) == (1, 2, 2)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9, abs=1e-11)
    assert other["weights"] == two["weights"] and other["state"] == two["state"]
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-9)
    assert len(one["lines"]) == 4
    for alone, together in zip(one["lines"], two["lines"], strict=True):
        assert {*alone} == {*together}
        assert together == pytest.approx(alone, rel=1e-6)
    if "weighted" not in name:  # there were steps without a row of a teacher, and one process had none of it at all
        counts = [(line["labels/math"], line["labels/code"]) for line in one["lines"]]
        assert any(math == 0 for math, _ in counts) and any(math and code for math, code in counts)
