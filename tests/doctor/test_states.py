"""What the doctor says of a teacher's states: what a cache of them would take, and what the recipe's is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dts_hf.doctor.run import diagnose
from dts_hf.language_modeling.caching import cache_teacher
from dts_hf.recipe.loading import load_recipe
from tests.support.examined import recipe, texts


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
