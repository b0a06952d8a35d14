"""Numbers with their intervals: what the sums of a sample come to, resampled over its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dts_hf.advice.sums import SIZES, RowSums

#: Resamples of the rows, and the share of them that an interval holds.
RESAMPLES, LEVEL = 1000, 0.95
#: Shares of the classes that a teacher may offer at most (effective support), ours.
MOST_SUPPORT = 0.02


@dataclass(frozen=True)
class Estimate:
    """A number, and its 95 % interval from a bootstrap over rows."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Estimate:
        """From the number itself, followed by those of the resamples, ``[1 + RESAMPLES]``."""
        tail = (1.0 - LEVEL) / 2
        low, high = np.quantile(draws[1:], (tail, 1.0 - tail))
        return cls(float(draws[0]), float(low), float(high))

    def __str__(self) -> str:
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"


@dataclass(frozen=True)
class Situation:
    """What the recipe says by itself, and how large the sample was.

    Attributes:
        classifier: a recipe with ``task:``.
        classes: what the loss chooses among: tokens of the vocabulary, or labels.
        grid: temperatures that were measured.
        policy: name of the temperature policy.
        rule: of ``dts``; else empty.
        moves: whether the policy changes the temperature during training.
        hottest: the highest temperature that the recipe may visit, as far as that is known before training.
        divergence: name.
        kd_ratio: of the recipe.
        optimizer: ``training.optim``.
        epochs: of the whole run.
        student: ``random``, ``cut`` (out of another model) or ``loaded``.
        own_answers: the labels are the teacher's own answers.
        labels, rows: of the sample of training rows.
        held_out_labels, held_out_rows: of the held-out ones.
    """

    classifier: bool = False
    classes: int = 49_152
    grid: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
    policy: str = "constant"
    rule: str = ""
    moves: bool = False
    hottest: float = 2.0
    divergence: str = "forward_kl"
    kd_ratio: float = 0.5
    optimizer: str = "adamw_torch"
    epochs: float = 3.0
    student: str = "loaded"
    own_answers: bool = False
    labels: int = 4000
    rows: int = 64
    held_out_labels: int = 4000
    held_out_rows: int = 64


@dataclass(frozen=True)
class Measured:
    """All that rules look at.

    Attributes:
        situation: see there.
        values: estimates by name; those of held-out rows begin with ``held_out_``.
        curves: by name an estimate for each temperature of the grid.
        notes: what was done in another way than the recipe says, for people.
    """

    situation: Situation
    values: Mapping[str, Estimate]
    curves: Mapping[str, Sequence[Estimate]]
    notes: Sequence[str] = field(default=())

    def at(self, curve: str, temperature: float) -> Estimate:
        """``curve`` at any temperature: between those of the grid linear in log T, beyond them that of the end."""
        points = self.curves[curve]
        grid, t = np.log(self.situation.grid), math.log(temperature)
        low, middle, high = (
            float(np.interp(t, grid, column))
            for column in zip(*((e.low, e.value, e.high) for e in points), strict=True)
        )
        return Estimate(middle, low, high)

    @property
    def sizes(self) -> list[int]:
        """Numbers of tokens whose share was measured."""
        return [size for size in SIZES if f"mass_{size}" in self.curves]


def resampled(rows: RowSums, seed: int) -> dict[str, np.ndarray]:
    """Means over labels ``[1 + RESAMPLES, ...]`` by name: of the rows themselves, then of resamples of them."""
    count = len(rows.labels)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), draws])
    total = weights @ rows.labels
    means = {name: np.tensordot(weights, sums, 1) for name, sums in rows.sums.items()}
    return {name: sums / total.reshape(-1, *[1] * (sums.ndim - 1)) for name, sums in means.items()}


def measured(
    situation: Situation, train: RowSums, held_out: RowSums | None, seed: int, notes: Sequence[str]
) -> Measured:
    """All numbers of a sample.

    Args:
        situation: of the recipe and the sample.
        train: sums of training rows.
        held_out: of held-out rows; None: the recipe has none.
        seed: of the bootstrap.
        notes: for ``Measured.notes``.
    """
    own = resampled(train, seed)
    draws, curves = _of_rows(own, situation)
    if held_out is not None:
        other = resampled(held_out, seed + 1)
        more, more_curves = _of_rows(other, situation)
        draws |= {f"held_out_{name}": values for name, values in more.items()}
        curves |= {f"held_out_{name}": values for name, values in more_curves.items()}
        draws["ce_ratio"] = other["teacher_ce"] / np.maximum(own["teacher_ce"], 1e-12)
        one = situation.grid.index(1.0)
        draws["matching_t"] = _solved(situation.grid, own["entropy_at_t"], other["entropy_at_t"][:, one])
    values = {name: Estimate.of(one) for name, one in draws.items()}
    by_t = {name: [Estimate.of(column) for column in one.T] for name, one in curves.items()}
    return Measured(situation, values, by_t, tuple(notes))


def _of_rows(
    means: Mapping[str, np.ndarray], situation: Situation
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values ``[1 + RESAMPLES]`` and curves ``[1 + RESAMPLES, K]`` of one sample, by name."""
    direct = ("student_ce", "teacher_ce", "negative", "kl", "agreement", "confidence", "correct", "p_target")
    entropy, hard = means["entropy_at_t"], np.sqrt(means["ce_gradient"])[:, None]
    soft = np.sqrt(means["gradient_at_t"])
    ratio = situation.kd_ratio
    values = {name: means[name] for name in direct} | {
        "gap": means["student_ce"] - means["teacher_ce"],
        "over_confidence": means["confidence"] - means["correct"],
        "ece": np.abs(means["miscalibration"]).sum(-1),
        "ceiling": _solved(situation.grid, entropy, np.full(len(entropy), math.log(MOST_SUPPORT * situation.classes))),
    }
    tiny = 1e-30
    curves = {
        "entropy": entropy, "share_of_log_classes": entropy / math.log(situation.classes), "support": np.exp(entropy),
        "binary": means["binary_at_t"], "relation": means["relation_at_t"], "other": means["other_at_t"],
        "teacher_ce": means["teacher_ce_at_t"],
        "kd_share": ratio * soft / np.maximum(ratio * soft + (1.0 - ratio) * hard, tiny),
        "cosine": means["product_at_t"] / np.maximum(hard * soft, tiny),
        "equal_ratio": hard / np.maximum(hard + soft, tiny),
    }  # fmt: skip
    for place in range(means["mass_at_t"].shape[-1]):
        curves[f"mass_{SIZES[place]}"] = means["mass_at_t"][..., place]
    return values, curves


def _solved(grid: Sequence[float], entropies: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The temperature at which each row of ``entropies`` ``[n, K]`` is ``wanted`` ``[n]``; not beyond the grid."""
    return np.exp([np.interp(goal, row, np.log(grid)) for goal, row in zip(wanted, entropies, strict=True)])


def short(value: float) -> str:
    """A number as people write it: no more digits than a sample knows."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
