"""Prepare UnNI: the first 10,000 rows of Unnatural Instructions' core set with references of 11 tokens or more.

    dts-hf prepare unni --output data/                  # MiniLLM/uinst from the Hub, 11_/valid.jsonl
    dts-hf prepare unni --source core_data.jsonl.zip --tokenizer GPT2_FOLDER

Takes MiniLLM's file (already in bins and without long prompts), the core set of orhonovich/unnatural-instructions
({instruction, instances: [{input, output, constraints}]}, zipped or not), or rows of our format. The papers say that
10,000 rows were sampled; MiniLLM's code takes the first 10,000 of its file, and so does this script. That file's order
is not that of the core set, so the 10,000 made from the core set are other rows: the manifest says which were used.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dts_hf.data_prep.arguments import parser, run, with_tokenizer
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.lengths import BINS
from dts_hf.data_prep.reading import objects
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError

MAX_ROWS = 10_000
NAMES = (  # in a folder
    "11_/valid.jsonl", "11_/valid.jsonl.gz", "core_data.jsonl", "core_data.jsonl.zip", "core_data.zip",
    "valid.jsonl", "valid.jsonl.gz", "test.jsonl", "test.jsonl.gz",
)  # fmt: skip


def read(path: Path, rules: list[str]) -> Iterator[tuple[str, Any]]:
    """Rows; of the core set one for each instance.

    Raises:
        UserError: an instruction has no list of instances.
    """
    rule = "made from the core set in its order: not the same rows as in MiniLLM's release"
    for where, row in objects(path):
        if not isinstance(row, dict) or "instances" not in row:
            yield where, row
            continue
        if rule not in rules:
            rules.append(rule)
        if not isinstance(row["instances"], list):
            raise UserError(f"{where}: field 'instances': expected a list of objects {{input, output}}")
        for instance in row["instances"]:
            if not isinstance(instance, dict):
                raise UserError(f"{where}: field 'instances': expected objects {{input, output}}")
            yield (
                where,
                {
                    "instruction": row.get("instruction"),
                    "input": instance.get("input"),
                    "output": instance.get("output"),
                },
            )


def prepare(arguments: argparse.Namespace) -> None:
    """Write the test rows."""
    job = Job("unni", arguments)
    path = job.source.get(*NAMES)
    rows = job.clean(read(path, job.rules), "unni")
    rows = job.keep_bin(job.drop_long_prompts(rows))
    low, _ = BINS["11_"]
    job.rules.append(f"the first {MAX_ROWS:,} rows of [{low}, inf) in the source's order")
    if len(rows) > MAX_ROWS:
        job.dropped[f"after the first {MAX_ROWS:,}"] += len(rows) - MAX_ROWS
    job.write({"test": rows[:MAX_ROWS]})


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare unni``."""
    return with_tokenizer(parser(__doc__, UPSTREAM["unni"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
