"""Do stored states belong to this head and these labels? Asked before training, of every teacher that is not run live.

Label log-probabilities that were stored when the teacher ran are computed again from its states and its head: a wrong head,
a cut vocabulary, states before the norm, rows shifted by one or of another dtype cannot give them. Where the teacher itself
is at hand, its states of some rows are compared as well. All differences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.models.head import Head

#: Rows of states, and of the vocabulary, whose logits are in memory together.
_ROWS, _IDS = 256, 1 << 14


class Bounds(NamedTuple):
    """Differences in nats above which a person is warned, and above which nothing is learned from the states."""

    warn: float
    refuse: float


#: By the type that the states are stored in. What is wrong is off by nats: states before the norm by 267, rows shifted by
#: one by 10 (SmolLM2-135M).
BOUNDS = {
    "float32": Bounds(1e-5, 1e-5),
    "bfloat16": Bounds(1e-3, 1e-2),
    "float16": Bounds(1e-3, 1e-2),
    "int8": Bounds(1e-2, 5e-2),
}


@torch.no_grad()
def label_logprobs(states: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-probabilities of labels at T = 1, ``[N]`` float32: products and sums in fp32, a few rows at a time.

    Args:
        states: ``[N, H]``, final states.
        head: of the teacher, whole.
        targets: ``[N]``, the labels.
    """
    found = [
        _logprobs_of_chunk(states[at : at + _ROWS].float(), head, targets[at : at + _ROWS])
        for at in range(0, len(states), _ROWS)
    ]
    return torch.cat(found) if found else torch.zeros(0, device=states.device)


def _logprobs_of_chunk(states: Tensor, head: Head, targets: Tensor) -> Tensor:
    """The log-sum-exp is collected over pieces of the vocabulary: the head is never in fp32 as a whole."""
    total = torch.full((len(states),), -math.inf, dtype=torch.float64, device=states.device)
    chosen = torch.zeros_like(total)
    for first in range(0, head.vocab_size, _IDS):
        weight = head.weight[first : first + _IDS].to(states.device).float()
        bias = None if head.bias is None else head.bias[first : first + _IDS].to(states.device).float()
        logits = head.activate(torch.nn.functional.linear(states, weight, bias))
        total = torch.logaddexp(total, torch.logsumexp(logits, dim=-1).double())
        inside = (targets >= first) & (targets < first + len(weight))
        picked = logits.gather(1, (targets - first).clamp(0, len(weight) - 1)[:, None])[:, 0].double()
        chosen = torch.where(inside, picked, chosen)
    return (chosen - total).float()


@dataclass(frozen=True)
class LabelDifference:
    """How far label log-probabilities that were computed again are from the stored ones.

    Attributes:
        labels: how many were compared.
        shift: mean of the signed differences, nats: what a cut vocabulary moves.
        error: standard error of ``shift``, nats: rounded states move each label, to either side.
        kl: half the mean of their squares, which is KL(stored || again) to second order, nats.
        largest: the largest of them, nats.
    """

    labels: int
    shift: float
    error: float
    kl: float
    largest: float

    @property
    def nats(self) -> float:
        """What the bounds are for; NaN where a number is non-finite."""
        if math.isnan(self.shift + self.kl):
            return math.nan
        return max(abs(self.shift) - 3 * self.error, self.kl)

    def __str__(self) -> str:
        return (
            f"label log-probabilities of {self.labels:,} labels: mean shift {self.shift:.1e}, KL {self.kl:.1e}, "
            f"largest difference {self.largest:.1e} nats"
        )


def compare_labels(stored: Tensor, states: Tensor, head: Head, targets: Tensor) -> LabelDifference:
    """Compute label log-probabilities from states and head, and compare them with the stored ones.

    Args:
        stored: ``[N]``, as they were when the teacher ran.
        states: ``[N, H]``, in fp32 or as they were stored (int8 already multiplied by its scale).
        head: the one that would be trained with.
        targets: ``[N]``, the labels of the rows as they are now.
    """
    return label_difference(stored, label_logprobs(states, head, targets))


def label_difference(stored: Tensor, again: Tensor) -> LabelDifference:
    """Compare label log-probabilities ``[N]`` as they were when the teacher ran with those that were computed ``again``."""
    apart = again.double().cpu() - stored.double().cpu()
    if not len(apart):
        return LabelDifference(0, 0.0, 0.0, 0.0, 0.0)
    error = float(apart.std(correction=0)) / math.sqrt(len(apart))
    return LabelDifference(
        len(apart), float(apart.mean()), error, float(apart.square().mean() / 2), float(apart.abs().max())
    )


@dataclass(frozen=True)
class LiveDifference:
    """How far stored states are from those that the live teacher gives for the same rows.

    Attributes:
        labels: how many rows were compared.
        kl: mean KL(live || stored) in nats, by temperature.
        largest_kl: the largest of a row, by temperature.
        states: the largest difference of a number in the states.
    """

    labels: int
    kl: dict[float, float]
    largest_kl: dict[float, float]
    states: float

    @property
    def nats(self) -> float:
        """The worst of the means: what the bounds are for."""
        return math.nan if any(map(math.isnan, self.kl.values())) else max(self.kl.values(), default=0.0)

    def __str__(self) -> str:
        parts = [f"at T = {t:g} mean KL {self.kl[t]:.1e}, largest {self.largest_kl[t]:.1e} nats" for t in self.kl]
        return f"{self.labels:,} labels scored again: {'; '.join(parts)}; states differ by {self.states:.1e} at most"


@torch.no_grad()
def compare_live(stored: Tensor, live: Tensor, head: Head, temperatures: Sequence[float] = (1.0,)) -> LiveDifference:
    """Compare stored states with those of the live teacher, through the head.

    Args:
        stored: ``[N, H]``.
        live: ``[N, H]``, of the same rows.
        head: of the teacher.
        temperatures: 1 and the highest one of the policy.
    """
    sums, largest, widest = dict.fromkeys(temperatures, 0.0), dict.fromkeys(temperatures, 0.0), 0.0
    weight = head.weight.float()
    whole = Head(weight, None if head.bias is None else head.bias.float(), head.logit_scale, head.softcap)
    for at in range(0, len(stored), _ROWS):
        one, other = live[at : at + _ROWS].float(), stored[at : at + _ROWS].to(live.device).float()
        widest = max(widest, float((one - other).abs().max()))
        ours, theirs = whole(one).double(), whole(other).double()
        for t in temperatures:
            log_p, log_q = (logits.div(t).log_softmax(-1) for logits in (ours, theirs))
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            sums[t] += float(kl.sum())
            largest[t] = max(largest[t], float(kl.max()))
    means = {t: value / max(len(stored), 1) for t, value in sums.items()}
    return LiveDifference(len(stored), means, largest, widest)


def judge(difference: LabelDifference | LiveDifference, dtype: str, where: str) -> str | None:
    """Refuse states that do not give what they should.

    Args:
        difference: of ``compare_labels`` or ``compare_live``.
        dtype: what the states are stored in, a key of ``BOUNDS``.
        where: the cache or the server, for messages.

    Returns:
        a warning where the difference is larger than storage in ``dtype`` explains, else None.

    Raises:
        UserError: it is so large that they are other states, or go with another head.
    """
    bounds, nats = BOUNDS[dtype], difference.nats
    if not nats <= bounds.refuse:  # NaN, too
        raise UserError(
            f"{where}: the self-test failed: {difference}; expected at most {bounds.refuse:g} nats of states in {dtype}. "
            "They are not the final states (after the norm) that this head makes the teacher's logits of: another head or "
            "vocabulary, other rows, or states before the norm. Make them again"
        )
    if nats > bounds.warn:
        return (
            f"{where}: {difference}, which is more than the {bounds.warn:g} nats that are usual of states in {dtype}"
        )
    return None
