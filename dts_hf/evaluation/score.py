"""Score a file of predictions that anyone may have written, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError, nearest
from dts_hf.evaluation.text import exact_match, repeats_ngram

REFERENCE_FIELDS = ("references", "reference", "output")


def score_file(path: str | Path) -> dict[str, Any]:
    """Score a JSONL file.

    Args:
        path: one object a line: ``prediction`` and its reference under ``references``, ``reference`` or ``output`` (a
            text or a list of texts, of which the best counts). Other fields are ignored.

    Returns:
        ``n`` rows, and the shares and means (0 to 1) ``rougeL``, ``exact_match``, ``empty`` (no text) and
        ``repeats_4gram``.

    Raises:
        UserError: the file or a line of it cannot be read; the message names the line.
    """
    from dts_hf.evaluation.rouge import best_rouge_l  # loads nltk

    predictions, references = _read(Path(path))
    n = len(predictions)
    return {
        "n": n,
        "rougeL": sum(map(best_rouge_l, predictions, references)) / n,
        "exact_match": sum(map(exact_match, predictions, references)) / n,
        "empty": sum(not text.strip() for text in predictions) / n,
        "repeats_4gram": sum(map(repeats_ngram, predictions)) / n,
    }


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
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
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    predictions, references = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            prediction, row_references = _row(line, f"{path}, line {number}")
            predictions.append(prediction)
            references.append(row_references)
    if not predictions:
        raise UserError(f"{path}: no rows, expected one JSON object a line with 'prediction' and 'references'")
    return predictions, references


def _row(line: str, where: str) -> tuple[str, list[str]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: got {_shown(row)}, expected an object with 'prediction' and 'references'")
    if "prediction" not in row:
        raise UserError(f"{where}: no field 'prediction'.{nearest('prediction', row)}")
    if not isinstance(row["prediction"], str):
        raise UserError(f"{where}: prediction: got {_shown(row['prediction'])}, expected a text")
    name = next((field for field in REFERENCE_FIELDS if field in row), None)
    if name is None:
        raise UserError(f"{where}: no field 'references' (nor 'reference', 'output').{nearest('references', row)}")
    found = [row[name]] if isinstance(row[name], str) else row[name]
    if not isinstance(found, list) or not found or not all(isinstance(reference, str) for reference in found):
        raise UserError(f"{where}: {name}: got {_shown(row[name])}, expected a text or a list of at least one text")
    return row["prediction"], found


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
