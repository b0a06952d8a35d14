"""``dts-hf doctor`` on a recipe with several teachers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.doctor.dry_run import dry_run
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.recipe.loading import load_recipe
from tests.support.examined import recipe, rows_between, save_model, texts, write_rows

TEACHERS: dict[str, Any] = {name: {"model": f"./{name}", "dtype": "float32"} for name in ("fruit", "words")}


def routed(start: int, stop: int, **cells: Any) -> list[dict[str, Any]]:
    return [{**row, "domain": ("fruit", "words")[k % 2], **cells} for k, row in enumerate(rows_between(start, stop))]


def several(workplace: Path, teachers: dict[str, Any] = TEACHERS, **cells: Any) -> Path:
    shutil.copytree("teacher", "fruit")
    save_model("words", 40, layers=2)
    save_model("poor", 5, layers=2)
    write_rows(workplace / "train.jsonl", routed(0, 24) + (routed(24, 25, **cells) if cells else []))
    write_rows(workplace / "valid.jsonl", routed(50, 55))
    sections: dict[str, Any] = {"student": {"model": "./poor"}, "teacher": None, "data": {"teacher_column": "domain"}}
    path = recipe(**sections)
    values = yaml.safe_load(path.read_text())
    values["teachers"] = teachers
    path.write_text(yaml.safe_dump(values))
    return path


def test_each_teacher_is_examined_on_its_own_rows(workplace: Path) -> None:
    diagnosis = diagnose(several(workplace))
    assert diagnosis.status == "ok", texts(diagnosis)
    names = [check.name for check in diagnosis.checks]
    assert diagnosis["teachers"].values == {"fruit": 12, "words": 12}
    assert [name for name in names if "/" not in name] == ["recipe", "teachers", "training", "rows", "output"]
    for check in ("teacher", "memory", "vocabulary", "cross-entropy", "effect", "temperature", "steps"):
        assert {f"{check}/fruit", f"{check}/words"} <= {*names}
    one, other = (diagnosis[f"cross-entropy/{name}"].values["teacher_ce"] for name in TEACHERS)
    assert one != other
    (entry, *_) = diagnosis.memory
    weights = sum(diagnosis[f"teacher/{name}"].values["teacher"]["parameters"] for name in TEACHERS)
    assert entry["teacher"] == 4 * weights  # of both, whichever is looked at


def test_a_row_without_a_teacher_is_an_error_and_two_names_of_one_model_are_one(workplace: Path) -> None:
    same = {name: {"model": "./fruit", "dtype": "float32"} for name in ("fruit", "words")}
    diagnosis = diagnose(several(workplace, same, domain="wods"))
    assert any("'wods'" in one.text and "row-24" in one.text for one in diagnosis.problems)
    assert diagnosis.status == "error"
    assert [check.name for check in diagnosis.checks if check.name.startswith("teacher/")] == ["teacher/fruit"]


def test_a_dry_run_counts_the_rows_of_each_teacher_and_refuses_one_without(workplace: Path) -> None:
    path = several(workplace)
    plan = dry_run(load_recipe(path)).plan
    assert plan["teachers"] == "fruit: 12 training rows; words: 12 training rows"
    assert "load 2 teachers and student" in plan["parts"] and "needed" in plan["memory"]
    write_rows(workplace / "train.jsonl", [*routed(0, 24), *routed(24, 25, domain="wods")])
    with pytest.raises(UserError, match=r"row 'row-24': got 'wods'.*Did you mean 'words'"):
        dry_run(load_recipe(path))
