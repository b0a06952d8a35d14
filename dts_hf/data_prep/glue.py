"""Prepare the nine GLUE tasks: train and validation rows with the fields and labels of Hugging Face's `glue`.

    dts-hf prepare glue --output data/                                    # nyu-mll/glue from the Hub, all tasks
    dts-hf prepare glue --source GLUE_FOLDER --tasks sst2,rte             # GLUE's TSV files, or zips of them

The source has, for each task, Parquet files (`sst2/validation-00000-of-00001.parquet`), GLUE's own `SST-2/dev.tsv` in
folders or in `SST-2.zip`, or rows of our format (`sst2/validation.jsonl`, also gzipped). A row is
`{id, idx, <fields>, label}`; labels count from 0 in the order of the table in the README (a float for STS-B).
GLUE's test rows have no public labels and are not written. TSV files are read without quoting rules, lines with too few
fields (three of QQP's) are dropped and counted.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts_hf.data_prep.arguments import parser, run
from dts_hf.data_prep.download import Source
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.lengths import JsonObject
from dts_hf.data_prep.reading import objects, zip_texts
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError, nearest
from dts_hf.evaluation.benchmark_sets import KNOWN_SETS


@dataclass(frozen=True)
class Task:
    """``columns``: our field -> column of GLUE's TSV (a number where the file has no header)."""

    folder: str
    columns: dict[str, str | int]
    label: str | int
    labels: tuple[str, ...] | None
    licence: str


ENTAILMENT = ("entailment", "not_entailment")
UNKNOWN = "no licence of its own; research use"
TASKS = {
    "cola": Task("CoLA", {"sentence": 3}, 1, ("0", "1"), "text copyright with its authors; research use"),
    "sst2": Task("SST-2", {"sentence": "sentence"}, "label", ("0", "1"), UNKNOWN),
    "mrpc": Task("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality", ("0", "1"),
                 "Microsoft Research's own terms"),
    "stsb": Task("STS-B", {"sentence1": "sentence1", "sentence2": "sentence2"}, "score", None,
                 "scores CC BY-SA 4.0, texts under their own terms"),
    "qqp": Task("QQP", {"question1": "question1", "question2": "question2"}, "is_duplicate", ("0", "1"),
                "Quora's terms of service"),
    "mnli": Task("MNLI", {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label",
                 ("entailment", "neutral", "contradiction"), UNKNOWN),
    "qnli": Task("QNLI", {"question": "question", "sentence": "sentence"}, "label", ENTAILMENT, UNKNOWN),
    "rte": Task("RTE", {"sentence1": "sentence1", "sentence2": "sentence2"}, "label", ENTAILMENT, UNKNOWN),
    "wnli": Task("WNLI", {"sentence1": "sentence1", "sentence2": "sentence2"}, "label", ("0", "1"), UNKNOWN),
}  # fmt: skip
OTHER_ZIPS = {"qqp": ("QQP-clean.zip",), "qnli": ("QNLIv2.zip",)}  # as GLUE's own server calls them
TSV_NAMES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


def check(name: str, split: str, rows: Iterator[tuple[str, Any]], task: Task) -> list[JsonObject]:
    """Rows in our format.

    Args:
        name: of the task; it begins the ids.
        split: of the rows; it stands behind the name.
        rows: (place, row) of the source.
        task: what a row must have.

    Raises:
        UserError: a field is missing, a label is out of range, or an index appears twice.
    """
    kept: list[JsonObject] = []
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with {', '.join(task.columns)}, label")
        for field in task.columns:
            if field not in row:
                raise UserError(f"{where}: no field '{field}'; found {', '.join(map(repr, row))[:200] or 'none'}")
            if not isinstance(row[field], str):
                raise UserError(f"{where}: field '{field}': got {row[field]!r}, expected text")
        index = row.get("idx", number)
        row_id = f"{name}-{split}-{index}"
        if row_id in seen:
            raise UserError(f"{where}: idx {index} is already used by {seen[row_id]}")
        seen[row_id] = where
        label = _label(row.get("label"), task, where)
        kept.append({"id": row_id, "idx": index} | {field: row[field] for field in task.columns} | {"label": label})
    return kept


def _label(value: Any, task: Task, where: str) -> int | float:
    if task.labels is None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 5:
            raise UserError(f"{where}: field 'label': got {value!r}, expected a number from 0 to 5")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(task.labels):
        raise UserError(f"{where}: field 'label': got {value!r}, expected a whole number below {len(task.labels)}")
    return value


def read_tsv(content: bytes, name: str, task: Task, job: Job) -> Iterator[tuple[str, JsonObject]]:
    """Rows of one of GLUE's TSV files; ``idx`` counts the file's rows from 0, dropped ones included.

    Args:
        content: the bytes of the file.
        name: what messages call it.
        task: its columns and labels.
        job: counts the lines that are dropped.

    Raises:
        UserError: it is not UTF-8, or lacks a column.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start + 1} is not UTF-8") from None
    # Not splitlines and not the csv module: both see line ends and quotes inside GLUE's sentences.
    lines = io.StringIO(text, newline="\n")
    header: list[str] | None = None
    if isinstance(task.label, str):
        header = next(lines, "").rstrip("\r\n").split("\t")
        missing = {*task.columns.values(), task.label} - {*header}
        if missing:
            raise UserError(
                f"{name}: line 1: no column {', '.join(map(repr, sorted(map(str, missing))))}; found"
                f" {', '.join(map(repr, header))[:200]}"
            )
    for index, line in enumerate(lines):
        where = f"{name}: line {index + (2 if header else 1)}"
        cells = line.rstrip("\r\n").split("\t")

        def cell(column: str | int, cells: list[str] = cells) -> str | None:
            place = header.index(str(column)) if header else int(column)
            return cells[place] if place < len(cells) else None

        found = {field: cell(column) for field, column in task.columns.items()}
        label = cell(task.label)
        if label is None or None in found.values():
            job.dropped["line with too few fields"] += 1
            continue
        yield where, {"idx": index, **found, "label": _tsv_label(label, task, where)}


def _tsv_label(text: str, task: Task, where: str) -> int | float:
    if task.labels is not None:
        if text not in task.labels:
            raise UserError(f"{where}: label: got {text!r}, expected {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:
        raise UserError(f"{where}: label: got {text!r}, expected a number from 0 to 5")
    return value


def read(job: Job, task_name: str, split: str, task: Task) -> Iterator[tuple[str, Any]]:
    """The rows of a split, in whichever of the layouts the source has.

    Args:
        job: has the source.
        task_name: which task.
        split: which of its rows.
        task: its folder and columns in GLUE's own files.
    """
    tsv = TSV_NAMES[split]
    parquet = [f"{task_name}/{split}-00000-of-00001.parquet", f"{task_name}/{split}.parquet"]
    rows = [f"{task_name}/{split}.jsonl", f"{task_name}/{split}.jsonl.gz"]
    tables = [f"{task.folder}/{tsv}", f"{task_name}/{tsv}"]
    zips = [f"{task.folder}.zip", *OTHER_ZIPS.get(task_name, ())]
    names = {"hub": parquet, "url": zips}.get(job.source.kind) or [*rows, *parquet, *tables, *zips]
    path = job.source.get(*names)
    if path.suffix == ".zip":
        yield from _from_zip(job, path, task, tsv)
    elif path.suffix == ".tsv":
        yield from read_tsv(path.read_bytes(), str(path), task, job)
    else:
        yield from objects(path)


def _from_zip(job: Job, path: Path, task: Task, tsv: str) -> Iterator[tuple[str, Any]]:
    found = [(name, content) for name, content in zip_texts(path) if name in (f"{task.folder}/{tsv}", tsv)]
    if not found:
        raise UserError(f"{path}: there is no {task.folder}/{tsv} in this zip")
    yield from read_tsv(found[0][1], f"{path}: {found[0][0]}", task, job)


def prepare(arguments: argparse.Namespace) -> None:
    """Write train and validation rows of every task that is asked for.

    Raises:
        UserError: the source, its counts or the options are wrong; nothing was written.
    """
    names = list(TASKS) if arguments.tasks == "all" else arguments.tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: got '{name}', expected {', '.join(TASKS)} or all.{nearest(name, TASKS)}")
    if arguments.checksum and len(names) > 1:
        raise UserError("--checksum: one checksum cannot hold for several tasks; give one task with --tasks")
    for name in names:
        task = TASKS[name]
        source = Source(arguments.source, arguments.output / ".downloads", arguments.revision, arguments.checksum)
        job = Job(f"glue/{name}", arguments, task.licence, source)
        splits = [split for split in KNOWN_SETS[job.name].rows if split not in arguments.without.split(",")]
        job.rules.append("labels of Hugging Face's glue: " + ", ".join(task.labels or ("a number from 0 to 5",)))
        job.write({split: check(name, split, read(job, name, split, task), task) for split in splits})


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare glue``."""
    made = parser(__doc__, UPSTREAM["glue"])
    made.add_argument("--tasks", default="all", help="comma-separated, of " + ", ".join(TASKS))
    made.add_argument("--without", default="", metavar="SPLITS", help="splits to leave out, such as train")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
