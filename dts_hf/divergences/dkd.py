"""Decoupled knowledge distillation: the target token, and the rest of the vocabulary among itself."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from torch import Tensor

from dts_hf.divergences.base import Distribution, Distributions, Divergence, check_option, dot
from dts_hf.errors import UserError
from dts_hf.registry import Between


class DKD(Divergence):
    """alpha TCKD + beta NCKD (Zhao et al. 2022, arXiv 2203.08679).

    With y the target token, TCKD is the KL of (p_y, 1 - p_y) and (q_y, 1 - q_y), and NCKD the KL of p^ and q^, which are p
    and q without y, each normalised again. Forward KL is TCKD + (1 - p_y) NCKD: it hardly teaches the other tokens where
    the teacher is sure. Gradient alpha (q_y - p_y) at y, and q^_j (alpha (p_y - q_y) + beta) - beta p^_j elsewhere.

    The paper's beta of 8 belongs to image classes at T = 4. For a language model 0.5 is the value of the one port we know
    (TAID's code), and of the order of the mean of 1 - p_y over a text, so that NCKD has about the weight it has in forward
    KL, over all tokens. Needs the targets. The paper's T^2 is applied by the loss; its
    warm-up of the weight over 20 epochs is not part of this.

    Args:
        alpha: weight of TCKD, from 0.
        beta: weight of NCKD, from 0.

    Raises:
        UserError: an option is out of range, or both are 0.
    """

    name = "dkd"
    title = "Decoupled (DKD)"
    paper = "arXiv 2203.08679"
    formula = "alpha KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta KL(p^ || q^), p^ and q^ without the target y"
    gradient = "alpha (q_y - p_y) at y; q^ (alpha (p_y - q_y) + beta) - beta p^ elsewhere"
    use = "A sure teacher whose ranking of the other tokens should count; on text whose tokens are trusted as targets."
    reads_targets = True

    def __init__(
        self, alpha: Annotated[float, Between(low=0.0)] = 1.0, beta: Annotated[float, Between(low=0.0)] = 0.5
    ) -> None:
        self.alpha = check_option(self, "alpha", alpha)
        self.beta = check_option(self, "beta", beta)
        if self.alpha == self.beta == 0.0:
            raise UserError("loss.divergence.beta: got 0 for 'dkd' with alpha 0, expected one of them above 0")

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        targets = _targets(d)
        p, q = _Split.of(d.p, targets), _Split.of(d.q, targets)
        others = Distributions(p.others, q.others)
        value = self.alpha * _binary_kl(p, q) + self.beta * others.forward_kl().unsqueeze(-1)
        # TCKD depends on q_y alone: d TCKD / d log q_y = (q_y - p_y) / (1 - q_y), and d log q_y / d u_j = [j = y] - q_j. The
        # product is q_y - p_y at y, and -q^_j (q_y - p_y) elsewhere. NCKD is a forward KL without y: q^_j - p^_j.
        rise = _rise(p, q)
        grad = q.others.prob.mul_(self.beta - self.alpha * rise).sub_(p.others.prob, alpha=self.beta)
        return value.squeeze(-1), grad.scatter_(-1, targets, self.alpha * rise)

    def teacher_grad(self, d: Distributions) -> Tensor:
        # Both terms are forward KLs, of two and of V - 1 entries: p (log(p / q) - KL), see forward_teacher_grad. The rest's
        # share of TCKD goes to each other token by p^_j = p_j / (1 - p_y).
        targets = _targets(d)
        p, q = _Split.of(d.p, targets), _Split.of(d.q, targets)
        binary = _binary_kl(p, q)
        log_ratio = Distributions(p.others, q.others).log_ratio()
        others_kl = dot(p.others.prob, log_ratio).unsqueeze(-1)
        others_share = self.alpha * p.log_rest.exp() * (p.log_rest - q.log_rest - binary)
        grad = log_ratio.sub_(others_kl).mul_(self.beta).add_(others_share).mul_(p.others.prob)
        return grad.scatter_(-1, targets, self.alpha * p.log_target.exp() * (p.log_target - q.log_target - binary))


class _Split(NamedTuple):
    """log of the target's probability and of the rest's, each ``[C, 1]``, and the distribution over the rest."""

    log_target: Tensor
    log_rest: Tensor
    others: Distribution

    @classmethod
    def of(cls, x: Distribution, targets: Tensor) -> _Split:
        """Split ``x`` at the tokens ``targets``, ``[C, 1]`` int64."""
        # Its own softmax: 1 - p_y and p_j / (1 - p_y) are lost to rounding where p_y is almost 1.
        log_target = x.logits.gather(-1, targets) - x.log_norm
        masked = x.logits.scatter(-1, targets, -math.inf)
        top = masked.amax(-1, keepdim=True)
        # 0 in the target's place of the logits too, whose probability of 0 would make it NaN.
        others = Distribution.of(masked.sub_(top))
        others.logits.scatter_(-1, targets, 0.0)
        return cls(log_target, top + others.log_norm - x.log_norm, others)


def _targets(d: Distributions) -> Tensor:
    """The targets as ``[C, 1]``, for ``gather``."""
    if d.targets is None:
        raise ValueError(
            "the divergence 'dkd' needs the target tokens: Distributions(p, q, targets), targets [C] int64"
        )
    if d.q.prob.shape[-1] < 2:
        raise ValueError(
            "the divergence 'dkd' needs two tokens or more: beside the target there is nothing to compare"
        )
    return d.targets.unsqueeze(-1)


def _binary_kl(p: _Split, q: _Split) -> Tensor:
    """TCKD, ``[C, 1]``: the KL of (p_y, 1 - p_y) and (q_y, 1 - q_y)."""
    target = p.log_target.exp() * (p.log_target - q.log_target)
    return target + p.log_rest.exp() * (p.log_rest - q.log_rest)


def _rise(p: _Split, q: _Split) -> Tensor:
    """q_y - p_y, ``[C, 1]``, from the smaller of p_y and 1 - p_y: the other difference would cancel."""
    return (q.log_target.exp() - p.log_target.exp()).where(
        p.log_target < p.log_rest, p.log_rest.exp() - q.log_rest.exp()
    )
