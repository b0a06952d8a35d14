"""Each rule on planted measurements: one that makes it fire, one that does not, one that does not decide."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dts_hf.advice.guidance import IMAGES, RULES, advise_on
from dts_hf.advice.measured import Estimate, Measured, Situation
from dts_hf.advice.proposal import MOST_ARMS, arms, temperatures
from dts_hf.advice.rules import Judged, Verdict
from dts_hf.advice.sums import SIZES
from tests.support.recipes import recipe

CONSTANT = {"name": "constant", "value": 2.0}
HEADS = (1.0, 2.0, 4.0, 8.0, 16.0, 40.0)


def near(value: float, width: float = 0.01) -> Estimate:
    half = width * max(abs(value), 1e-6)
    return Estimate(value, value - half, value + half)


def wide(value: float) -> Estimate:
    return near(value, 10.0)


def planted(
    values: dict[str, Estimate] | None = None, curves: dict[str, float] | None = None, **facts: Any
) -> Measured:
    """A measurement about which no rule has anything to say but those without a condition, changed here and there.

    Args:
        values: in the place of others.
        curves: in the place of others, the same at all temperatures.
        facts: of the situation.
    """
    situation = dataclasses.replace(Situation(), **facts)
    flat = {
        "entropy": 2.0,
        "other": 3.0,
        "kd_share": 0.5,
        "cosine": 0.5,
        "equal_ratio": 0.5,
        "binary": 0.5,
        "relation": 1.5,
    }
    flat |= {"teacher_ce": 2.0, "held_out_teacher_ce": 2.0} | {f"mass_{size}": 0.97 for size in SIZES} | (curves or {})
    points = {name: [near(value)] * len(situation.grid) for name, value in flat.items()}
    plain = {"gap": 0.5, "kl": 0.5, "ce_ratio": 1.1, "over_confidence": 0.001, "held_out_over_confidence": 0.001,
             "ceiling": 1.9, "matching_t": 1.6}  # fmt: skip
    return Measured(situation, {name: near(value) for name, value in plain.items()} | (values or {}), points)


def judged(found: Measured, rule: str) -> Judged:
    return next(one for one in advise_on(found) if one.rule.id == rule)


CLASSES = {"classifier": True, "grid": HEADS, "classes": 3, "labels": 64, "held_out_labels": 64}
DTS = {"policy": "dts", "moves": True}
RELATED = {**CLASSES, "classes": 100, "epochs": 30.0}
BOTH = ("over_confidence", "held_out_over_confidence")
#: By rule: a measurement that makes it fire and others that do not, as arguments of ``planted``.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "revisit-f1-fixed-temperature": ({}, []),
    "revisit-f2-adamw": ({}, [{"optimizer": "sgd"}, {"optimizer": "adafactor"}]),
    "revisit-f2-sgd": ({"optimizer": "sgd"}, [{}, {"optimizer": "adafactor"}]),
    "revisit-f3-large-temperature": (
        {**RELATED, "curves": {"other": 2.0}},
        [{**RELATED, "curves": {"other": 4.5}}, {**RELATED, "epochs": 3.0, "curves": {"other": 2.0}},
         {**CLASSES, "classes": 2, "epochs": 30.0}, {"epochs": 30.0}],
    ),
    "revisit-f4-fine-labels": ({**CLASSES, "classes": 100}, [CLASSES, {"classes": 100}]),
    "revisit-f4-coarse-labels": (CLASSES, [{**CLASSES, "classes": 100}, {"classes": 3}]),
    "revisit-f5-heavy-fine-tuning": ({"values": {"ce_ratio": near(2.0)}}, [{}, {"values": {"ce_ratio": near(0.9)}}]),
    "revisit-f6-random-student": ({"student": "random"}, [{}, {"student": "cut"}]),
    "revisit-f6-pretrained-student": ({"student": "cut"}, [{"student": "random"}]),
    "over-fitted-teacher": (
        {"values": {"ce_ratio": near(2.0)}}, [{}, {"values": {"ce_ratio": near(2.0)}, "own_answers": True}],
    ),
    "sharp-teacher": (
        {"values": dict.fromkeys(BOTH, near(0.2))},
        [{}, {"values": {"over_confidence": near(0.0), "held_out_over_confidence": near(0.3)}},  # knows them by heart
         {"values": dict.fromkeys(BOTH, near(-0.2))}],
    ),
    "flat-teacher": (
        {"values": dict.fromkeys(BOTH, near(-0.2))},
        [{}, {"values": dict.fromkeys(BOTH, near(-0.2)), "own_answers": True}, {"values": dict.fromkeys(BOTH, near(0.2))}],
    ),
    "teacher-worse": ({"values": {"gap": near(-0.1)}}, [{}, {"values": {"gap": near(0.01)}}]),
    "no-relations-left": ({"curves": {"other": 10.5}}, [{}, {**CLASSES, "classes": 2}]),
    "support-ceiling": (
        {"curves": {"entropy": 8.0}},
        [{}, {**CLASSES, "curves": {"entropy": 1.0}}, {"curves": {"entropy": 8.0}, "hottest": None}],
    ),
    "forward-kl-values": ({}, [{"divergence": "reverse_kl"}, CLASSES]),
    "reverse-kl-values": ({"divergence": "reverse_kl"}, [{}, {"divergence": "jsd"}]),
    "near-student": ({"values": {"kl": near(0.01)}}, [{}]),
    "fixed-is-enough": (
        {**DTS, "rule": "gap", "values": {"gap": near(0.01)}},
        [{**DTS, "rule": "gap"}, {"values": {"gap": near(0.01)}}, {**DTS, "rule": "paper", "values": {"gap": near(0.01)}}],
    ),
    "dts-paper-cannot-act": (
        {**DTS, "rule": "paper"}, [{**DTS, "rule": "paper", "values": {"gap": near(-2.0)}}, {**DTS, "rule": "gap"}],
    ),
    "moving-needs-controls": ({"policy": "cosine", "moves": True}, [{}, {"policy": "ats"}]),
    "gradient-share": (
        {"curves": {"kd_share": 0.02, "equal_ratio": 0.96}},
        [{}, {"curves": {"kd_share": 0.02}, "kd_ratio": 0.0}, {"curves": {"kd_share": 1.0}, "kd_ratio": 1.0},
         {"curves": {"kd_share": 0.02}, "hottest": None}],
    ),
    "compact-cache": ({}, [{"curves": {f"mass_{size}": 0.5 for size in SIZES}}, CLASSES, {"hottest": None}]),
    "no-compact-cache": (
        {"curves": {f"mass_{size}": 0.5 for size in SIZES}},
        [{}, CLASSES, {"curves": {f"mass_{size}": 0.5 for size in SIZES}, "hottest": None}],
    ),
}  # fmt: skip


def test_every_rule_has_its_cases() -> None:
    assert list(CASES) == [rule.id for rule in RULES]


@pytest.mark.parametrize("rule", CASES)
def test_it_fires_and_fills_its_advice_in(rule: str) -> None:
    found = judged(planted(**CASES[rule][0]), rule)
    assert found.fires, found.measured
    assert found.advice and "{" not in found.advice and "nan" not in found.advice and found.measured


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, (_, cases) in CASES.items() for case in cases])
def test_it_does_not_fire(rule: str, case: dict[str, Any]) -> None:
    found = judged(planted(**case), rule)
    assert found.verdict in (Verdict.SILENT, Verdict.ELSEWHERE) and not found.advice, found.measured


def undecided(rule: str) -> Measured:
    """The measurement that makes ``rule`` fire, with intervals that hold every limit."""
    found = planted(**CASES[rule][0])
    values = {name: wide(one.value) for name, one in found.values.items()}
    curves = {name: [wide(point.value) for point in points] for name, points in found.curves.items()}
    return dataclasses.replace(found, values=values, curves=curves)


#: Rules that look at numbers.
MEASURING = [rule.id for rule in RULES if rule.reads]


@pytest.mark.parametrize("rule", MEASURING)
def test_an_interval_that_holds_the_limit_decides_nothing(rule: str) -> None:
    assert judged(undecided(rule), rule).verdict is Verdict.CANNOT_SAY


@pytest.mark.parametrize("rule", MEASURING)
def test_few_labels_decide_nothing(rule: str) -> None:
    case = CASES[rule][0]
    few = {"labels": 1999, "rows": 63}
    found = judged(planted(**case | few), rule)
    assert found.verdict is Verdict.CANNOT_SAY and "expected" in found.measured
    if "held_out" in next(one.reads for one in RULES if one.id == rule):
        none = judged(planted(**case | {"held_out_labels": 0, "held_out_rows": 0}), rule)
        assert none.verdict is Verdict.CANNOT_SAY and "data.validation" in none.measured


@pytest.mark.parametrize("rule", [rule.id for rule in RULES if not rule.reads])
def test_facts_of_the_recipe_need_no_labels(rule: str) -> None:
    assert judged(planted(**CASES[rule][0] | {"labels": 1, "rows": 1}), rule).fires


def test_every_finding_of_the_paper_is_there_for_images_only() -> None:
    theirs = [rule for rule in RULES if rule.id.startswith("revisit-")]
    assert {re.search(r"finding (F\d)", rule.source)[1] for rule in theirs} == {f"F{n}" for n in range(1, 7)}  # type: ignore[index]
    assert all(rule.domain == IMAGES == "image classification only" and "2603.02430" in rule.source for rule in theirs)


def test_each_threshold_of_ours_is_called_so() -> None:
    """Where a condition has a number and nobody has published it."""
    for rule in RULES:
        numbers = re.findall(r"\d", rule.condition.replace("DTS", "").replace("log(V - 1)", ""))
        if numbers and rule.id not in ("teacher-worse", "dts-paper-cannot-act", "compact-cache", "no-compact-cache"):
            assert re.search(r"thresholds? ours", rule.condition), rule.id


def test_nothing_is_claimed_that_nobody_knows() -> None:
    """No rule predicts which temperature or policy wins, a score, or that a large vocabulary is fine-grained."""
    for rule in RULES:
        text = f"{rule.condition} {rule.advice}".lower()
        for word in ("rouge", "optimal", "best ", "will improve", "vocabulary is fine", "prefer dts", "use dts"):
            assert word not in text, rule.id
        if "better choice" in text:
            assert "fixed" in rule.advice, rule.id


@pytest.mark.parametrize("rule", [None, *CASES])
def test_temperatures_of_the_sweep(rule: str | None) -> None:
    found = planted(**({} if rule is None else CASES[rule][0]))
    fired = {one.rule.id for one in advise_on(found) if one.fires}
    values = temperatures(found, fired)
    assert values and len(set(values)) == len(values) and all(0 < t <= 40 and math.isfinite(t) for t in values)
    if not found.situation.classifier:
        assert max(values) <= max(1.0, found.values["ceiling"].value)
    assert len(values) <= MOST_ARMS


@pytest.mark.parametrize("rule", CASES)
def test_arms_of_the_sweep(rule: str) -> None:
    """Four at most and no two alike; labels alone and a constant forward KL are always there."""
    found = planted(**CASES[rule][0])
    sections: dict[str, Any] = {
        "temperature": CONSTANT,
        "loss": {"divergence": found.situation.divergence, "kd_ratio": found.situation.kd_ratio},
    }
    if found.situation.moves:
        sections["temperature"] = {"name": "dts", "rule": found.situation.rule or "gap", "t_init": 3.0}
    given = recipe(**sections)
    wanted = [arm.values for arm in arms(given, found, advise_on(found))]
    assert 2 <= len(wanted) <= MOST_ARMS and all(wanted.count(one) == 1 for one in wanted)
    assert wanted[0]["loss.kd_ratio"] == 0
    assert isinstance(wanted[1]["temperature"], float) and wanted[1]["loss.divergence"] == {"name": "forward_kl"}
    assert wanted[1]["loss.kd_ratio"] > 0
    own = [one for one in wanted if isinstance(one["temperature"], dict)]
    assert len(own) == (found.situation.moves and rule != "fixed-is-enough")


def test_what_fires_is_in_the_sweep() -> None:
    def of(rule: str, **sections: Any) -> list[dict[str, Any]]:
        found = planted(**CASES[rule][0])
        return [arm.values for arm in arms(recipe(**{"temperature": CONSTANT, **sections}), found, advise_on(found))]

    assert any(arm["loss.kd_ratio"] == 0.95 for arm in of("gradient-share"))  # 0.96 is no closer to the end
    assert any(arm["loss.kd_ratio"] == 0.9 for arm in of("revisit-f6-random-student"))
    assert any(arm["temperature"] == 1.6 for arm in of("over-fitted-teacher"))
    assert {arm["temperature"] for arm in of("flat-teacher")} <= {0.5, 0.7, 1.0}
    assert any(arm["temperature"] == 16.0 for arm in of("revisit-f3-large-temperature"))
    assert any(arm["temperature"] == 0.8 for arm in of("reverse-kl-values", loss={"divergence": "reverse_kl"}))


@pytest.mark.parametrize(
    ("policy", "capped"),
    [
        ({"name": "dts", "t_init": 3.0, "t_max": 3.0, "t_min": 1.0}, {"t_init": 1.9, "t_max": 1.9, "t_min": 1.0}),
        ({"name": "dts"}, {"t_init": 1.9, "t_max": 1.9}),  # by itself it would begin at 3
        ({"name": "cosine", "t_init": 2.5}, {"t_init": 1.9}),
        ({"name": "linear", "t_init": 1.0, "t_end": 4.0}, {"t_init": 1.0, "t_end": 1.9}),
        ({"name": "pocl"}, {"t_end": 1.9}),
        ({"name": "dts", "t_min": 1.95}, {"t_min": 1.95}),  # there is no room below the ceiling
        ({"name": "ctkd"}, {}),  # t_end is a width
        ({"name": "annealing"}, {}),  # t_max is a whole number
        ({"name": "taid", "value": 3.0}, {"value": 3.0}),
        ({"name": "ats"}, {}),
    ],
)
def test_a_range_ends_at_the_ceiling_where_it_can(policy: dict[str, Any], capped: dict[str, Any]) -> None:
    found = planted(**CASES["support-ceiling"][0])
    wanted = [arm.values["temperature"] for arm in arms(recipe(temperature=policy), found, advise_on(found))]
    assert [one for one in wanted if isinstance(one, dict)] == [{"name": policy["name"], **capped}]


@pytest.mark.parametrize(
    ("teacher_value", "kept"), [(3.0, [{"name": "constant", "value": 1.0, "teacher_value": 3.0}]), (1.0, [])]
)
def test_a_temperature_for_each_model_is_in_the_sweep(teacher_value: float, kept: list[dict[str, Any]]) -> None:
    given = recipe(temperature={"name": "constant", "value": 1.0, "teacher_value": teacher_value})
    wanted = arms(given, found := planted(), advise_on(found))
    assert [arm.values["temperature"] for arm in wanted if isinstance(arm.temperature, dict)] == kept
    assert any("T = 1 (student), 3 (teacher)" in arm.label for arm in wanted) == bool(kept)


def test_between_the_temperatures_of_the_grid_curves_are_interpolated() -> None:
    found = planted()
    points = [near(float(place)) for place in range(7)]
    found = dataclasses.replace(found, curves={"a": points})
    assert found.at("a", 1.0).value == 2.0 and math.isclose(found.at("a", math.sqrt(2.0)).value, 3.03, abs_tol=0.01)
    assert found.at("a", 0.1).value == 0.0 and found.at("a", 99.0).value == 6.0


def test_the_page_lists_every_rule_as_it_is() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/advise.md").read_text(encoding="utf-8")
    for rule in RULES:
        condition = rule.condition.replace("||", "\\|\\|")
        assert f"| `{rule.id}` | {condition} | {rule.domain} | {rule.strength} |" in page
    assert page.count("\n| `") - page.count("\n| `--") == len(RULES)
