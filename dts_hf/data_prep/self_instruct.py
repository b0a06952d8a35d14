"""Prepare SelfInst: the 252 user-oriented instructions of Self-Instruct, of which 242 have a short enough prompt.

    dts-hf prepare self_instruct --output data/
    dts-hf prepare self_instruct --source user_oriented_instructions.jsonl --tokenizer GPT2_FOLDER

Takes the file of the yizhongw/self-instruct repository ({id, motivation_app, instruction, instances}), MiniLLM's
`valid.jsonl`, or rows of our format. The default is pinned to a commit and checked. For evaluation only, as its authors
ask.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dts_hf.data_prep.arguments import parser, run, with_tokenizer
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.reading import objects
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError

NAMES = ("valid.jsonl", "test.jsonl", "user_oriented_instructions.jsonl")  # in a folder


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows; of the original file, the one instance of each instruction.

    Raises:
        UserError: an instruction has not exactly one.
    """
    for where, row in objects(path):
        if not isinstance(row, dict) or "instances" not in row:
            yield where, row
            continue
        instances = row["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise UserError(f"{where}: field 'instances': expected a list of exactly one object {{input, output}}")
        yield where, {**row, **instances[0], "category": row.get("motivation_app")}


def prepare(arguments: argparse.Namespace) -> None:
    """Write the test rows."""
    upstream = UPSTREAM["self_instruct"]
    if arguments.source == upstream.source and arguments.checksum is None:
        arguments.checksum, arguments.revision = upstream.blob, upstream.revision
    job = Job("self_instruct", arguments)
    rows = job.clean(read(job.source.get(*NAMES)), "self_instruct")
    job.write({"test": job.drop_long_prompts(rows)})


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare self_instruct``."""
    return with_tokenizer(parser(__doc__, UPSTREAM["self_instruct"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
