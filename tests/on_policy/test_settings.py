"""The settings of mixed data: a recipe's and Python's are the same, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dts_hf.errors import UserError
from dts_hf.on_policy.settings import OnPolicySettings, on_policy_settings
from dts_hf.recipe.schema import OnPolicy


def test_recipe_and_python_have_the_same_options_and_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(OnPolicySettings)}
    assert ours == {name: field.default for name, field in OnPolicy.model_fields.items()}
    assert OnPolicySettings(**OnPolicy().model_dump()) == on_policy_settings({}) == OnPolicySettings()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fraction": 1.5}, "on_policy.fraction: got 1.5"),
        ({"fraction": True}, "on_policy.fraction: got True"),
        ({"fraction": float("nan")}, "on_policy.fraction: got nan"),
        ({"schedule": "cosin", "end_fraction": 1.0}, "on_policy.schedule: got 'cosin'.*cosine"),
        ({"schedule": "linear"}, "on_policy.end_fraction: is missing"),
        ({"end_fraction": 1.0}, "on_policy.end_fraction: got 1 with schedule 'constant'"),
        ({"temperature": 0}, "on_policy.temperature: got 0"),
        ({"temperature": float("inf")}, "on_policy.temperature: got inf"),
        ({"top_p": 0.0}, "on_policy.top_p: got 0.0"),
        ({"max_new_tokens": 0}, "on_policy.max_new_tokens: got 0"),
        ({"max_new_tokens": None}, "on_policy.max_new_tokens: got None"),
        ({"batch_size": 2.5}, "on_policy.batch_size: got 2.5"),
        ({"seed": -1}, "on_policy.seed: got -1"),
        ({"fracton": 0.5}, "on_policy: 'fracton' is no option of it.*fraction"),
        (0.5, "on_policy: got 0.5, expected a mapping"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, named):
    with pytest.raises(UserError, match=named):
        on_policy_settings(given)


def test_the_schedules_begin_at_fraction_and_end_at_end_fraction():
    for schedule, middle in (("linear", 0.35), ("cosine", 0.35)):
        settings = OnPolicySettings(fraction=0.1, schedule=schedule, end_fraction=0.6)
        found = [settings.fraction_at(progress) for progress in (0.0, 0.5, 1.0, 2.0)]
        assert found == pytest.approx([0.1, middle, 0.6, 0.6])
    quarter = OnPolicySettings(fraction=0.0, schedule="cosine", end_fraction=1.0).fraction_at(0.25)
    assert quarter == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert OnPolicySettings(fraction=0.3).fraction_at(0.9) == 0.3
