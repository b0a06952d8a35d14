"""Finished runs as ``compare`` reads them: what they were made with, and the scores of each of their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from dts_hf.errors import UserError
from dts_hf.experiments.identity import settings_of
from dts_hf.recipe.schema import Recipe, Source
from dts_hf.runs.directory import RunDirectory

#: What a measure is called, and whether more is better; None: neither more nor less is.
Measure: TypeAlias = tuple[str, bool | None]
#: Of a whole set, and of each run one number: the student on held-out rows, in nats per label or a share.
DENSE: dict[str, Measure] = {
    "kl": ("held-out KL", False), "ce": ("held-out CE", False), "top1_agreement": ("top-1 agreement", True),
    "reverse_kl": ("held-out reverse KL", False), "ece": ("held-out calibration error", False),
    "entropy": ("held-out entropy", None),
}  # fmt: skip
#: The student against its teacher on text of its own, in nats per token; comparable where it was asked for alike.
OF_OWN_TEXT: dict[str, Measure] = {
    "own_kl": ("KL on own text", False),
    "own_reverse_kl": ("reverse KL on own text", False),
}
HELD_OUT, OWN_TEXT = "held out", "own text"
#: Of each answer.
OF_ANSWERS: dict[str, Measure] = {
    "rougeL": ("ROUGE-L", True), "accuracy": ("accuracy", True), "tokens": ("length in tokens", None),
    "distinct_1": ("distinct-1 of each answer", None), "distinct_2": ("distinct-2 of each answer", None),
}  # fmt: skip
#: An answer that is too short has none.
MAY_LACK = ("distinct_1", "distinct_2")
#: Scores of answers that are shown in points of 100.
IN_PERCENT = ("rougeL", "accuracy")
#: Of a set that a classifier is scored on, and of each run one number, x 100; accuracy has a score of each row.
OF_CLASSES: dict[str, Measure] = {
    "f1": ("F1", True), "matthews_correlation": ("Matthews correlation", True), "pearson": ("Pearson correlation", True),
    "spearmanr": ("Spearman correlation", True),
}  # fmt: skip
#: The same, in nats per row, squared, or as a share.
OF_CLASSES_AS_THEY_ARE: dict[str, Measure] = {
    "label_ce": ("held-out CE of the labels", False), "label_mse": ("held-out squared error", False),
    "teacher_kl": ("held-out KL from the teacher", False), "teacher_agreement": ("agreement with the teacher", True),
}  # fmt: skip
#: Measures of which a run has one number.
OF_RUNS = {**DENSE, **OF_OWN_TEXT, **OF_CLASSES, **OF_CLASSES_AS_THEY_ARE, "accuracy": OF_ANSWERS["accuracy"]}
#: Keys of a recipe that name rows.
OF_ROWS = ("data.train", "data.validation", "evaluation.sets")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: of the run.
        settings: its recipe as ``{dotted key: value}``, without what has no effect and without seeds.
        seed: of training.
        failed: why it has no scores; empty where it has.
        protocol: fingerprint of how answers were made.
        answers: ``{set: {measure: {(row, generation seed): score}}}``; ROUGE-L and accuracy in points of 100.
        numbers: ``{set: {measure: number}}``, of which a run has one; ``HELD_OUT`` for the student beside its teacher on
            the data's text, ``OWN_TEXT`` on its own.
        seconds: of training.
        rows: digests of its rows as it has recorded them, by key of the recipe.
        own_text: fingerprint of how text of the student's own was asked for.
    """

    path: Path
    recipe: Recipe = field(repr=False)
    settings: Mapping[str, Any]
    seed: int
    failed: str = ""
    protocol: str = ""
    answers: Mapping[str, Mapping[str, Mapping[tuple[str, int], float]]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = math.nan
    rows: Mapping[str, Any] = field(default_factory=dict)
    own_text: str = ""


def read_run(path: Path) -> Run:
    """The run in ``path``; one that did not end, or whose scores are no numbers, has ``failed``.

    Raises:
        UserError: it is no run directory, or its files are damaged.
    """
    run = RunDirectory.open(path)
    recipe = run.read_recipe()
    seed, settings, rows = recipe.seed, settings_of(recipe), _recorded_rows(run, recipe)
    metrics, where = run.read_metrics(), run.metrics_path
    student = _part(_part(metrics, "models", where), "student", where)
    if not student:
        failed = "it has not ended" if not metrics else "its student was not scored"
        return Run(path, recipe, settings, seed, failed=failed, rows=rows)
    scores = _part(student, "teacher_forced", where)
    dense = {key: _number(scores[key], key, where) for key in DENSE if key in scores}
    answers = _answers(run)
    own = _part(student, "own_text", where)
    of_own = {key: key.removeprefix("own_") for key in OF_OWN_TEXT}
    said = {key: _number(own[name], f"own_text.{name}", where) for key, name in of_own.items() if name in own}
    numbers = {HELD_OUT: dense, OWN_TEXT: said, **_of_classes(_part(student, "sets", where), answers, where)}
    broken = [(key, value) for of_set in numbers.values() for key, value in of_set.items() if not math.isfinite(value)]
    failed = f"its {broken[0][0]} is {broken[0][1]}" if broken else ""
    seconds = _number(_part(metrics, "training", where).get("seconds"), "training.seconds", where)
    protocol = str(_part(metrics, "protocol", where).get("fingerprint", ""))
    asked = str(own.get("fingerprint", ""))
    return Run(path, recipe, settings, seed, failed, protocol, answers, numbers, seconds, rows, asked)


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


def _recorded_rows(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """What ``data_manifest.json`` says of the rows, by key of the recipe: they may lie elsewhere now, or be others."""
    manifest, where = run.read_data_manifest(), run.data_manifest_path
    splits = _part(manifest, "splits", where)
    found: dict[str, Any] = {}
    for name, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        # A share that is held out is no place, and its digest is that of the whole file
        if isinstance(sources, (str, list, Source)) and (digest := _part(splits, name, where).get("sha256")):
            found[f"data.{name}"] = digest
    sets = _part(manifest, "evaluation_sets", where)
    digests = [_part(sets, name, where).get("sha256") for name in sets]
    return found | ({"evaluation.sets": digests} if digests and all(digests) else {})


def _of_classes(
    sets: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]], where: Path
) -> dict[str, dict[str, float]]:
    """The numbers of a classifier; accuracy among them where no predictions give it row by row."""
    found: dict[str, dict[str, float]] = {}
    for name in sets:
        entry = _part(sets, name, where)
        for key in OF_RUNS:
            if (
                key in DENSE
                or key in OF_OWN_TEXT
                or key not in entry
                or (key == "accuracy" and key in answers.get(name, {}))
            ):
                continue
            value = _number(_part(entry, key, where).get("mean"), f"{name}: {key}", where)
            found.setdefault(name, {})[key] = value * (1 if key in OF_CLASSES_AS_THEY_ARE else 100)
    return found


def _answers(run: RunDirectory) -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    found: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    where = run.predictions_of("student")
    for line, row in enumerate(run.read_predictions("student") if run.has_predictions("student") else (), start=1):
        seed = row.get("seed") or 0
        if "id" not in row or "set" not in row or not isinstance(seed, int):
            raise UserError(
                f"{where}: answer {line}: expected set, id and a whole number as seed: the file is damaged"
            )
        for measure, score in _scores_of(row).items():
            place = found.setdefault(str(row["set"]), {}).setdefault(measure, {})
            if (key := (str(row["id"]), seed)) in place:
                raise UserError(f"{where}: answer {line}: row {key[0]!r} is there twice with the seed {seed}")
            scale = 100.0 if measure in IN_PERCENT else 1.0
            place[key] = scale * _number(score, f"answer {line}: {measure}", where)
            if not math.isfinite(place[key]):  # 1e999
                raise UserError(f"{where}: answer {line}: {measure}: got {score}, expected a finite number")
    return found


def _scores_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of one answer; a classifier's class is right or wrong, and what a regression says is neither."""
    label, chosen = row.get("label"), row.get("predicted")
    is_class = isinstance(label, int) and isinstance(chosen, int)
    found = {"accuracy": int(label == chosen)} if is_class else {}
    of_text = (measure for measure in OF_ANSWERS if measure != "accuracy")
    return found | {measure: row[measure] for measure in of_text if row.get(measure) is not None}


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
