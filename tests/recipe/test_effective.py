"""The effective recipe: every default of policy, divergence and training; once made, it stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dts_hf.distill import task_of
from dts_hf.divergences import DIVERGENCES
from dts_hf.recipe.effective import RESULT_KEYS, effective
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.temperature import temperature_policies


def values(**sections: Any) -> dict[str, Any]:
    return {
        "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "rows.jsonl"}, "output": {"dir": "run"},
        "training": {"use_cpu": True}, **sections,
    }  # fmt: skip


def arguments(recipe: Recipe) -> Any:
    return task_of(recipe).training_arguments("run")


CASES = [
    {"temperature": {"name": name, **({"run": "r"} if name == "replay" else {})}} for name in temperature_policies()
] + [
    *({"loss": {"divergence": name}} for name in DIVERGENCES),
    {"temperature": {"name": "dts", "range": "auto", "support_max": 40}},
    {"temperature": {"name": "dts", "gap_source": {"replay": "r", "order": "permuted"}, "seed": 3}},
    {"temperature": {"name": "cosine", "match_mean_of": "r"}},
    {"training": {"use_cpu": True, "max_steps": 5, "warmup_steps": 0.1, "eval_strategy": "no", "report_to": ["none"]}},
    {"training": {"use_cpu": True, "optim": "sgd", "lr_scheduler_kwargs": {"num_cycles": 2}}},
    {"data": {"train": "a", "packing": True}},
    {"task": {"name": "glue", "subset": "rte"}, "data": {"train": "a", "validation": "b"}},
]  # fmt: skip


@pytest.mark.parametrize("sections", CASES, ids=str)
def test_it_loads_again_to_an_equal_recipe_and_equal_arguments(sections: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(values(**sections))
    args = arguments(recipe)
    full = effective(recipe, args)
    path = tmp_path / "recipe.yaml"
    path.write_text(full.to_yaml())
    again = load_recipe(path)
    assert again == full and effective(again, arguments(again)) == full
    different = {key for key, value in vars(args).items() if value != vars(arguments(again)).get(key)}
    assert not different & {*RESULT_KEYS}
    assert full.temperature.options.items() >= recipe.temperature.options.items()


def test_it_holds_no_machine_and_no_path() -> None:
    full = effective(recipe := Recipe.from_dict(values(training={})), arguments(recipe))
    gone = {"use_cpu", "output_dir", "dataloader_num_workers", "logging_dir", "hub_token", "report_to", "run_name"}
    assert not gone & full.training.keys() and full.training["optim"] and full.training["learning_rate"] == 5e-5
    assert "max_steps" not in full.training and full.training["num_train_epochs"] == 3
