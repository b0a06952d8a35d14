"""What the doctor says of a teacher's states: what a cache of them would take, and what the recipe's is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dts_hf.doctor.run import diagnose
from dts_hf.language_modeling.caching import cache_teacher
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Teacher
from dts_hf.serving.serve import ServeOptions, load_served
from tests.support.examined import recipe, texts
from tests.support.served import running
from tests.support.tiny import tiny_llama, tiny_tokenizer


def test_what_a_cache_would_take(workplace: Path) -> None:
    found = diagnose(recipe())["states"]
    manifest = cache_teacher(load_recipe(recipe()), Path("states"))
    values = found.values
    assert values["labels"] == pytest.approx(manifest.labels, rel=0.1)  # of a sample of the rows
    hidden = manifest.identity.hidden_size
    assert values["bytes_per_label"] == 4 * hidden and values["break_even_k"] == hidden  # fp32: twice H / 2
    assert values["bytes"] < 1.1 * manifest.size and 0 < values["seconds"] < 60
    assert f"top-k is smaller below k = {hidden}" in found.summary


def test_a_cached_recipe_is_clean(workplace: Path) -> None:
    manifest = cache_teacher(load_recipe(recipe()), Path("states"))
    teacher = {"model": "teacher", "dtype": "float32", "kind": "cached", "cache": "states"}
    diagnosis = diagnose(recipe(teacher=teacher))
    assert diagnosis.status == "ok", texts(diagnosis)
    assert f"{manifest.labels:,} labels of" in diagnosis["states"].summary
    assert diagnosis["cross-entropy"].values["teacher_ce"] < diagnosis["cross-entropy"].values["student_ce"]
    assert diagnosis["steps"].status == diagnosis["effect"].status == "ok"


@pytest.mark.parametrize("change", ["other rows", "no cache"])
def test_a_cache_that_does_not_fit_is_an_error(workplace: Path, change: str) -> None:
    teacher = {"model": "teacher", "dtype": "float32", "kind": "cached", "cache": "states"}
    if change == "other rows":
        cache_teacher(load_recipe(recipe()), Path("states"))
        text = Path("train.jsonl").read_text()
        Path("train.jsonl").write_text(text.replace("e", "o", 5))
    said = texts(diagnose(recipe(teacher=teacher)))
    expected = "are not in the cache" if change == "other rows" else "no such folder"
    assert expected in said, said


def test_a_remote_recipe_is_clean_and_tells_its_server(workplace: Path) -> None:
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    with running(load_served(Teacher(model="teacher", dtype="float32"), "chat", ServeOptions())) as url:
        teacher = {"model": "teacher", "dtype": "float32", "kind": "remote", "url": url}
        diagnosis = diagnose(recipe(teacher=teacher, student={"model": "student"}))
    # The student's weights are random
    assert [problem.code for problem in diagnosis.problems] == ["student-worse-than-guessing"], texts(diagnosis)
    assert f"from {url}: teacher in float32" in diagnosis["states"].summary
    assert diagnosis["steps"].status == diagnosis["effect"].status == "ok"


def test_a_server_that_is_not_there_is_an_error(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    monkeypatch.setattr("dts_hf.teachers.remote.FIRST_PATIENCE", 0.2)
    teacher = {"model": "teacher", "kind": "remote", "url": "http://127.0.0.1:9"}
    said = texts(diagnose(recipe(teacher=teacher, student={"model": "student"})))
    assert "http://127.0.0.1:9/v1/teacher: no answer in 0.2 s" in said, said


def test_random_weights_are_not_told_to_choose_other_layers(workplace: Path) -> None:
    diagnosis = diagnose(recipe(student={"init": {"from": "config", "layers": 2}}))
    found = [problem for problem in diagnosis.problems if problem.code == "student-worse-than-guessing"]
    assert len(found) == 1 and "From random weights" in found[0].advice and "choose: search" not in found[0].advice
