"""ZeRO-2, ZeRO-3 and FSDP2 with cached teachers train as with the live ones: one teacher, and several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cached import cache_of
from tests.support.launching import WORKERS
from tests.support.trainers import encoded
from tests.support.two_teachers import live_pair
from tests.support.warm import run_warm

WRAPPERS = {"fsdp2": "DTensor", "zero2": "DeepSpeedEngine 2", "zero3": "DeepSpeedEngine 3"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("strategies")
    caches = [cache_of(out / name, model, encoded()) for name, model in live_pair().items()]  # type: ignore[no-untyped-call]
    done = run_warm(WORKERS / "cached_strategies_worker.py", 2, [str(out), *map(str, caches), *WRAPPERS])
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "0.json").read_text())
    assert found["world"] == 2
    return found


@pytest.mark.parametrize("teachers", ["", "several "])
@pytest.mark.parametrize("strategy", WRAPPERS)
def test_cached_is_live(record: dict[str, Any], strategy: str, teachers: str) -> None:
    live, cached = record[f"{strategy} {teachers}live"], record[f"{strategy} {teachers}cached"]
    assert live["wrapper"] == cached["wrapper"] == WRAPPERS[strategy]
    for key in ("loss", "kl", "grad_norm", "temperature"):
        assert len(live[key]) == 4
        assert cached[key] == pytest.approx(live[key], rel=2e-6, abs=1e-6), key
