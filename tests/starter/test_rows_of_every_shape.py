"""What init writes for rows that are few, alike, long or texts is what the doctor and a run can read, for a true reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dts_hf.errors import UserError
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.starter.start import start
from tests.support.examined import save_model
from tests.support.tiny import tiny_tokenizer

LONG = "word " * 2000  # the tiny teacher has 1,024 positions


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(str(folder), steps=0)
    return str(folder)


def asked(prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    return [{"instruction": prompt, "output": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def started(teacher: str, folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> tuple[Recipe, str]:
    """The recipe that init writes for ``rows``, and its text."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = start(teacher, str(data), output=folder / "made.yaml", overwrite=True, **options)
    return load_recipe(made.path), made.text


def reason(text: str, key: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(f"{key}:")).partition(" # ")[2]


NUMBERED = [f"Name a fruit {number}" for number in range(40)]
TEXTS = [{"text": f"{line} apples and pears " * 3} for line in NUMBERED]


@pytest.mark.parametrize(
    "rows",
    [
        asked(["Name a fruit"], ["apple"]),
        asked(["Name a fruit"] * 40, NUMBERED),
        asked(NUMBERED, ["apple"] * 40),
        asked([LONG if number % 2 else f"{number}" for number in range(40)], ["apple"] * 40),
        asked(NUMBERED, [LONG if number % 2 else "apple" for number in range(40)]),
        TEXTS,
        [{"text": LONG}, *TEXTS],
    ],
    ids=["one row", "one prompt", "prompts", "long prompts", "long answers", "texts", "a long text"],
)
def test_the_rows_of_the_recipe_can_be_read_and_encoded(
    teacher: str, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    recipe, text = started(teacher, tmp_path, rows)
    task = LanguageModeling(recipe)
    read = task.load_rows()
    data = task.encode(read, tiny_tokenizer())
    assert len(data.train) and bool(read.validation) == (recipe.data.validation is not None)
    assert recipe.training["eval_strategy"] == ("epoch" if read.validation else "no")
    if read.validation:
        assert f"{len(read.validation)} of them" in reason(text, "validation")


def test_too_few_prompts_are_not_split(teacher: str, tmp_path: Path) -> None:
    recipe, text = started(teacher, tmp_path, asked(["Name a fruit"] * 40, NUMBERED))
    assert recipe.data.validation is None and "too few different prompts" in reason(text, "validation")


def test_prompts_that_do_not_fit_are_counted(teacher: str, tmp_path: Path) -> None:
    prompts = [LONG if number % 2 else f"{number}" for number in range(40)]
    recipe, text = started(teacher, tmp_path, asked(prompts, ["apple"] * 40))
    assert reason(text, "max_prompt_length").startswith("50 % of the rows are left out: their prompt is beyond")
    assert reason(text, "max_length").startswith("99 % of the other rows are shorter") and recipe.data.max_length < 100


def test_long_answers_are_cut_and_counted(teacher: str, tmp_path: Path) -> None:
    answers = [LONG if number % 4 == 0 else "apple" for number in range(40)]
    recipe, text = started(teacher, tmp_path, asked(NUMBERED, answers))
    assert recipe.data.long_rows == "cut" and recipe.data.max_length == 1024
    assert reason(text, "max_length") == "the teacher's 1,024 positions; 25 % of the rows are longer"
    assert reason(text, "max_new_tokens").startswith("25 % of the answers in your rows are longer")
    short, text = started(teacher, tmp_path, asked(NUMBERED, ["apple"] * 40))
    assert short.data.long_rows == "drop" and "long_rows" not in text
    with pytest.raises(UserError, match="every row is longer than the teacher's 1,024 positions"):
        started(teacher, tmp_path, asked(NUMBERED, [LONG] * 40))
    texts, _ = started(teacher, tmp_path, [{"text": LONG}] * 3)
    assert texts.data.long_rows == "cut"


def test_a_student_that_is_not_there_is_said_before_the_recipe_is_written(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--student: cannot load 'nosuch'"):
        started(teacher, tmp_path, asked(NUMBERED, ["apple"] * 40), student="nosuch")
    assert not (tmp_path / "made.yaml").exists()
    recipe, _ = started(teacher, tmp_path, asked(NUMBERED, ["apple"] * 40), student=teacher)
    assert recipe.student.model == teacher


def test_an_output_that_cannot_be_written(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(asked(NUMBERED, NUMBERED)[0]) + "\n")
    for output, words in ((tmp_path / "file/x.yaml", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=words):
            start(teacher, str(rows), output=output, overwrite=True)
