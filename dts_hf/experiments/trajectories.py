"""What the logs of several kinds of runs have in common, over steps: the mean over seeds, and how far these lie apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dts_hf.experiments.kinds import Kind
from dts_hf.loss.statistics import CE, GAP, KL, TEMPERATURE
from dts_hf.reporting.canvas import SMOOTH_FROM, Theme, finish, line, panels, set_range
from dts_hf.reporting.curves import Curve, curve, in_words, moving_mean
from dts_hf.reporting.plots import Drawing
from dts_hf.reporting.tables import MEASURES
from dts_hf.runs.directory import RunDirectory

#: Of one kind of runs: more than a figure has columns of pixels, and no more the longer a run is.
MOST_STEPS = 400
MOST_KINDS = 8
DASHES = ("-", "--", "-.", ":")


class Quantity(NamedTuple):
    """One number of the log.

    Attributes:
        key: in a record.
        kind: of the record.
        title: of its figure.
        label: of its axis.
        about: a sentence for the caption.
        scale: from the log's unit to that of the axis.
        smooth: whether a moving mean says more than the values.
    """

    key: str
    kind: str
    title: str
    label: str
    about: str
    scale: float = 1.0
    smooth: bool = False


QUANTITIES = (
    Quantity(TEMPERATURE.log, "train", "Temperature", "temperature", "What divided the logits at each step."),
    Quantity(
        GAP.log, "train", "Gap", "gap\n(nats per label)",
        "The student's cross-entropy minus the teacher's, on the rows that it is trained on.", smooth=True,
    ),
    Quantity(
        KL.held_out_log, "eval", "Held-out KL", "held-out KL\n(nats per label)",
        "From the teacher at T = 1, on held-out rows: the same yardstick for every kind.",
    ),
    Quantity("rougeL", "generation", "ROUGE-L during training", "ROUGE-L\n(0 to 100)", "Of answers during training.", 100.0),
    Quantity(CE.held_out_log, "eval", "Held-out cross-entropy", "held-out CE\n(nats per label)", "On held-out rows."),
    *(
        Quantity(f"eval_{measure.key}", "eval", measure.label, f"{measure.label}\n(x 100)", "On held-out rows.", 100.0)
        for measure in MEASURES
        if measure.key in ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
    ),
    Quantity(
        "loss", "train", "Training loss", "loss",
        "What each kind minimises: kinds with another divergence, weight or temperature minimise something else, so only "
        "its shape can be compared.", smooth=True,
    ),
)  # fmt: skip


class Band(NamedTuple):
    """Of one kind of runs.

    Attributes:
        mean: over its runs.
        low: the lowest run at each step.
        high: the highest.
        runs: how many.
    """

    mean: Curve
    low: Curve
    high: Curve
    runs: int


def bands(kinds: Sequence[Kind]) -> dict[str, list[Band | None]]:
    """By the key of a quantity that any of the ``kinds`` has logged: a band for each kind, None where it has none.

    Runs that failed are in no band. One log is held at a time.
    """
    found: dict[str, list[Band | None]] = {quantity.key: [] for quantity in QUANTITIES}
    for kind in kinds:
        curves: dict[str, list[Curve]] = {quantity.key: [] for quantity in QUANTITIES}
        for seed in sorted(kind.runs):
            log = RunDirectory(kind.runs[seed].path).read_log()
            for quantity in QUANTITIES:
                curves[quantity.key].append(_curve(log, quantity))
        for key, of_runs in curves.items():
            found[key].append(band(of_runs))
    return {key: of_kinds for key, of_kinds in found.items() if any(of_kinds)}


def _curve(log: Sequence[Mapping[str, Any]], quantity: Quantity) -> Curve:
    of_student = [record for record in log if record.get("model", "student") == "student"]
    data = curve(of_student, quantity.key, quantity.kind)
    values = [value * quantity.scale for value in data.values]
    return Curve(data.steps, moving_mean(values) if quantity.smooth and len(values) >= SMOOTH_FROM else values)


def band(curves: Sequence[Curve]) -> Band | None:
    """Mean and range of ``curves`` over the steps that all of those with values have; None where there are none.

    Beyond the end of the shortest one the mean would be over other runs, and jump.
    """
    whole = [
        [(step, value) for step, value in zip(*data, strict=True) if not math.isnan(value)]
        for data in curves
        if not data.empty
    ]
    if not whole:
        return None
    first, last = max(points[0][0] for points in whole), min(points[-1][0] for points in whole)
    steps = sorted({step for points in whole for step, _ in points if first <= step <= last})
    if not steps:
        return None
    if len(steps) > MOST_STEPS:
        steps = [steps[place] for place in np.linspace(0, len(steps) - 1, MOST_STEPS).astype(int)]
    places = [([step for step, _ in points], [value for _, value in points]) for points in whole]
    table = np.stack([np.interp(steps, known, values) for known, values in places])
    mean, low, high = (Curve(steps, values.tolist()) for values in (table.mean(0), table.min(0), table.max(0)))
    return Band(mean, low, high, len(whole))


def draw_trajectories(
    kinds: Sequence[Kind], found: Mapping[str, Sequence[Band | None]], theme: Theme
) -> list[Drawing]:
    """A figure for each quantity that was logged, the kinds in the colours and dashes of ``style_of``."""
    return [_draw(kinds, quantity, found[quantity.key], theme) for quantity in QUANTITIES if quantity.key in found]


def style_of(place: int) -> tuple[int, str]:
    """The number of the colour and the dash of a kind: they never agree in both."""
    return place % 4, DASHES[(place + place // 4) % 4]


def _draw(kinds: Sequence[Kind], quantity: Quantity, of_kinds: Sequence[Band | None], theme: Theme) -> Drawing:
    figure, (axis,) = panels([3.6], theme)
    colours = (theme.blue, theme.orange, theme.green, theme.purple)
    words, drawn = [], []
    for place, (kind, of_kind) in enumerate(zip(kinds, of_kinds, strict=True)):
        if of_kind is None:
            continue
        colour, dash = style_of(place)
        if of_kind.runs > 1:
            axis.fill_between(
                of_kind.mean.steps,
                of_kind.low.values,
                of_kind.high.values,
                color=colours[colour],
                alpha=0.18,
                linewidth=0,
            )
        line(axis, of_kind.mean, "_", colours[colour], dash, smooth=False)
        words.append(in_words(kind.name, of_kind.mean))
        drawn += [of_kind.low, of_kind.high]
    axis.set_ylabel(quantity.label)
    floor = None if quantity.key == GAP.log else 0.0
    note = set_range(axis, drawn, floor=floor, tame=quantity.kind != "generation" and quantity.key != TEMPERATURE.log)
    finish(figure, [step for data in drawn for step in data.steps])
    missing = [kind.name for kind, of_kind in zip(kinds, of_kinds, strict=True) if of_kind is None]
    caption = quantity.about + note + (f" Not logged: {'; '.join(missing)}." if missing else "")
    return Drawing(quantity.key, quantity.title, caption, figure, alt=f"{quantity.title}: {'; '.join(words)}.")
