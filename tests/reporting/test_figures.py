"""What the figures of a run do with first points that dwarf the rest, with long logs, and with few points."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dts_hf.reporting import curves, facts, plots
from tests.support.made_run import RECIPE, changed, make_log, make_run


def figures_of(
    path: Path, log: list[dict[str, Any]], recipe: dict[str, Any] | None = None
) -> dict[str, plots.Drawing]:
    run = make_run(path, log=log, recipe=recipe or RECIPE)
    return {drawing.name: drawing for drawing in plots.draw(facts.gather(run))}


def axis_of(drawing: plots.Drawing, label: str) -> Any:
    assert drawing.figure is not None
    return next(axis for axis in drawing.figure.axes if axis.get_ylabel().startswith(label))


def test_losses_whose_first_points_dwarf_the_rest_stand_on_a_logarithmic_axis(tmp_path: Path) -> None:
    log = make_log(100)
    for record in log[:3]:
        record.update(kl=40.0, kd_loss=200.0)
    drawing = figures_of(tmp_path / "steep", log)["losses"]
    assert axis_of(drawing, "distance").get_yscale() == "log"
    assert axis_of(drawing, "cross-entropy").get_yscale() == "linear"
    assert "logarithmic" in drawing.caption
    assert "logarithmic" not in figures_of(tmp_path / "flat", make_log(100))["losses"].caption


def test_a_gap_that_begins_far_away_and_ends_below_zero_is_clipped_and_says_so(tmp_path: Path) -> None:
    log = [
        {"kind": "train", "step": step, "temperature": 2.0, "gap": 15.0 if step <= 4 else 0.2 * math.sin(step)}
        for step in range(1, 101)
    ]
    drawing = figures_of(tmp_path / "run", log)["temperature"]
    low, high = axis_of(drawing, "gap").get_ylim()
    assert -0.5 < low < -0.2 and 0.2 < high < 0.5
    assert "The first points (4, as far as 15) lie outside of the picture." in drawing.caption


def test_what_the_gap_adds_to_the_cosine_is_drawn(tmp_path: Path) -> None:
    log = make_log(50)
    axis = axis_of(figures_of(tmp_path / "run", log)["temperature"], "T - cosine")
    train = [record for record in log if record["kind"] == "train"]
    wanted = [record["temperature"] - record["temperature_cosine"] for record in train]
    assert list(axis.get_lines()[-1].get_ydata()) == pytest.approx(wanted)


def test_a_temperature_that_never_left_its_cosine_is_said_to_follow_it(tmp_path: Path) -> None:
    log = make_log(50)
    for record in log:
        if "temperature" in record:
            record["temperature"] = record["temperature_cosine"]
    drawing = figures_of(tmp_path / "run", log)["temperature"]
    assert drawing.figure is not None
    assert [axis.get_ylabel() for axis in drawing.figure.axes] == ["temperature", "gap\n(nats per label)"]
    assert "The two are the same throughout" in drawing.caption


def test_rate_norm_and_speed_have_a_figure(tmp_path: Path) -> None:
    log = make_log(40)
    drawing = figures_of(tmp_path / "run", log)["optimizer"]
    train = [record for record in log if record["kind"] == "train"]
    for label, key in (
        ("learning rate", "learning_rate"),
        ("gradient norm", "grad_norm"),
        ("tokens", "tokens_per_second"),
    ):
        assert list(axis_of(drawing, label).get_lines()[-1].get_ydata()) == [record[key] for record in train]
    assert axis_of(drawing, "gradient norm").get_yscale() == "log"  # its first is 90, its last 1.5
    assert all(word in drawing.alt for word in ("learning rate", "gradient norm", "tokens per second"))
    without = [{k: v for k, v in r.items() if k not in ("learning_rate", "tokens_per_second")} for r in log]
    (axis,) = figures_of(tmp_path / "less", without)["optimizer"].figure.axes  # type: ignore[union-attr]
    assert axis.get_ylabel() == "gradient norm"


@pytest.mark.parametrize(("weights", "share"), [([0.7], 87.5), ([0.0], None), ([1.0], None)])
def test_the_share_of_the_soft_loss_is_that_of_the_loss(
    tmp_path: Path, weights: list[float], share: float | None
) -> None:
    log = [{"kind": "train", "step": step, "ce_loss": 1.0, "kd_loss": 3.0} for step in range(1, 5)]
    recipe = changed(loss={"divergence": "forward_kl", "kd_ratio": weights[0]})
    drawing = figures_of(tmp_path / "run", log, recipe)["losses"]
    assert drawing.figure is not None
    labels = [axis.get_ylabel() for axis in drawing.figure.axes]
    assert (
        ("KD's share\nof the loss (%)" in labels) == (share is not None) == ("not of its gradient" in drawing.caption)
    )
    if share is not None:  # 0.7 * 3 of 0.7 * 3 + 0.3 * 1
        assert list(drawing.figure.axes[-1].get_lines()[0].get_ydata()) == pytest.approx([share] * 4)


def test_a_weight_that_the_policy_sets_counts_step_by_step(tmp_path: Path) -> None:
    log = [{"kind": "train", "step": s, "ce_loss": 1.0, "kd_loss": 1.0, "kd_ratio": s / 10} for s in range(1, 5)]
    drawing = figures_of(tmp_path / "run", log)["losses"]
    assert drawing.figure is not None
    assert list(drawing.figure.axes[-1].get_lines()[0].get_ydata()) == pytest.approx([10, 20, 30, 40])


@pytest.mark.parametrize("points", [1, 2, 3])
def test_points_are_joined_from_three_on(tmp_path: Path, points: int) -> None:
    log = make_log(points) + [
        {"kind": kind, "step": step, "model": "student", "rougeL": 0.1 * step, "eval_ce_loss": 1.0, "eval_kl": 1.0}
        for step in range(1, points + 1)
        for kind in ("eval", "generation")
    ]
    drawn = figures_of(tmp_path / "run", log)
    lines = [
        one
        for drawing in drawn.values()
        for axis in drawing.figure.axes  # type: ignore[union-attr]
        for one in axis.get_lines()
        if not one.get_label().startswith(("_", "teacher (", "student before", "student after"))
    ]
    assert len(lines) >= 10
    assert {one.get_linestyle() != "None" for one in lines} == {points >= 3}


def test_a_long_curve_is_thinned_and_keeps_its_spikes_and_holes() -> None:
    values = [math.sin(i / 5000) for i in range(100_000)]
    values[31_415] = 50.0
    values[27_182] = -50.0
    values[70_000:75_000] = [math.nan] * 5000
    whole = curves.Curve([float(i) for i in range(100_000)], values)
    thin = curves.thinned(whole)
    assert 600 < len(thin.values) <= 1.6 * curves.MOST_POINTS and len(thin.steps) == len(thin.values)
    assert max(thin.finite) == 50.0 and min(thin.finite) == -50.0
    assert all(a < b for a, b in pairwise(thin.steps)) and (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    holes = [step for step, value in zip(*thin, strict=True) if math.isnan(value)]
    assert holes and all(70_000 <= step < 75_000 for step in holes)
    assert curves.thinned(curves.Curve([1.0, 2.0], [3.0, 4.0])) == curves.Curve([1.0, 2.0], [3.0, 4.0])


def test_the_moving_mean_of_a_long_log_takes_no_time() -> None:
    started = time.process_time()
    means = curves.moving_mean([float(i % 7) for i in range(300_000)])
    assert time.process_time() - started < 3
    assert means[150_000] == pytest.approx(3.0, abs=1e-3) and means[0] == 0.0


def test_a_long_log_makes_figures_of_few_points(tmp_path: Path) -> None:
    for drawing in figures_of(tmp_path / "long", make_log(20_000)).values():
        assert drawing.figure is not None
        assert all(len(line.get_xdata()) <= 2000 for axis in drawing.figure.axes for line in axis.get_lines())


def test_a_picture_is_told_in_words(tmp_path: Path) -> None:
    drawn = figures_of(tmp_path / "run", make_log(100))
    assert drawn["temperature"].alt.startswith("Temperature, steps 1 to 100: temperature from 3 to 1.")
    assert "gap from 5.48" in drawn["temperature"].alt and "student after 46.3" in drawn["rouge"].alt
    assert all(drawing.alt.endswith(".") for drawing in drawn.values())
