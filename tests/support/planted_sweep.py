"""A study whose runs train nothing and take moments, for tests of what starts them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from dts_hf.experiments.sweep import Planned, Study

WORKER = Path(__file__).parents[1] / "workers/planted_run.py"


@dataclass(frozen=True)
class Planted(Study):
    """A study whose runs take moments, and of which those called so fail."""

    seconds: float = 0.05

    def command(self, run: Planned) -> list[str]:
        outcome = "fails" if run.label == "fails" else "ends"
        return [sys.executable, str(WORKER), str(run.path), str(self.seconds), outcome]


def planted(folder: Path, count: int = 4, seconds: float = 0.05, failing: int = 0) -> Planted:
    labels = [f"run {number}" for number in range(count)] + ["fails"] * failing
    runs = [Planned(f"{number:010}", label, (), folder / f"run-{number}") for number, label in enumerate(labels)]
    return Planted("recipe.yaml", folder, runs, seconds)
