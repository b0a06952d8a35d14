"""Adaptive KL: forward and reverse KL weighted by where teacher and student differ."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, check_option, dot
from dts_hf.divergences.kl import forward_teacher_grad, mixed_kl
from dts_hf.registry import Between

#: Halvings of the search for the head before the rest is sorted: each is three passes over V, and halves the octaves left.
_HALVINGS = 8


class AdaptiveKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w = sum over the head of |p - q| / sum |p - q| (AKL, arXiv 2404.02657).

    The head is the teacher's most probable tokens up to a mass of ``mu``: a token is in it where the tokens strictly more
    probable than it hold less than ``mu`` together. So the first is always in, and equal probabilities enter together. w is
    held constant; the gradient is w (q - p) + (1 - w) q (log(q / p) - KL(q || p)). Where p = q, w = 0. The token whose
    probability crosses ``mu`` belongs to the head, so the head holds at least ``mu``; in AdaKD's copy of the method (arXiv
    2510.11615) it does not.

    The head is a threshold on p, not a sorted order, so its mask fits the unsorted gaps (TAID's code puts the mask of the
    sorted tokens on the unsorted ones).

    Args:
        mu: the teacher's probability that the head holds at least, between 0 and 1, ends excluded.
    """

    name = "adaptive_kl"
    title = "Adaptive KL (AKL)"
    paper = "arXiv 2404.02657"
    formula = "w KL(p || q) + (1 - w) KL(q || p), w = sum of |p - q| over the head of p / sum |p - q|, constant"
    gradient = "w (q - p) + (1 - w) q (log(q / p) - KL(q || p))"
    use = "Forward KL while the student misses the teacher's first choices, reverse KL while it errs in the tail."
    held = (
        "The weight w. Dropped is the force that would lower the value by moving w to the smaller of the two KLs, which "
        "says nothing about where the student is wrong. As in its paper."
    )

    def __init__(self, mu: Annotated[float, Between(0.0, 1.0, "none")] = 0.5) -> None:
        hint = "the share of the teacher's probability that makes up the head"
        self.mu = check_option(self, "mu", mu, hint=hint)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return mixed_kl(d.log_ratio(), d, 1.0 - self.forward_weight(d))

    def teacher_grad(self, d: Distributions) -> Tensor:
        # By the teacher's logits: forward KL gives p (log(p / q) - KL(p || q)), reverse KL p - q.
        weight = self.forward_weight(d)
        forward = forward_teacher_grad(d.log_ratio(), d).mul_(weight)
        return forward.addcmul_(d.p.prob - d.q.prob, 1.0 - weight)

    def held_slope(self, d: Distributions) -> Tensor:
        p, q = d.p.prob, d.q.prob
        difference = p - q
        total = difference.abs().sum(-1).clamp_min_(torch.finfo(p.dtype).tiny)
        head = torch.ge(p, head_threshold(p, self.mu), out=torch.empty_like(p))
        # d value / d w = KL(p || q) - KL(q || p), and w is a fraction: d w = (d head part - w d total) / total.
        # The head is constant between two orders of p, and T does not change their order.
        moved = (p * d.p.log_prob_slope()).sub_(q * d.q.log_prob_slope()).mul_(difference.sign())
        weight = dot(head, difference.abs()) / total
        weight_slope = (dot(head, moved) - weight * moved.sum(-1)) / total
        log_ratio = d.log_ratio()
        return weight_slope * (dot(p, log_ratio) + dot(q, log_ratio))

    def forward_weight(self, d: Distributions) -> Tensor:
        """The weight w, ``[C, 1]``: the head's share of sum |p - q|."""
        p = d.p.prob
        gap = (p - d.q.prob).abs_()
        total = gap.sum(-1, keepdim=True).clamp_min_(torch.finfo(gap.dtype).tiny)
        head = torch.ge(p, head_threshold(p, self.mu), out=torch.empty_like(p))
        return head.mul_(gap).sum(-1, keepdim=True) / total


def head_threshold(p: Tensor, mu: float) -> Tensor:
    """The smallest probability in the head of each row of ``p``, ``[C, V] -> [C, 1]``.

    On a CPU no row is sorted whole: a search by halves (of the logarithm) narrows the threshold to [low, high), and only the
    tokens between are sorted. The ones below (1 - mu) / V hold less than 1 - mu together, so the threshold is above that.
    How many are left only the data says, and a GPU would have to stop and tell: there rows are sorted whole.
    """
    if p.device.type != "cpu":
        return _sorted_threshold(p, mu)
    low = torch.full_like(p[:, :1], (1.0 - mu) / p.shape[-1])
    high, above = 2.0 * p.amax(-1, keepdim=True), torch.zeros_like(low)
    mask = torch.empty_like(p)  # of numbers: a comparison into booleans, and any use of them, is several times slower
    for _ in range(_HALVINGS):
        middle = (low * high).sqrt_()
        mass = torch.ge(p, middle, out=mask).mul_(p).sum(-1, keepdim=True)
        enough = mass >= mu
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        above = torch.where(enough, above, mass)
    mask = torch.ge(p, low, out=mask).mul_(torch.lt(p, high, out=torch.empty_like(p)))
    between = _packed(p, mask).sort(-1, descending=True).values
    before = (between.cumsum(-1) - between).add_(above)
    inside = ((before < mu) & (between > 0.0)).sum(-1, keepdim=True)
    return between.gather(-1, inside.sub_(1).clamp_min_(0))


def _sorted_threshold(p: Tensor, mu: float) -> Tensor:
    """``head_threshold`` by a sort of whole rows, with no word to the host."""
    falling = p.sort(-1, descending=True).values
    before = falling.cumsum(-1) - falling  # what is strictly above an entry, but for equal ones, which enter together
    inside = ((before < mu) & (falling > 0.0)).sum(-1, keepdim=True)
    return falling.gather(-1, inside.sub_(1).clamp_min_(0))


def _packed(values: Tensor, mask: Tensor) -> Tensor:
    """The masked values of each row ``[C, V]`` side by side, ``[C, K]`` with K the largest count, filled up with 0."""
    row, place = mask.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(mask))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    packed = values.new_zeros(len(values), max(1, int(counts.max())))
    packed[row, column] = values[row, place]
    return packed
