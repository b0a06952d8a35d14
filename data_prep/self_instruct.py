"""Prepare SelfInst: the 252 user-oriented instructions of Self-Instruct, of which 242 have a short enough prompt.

    python data_prep/self_instruct.py --output data/
    python data_prep/self_instruct.py --source user_oriented_instructions.jsonl --tokenizer GPT2_FOLDER

Takes the file of the yizhongw/self-instruct repository ({id, motivation_app, instruction, instances}), MiniLLM's
`valid.jsonl`, or rows of our format. The default is pinned to a commit and checked. For evaluation only, as its authors
ask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _prepare import Job, objects, parser, run, with_tokenizer

from dts_hf.errors import UserError

LICENCE = "Apache-2.0"
COMMIT = "0b26ccaa415992100fa32df62d41b994cf928e23"
SOURCE = (
    f"https://raw.githubusercontent.com/yizhongw/self-instruct/{COMMIT}/human_eval/user_oriented_instructions.jsonl"
)
GIT_BLOB = "ed6d5d986e3f4c65ff64d70328a2e1dab146f914"


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows; of the original file, the one instance of each instruction."""
    for where, row in objects(path):
        if not isinstance(row, dict) or "instances" not in row:
            yield where, row
            continue
        instances = row["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise UserError(f"{where}: field 'instances': expected a list of exactly one object {{input, output}}")
        yield where, {**row, **instances[0], "category": row.get("motivation_app")}


def prepare(arguments: argparse.Namespace) -> None:
    if arguments.source == SOURCE and arguments.checksum is None:
        arguments.checksum, arguments.revision = GIT_BLOB, COMMIT
    job = Job("self_instruct", LICENCE, arguments)
    rows = job.clean(read(job.source.get("valid.jsonl", "test.jsonl")), "self_instruct")
    job.write({"test": job.drop_long_prompts(rows)})


def main(argv: Sequence[str] | None = None) -> int:
    return run(prepare, with_tokenizer(parser(__doc__, SOURCE)).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
