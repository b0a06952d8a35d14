"""Sweeps by name: the runs that each comes to, for language models and for classifiers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.errors import UserError
from dts_hf.experiments.presets import PRESETS, TEMPERATURES, grids_of
from dts_hf.experiments.sweep import Study, plan
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import PresetName, Recipe
from dts_hf.recipe.yaml_files import parse_yaml
from tests.support.recipes import recipe, short_yaml, write_rows

LABELLED = {
    "task": {"name": "glue", "subset": "sst2"}, "data": {"prompt_template": "auto"}, "evaluation": {"every_steps": None},
    "student": {"init": {"from": "teacher", "layers": 2}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 0, 6)
    write_rows(tmp_path / "valid.jsonl", 6, 3)
    (tmp_path / "recipe.yaml").write_text(short_yaml(recipe()))
    (tmp_path / "heads.yaml").write_text(short_yaml(recipe(**LABELLED)))
    return tmp_path


def planned(name: str, file: str = "recipe.yaml", seeds: tuple[int, ...] = (1,), **more: Any) -> Study:
    overrides = more.pop("overrides", [])
    return plan(file, overrides, Path("out"), more.pop("product", {}), more.pop("together", {}), seeds, name)


def recipes(study: Study, file: str = "recipe.yaml") -> list[Recipe]:
    return [load_recipe(file, [*run.overrides, "sweep=null"]) for run in study.runs]


def test_the_schema_has_the_same_names() -> None:
    assert tuple(PRESETS) == get_args(PresetName)


@pytest.mark.parametrize(
    ("name", "file", "runs"),
    [
        ("temperature", "recipe.yaml", 7), ("temperature", "heads.yaml", 6), ("fkl-rkl-temperature", "recipe.yaml", 8),
        ("policies", "recipe.yaml", 5), ("policies", "heads.yaml", 5),
    ],
)  # fmt: skip
def test_a_preset_with_three_seeds(name: str, file: str, runs: int) -> None:
    study = planned(name, file, ())
    assert len(study.runs) == 3 * runs == len({run.id for run in study.runs})
    assert [made.training["seed"] for made in recipes(study, file)] == [1] * runs + [2] * runs + [3] * runs
    assert len(planned(name, file, (7,)).runs) == runs


def test_a_section_may_name_it(here: Path) -> None:
    section = {"preset": "temperature", "set": {"loss.kd_ratio": [0.1, 0.9]}}
    (here / "recipe.yaml").write_text(short_yaml(recipe(sweep=section)))
    study = plan("recipe.yaml", [], here / "out", {}, {}, [])
    assert len(study.runs) == 7 * 2 * 3
    assert {made.loss.kd_ratio for made in recipes(study)} == {0.1, 0.9}


@pytest.mark.parametrize(("low", "high", "file"), [(1, 2, "recipe.yaml"), (1, 4, "heads.yaml")])
def test_all_policies_have_one_range(low: float, high: float, file: str) -> None:
    found = {made.temperature.name: made.temperature.options for made in recipes(planned("policies", file), file)}
    assert [*found] == ["constant", "cosine", "dts", "dtkd", "adakd"]
    assert found["constant"]["value"] == (low + high) / 2
    assert all(found[name]["t_init"] == high and found[name]["t_min"] == low for name in ("cosine", "dts"))
    tau, clamp = found["dtkd"]["tau"], found["dtkd"]["clamp"]
    assert [2 * tau / (1 + clamp), 2 * tau * clamp / (1 + clamp)] == pytest.approx([low, high])
    base, c = found["adakd"]["t_base"], found["adakd"]["c"]
    assert [base * math.exp(-c), base * math.exp(c)] == pytest.approx([low, high], rel=1e-3)


# ------------------------------------------------------------------------------------------------------- the revisit


def values(study: Study) -> list[dict[str, Any]]:
    """What each run gives the keys that are varied, without its seed."""
    pairs = [
        [text.partition("=")[::2] for text in run.overrides if not text.startswith("training.seed")]
        for run in study.runs
    ]
    return [{key: parse_yaml(value, key) for key, value in of_run} for of_run in pairs]


def varied(study: Study) -> Counter[frozenset[str]]:
    """How many runs differ from the recipe in which keys beside temperature and seed."""
    return Counter(frozenset({*one} - {"temperature"}) for one in values(study))


@pytest.mark.parametrize(
    ("name", "file", "temperatures"),
    [
        ("revisit-lm", "recipe.yaml", TEMPERATURES.language_models),
        ("revisit-classification", "heads.yaml", TEMPERATURES.classifiers),
    ],
)
def test_one_axis_at_a_time(
    name: str, file: str, temperatures: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    study, each = planned(name, file), len(temperatures)
    steps = {"training.max_steps", "training.num_train_epochs"}
    batch = {"training.gradient_accumulation_steps", "training.learning_rate", "training.max_steps"}
    assert varied(study) == {
        frozenset(): each,
        frozenset({"training.learning_rate"}): 2 * each,  # the recipe's own is there already, and is one run
        frozenset({"training.optim", "training.optim_args", "training.learning_rate"}): 3 * each,
        frozenset(steps): 3 * each, frozenset(batch): 2 * each, frozenset({"loss.divergence"}): 3 * each,
    }  # fmt: skip
    assert {one["temperature"] for one in values(study)} == {*temperatures}
    said = capsys.readouterr().err
    assert "without its axis teacher" in said and "--set teacher.model=BASE,INSTRUCT,SFT_1,SFT_10" in said


def test_batches_grow_at_equal_tokens() -> None:
    study = planned("revisit-lm", overrides=["training.learning_rate=1e-3", "training.warmup_steps=4"])
    found = [one for one in values(study) if one.get("training.gradient_accumulation_steps", 1) > 1]
    keys = ("gradient_accumulation_steps", "max_steps", "warmup_steps", "learning_rate")
    rows = {tuple(one[f"training.{key}"] for key in keys) for one in found}
    assert rows == {(2, 2, 2, 1.414e-3), (4, 1, 1, 2e-3)}


def test_what_is_no_count_of_steps_stays() -> None:
    made = load_recipe("recipe.yaml", ["training.warmup_steps=0.1", "training.max_steps=-1"])
    for grid in grids_of("revisit-lm", made, {}, {}):
        assert not {"training.warmup_steps"} & {*grid.product}
        assert ("training.max_steps" in grid.product) is False
    with pytest.raises(UserError, match=r"batch: training.max_steps is 6, expected a multiple of 4"):
        grids_of("revisit-lm", load_recipe("recipe.yaml", ["training.max_steps=6"]), {}, {})


def test_epochs_are_not_ended_by_max_steps() -> None:
    grids = [grid.product for grid in grids_of("revisit-lm", load_recipe("recipe.yaml"), {}, {})]
    epochs = [
        (grid["training.num_train_epochs"], grid["training.max_steps"])
        for grid in grids
        if "training.num_train_epochs" in grid
    ]
    assert epochs == [([1], [-1]), ([3], [-1]), ([10], [-1])]


def test_models_that_are_given_are_crossed_with_temperatures_alone() -> None:
    product = {"teacher.model": ["a/base", "a/sft"], "student": [{"init": {"from": "config", "layers": 2}}]}
    found = varied(planned("revisit-lm", product={**product, "loss.kd_ratio": [0.1]}))
    assert found[frozenset({"teacher.model", "loss.kd_ratio"})] == 2 * 7
    assert found[frozenset({"student", "loss.kd_ratio"})] == 7
    assert found[frozenset({"training.num_train_epochs", "training.max_steps", "loss.kd_ratio"})] == 3 * 7
    assert not [keys for keys in found if {"teacher.model", "student"} <= keys]


@pytest.mark.parametrize(
    ("name", "file", "more", "said"),
    [
        ("revisit-ml", "recipe.yaml", {}, "Did you mean 'revisit-lm'"),
        ("revisit-lm", "heads.yaml", {}, "is for language models, but the recipe is of classifiers"),
        ("revisit-classification", "recipe.yaml", {}, "is for classifiers"),
        ("temperature", "recipe.yaml", {"product": {"temperature": [1]}}, "varies temperature itself"),
        ("temperature", "recipe.yaml", {"product": {"temperature.value": [1]}}, "varies temperature.value itself"),
        ("revisit-lm", "recipe.yaml", {"together": {"training.learning_rate": [1]}}, "varies training.learning_rate itself"),
        ("revisit-lm", "recipe.yaml", {"overrides": ["training.optim=sgd"]}, "training.optim is sgd, expected adamw_torch"),
    ],
)  # fmt: skip
def test_presets_that_do_not_fit_are_refused(name: str, file: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(name, file, **more)


def test_the_command_lists_them_and_plans_them() -> None:
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["sweep", "--list-presets"])
    assert listed.exit_code == 0 and all(name in listed.stdout for name in PRESETS)
    assert "--set teacher.model=BASE,INSTRUCT,SFT_1,SFT_10" in listed.stdout
    shown = CliRunner().invoke(
        app, ["sweep", "recipe.yaml", "--preset", "temperature", "--output", "out", "--dry-run"]
    )
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("missing") == 21 and "runs left: 21; how long that takes is unknown" in shown.stdout
    wrong = CliRunner().invoke(app, ["sweep", "recipe.yaml", "--preset", "temperatur"])
    assert wrong.exit_code == 2 and isinstance(wrong.exception, (UserError, SystemExit))
