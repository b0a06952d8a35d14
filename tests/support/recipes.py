"""A recipe of tiny models on a few rows, and the rows, for tests that distil in the current folder (``workplace``)."""

from __future__ import annotations

import json

from dts_hf.distill import task_of
from dts_hf.recipe.effective import effective
from dts_hf.recipe.schema import Recipe

INSTRUCTIONS = ["Name a fruit", "Say yes", "Count to three", "Name a colour", "Say no", "Write a word"]


def in_full(recipe: Recipe) -> Recipe:
    """``recipe`` as the run directory has it."""
    return effective(recipe, task_of(recipe).training_arguments(recipe.output.dir))


def write_rows(path, start, count):
    answer = {"input": "", "output": "apples and pears"}
    rows = [
        {"id": f"row-{i}", "instruction": f"{INSTRUCTIONS[i % 6]} {i}", **answer} for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def short_yaml(made: Recipe) -> str:
    """``made`` without its defaults, as YAML (JSON is) that is read many times as fast as all of it."""
    return json.dumps(made.model_dump(mode="json", exclude_defaults=True))


def recipe(**sections):
    """The recipe with other ``sections``: those of models and temperature as a whole, of the others the keys given."""
    values = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "chat", "max_length": 96,
                 "max_prompt_length": 64},
        "temperature": {"name": "dts", "rule": "gap"},
        "training": {"use_cpu": True, "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4,
                     "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True},
        "evaluation": {"rows": 5, "max_new_tokens": 8, "every_steps": 2},
        "output": {"dir": "run"},
    }  # fmt: skip
    for name, section in sections.items():
        whole = name in ("student", "teacher", "temperature")
        values[name] = section if whole else {**values.get(name, {}), **section}
    return Recipe.from_dict(values)
