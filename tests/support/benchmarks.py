"""Run a script of ``benchmarks/`` with the words of a user, and read what it wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest

from tests.support.launching import ROOT, WORKERS
from tests.support.warm import run_warm

FOLDER = ROOT / "benchmarks"
HAS_TRL = importlib.util.find_spec("trl") is not None
TRL_VARIANTS = {"trl_gkd", "trl_chunked"} if HAS_TRL else set()


def run(script: str, *arguments: str) -> str:
    done = run_warm(FOLDER / script, args=arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(script: str, *arguments: str, forked: bool = False) -> dict[str, Any]:
    """What ``script`` found; ``forked``: its workers are forked, which is faster where there are many."""
    words = ["--quick", "--json", *arguments]
    done = run_warm(WORKERS / "benchmark_worker.py", args=[FOLDER / script, *words]) if forked else None
    assert done is None or done.returncode == 0, done.stderr
    return json.loads(run(script, *words) if done is None else done.stdout)  # type: ignore[no-any-return]


def rows_of(found: dict[str, Any], table: int = 0) -> dict[str, dict[str, Any]]:
    """Rows by name; every timed variant has its seconds of each round, and on Linux its peak memory."""
    rows = {row["name"]: row for row in found["tables"][table]["rows"]}
    for row in rows.values():
        assert len(row["seconds_per_round"]) == found["setting"]["rounds"]
        assert row["seconds"] > 0
        assert sys.platform != "linux" or "peak_bytes" in row
    return rows


def assert_same_kl(rows: dict[str, dict[str, Any]], rel: float) -> None:
    values = [row["kl"] for row in rows.values() if "kl" in row]
    assert values[0] > 0.1
    assert values == pytest.approx([values[0]] * len(values), rel=rel)
