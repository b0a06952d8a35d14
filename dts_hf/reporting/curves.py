"""The numbers of ``log.jsonl`` as curves over optimizer steps: smoothed, thinned, told in words. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dts_hf.loss.statistics import GENERATED_CE
from dts_hf.reporting.facts import number

MOST_POINTS = 1200  # of a curve that is drawn: more than a figure has columns of pixels


#: In a record that is about text of the student's own.
OWN_TEXT = GENERATED_CE.log


class Curve(NamedTuple):
    """Values over optimizer steps; a step without a number is NaN and leaves a hole in the line."""

    steps: list[float]
    values: list[float]

    @property
    def finite(self) -> list[float]:
        """The values without the holes."""
        return [value for value in self.values if not math.isnan(value)]

    @property
    def empty(self) -> bool:
        return all(math.isnan(value) for value in self.values)


def curve(records: Sequence[Mapping[str, Any]], key: str, kind: str = "train") -> Curve:
    """The values of ``key`` over the steps of the log records of one kind.

    The log of a run that was resumed has the steps since the checkpoint twice: the last record of a step counts.
    """
    found: dict[float, float] = {}
    for record in records:
        if record.get("kind") == kind and "step" in record:
            step, value = float(record["step"]), number(record.get(key))
            if (
                key not in record and OWN_TEXT in record
            ):  # no hole in what is of the data's labels: the step has none of them
                continue
            # Another record of the same step may hold other columns: it does not make a hole in this one
            if key in record or step not in found:
                found[step] = math.nan if value is None else value
    steps = sorted(found)
    return Curve(steps, [found[step] for step in steps])


def difference(left: Curve, right: Curve) -> Curve:
    """``left`` minus ``right`` at the steps that both have; NaN where either is."""
    other = dict(zip(*right, strict=True))
    pairs = [(step, value - other[step]) for step, value in zip(*left, strict=True) if step in other]
    return Curve([step for step, _ in pairs], [value for _, value in pairs])


def share_of_soft_loss(soft: Curve, hard: Curve, ratio: Curve | float) -> Curve:
    """Percent of the loss ``(1 - r) hard + r soft`` that is its soft part.

    A share of the loss, and not of its gradient: the two parts of the gradient are formed as one over the vocabulary, and
    their norms apart would be further passes over it in every step.

    Args:
        soft: the KD loss, its temperature factor included.
        hard: the cross-entropy of the labels.
        ratio: the weight r of the soft loss, over steps where a policy sets it.
    """
    hards = dict(zip(*hard, strict=True))
    ratios = dict(zip(*ratio, strict=True)) if isinstance(ratio, Curve) else dict.fromkeys(soft.steps, ratio)
    values = []
    for step, value in zip(*soft, strict=True):
        weight = ratios.get(step, math.nan)
        kd, ce = weight * value, (1 - weight) * hards.get(step, math.nan)
        values.append(100 * kd / (kd + ce) if kd + ce > 0 else math.nan)
    return Curve(soft.steps, values)


def moving_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the points; the window narrows at both ends and beside holes (NaN).

    It stays symmetric, because a one-sided mean would bend a falling line upwards before every hole.
    """
    array = np.asarray(values, dtype=float)
    count, places = len(array), np.arange(len(array))
    holes = np.isnan(array)
    # To the nearest hole on either side; the ends of the line count as holes just outside of it
    before = places - np.maximum.accumulate(np.where(holes, places, -1))
    after = np.minimum.accumulate(np.where(holes, places, count)[::-1])[::-1] - places
    reach = np.clip(np.minimum(np.minimum(before, after) - 1, max(1, count // 40)), 0, None)
    # Differences of running sums: a window for each point would be minutes for a log of 100,000 lines
    sums = np.concatenate([[0.0], np.cumsum(np.where(holes, 0.0, array))])
    means = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return [float(mean) for mean in np.where(holes, math.nan, means)]


def thinned(data: Curve, most: int = MOST_POINTS) -> Curve:
    """At most about ``most`` of the points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(data.values) <= most:
        return data
    values = np.asarray(data.values)
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges.tolist()):
        holes = np.isnan(values[start:end])
        if holes.any():
            kept.add(start + int(holes.argmax()))  # a hole stays a hole
        if not holes.all():
            kept |= {start + int(np.nanargmin(values[start:end])), start + int(np.nanargmax(values[start:end]))}
    places = sorted(kept)
    return Curve([data.steps[place] for place in places], [data.values[place] for place in places])


def in_words(label: str, data: Curve) -> str:
    """What a line shows, for those who cannot see it: ``gap from 4.2 to 0.31 (0.28 to 4.2)``."""
    values = data.finite
    if len(values) < 2:
        return f"{label} {values[0]:.3g}" if values else ""
    return f"{label} from {values[0]:.3g} to {values[-1]:.3g} (between {min(values):.3g} and {max(values):.3g})"
