"""A recipe of two tiny teachers, each of which has the rows that name it, for tests that distil in the current folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dts_hf.recipe.schema import Recipe
from tests.support.recipes import INSTRUCTIONS, recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer

NAMES = ("math", "code")
WHOLE = ("student", "teacher", "teachers", "temperature")
SECTIONS: dict[str, Any] = {name: {"model": name, "dtype": "float32"} for name in NAMES}


def write_routed(path: Path, start: int, count: int, **cells: Any) -> None:
    rows = [
        {"id": f"row-{i}", "instruction": f"{INSTRUCTIONS[i % 6]} {i}", "input": "", "output": "apples and pears",
         "domain": NAMES[i % 3 == 0], **cells} for i in range(start, start + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_place(workplace: Path) -> Path:
    """Folders of two teachers and a student, and rows that name their teacher, in the current folder."""
    for seed, name in enumerate((*NAMES, "student")):
        tiny_llama(seed=5 + seed, layers=2 + (seed == 0)).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    write_routed(workplace / "train.jsonl", 0, 12)
    write_routed(workplace / "valid.jsonl", 50, 5)
    return workplace


def values_of_several(**sections: Any) -> dict[str, Any]:
    base = recipe(student={"model": "student"}).model_dump(mode="json", exclude_unset=True)
    base |= {"teacher": None, "teachers": SECTIONS}
    base["data"] |= {"teacher_column": "domain"}
    base["output"] |= {"report": False}  # figures take seconds
    for name, section in sections.items():
        base[name] = section if name in WHOLE else {**base.get(name, {}), **section}
    return base


def several(**sections: Any) -> Recipe:
    return Recipe.from_dict(values_of_several(**sections))
