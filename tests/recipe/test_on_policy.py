"""``data.on_policy`` in a recipe: what does not go together is refused by name, and the rest reaches the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dts_hf.errors import UserError
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.on_policy.settings import OnPolicySettings
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.shipped import shipped_recipes
from dts_hf.task import Data, Models
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, encoded


def recipe(data: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    values = {
        "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "rows.jsonl", **(data or {})},
        "output": {"dir": "run"}, **sections,
    }  # fmt: skip
    return Recipe.from_dict({name: value for name, value in values.items() if value is not None}, deep=False)


@pytest.mark.parametrize(
    ("own", "sections", "named"),
    [
        ({"fraction": 1.5}, {}, "data.on_policy.fraction: got 1.5, expected a number between 0 and 1"),
        ({"fracton": 0.5}, {}, "data.on_policy.fracton: .*fraction"),
        ({"schedule": "sine"}, {}, "data.on_policy.schedule: got \"sine\", expected one of .*Did you mean 'cosine'"),
        ({"schedule": "linear"}, {}, "data.on_policy.*: end_fraction: is missing"),
        ({"end_fraction": 0.5}, {}, "data.on_policy.*: end_fraction: got 0.5 with schedule 'constant'"),
        ({"top_p": 0}, {}, "data.on_policy.top_p: got 0, expected a number above 0"),
        ({"temperature": 0}, {}, "data.on_policy.temperature: got 0, expected a number above 0"),
        ({"max_new_tokens": 0}, {}, "data.on_policy.max_new_tokens: got 0"),
        ({}, {"teacher": None, "loss": {"kd_ratio": 0}}, "data.on_policy: there is no teacher"),
        ({}, {"teacher": {"model": "t", "kind": "cached", "cache": "states"}}, "data.on_policy: .*teacher.missing: live"),
        ({}, {"task": {"name": "glue", "subset": "sst2"}}, "data.on_policy: belongs to generated answers"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_by_name(
    own: dict[str, Any], sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        recipe({"on_policy": own}, **sections)


def test_the_folder_of_the_weights_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "recipes" / "recipe.yaml"
    for given, found in (("../weights", "weights"), ("~/weights", "home/weights"), ("/dev/shm/w", "/dev/shm/w")):
        own = {"backend": "vllm", "vllm_url": "http://a:1", "vllm_folder": given}
        data = {"train": "rows.jsonl", "on_policy": own}
        sections = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": data, "output": {"dir": "run"}}
        file.write_text(json.dumps(sections))
        chosen = load_recipe(file).data.on_policy
        assert chosen is not None and chosen.vllm_folder == found


def test_a_cache_with_a_live_teacher_beside_it_is_taken() -> None:
    teacher = {"model": "t", "kind": "cached", "cache": "states", "missing": "live"}
    assert recipe({"on_policy": {}}, teacher=teacher).data.on_policy is not None


def test_the_trainer_is_given_what_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own = {"fraction": 0.25, "schedule": "cosine", "end_fraction": 1.0, "temperature": 0.8, "top_p": 0.9, "seed": 4,
           "max_new_tokens": 9, "batch_size": 3}  # fmt: skip
    for asked, expected in ((own, OnPolicySettings(**own)), (None, None)):
        task = LanguageModeling(recipe({"on_policy": asked, "prompt_template": "chat"}))
        models = Models(tiny_llama(), tiny_llama(seed=1, layers=3), tiny_tokenizer(), tiny_tokenizer())
        trainer = task.make_trainer(arguments(tmp_path), models, Data(encoded(), None))
        assert trainer.on_policy == expected
        assert trainer.facts.get("on_policy_top_p") == (None if asked is None else 0.9)
        assert ("on_policy" in trainer.describe_objective()) == (asked is not None)
        if trainer.rollout is not None:
            assert trainer.rollout.seed == 4


def test_the_shipped_recipe_mixes_the_quickstart() -> None:
    path, comment = shipped_recipes()["on_policy"]
    own = load_recipe(path).data.on_policy
    assert own is not None and own.fraction == 0.5 and comment.startswith("Mixed data")
