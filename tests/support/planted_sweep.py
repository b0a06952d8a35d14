"""A study whose runs train nothing and take moments, for tests of what starts them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dts_hf.experiments.sweep import Planned, Study

WORKER = Path(__file__).parents[1] / "workers/planted_run.py"
STEPS = 5  # of a run


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


def with_scores(study: Planted, temperatures: Sequence[float] = (1.0, 2.0)) -> Planted:
    """Give every run a recipe and scores, for ``compare``: the temperatures by turns, and with each the seeds 1, 2, 3 ..."""
    from tests.support.recipes import recipe  # loads torch, which a sweep does without

    chance = random.Random(7)
    for number, run in enumerate(study.runs):
        turn, kind = divmod(number, len(temperatures))
        made = recipe(temperature={"name": "constant", "value": temperatures[kind]}, training={"seed": turn + 1})
        scores = {"kl": temperatures[kind] / 10 + chance.gauss(0, 0.01), "ce": 2.0, "top1_agreement": 0.5}
        metrics = {"format": 1, "models": {"student": {"teacher_forced": scores}}, "training": {"seconds": 1.0}}
        place = study.folder / ".planted" / run.path.name
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.yaml").write_text(made.to_yaml())
        (place / "metrics.json").write_text(json.dumps(metrics))
    return study


def noted(folder: Path, what: str) -> Counter[str]:
    """How often each run has come to a step, or to its end."""
    path = folder / f"{what}.txt"
    return Counter(path.read_text().split() if path.is_file() else [])


SWEEP = """
import sys
from pathlib import Path
from tests.support.planted_sweep import planted
from dts_hf.experiments.sweep import Sweep
study = planted(Path(sys.argv[1]), count=int(sys.argv[2]), seconds=float(sys.argv[3]))
Sweep(study, study.runs, jobs=2, retries=int(sys.argv[4])).run()
"""


def start(folder: Path, count: int, seconds: float, retries: int = 1) -> subprocess.Popen[bytes]:
    """A sweep of ``planted(folder, count, seconds)`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder), str(count), str(seconds), str(retries)],
        cwd=Path(__file__).parents[2], start_new_session=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def processes_of(folder: Path) -> list[int]:
    """The runs at work in ``folder``, by what Linux says of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and WORKER.name.encode() in words:
            found.append(int(path.parent.name))
    return found


def send(process: int, number: signal.Signals) -> None:
    """Send a signal to a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
