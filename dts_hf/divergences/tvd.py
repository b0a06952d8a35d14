"""Total variation distance."""

from __future__ import annotations

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, centred_


class TVD(Divergence):
    """1/2 sum |p - q|, between 0 and 1 (as used by f-distill, arXiv 2307.15190).

    Gradient 1/2 q_j (s_j - sum_k q_k s_k) with s = sign(q - p), and s = 0 where p = q.
    """

    name = "tvd"
    title = "Total variation"
    paper = "arXiv 2307.15190"
    formula = "1/2 sum |p - q|"
    gradient = "1/2 q (s - sum(q s)), s = sign(q - p)"
    use = "Insensitive to the tail: a token counts by its probability, not by its logarithm."

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        difference = d.q.prob - d.p.prob
        value = difference.abs().sum(-1).mul_(0.5)
        # d / d log q_j = 1/2 s_j q_j, to be centred; sign(0) = 0 is the middle of the kink.
        return value, centred_(difference.sign_().mul_(d.q.prob), d.q.prob).mul_(0.5)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return self.value_and_grad(d.mirrored())[1]
