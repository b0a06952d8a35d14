"""Finished runs as ``compare`` reads them: what they were made with, and the scores of each of their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError
from dts_hf.experiments.identity import settings_of
from dts_hf.runs.directory import RunDirectory

#: Of a whole set, and of each run one number: the student against the teacher on held-out rows, in nats per label.
DENSE = {"kl": ("held-out KL", False), "ce": ("held-out CE", False), "top1_agreement": ("top-1 agreement", True)}
#: Of each answer, and whether more is better.
OF_ANSWERS = {"rougeL": ("ROUGE-L", True)}


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: of the run.
        settings: its recipe as ``{dotted key: value}``, without what has no effect and without seeds.
        seed: of training.
        failed: why it has no scores; empty where it has.
        protocol: fingerprint of how answers were made.
        answers: ``{set: {measure: {(row, generation seed): score}}}``; ROUGE-L in points of 100.
        dense: ``{measure: number}`` of the whole held-out set.
        seconds: of training.
    """

    path: Path
    settings: Mapping[str, Any]
    seed: int
    failed: str = ""
    protocol: str = ""
    answers: Mapping[str, Mapping[str, Mapping[tuple[str, int], float]]] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan


def read_run(path: Path) -> Run:
    """The run in ``path``; one that did not end, or whose scores are no numbers, has ``failed``.

    Raises:
        UserError: it is no run directory, or its files are damaged.
    """
    run = RunDirectory.open(path)
    recipe = run.read_recipe()
    seed, settings = int(recipe.training.get("seed") or 42), settings_of(recipe)
    metrics = run.read_metrics()
    student = (metrics.get("models") or {}).get("student")
    if not student:
        return Run(path, settings, seed, failed="it has not ended" if not metrics else "its student was not scored")
    dense = {key: float(value) for key, value in (student.get("teacher_forced") or {}).items() if key in DENSE}
    answers = _answers(run)
    broken = [key for key, value in dense.items() if not math.isfinite(value)]
    failed = f"its {broken[0]} is {dense[broken[0]]}" if broken else ""
    training = metrics.get("training") or {}
    protocol = str((metrics.get("protocol") or {}).get("fingerprint", ""))
    return Run(path, settings, seed, failed, protocol, answers, dense, float(training.get("seconds", math.nan)))


def _answers(run: RunDirectory) -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    found: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for row in run.read_predictions("student") if run.has_predictions("student") else ():
        for measure in OF_ANSWERS:
            if isinstance(row.get(measure), (int, float)):
                place = found.setdefault(str(row["set"]), {}).setdefault(measure, {})
                place[str(row["id"]), int(row.get("seed") or 0)] = 100 * float(row[measure])
    return found


def names_of_kinds(kinds: list[Mapping[str, Any]]) -> list[str]:
    """What tells each kind of runs from the others, such as ``temperature.value=2``.

    Args:
        kinds: the settings of each.

    Raises:
        UserError: there are none.
    """
    if not kinds:
        raise UserError("compare: got no runs")
    keys = sorted({key for kind in kinds for key in kind})
    telling = [key for key in keys if any(kind.get(key) != kinds[0].get(key) for kind in kinds)]
    # The name of a policy says more than the options that come with it: it stands first
    telling.sort(key=lambda key: (not key.endswith(".name"), key))
    if not telling:
        return ["all"] * len(kinds)
    return [", ".join(f"{_short(key)}={kind[key]}" for key in telling if kind.get(key) is not None) for kind in kinds]


def _short(key: str) -> str:
    """The key without what says nothing: ``temperature`` for ``temperature.name``."""
    return key.removesuffix(".name").removeprefix("training.").removeprefix("loss.")
