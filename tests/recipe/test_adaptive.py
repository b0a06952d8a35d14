"""``data.on_policy.adaptive`` in a recipe: what it needs, and what it is refused beside."""

from __future__ import annotations

import pytest

from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe

VALUES = {
    "student": {"model": "student"}, "teacher": {"model": "teacher"}, "output": {"dir": "out"},
    "data": {"train": "rows.jsonl", "validation": "held_out.jsonl"},
}  # fmt: skip


def recipe_with(on_policy, **more):
    data = {**VALUES["data"], "on_policy": on_policy, **more.pop("data", {})}
    return Recipe.from_dict({**VALUES, **more, "data": data})


def test_its_keys_reach_the_settings():
    chosen = recipe_with(
        {"adaptive": {"eps": 0.2, "capacity": 50, "replay": "rows"}, "backend": "vllm"}
    ).data.on_policy
    assert chosen is not None and chosen.adaptive is not None
    assert (chosen.adaptive.eps, chosen.adaptive.step, chosen.adaptive.capacity) == (0.2, 0.1, 50)
    assert (chosen.fraction, chosen.backend, chosen.vllm_memory) == (None, "vllm", 0.3)


@pytest.mark.parametrize(
    ("on_policy", "more", "named"),
    [
        ({"adaptive": {}}, {"data": {"validation": None}}, "held-out loss, but data.validation is null"),
        ({"adaptive": {}}, {"training": {"eval_strategy": "no"}}, "held-out loss, but training.eval_strategy is 'no'"),
        ({"adaptive": {"capcity": 5}}, {}, "capacity"),
        ({"adaptive": {"replay": "sates"}}, {}, "states"),
        ({"adaptive": {"eps": -0.1}}, {}, "eps"),
        ({"adaptive": {}, "schedule": "cosine", "end_fraction": 1}, {}, "beside adaptive, which moves the fraction"),
    ],
)
def test_what_does_not_go_is_named(on_policy, more, named):
    with pytest.raises(UserError, match=named):
        recipe_with(on_policy, **more)
