"""The teacher's answers: a run that is killed while they are made goes on, and ends with the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dts_hf.data.chat_templates import get_template
from dts_hf.data.rows import Row
from dts_hf.generation.answer_file import AnswerFile
from dts_hf.recipe.schema import Recipe
from dts_hf.teachers import answers as teacher_answers
from dts_hf.teachers.answers import answer_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROWS = [Row(str(k), f"Say {'it ' * k}.", "", ("x",)) for k in range(12)]


class Killed(BaseException):
    """Nothing catches it."""


def recipe(place: Path, run: str = "a") -> Recipe:
    return Recipe.from_dict(
        {
            "student": {"init": {"from": "teacher", "layers": 1}},
            "teacher": {"model": str(place / "teacher")},
            "data": {"train": "x.jsonl", "responses": "teacher", "teacher_max_new_tokens": 5, "max_prompt_length": 64,
                     "cache_dir": str(place / "cache")},
            "evaluation": {"batch_size": 1},
            "output": {"dir": str(place / run)},
        }
    )  # fmt: skip


def answers(place: Path, dtype: torch.dtype, run: str = "a") -> tuple[list[str], bool]:
    rows, about = answer_rows(
        recipe(place, run), tiny_llama().to(dtype).eval(), tiny_tokenizer(), get_template("plain"), ROWS
    )
    return ["" if row is None else row.references[0] for row in rows], about["cached"]


@pytest.mark.parametrize(
    ("dtype", "made_again"),
    [(torch.float32, 12 - 6), (torch.bfloat16, 12 - 4)],  # in bf16 blocks of four batches belong together
)
def test_a_killed_run_goes_on_behind_the_last_answer(
    tmp_path: Path, dtype: torch.dtype, made_again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = answers(tmp_path / "straight", dtype)
    place, append, generate, asked = tmp_path / "killed", AnswerFile.append, teacher_answers.generate, []

    def dies(self: AnswerFile, row: Any) -> None:
        if int(self.path.with_name(f"{self.path.name}.partial-0").exists()) and len(self.load()) == 6:
            raise Killed
        append(self, row)

    monkeypatch.setattr(AnswerFile, "append", dies)
    with pytest.raises(Killed):
        answers(place, dtype)
    monkeypatch.undo()
    (partial,) = (place / "cache").iterdir()
    with partial.open("a") as file:
        file.write('{"seed": 0, "id": "3", "te')  # the kill came in the middle of a line

    def counted(model: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(teacher_answers, "generate", counted)
    assert answers(place, dtype) == (straight, False) and len(asked) == made_again
    assert [path.suffix for path in (place / "cache").iterdir()] == [".json"]
    assert answers(place, dtype, run="b") == (straight, True) and len(asked) == made_again


def test_another_run_does_not_write_into_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a sweep share teacher, prompts and cache, and start at the same time."""
    append, inner = AnswerFile.append, []

    def beside(self: AnswerFile, row: Any) -> None:
        append(self, row)
        if not inner:
            inner.append(None)
            inner.append(answers(tmp_path, torch.float32, run="b"))

    monkeypatch.setattr(AnswerFile, "append", beside)
    texts, cached = answers(tmp_path, torch.float32)
    assert inner[1] == (texts, False) and not cached
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
