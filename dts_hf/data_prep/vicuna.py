"""Prepare VicunaEval: the 80 Vicuna questions with the references of MiniLLM's release.

    dts-hf prepare vicuna --output data/                                  # MiniLLM/Vicuna from the Hub
    dts-hf prepare vicuna --source question.jsonl --answers answers.jsonl

Takes rows of MiniLLM's or our format, or FastChat's questions ({question_id, turns} or {question_id, text}) with
`--answers`: FastChat answers ({question_id, text} or {question_id, choices}), or rows of MiniLLM's or our format with
the same questions. There is no length rule. The references are a language model's: do not train on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dts_hf.data_prep.arguments import parser, run
from dts_hf.data_prep.download import Source
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.reading import objects
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError

NAMES = ("valid.jsonl", "test.jsonl", "question.jsonl")  # in a folder


def question(row: Any) -> str | None:
    """The text of a FastChat question; None for a row that is none."""
    if not isinstance(row, dict) or "question_id" not in row:
        return None
    turns = row.get("turns")
    text = turns[0] if isinstance(turns, list) and turns else row.get("text")
    return text if isinstance(text, str) else None


def answer(row: Any) -> Any:
    """The text of a FastChat answer, its first turn; of a row of our format, its output."""
    try:
        return row["choices"][0]["turns"][0] if "choices" in row else row.get("text", row.get("output"))
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def read(path: Path, answers: Path | None) -> Iterator[tuple[str, Any]]:
    """Rows; FastChat's questions are joined with their answers.

    Raises:
        UserError: a question has no answer.
    """
    by_id: dict[Any, Any] = {}
    for _, row in objects(answers) if answers else ():
        if isinstance(row, dict):
            by_id[row.get("question_id", row.get("instruction"))] = answer(row)
    for where, row in objects(path):
        text = question(row)
        if text is None:
            yield where, row
            continue
        if answers is None:
            raise UserError(f"{where}: FastChat's questions have no references; give them with --answers FILE")
        reference = by_id.get(row["question_id"], by_id.get(text))
        if reference is None:
            raise UserError(f"{where}: {answers} has no answer to question {row['question_id']!r}")
        yield (
            where,
            {
                "id": f"vicuna-{row['question_id']}",
                "instruction": text,
                "input": "",
                "output": reference,
                "category": row.get("category"),
            },
        )


def prepare(arguments: argparse.Namespace) -> None:
    """Write the test rows."""
    job = Job("vicuna", arguments)
    path = job.source.get(*NAMES)
    job.note_edition(path)
    answers = None
    if arguments.answers:
        other = Source(arguments.answers, arguments.output / ".downloads")
        answers = other.get("valid.jsonl", "test.jsonl")
        job.source.files += other.files
    job.write({"test": job.clean(read(path, answers), "vicuna")})


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare vicuna``."""
    made = parser(__doc__, UPSTREAM["vicuna"])
    made.add_argument("--answers", metavar="FILE", help="references for FastChat's questions: path, URL or Hub name")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
