"""On two processes a teacher with another tokenizer that is cached, or elsewhere, is the live one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.alignment import aligned_rows, instruction_rows, tokenizer_of
from tests.support.cached import cache_of
from tests.support.launching import WORKERS
from tests.support.served import running, served_tiny
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.warm import run_warm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("aligned_states")
    tokenizer = tokenizer_of("byte_level", 900)
    teacher = tiny_llama(vocab=len(tokenizer), seed=1, layers=3)
    data = aligned_rows(tiny_tokenizer(), tokenizer, instruction_rows(13))
    cache = cache_of(out / "states", teacher, data, tokenizer)  # type: ignore[no-untyped-call]
    with running(served_tiny(teacher, tokenizer=tokenizer)) as url:
        done = run_warm(WORKERS / "aligned_states_worker.py", 2, [str(out), str(cache), url], "ddp", timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "0.json").read_text())
    assert found["world"] == 2
    return found


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["cached", "remote"])
def test_states_from_elsewhere_are_the_live_ones(record: dict[str, Any], kind: str, packing: bool) -> None:
    found, live = record[f"{kind} {packing}"], record[f"live {packing}"]
    assert len(live["losses"]) == 20
    for key in ("losses", "temperatures", "weights"):
        assert found[key] == pytest.approx(live[key], rel=1e-6, abs=1e-6), key
