"""Triton's kernels compiled for a card that is not here: Triton brings ptxas along, so all but running them is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.support.launching import ROOT, WORKERS


@dataclass(frozen=True)
class Kernel:
    """One way to compile a kernel.

    Attributes:
        name: ``"package.module:function"`` of the ``triton.jit`` function.
        signature: Triton's type of every argument, in order: ``{"logits": "*bf16", "rows": "i32", "BLOCK": "constexpr"}``.
        constants: the value of each constexpr; one that is itself a ``triton.jit`` function as ``{"jit": "module:name"}``.
        capability: of the card: 80 is an A100, 90 an H100, 100 a B200.
        options: of the compiler, such as ``{"num_warps": 4}``.
    """

    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    capability: int = 90
    options: Mapping[str, Any] = field(default_factory=dict)


def compile_ahead(kernels: Sequence[Kernel]) -> list[dict[str, int]]:
    """What each needs: ``registers`` a thread, ``stack`` bytes a thread (spilled), ``shared`` bytes a block.

    In a process of its own: where Triton interprets (tests/conftest.py), it cannot compile. About 2 s, and 1 s a kernel.

    Raises:
        AssertionError: one does not compile; with what Triton and ptxas say.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(WORKERS / "ahead_of_time_worker.py")], input=json.dumps([asdict(one) for one in kernels]),
        env=environment, text=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found
