"""The benchmark of generation runs and compares like with like. No time is asserted: this machine may be busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--quick", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generation_compares_tokens_per_second() -> None:
    result = json.loads(run("generation.py", "--json", "--threads", "1"))
    assert set(result["rates"]) == {"model.generate", "dts_hf"} and result["prompts"] == 12
    assert all(rate > 0 for rates in result["rates"].values() for rate in rates) and result["ratio"] > 0
