"""A recipe whose teacher has another tokenizer, from the file to the finished run."""

from __future__ import annotations

import json

import pytest

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.runs.directory import RunDirectory
from tests.support.alignment import tokenizer_of
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama

TEACHER = {"model": "other", "dtype": "float32", "alignment": "overlap"}


@pytest.fixture
def two_families(workplace):
    """The student's folder is ``teacher``, which has the tokenizer of the tiny models; that of its teacher is ``other``."""
    tokenizer = tokenizer_of("byte_level", 900)
    tiny_llama(vocab=len(tokenizer), seed=3, layers=3).save_pretrained("other")
    tokenizer.save_pretrained("other")
    return workplace


def other(**sections):
    return recipe(**{"student": {"model": "teacher"}, "teacher": TEACHER, **sections})


def test_a_recipe_trains_and_scores_both(two_families, capsys):
    run = distill(other(evaluation={"every_steps": None}))
    assert isinstance(run, RunDirectory)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if "aligned_share" in line]
    assert train and all(0 < line["aligned_share"] < 1 and 0 < line["common_mass"] <= 1 for line in train)
    metrics = json.loads((run.path / "metrics.json").read_text())["models"]
    assert {"teacher", "student_before", "student"} <= {*metrics} and metrics["student"]["teacher_forced"]["n_tokens"] > 0
    said = capsys.readouterr().err
    assert "train: " in said and "labels are the same for the teacher" in said
    manifest = json.loads((run.path / "data_manifest.json").read_text())
    assert manifest["splits"]["train"]["alignment"]["pairs"] > 0


def test_without_alignment_the_tokenizers_must_be_one(two_families):
    with pytest.raises(UserError, match="different tokenizers.*teacher.alignment: overlap"):
        distill(other(teacher={"model": "other", "dtype": "float32"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {**TEACHER, "alignment": "overlop"}}, 'teacher.alignment: got "overlop"'),
        ({"teacher": {**TEACHER, "kind": "cached", "cache": "x"}}, "states from elsewhere are of the student's tokens"),
        ({"teacher": {**TEACHER, "vocab_alignment": "intersect"}}, "leave the latter out"),
        ({"data": {"responses": "teacher"}}, "teacher.alignment: overlap and data.responses: teacher"),
        ({"student": {"init": {"from": "teacher", "layers": 2}}}, "has the teacher's tokenizer"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything(two_families, sections, message):
    with pytest.raises(UserError, match=message):
        other(**sections)


def test_one_of_several_has_the_students_tokenizer(two_families):
    several = {name: {"model": "other", "weight": 0.5, "alignment": "overlap"} for name in ("a", "b")}
    with pytest.raises(UserError, match=r"teachers.a.alignment: overlap, but only a teacher that is alone"):
        other(teacher=None, teachers=several)
