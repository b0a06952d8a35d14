"""The loss kernels compiled for cards that are not here: they compile, spill nothing, and load 16 bytes at a time.

What is compiled are the launches that the loss makes (``benchmarks/kernel_report.py`` records them), in a process of its
own: where Triton interprets (tests/conftest.py), it cannot compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dts_hf.divergences import DIVERGENCES
from dts_hf.temperature import temperature_policies
from tests.support.launching import ROOT, WORKERS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
#: Registers of a thread, at most: four blocks of four warps on each multiprocessor.
MOST_REGISTERS = 128


def compiled(folder: Path, **job: Any) -> list[dict[str, Any]]:
    """What each launch needs of a card, and how it loads; see the worker for the jobs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [environment.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(WORKERS / "kernel_report_worker.py"), json.dumps(job)],
        env=environment, text=True, capture_output=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert rows and not [row for row in rows if "failed" in row], rows
    return rows


def assert_lean(rows: list[dict[str, Any]], aligned: bool, spilled: int = 0) -> None:
    """``aligned``: rows begin at multiples of 16 entries. Others compile too, but have narrow loads. ``spilled``: bytes."""
    for row in rows:
        assert row["spills"] <= spilled, row
        if aligned:
            assert row["registers"] <= MOST_REGISTERS and row["wide"] >= 2, row  # of both models


def test_the_usual_kernels_compile_without_a_card(tmp_path: Path) -> None:
    """Forward KL under a known T, a scale-free JSD of soft-capped heads, GPT-2's vocabulary, and rows of no pitch."""
    for cases, kernels, capped, vocab, pitched, archs in (
        ([["forward_kl", "constant"]], 2, False, 49152, True, [80, 90]),
        ([["jsd", "logit_std"]], 4, True, 50257, True, [90]),
        ([["forward_kl", "constant"]], 2, False, 50257, False, [90]),
    ):
        job = {"cases": cases, "capped": capped, "vocab": vocab, "pitched": pitched, "archs": archs}
        rows = compiled(tmp_path, dtypes=["bfloat16"] * 2, rows=[1, 5, 16], **job)
        assert {row["arch"] for row in rows} == set(archs)
        # Chunks of 1, of 5 and of 16 rows are no reason to compile again
        assert len(rows) == kernels * len(archs)
        assert_lean(rows, aligned=pitched)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("dtypes", "vocab", "capped"),
    [(["bfloat16"] * 2, 49152, False), (["bfloat16"] * 2, 50257, True), (["float16"] * 2, 50257, False),
     (["float32"] * 2, 50257, True), (["bfloat16", "float32"], 49152, False)],
    ids=["bf16", "bf16-odd-capped", "fp16-odd", "fp32-odd-capped", "bf16-fp32"],
)  # fmt: skip
def test_every_kernel_compiles_without_a_card(dtypes: list[str], vocab: int, capped: bool, tmp_path: Path) -> None:
    """Each divergence under a known T, a scale-free one and a learnt one; each policy under a KL and a divergence."""
    usual = [name for name in sorted(DIVERGENCES) if name != "adaptive_kl"]
    cases = [[name, policy] for name in usual for policy in ("constant", "logit_std", "ctkd")]
    cases.remove(["dkd", "ctkd"])
    known = sorted(name for name, kind in temperature_policies().items() if kind.without_kernels is None)
    policies = [name for name in known if name != "replay"]  # it needs a run to replay
    cases += [[name, policy] for policy in policies for name in ("forward_kl", "jsd")]
    archs = [80, 90] if dtypes == ["bfloat16"] * 2 else [90]
    job = {"cases": cases, "capped": capped, "vocab": vocab, "pitched": True, "archs": archs}
    # 8 bytes: statistics of DKD under logit_std and capped heads, sm_90
    assert_lean(compiled(tmp_path, dtypes=dtypes, **job), aligned=True, spilled=8)
