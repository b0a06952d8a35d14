"""The schema for editors refuses what the loader refuses, accepts every shipped recipe, and lists nothing by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.divergences import DIVERGENCES
from dts_hf.errors import UserError
from dts_hf.recipe.editor_schema import MODELINE, editor_schema
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.shipped import find_recipes
from dts_hf.recipe.yaml_files import parse_yaml
from dts_hf.registry import Between
from dts_hf.temperature import temperature_policies

jsonschema = pytest.importorskip("jsonschema")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GOOD: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 12}},
    "teacher": {"model": "some/teacher"},
    "data": {"train": "rows.jsonl"},
    "output": {"dir": "runs/x"},
}
MISTAKES = {
    "temperature": [
        {"name": "dst"}, {"name": "dts", "t_inti": 3}, {"name": "dts", "rule": "gpa"}, {"name": "dts", "t_init": -1},
        {"name": "dts", "momentum": 1}, {"name": "dts", "granularity": "word"}, {"name": "dts", "decoupled": "yes"},
        {"name": "dts", "epochs": 0}, {"name": "dts", "gap_source": {"replay": "r", "ordr": "permuted"}},
        {"name": "constant", "value": 0}, {"name": "constant", "t_init": 3}, {"name": "ctkd", "betas": [0.9, 1.0]},
        {"name": "pocl", "stages": 0}, {"name": "annealing", "t_max": 2.5}, {"name": "taid", "beta": 1.5},
        "cosin", -2.0, True,
    ],
    "loss": [
        {"divergence": "fkl"}, {"divergence": {"name": "jsd", "beta": 1}}, {"divergence": {"name": "jsd", "bta": 0.5}},
        {"divergence": {"name": "skew_kl", "alpha": -0.1}}, {"divergence": {"name": "forward_kl", "beta": 0.5}},
        {"divergence": 2}, {"kd_ratio": 1.5},
    ],
    "training": [
        {"learning_rate": float("inf")}, {"learning_rate": -1}, {"adam_beta1": 1.5}, {"dataloader_num_workers": 100_000},
        {"weight_decay": float("inf")}, {"warmup_steps": float("inf")}, {"lerning_rate": 1e-4}, {"bf16": "yes"},
        {"lr_scheduler_type": "cosin"}, {"per_device_train_batch_size": 0}, {"num_train_epochs": 0}, {"seed": -1},
        {"output_dir": "x"}, {"max_steps": 2.5}, {"parallelism_config": {}}, {"debug": ["underflow"]},
    ],
    "data": [
        {"train": {}}, {"train": {"weight": 2}}, {"train": [{"weight": 2}]}, {"validation": {"split": "x"}},
        {"max_length": 300.5},{"max_length": 0}, {"max_lenght": 512}, {"long_rows": "crop"}],
    "output": [{"dir": ""}],
}  # fmt: skip
PLANTED = [(section, mistake) for section, mistakes in MISTAKES.items() for mistake in mistakes]


@functools.cache
def validator() -> Any:
    schema = editor_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def with_section(section: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(GOOD)
    values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return values


@pytest.mark.parametrize(("section", "mistake"), PLANTED, ids=str)
def test_editor_and_loader_refuse_the_same_mistake(section: str, mistake: Any) -> None:
    values = with_section(section, mistake)
    assert not validator().is_valid(values)
    with pytest.raises(UserError, match=section):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("temperature", 2),
        ("temperature", "dts"),
        ("temperature", {"name": "dts", "t_init": 4, "t_max": 5, "gap_source": "measured", "epochs": None}),
        ("temperature", {"name": "ctkd", "betas": [0.9, 0.99]}),
        ("temperature", "1.5"),
        ("temperature", "2e-1"),
        ("loss", {"divergence": "jsd"}),
        ("loss", {"divergence": {"name": "alpha_beta", "alpha": 3}}),
        ("training", {"max_grad_norm": float("inf"), "max_steps": -1, "adam_beta2": 0, "report_to": ["wandb"]}),
        ("training", {"max_steps": 1e3, "per_device_train_batch_size": 2.0, "debug": "underflow_overflow"}),
        ("data", {"max_length": 512.0, "train": {"source": "rows.jsonl", "weight": 2}}),
        ("data", {"train": ["rows.jsonl", {"source": "more.jsonl"}], "max_train_rows": 1e3}),
    ],
    ids=str,
)
def test_editor_and_loader_accept_the_same_values(section: str, value: Any) -> None:
    values = with_section(section, value)
    assert [error.message for error in validator().iter_errors(values)] == []
    Recipe.from_dict(values)


def test_options_alone_belong_to_the_choice_of_an_extended_recipe() -> None:
    assert validator().is_valid({"extends": "base.yaml", "temperature": {"rule": "code"}})
    assert not validator().is_valid({"extends": "base.yaml", "temperature": {"rule": "gpa"}})
    assert not validator().is_valid({"extends": "base.yaml", "temperature": {"t_init": -1}})


def test_the_source_of_a_mapping_may_stand_in_an_extended_recipe() -> None:
    assert validator().is_valid({"extends": "base.yaml", "data": {"train": {"weight": 2}}})
    assert not validator().is_valid({"extends": "base.yaml", "data": {"train": [{"weight": 2}]}})


def one_two(text: str) -> Any:
    """By a loader of YAML 1.2 that is not ours."""
    return pytest.importorskip("ruamel.yaml").YAML(typ="safe", pure=True).load(text)


@pytest.mark.parametrize("path", [*find_recipes(RECIPES), *RECIPES.rglob("_*.yaml")], ids=lambda path: str(path.name))
def test_shipped_recipes_read_alike_and_validate_under_every_loader(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"{MODELINE}\n")
    values = parse_yaml(text, path.name)
    assert yaml.safe_load(text) == values, "YAML 1.1 reads something else: quote it"
    assert one_two(text) == values
    assert [error.message for error in validator().iter_errors(values)] == []


def test_every_option_has_its_meaning_and_its_range() -> None:
    defs = editor_schema()["$defs"]
    for prefix, kinds in (("temperature", temperature_policies()), ("divergence", DIVERGENCES)):
        for name in kinds:
            section = defs[f"{prefix}.{name}"]
            assert section["description"] and section["additionalProperties"] is False
            assert all(option.get("description") for option in section["properties"].values()), name
    dts = defs["temperature.dts"]["properties"]
    assert dts["t_init"]["default"] == 3.0 and dts["t_init"]["anyOf"][0]["exclusiveMinimum"] == 0
    assert dts["rule"]["enum"] == ["paper", "code", "gap"] and dts["momentum"]["exclusiveMaximum"] == 1


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Between(0, 1), (0, 1, 0.5), (-0.1, 1.1, float("nan"), True, "0.5", None)),
        (Between(0, 1, "none"), (0.5,), (0, 1)),
        (Between(0, 1, "low"), (0,), (1,)),
        (Between(low=1), (1, 1e300), (0.99, float("inf"))),
    ],
)
def test_ranges(limits: Between, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    assert all(value in limits for value in inside) and not any(value in limits for value in outside)
