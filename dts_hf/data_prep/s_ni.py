"""Prepare S-NI: test tasks of Super-NaturalInstructions, rows whose first reference has 11 tokens or more.

    dts-hf prepare s_ni --output data/              # MiniLLM/sinst from the Hub, 11_/valid.jsonl
    dts-hf prepare s_ni --source natural-instructions/ --tokenizer GPT2_FOLDER
    dts-hf prepare s_ni \
        --source https://raw.githubusercontent.com/allenai/natural-instructions/b00871c954282e35d14de77c546918ee8b9d90da/

Takes MiniLLM's file, rows of our format, or the task files of allenai/natural-instructions (a checkout, a folder with
`test_tasks.txt` and the task files, or the base URL of the repository: 119 tasks are fetched one by one). Of each test
task the first 100 instances count, as in Tk-Instruct. All references of an instance are kept, as a list.
`--bins 0_2,3_5,6_10,11_` writes the other lengths too (`test_0_2.jsonl` ...); they need the task files, or one file a bin.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dts_hf.data_prep.arguments import parser, run, with_tokenizer
from dts_hf.data_prep.job import Job
from dts_hf.data_prep.lengths import BINS, JsonObject
from dts_hf.data_prep.reading import objects, read_json
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError, nearest

ROWS_PER_TASK = 100
NAMES = ("valid.jsonl", "valid.jsonl.gz", "test.jsonl", "test.jsonl.gz")  # a folder with one file of rows


def from_tasks(job: Job) -> Iterator[tuple[str, Any]]:
    """The first 100 instances of every test task, in the order of the list of test tasks.

    Raises:
        UserError: the list or a task file is none.
    """
    path = job.source.get("splits/default/test_tasks.txt", "test_tasks.txt")
    tasks = path.read_text(encoding="utf-8").split()
    wrong = [task for task in tasks if not re.fullmatch(r"[\w-]+", task)]
    if wrong or not tasks:
        raise UserError(f"{path}: expected one task name a line, got {', '.join(map(repr, wrong)) or 'none'}")
    for task in tasks:
        file = job.source.get(f"tasks/{task}.json", f"{task}.json")
        content = read_json(file)
        try:
            definition, instances = content["Definition"], content["Instances"]
            text = definition if isinstance(definition, str) else definition[0]
            category = (content.get("Categories") or [None])[0]
            for number, instance in enumerate(instances[:ROWS_PER_TASK]):
                yield (
                    f"{file}: instance {number + 1}",
                    {
                        "id": instance.get("id") or f"{task}-{number:05d}",
                        "task": task,
                        "category": category,
                        "instruction": text,
                        "input": instance["input"],
                        "output": instance["output"],
                    },
                )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: expected a task file with Definition and Instances [{{input, output}}]: {error!r}"
            ) from None


def prepare(arguments: argparse.Namespace) -> None:
    """Write the test rows of every bin that is asked for.

    Raises:
        UserError: the source, its counts or the options are wrong; nothing was written.
    """
    bins = arguments.bins.split(",")
    for name in bins:
        if name not in BINS:
            raise UserError(f"--bins: got '{name}', expected {', '.join(BINS)}.{nearest(name, BINS)}")
    job = Job("s_ni", arguments)
    splits: dict[str, list[JsonObject]] = {}
    if job.source.kind == "hub" or (not job.source.is_single_file and job.source.find("11_/valid.jsonl")):
        for name in bins:
            path = job.source.get(f"{name}/valid.jsonl")
            if name == "11_":
                job.note_edition(path)
            splits[name] = job.clean(objects(path), f"s_ni-{name.strip('_')}")
    elif job.source.is_single_file or (job.source.kind == "path" and job.source.find(*NAMES)):
        splits = dict.fromkeys(bins, job.clean(objects(job.source.get(*NAMES)), "s_ni"))
    else:
        splits = dict.fromkeys(bins, job.clean(from_tasks(job), "s_ni"))
        job.rules.append(f"the first {ROWS_PER_TASK} instances of every test task")
    job.write(
        {
            "test" if name == "11_" else f"test_{name}": job.keep_bin(job.drop_long_prompts(rows, name), name)
            for name, rows in splits.items()
        }
    )


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare s_ni``."""
    made = with_tokenizer(parser(__doc__, UPSTREAM["s_ni"]))
    made.add_argument("--bins", default="11_", help="lengths of the first reference to keep (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
