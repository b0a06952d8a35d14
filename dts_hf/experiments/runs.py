"""Finished runs as ``compare`` reads them: what they were made with, and the scores of each of their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError
from dts_hf.experiments.identity import settings_of
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory

#: Of a whole set, and of each run one number, and whether more is better (None: neither more nor less is): the student on
#: held-out rows, in nats per label or a share; and against the teacher on text of its own, in nats per token.
DENSE: dict[str, tuple[str, bool | None]] = {
    "kl": ("held-out KL", False), "ce": ("held-out CE", False), "top1_agreement": ("top-1 agreement", True),
    "reverse_kl": ("held-out reverse KL", False), "ece": ("held-out calibration error", False),
    "entropy": ("held-out entropy", None), "own_kl": ("KL on own text", False),
    "own_reverse_kl": ("reverse KL on own text", False),
}  # fmt: skip
#: Those of ``DENSE`` that are on the student's own text; they can be compared where it was asked the same.
OF_OWN_TEXT = {"own_kl": "kl", "own_reverse_kl": "reverse_kl"}
#: Of each answer, and whether more is better.
OF_ANSWERS: dict[str, tuple[str, bool | None]] = {
    "rougeL": ("ROUGE-L", True), "tokens": ("length in tokens", None), "distinct_1": ("distinct-1 of each answer", None),
    "distinct_2": ("distinct-2 of each answer", None),
}  # fmt: skip
#: An answer that is too short has none.
MAY_LACK = ("distinct_1", "distinct_2")
#: What a score is multiplied by where it is shown in another unit.
SCALES = {"rougeL": 100.0}


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
        own_text: fingerprint of how text of the student's own was asked for.
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
    own_text: str = ""


def read_run(path: Path) -> Run:
    """The run in ``path``; one that did not end, or whose scores are no numbers, has ``failed``.

    Raises:
        UserError: it is no run directory, or its files are damaged.
    """
    run = RunDirectory.open(path)
    recipe = run.read_recipe()
    seed, settings = seed_of(recipe), settings_of(recipe)
    metrics, where = run.read_metrics(), run.metrics_path
    student = _part(_part(metrics, "models", where), "student", where)
    if not student:
        return Run(path, settings, seed, failed="it has not ended" if not metrics else "its student was not scored")
    scores = _part(student, "teacher_forced", where)
    dense = {key: _number(scores[key], key, where) for key in DENSE if key in scores}
    own = _part(student, "own_text", where)
    dense |= {key: _number(own[name], f"own_text.{name}", where) for key, name in OF_OWN_TEXT.items() if name in own}
    answers = _answers(run)
    broken = [key for key, value in dense.items() if not math.isfinite(value)]
    failed = f"its {broken[0]} is {dense[broken[0]]}" if broken else ""
    seconds = _number(_part(metrics, "training", where).get("seconds"), "training.seconds", where)
    protocol = str(_part(metrics, "protocol", where).get("fingerprint", ""))
    return Run(path, settings, seed, failed, protocol, answers, dense, seconds, str(own.get("fingerprint", "")))


def seed_of(recipe: Recipe) -> int:
    """The seed of training: ``recipe.seed``."""
    return recipe.seed


def _part(values: Mapping[str, Any], name: str, where: Path) -> Mapping[str, Any]:
    """A mapping of ``metrics.json``, empty where there is none."""
    found = values.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise UserError(f"{where}: {name}: got {found!r}, expected a mapping: the file is damaged")
    return found or {}


def _number(value: Any, name: str, where: Path) -> float:
    """A score; null, as which a file of JSON has what is not finite, is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {name}: got {value!r}, expected a number: the file is damaged")
    return float(value)


def _answers(run: RunDirectory) -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    found: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    where = run.predictions_of("student")
    for line, row in enumerate(run.read_predictions("student") if run.has_predictions("student") else (), start=1):
        seed = row.get("seed") or 0
        if "id" not in row or "set" not in row or not isinstance(seed, int):
            raise UserError(
                f"{where}: answer {line}: expected set, id and a whole number as seed: the file is damaged"
            )
        for measure in OF_ANSWERS:
            if row.get(measure) is None:
                continue
            place = found.setdefault(str(row["set"]), {}).setdefault(measure, {})
            if (key := (str(row["id"]), seed)) in place:
                raise UserError(f"{where}: answer {line}: row {key[0]!r} is there twice with the seed {seed}")
            place[key] = SCALES.get(measure, 1.0) * _number(row[measure], f"answer {line}: {measure}", where)
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
        return ["all"] if len(kinds) == 1 else [f"all ({number})" for number in range(1, len(kinds) + 1)]
    names = [", ".join(f"{_short(key)}={kind[key]}" for key in telling if kind.get(key) is not None) for kind in kinds]
    # What is set by one kind alone, or to '1' and 1, leaves others without a name, or with the same one
    names = [name or f"without {', '.join(_short(key) for key in telling)}" for name in names]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})" for k, name in enumerate(names)
    ]


def _short(key: str) -> str:
    """The key without what says nothing: ``temperature`` for ``temperature.name``."""
    return key.removesuffix(".name").removeprefix("training.").removeprefix("loss.")
