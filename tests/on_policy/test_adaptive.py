"""DistiLLM's adaptive fraction: phi against a table made by hand, and what a coin leads to."""

import dataclasses
import math

import pytest

from dts_hf.on_policy.adaptive import AdaptiveFraction
from dts_hf.on_policy.settings import AdaptiveSettings, OnPolicySettings, on_policy_settings
from dts_hf.recipe.schema import Adaptive, OnPolicy


def test_phi_follows_a_hand_table():
    """The loss that the next one is compared with moves when phi grows, and then alone."""
    table = [
        # held-out loss, phi after it, the loss compared with after it
        (2.00, 0.0, 2.00),  # the first is only remembered
        (1.50, 0.0, 2.00),  # falling does not lower it
        (2.05, 0.0, 2.00),
        (2.10, 0.1, 2.10),  # exactly eps above
        (2.15, 0.1, 2.10),
        (2.30, 0.2, 2.30),
        (math.nan, 0.2, 2.30),
        (math.inf, 0.2, 2.30),
        (1.00, 0.2, 2.30),
        (9.00, 0.3, 9.00),
    ]
    rule = AdaptiveFraction(eps=0.1, step=0.1)
    for loss, phi, compared_with in table:
        before = rule.fraction
        assert rule.observe(loss) == (phi > before)
        assert (rule.fraction, rule.compared_with) == (phi, compared_with)


def test_phi_stops_at_one():
    rule = AdaptiveFraction(0.75, eps=0.1, step=0.1)
    rule.observe(0.0)
    seen = []
    for number in range(1, 6):
        rule.observe(float(number))
        seen.append(rule.fraction)
    assert seen == [0.85, 0.95, 1.0, 1.0, 1.0]


def test_ten_steps_of_a_tenth_are_one():
    rule = AdaptiveFraction(eps=0.0, step=0.1)
    for number in range(11):
        rule.observe(float(number))
    assert rule.fraction == 1.0


@pytest.mark.parametrize(
    ("coin", "progress", "full", "expected"),
    [
        (0.05, 0.0, True, "generate"),  # below phi (1 - 0)
        (0.39, 0.0, True, "generate"),
        (0.40, 0.0, True, "data"),  # not below phi
        (0.19, 0.5, True, "generate"),  # below phi / 2
        (0.20, 0.5, True, "replay"),
        (0.20, 0.5, False, "generate"),  # there is room
        (0.39, 0.99, True, "replay"),
        (0.45, 0.99, False, "data"),
        (0.20, 0.5, None, "generate"),  # no buffer
    ],
)
def test_the_branch_of_a_step(coin, progress, full, expected):
    rule = AdaptiveFraction(0.4)
    assert rule.branch(coin, progress, None if full is None else lambda: full) == expected


def test_fullness_is_asked_on_all_processes_or_on_none():
    """It may be a collective: whether it is asked must not depend on what this process has in its buffer."""
    asked = []
    rule = AdaptiveFraction(0.4)
    for coin in (0.1, 0.3, 0.5):
        for full in (True, False):
            rule.branch(coin, 0.5, lambda coin=coin, full=full: asked.append((coin, full)) or full)
    assert asked == [(0.3, True), (0.3, False)]


def test_its_shares_over_a_run_are_those_of_the_rule():
    """Over a run at a fixed phi half of the student's steps generate and half replay, once the buffer is full."""
    rule, steps = AdaptiveFraction(0.6), 20_000
    coins = [(0.5 + number * 0.6180339887498949) % 1 for number in range(steps)]  # evenly spread, in any window
    branches = [rule.branch(coin, step / steps, lambda: True) for step, coin in enumerate(coins)]
    for branch, share in (("data", 0.4), ("generate", 0.3), ("replay", 0.3)):
        assert branches.count(branch) / steps == pytest.approx(share, abs=0.002)


def test_its_state_goes_through_a_checkpoint():
    rule = AdaptiveFraction(0.2, eps=0.1, step=0.1)
    for loss in (1.0, 2.0, 1.9):
        rule.observe(loss)
    other = AdaptiveFraction(0.2, eps=0.1, step=0.1)
    other.load_state(rule.state())
    assert other.state() == rule.state() == {"fraction": 0.3, "compared_with": 2.0}
    assert other.observe(2.1) and rule.observe(2.1)
    other.reset()
    assert other.state() == {"fraction": 0.2, "compared_with": None}


def test_recipe_and_python_have_the_same_options_and_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(AdaptiveSettings)}
    assert ours == {name: field.default for name, field in Adaptive.model_fields.items()}
    made = OnPolicySettings(**OnPolicy.model_validate({"adaptive": {"capacity": 5}}).model_dump())
    assert made == on_policy_settings({"adaptive": {"capacity": 5}})
    assert made.adaptive == AdaptiveSettings(capacity=5)
    assert made.facts["on_policy_adaptive_capacity"] == 5 and "on_policy_adaptive" not in made.facts


@pytest.mark.parametrize(
    ("given", "first"),
    [({}, 0.5), ({"adaptive": {}}, 0.0), ({"adaptive": {}, "fraction": 0.3}, 0.3), ({"fraction": 0.0}, 0.0)],
)
def test_the_share_of_the_first_step(given, first):
    assert on_policy_settings(given).first_fraction == first
