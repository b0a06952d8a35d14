"""Prepare Dolly in MiniLLM's split: 11,435 rows to train on, 1,000 to choose checkpoints by, 500 to report.

    dts-hf prepare dolly --output data/                                    # MiniLLM/dolly from the Hub
    dts-hf prepare dolly --source FOLDER --tokenizer GPT2_FOLDER           # raw.jsonl and valid.jsonl
    dts-hf prepare dolly --source databricks-dolly-15k.jsonl --test valid.jsonl --allow-other-counts
    dts-hf prepare dolly --source databricks-dolly-15k.jsonl --own-split --allow-other-counts

Where the split comes from: MiniLLM's authors dropped the rows of databricks-dolly-15k (15,011) whose prompt has more
than 256 GPT-2 tokens, took 500 at random as the test set (`valid.jsonl` of their release) and published the rest
(`raw.jsonl`, 12,435) in a fixed order; their tool takes its first 1,000 lines as the development set. The random choice
cannot be repeated from Databricks' file, so that file needs `--test` (those 500 rows; they are taken out of the rest,
and at least 99 % of them must be found there) or `--own-split` (another test set, whose scores do not compare with
published ones; the manifest says so).
A folder with train, valid and test files in our row format is taken as it is split.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from dts_hf.data_prep.arguments import parser, run, with_tokenizer
from dts_hf.data_prep.download import Source
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.lengths import JsonObject
from dts_hf.data_prep.reading import objects
from dts_hf.data_prep.same_question import identity, without
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError

DEV_ROWS = 1_000
TEST_ROWS = 500
#: Of the test rows so many must be in Databricks' file. Of MiniLLM's 500 all are, but for a row in a thousand that the
#: later edition lacks; fewer are another test set, or an edition in other words whose rows would stay in train unseen.
MIN_FOUND = 0.99


def read(path: Path) -> list[tuple[str, JsonObject]]:
    """Rows of Databricks' file (context, response), of MiniLLM's or of ours (input, output)."""
    renamed = {"context": "input", "response": "output"}
    return [
        (where, {str(renamed.get(key, key)): value for key, value in row.items()} if isinstance(row, dict) else row)
        for where, row in objects(path)
    ]


def prepare(arguments: argparse.Namespace) -> None:
    """Write train, valid and test.

    Raises:
        UserError: the source, its counts or the options are wrong; nothing was written.
    """
    if arguments.test and arguments.own_split:
        raise UserError("--test and --own-split: give one of them, they both choose the test rows")
    job = Job("dolly", arguments)
    job.rules.append(f"tool's order kept: the first {DEV_ROWS:,} lines of the training file are the valid split")
    if job.source.is_single_file:
        splits = from_databricks(job, arguments.test, arguments.own_split)
    elif (train := job.source.find("raw.jsonl", "raw.jsonl.gz")) is not None:
        rows = job.clean(read(train), "dolly")
        test = job.clean(read(job.source.get("valid.jsonl", "valid.jsonl.gz")), "dolly-test")
        splits = {"train": rows[DEV_ROWS:], "valid": rows[:DEV_ROWS], "test": test}
    else:
        job.rules[:] = ["split as in the source"]
        splits = {}
        for split in ("train", "valid", "test"):
            file = job.source.get(f"{split}.jsonl", f"{split}.jsonl.gz")
            splits[split] = job.clean(read(file), f"dolly-{split}")
    job.write({split: job.drop_long_prompts(rows, split) for split, rows in splits.items()})


def from_databricks(job: Job, test_file: str | None, own_split: bool) -> dict[str, list[JsonObject]]:
    """The splits of Databricks' file, which does not say which rows are the test set.

    Raises:
        UserError: nothing else says it, or too few of the test rows are in the file.
    """
    everything = job.clean(read(job.source.get()), "dolly")
    # MiniLLM filtered before it split, so the first 1,000 are counted among the rows that stay.
    rows = job.drop_long_prompts(everything)
    if own_split:
        first, last = DEV_ROWS, DEV_ROWS + TEST_ROWS
        job.rules[:] = [
            f"OUR OWN split, not MiniLLM's: rows 1 to {first:,} are valid, {first + 1:,} to {last:,} test, the rest train",
            *job.rules[1:],
        ]
        return {"train": rows[last:], "valid": rows[:first], "test": rows[first:last]}
    if test_file is None:
        raise UserError(
            f"--source: {job.source.text}: Databricks' file does not say which rows are the test set. Give MiniLLM's"
            " 500 rows with --test valid.jsonl, or use --own-split (scores then do not compare with published ones)"
        )
    other = Source(test_file, job.arguments.output / ".downloads")
    test = job.clean(read(other.get("valid.jsonl", "test.jsonl")), "dolly-test")
    job.source.files += other.files
    job.rules.append(found_words(everything, test, job.arguments.allow_missing_test_rows))
    rest = without(rows, {key for row in test for key in identity(row)})
    if len(rest) < len(rows):
        job.dropped["the question of a test row"] += len(rows) - len(rest)
    job.rules.append(
        "rows with the question of a test row (letters and digits compared) left out of train and valid, or with its"
        " instruction and answer"
    )
    return {"train": rest[DEV_ROWS:], "valid": rest[:DEV_ROWS], "test": test}


def found_words(rows: list[JsonObject], test: list[JsonObject], allow_missing: bool) -> str:
    """How many of the test rows are among ``rows``, for the manifest.

    Raises:
        UserError: less than ``MIN_FOUND`` of them are, and that is not allowed.
    """
    there = {key for row in rows for key in identity(row)}
    missing = [row["id"] for row in test if not identity(row) & there]
    words = f"{len(test) - len(missing):,} of {len(test):,} test rows found in the source"
    needed = math.ceil(MIN_FOUND * len(test))
    if len(test) - len(missing) < needed and not allow_missing:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"--test: {words}, expected at least {needed:,}: the others may stay in train in other words. Not found:"
            f" {shown}. --allow-missing-test-rows goes on all the same, and the manifest will say how many were found"
        )
    return words


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare dolly``."""
    made = with_tokenizer(parser(__doc__, UPSTREAM["dolly"]))
    made.add_argument("--test", metavar="FILE", help="with Databricks' file: the 500 test rows, MiniLLM's valid.jsonl")
    made.add_argument("--own-split", action="store_true", help="with Databricks' file: make another test set")
    made.add_argument(
        "--allow-missing-test-rows",
        action="store_true",
        help=f"with --test: go on although less than {MIN_FOUND:.0%}% of the test rows are in the source",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
