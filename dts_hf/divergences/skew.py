"""KL divergences against a mixture that contains a little of the first argument."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, centred_, check_option, dot
from dts_hf.divergences.kl import ForwardKL, ReverseKL
from dts_hf.registry import Between

_HINT = "at 1 the mixture is the distribution itself and the divergence is 0"


class SkewKL(Divergence):
    """KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898).

    Gradient (1 - alpha) (q_j sum_k w_k - w_j) with w = p q / m. The gradient goes through the mixture, which bounds it:
    w_j is at most p_j / (1 - alpha). alpha = 0 is forward KL. The value printed by DistiLLM's code lacks the teacher's
    entropy; ours is the divergence, 0 where p = q.

    Args:
        alpha: the share of p in the mixture, from 0 to below 1.
    """

    name = "skew_kl"
    title = "Skew KL"
    paper = "arXiv 2402.03898"
    formula = "KL(p || m), m = alpha p + (1 - alpha) q"
    gradient = "(1 - alpha) (q sum(w) - w), w = p q / m"
    use = "Forward KL that stays bounded (by log 1 / alpha) where the student gives a teacher's token no probability."

    def __init__(self, alpha: Annotated[float, Between(0.0, 1.0, "low")] = 0.1) -> None:
        self.alpha = check_option(self, "alpha", alpha, hint=_HINT)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        if self.alpha == 0.0:  # the mixture is q, which may underflow where p does not
            return ForwardKL().value_and_grad(d)
        p, q = d.p.prob, d.q.prob
        mixture = d.mixture(self.alpha)
        # d / d log q_j reaches the value through m alone: -p_j (1 - alpha) q_j / m_j = -(1 - alpha) w_j, to be centred.
        # q / m first: p q underflows long before w does.
        overlap = (q / mixture).mul_(p)
        value = dot(p, mixture.log_().neg_().add_(d.p.logits)) - d.p.log_norm.squeeze(-1)
        return value, centred_(overlap, q).mul_(self.alpha - 1.0)

    def teacher_grad(self, d: Distributions) -> Tensor:
        if self.alpha == 0.0:
            return ForwardKL().teacher_grad(d)
        # Seen from the teacher p, KL(p || alpha p + ...) is a skew reverse KL.
        return SkewReverseKL(self.alpha).value_and_grad(d.mirrored())[1]


class SkewReverseKL(Divergence):
    """KL(q || m) with m = (1 - alpha) p + alpha q (DistiLLM, arXiv 2402.03898).

    Gradient e_j - q_j sum_k e_k with e = q (log(q / m) - alpha q / m): it goes through the mixture too. DistiLLM-2
    (arXiv 2503.07067) holds the student inside the mixture constant, which drops the second term of e; that is not the
    gradient of this divergence, and is not offered. alpha = 0 is reverse KL.

    Args:
        alpha: the share of q in the mixture, from 0 to below 1.
    """

    name = "skew_reverse_kl"
    title = "Skew reverse KL"
    paper = "arXiv 2402.03898"
    formula = "KL(q || m), m = (1 - alpha) p + alpha q"
    gradient = "e - q sum(e), e = q (log(q / m) - alpha q / m)"
    use = "Reverse KL that stays bounded (by log 1 / alpha) where the teacher gives a student's token no probability."

    def __init__(self, alpha: Annotated[float, Between(0.0, 1.0, "low")] = 0.1) -> None:
        self.alpha = check_option(self, "alpha", alpha, hint=_HINT)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        if self.alpha == 0.0:  # the mixture is p, which may underflow where q does not
            return ReverseKL().value_and_grad(d)
        q = d.q.prob
        mixture = d.mixture(1.0 - self.alpha)
        # d / d log q_j: q_j (log(q_j / m_j) + 1) - q_j alpha q_j / m_j = e_j + q_j, and centring takes the q_j out.
        share = (q / mixture).mul_(q)
        weighted = mixture.log_().neg_().add_(d.q.logits).mul_(q)
        value = weighted.sum(-1) - d.q.log_norm.squeeze(-1)
        return value, centred_(weighted.sub_(share, alpha=self.alpha), q)

    def teacher_grad(self, d: Distributions) -> Tensor:
        if self.alpha == 0.0:
            return ReverseKL().teacher_grad(d)
        return SkewKL(self.alpha).value_and_grad(d.mirrored())[1]
