"""Score a file of predictions that anyone may have written, without any model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from dts_hf.errors import UserError, nearest, not_readable
from dts_hf.evaluation.text_metrics import best_rouge_l, exact_match, has_reference, repeats_ngram

REFERENCE_FIELDS = ("references", "reference", "output")


def score_file(path: str | Path) -> dict[str, Any]:
    """Score a JSONL file.

    Args:
        path: one object a line: ``prediction`` and its reference under ``references``, ``reference`` or ``output`` (a
            text or a list of texts, of which the best counts). ``set`` and ``seed``, as in ``predictions/`` of a run,
            say what belongs together; other fields are ignored.

    Returns:
        ``n`` rows, and the shares and means (0 to 1) ``rougeL``, ``exact_match``, ``empty`` (no text) and
        ``repeats_4gram``. Of several seeds: the means over ``seeds`` seeds, each of up to ``n`` rows. Of several sets:
        ``{"sets": {name: these}}``. Rows whose references are empty count in neither of the first two.

    Raises:
        UserError: no row of a set has a reference text, or the file or a line of it cannot be read; the message names
            the line.
    """
    passes: dict[str, dict[str, list[_Row]]] = {}
    for row in _read(Path(path)):
        passes.setdefault(row.set_name, {}).setdefault(row.seed, []).append(row)

    # The mean over seeds of means over rows, as `evaluate` has it: with a row missing from one pass, the passes still
    # count alike
    def scores(by_seed: dict[str, list[_Row]]) -> dict[str, Any]:
        each = [
            {
                "rougeL": statistics.fmean(best_rouge_l(row.prediction, row.references) for row in _compared(rows)),
                "exact_match": statistics.fmean(
                    exact_match(row.prediction, row.references) for row in _compared(rows)
                ),
                "empty": statistics.fmean(not row.prediction.strip() for row in rows),
                "repeats_4gram": statistics.fmean(repeats_ngram(row.prediction) for row in rows),
            }
            for rows in by_seed.values()
        ]
        counts = {"n": max(map(len, by_seed.values())), **({"seeds": len(each)} if len(each) > 1 else {})}
        return {**counts, **{measure: statistics.fmean(means[measure] for means in each) for measure in each[0]}}

    by_set = {name: scores(by_seed) for name, by_seed in passes.items()}
    return {"sets": by_set} if len(by_set) > 1 else next(iter(by_set.values()))


class _Row(NamedTuple):
    prediction: str
    references: list[str]
    set_name: str
    seed: str


def _compared(rows: list[_Row]) -> list[_Row]:
    """The rows that have something to compare an answer with, as ``evaluate_instruct`` has it."""
    compared = [row for row in rows if has_reference(row.references)]
    if not compared:
        raise UserError(f"none of the {len(rows)} rows has a reference with a text, expected at least one")
    return compared


def _read(path: Path) -> list[_Row]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a JSONL file of predictions")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file.{nearest(path.name, beside)}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {number}: not UTF-8 text, expected one JSON object a line") from None
    except OSError as error:
        raise not_readable(error, f"{path}: cannot be read: {error.strerror}") from None
    lines = enumerate(text.split("\n"), start=1)
    rows = [_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: no rows, expected one JSON object a line with 'prediction' and 'references'")
    return rows


def _row(line: str, where: str) -> _Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of levels
        raise UserError(f"{where}: broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: got {_excerpt(row)}, expected an object with 'prediction' and 'references'")
    if "prediction" not in row:
        raise UserError(f"{where}: no field 'prediction'.{nearest('prediction', row)}")
    if not isinstance(row["prediction"], str):
        raise UserError(f"{where}: prediction: got {_excerpt(row['prediction'])}, expected a text")
    name = next((field for field in REFERENCE_FIELDS if field in row), None)
    if name is None:
        raise UserError(f"{where}: no field 'references' (nor 'reference', 'output').{nearest('references', row)}")
    references = [row[name]] if isinstance(row[name], str) else row[name]
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise UserError(f"{where}: {name}: got {_excerpt(row[name])}, expected a text or a list of at least one text")
    return _Row(row["prediction"], references, str(row.get("set", "")), str(row.get("seed", "")))


def _excerpt(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
