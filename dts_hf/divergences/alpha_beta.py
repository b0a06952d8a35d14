"""The alpha-beta family: one formula from forward to reverse KL."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from dts_hf.divergences.base import Distribution, Distributions, Divergence, centred_, check_option, dot
from dts_hf.registry import Between


class AlphaBeta(Divergence):
    """-1 / (a b) sum [p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)] (ABKD, arXiv 2505.04560).

    The limits (worked out here by a series in the vanishing exponent; AMiD, arXiv 2510.15982, has the same factors, ABKD's
    code is off by one power of the other exponent unless that is 1):

        b -> 0:      1 / a^2 sum [a p^a log(p / q) - p^a + q^a]     (a = 1: forward KL)
        a -> 0:      1 / b^2 sum [b q^b log(q / p) - q^b + p^b]     (b = 1: reverse KL)
        both -> 0:   1 / 2 sum log(p / q)^2

    Gradient e_j - q_j sum_k e_k with e = (q^(a + b) - p^a q^b) / a, and e = q^b log(q / p) at a = 0. alpha = beta = 0.5 is
    four times the squared Hellinger distance. Negative exponents are refused: they blow up the tail of a vocabulary. For an
    exponent near 0 take 0: what is left after the cancellation of the three sums is divided by a b.

    Args:
        alpha: the exponent a, from 0.
        beta: the exponent b, from 0.
    """

    name = "alpha_beta"
    title = "Alpha-beta (ABKD)"
    paper = "arXiv 2505.04560"
    formula = "-1 / (a b) sum (p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)), a = alpha, b = beta"
    gradient = "e - q sum(e), e = (q^(a + b) - p^a q^b) / a"
    use = "To tune between forward (1, 0) and reverse KL (0, 1); exponents that add up to less than 1 raise the tail."

    def __init__(
        self, alpha: Annotated[float, Between(low=0.0)] = 0.2, beta: Annotated[float, Between(low=0.0)] = 0.7
    ) -> None:
        hint = "negative powers of a vocabulary's tail overflow"
        self.alpha = check_option(self, "alpha", alpha, hint=hint)
        self.beta = check_option(self, "beta", beta, hint=hint)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        a, b = self.alpha, self.beta
        if a == 0.0:
            value, e = _at_alpha_zero(d, b)
        elif b == 0.0:
            value, e = _at_beta_zero(d, a)
        else:
            # d / d log q_j of the formula, with d q^x / d log q = x q^x: -1 / (a b) (b p^a q^b - b q^(a + b)), which is e.
            student = power(d.q, a + b)
            cross = _cross_power(d, a, b)
            student_sum, cross_sum = student.sum(-1), cross.sum(-1)
            teacher_sum = power(d.p, a + b).sum(-1)
            value = (a * teacher_sum + b * student_sum).div_(a + b).sub_(cross_sum).div_(a * b)
            e = student.sub_(cross).div_(a)
        return value, centred_(e, d.q.prob)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return AlphaBeta(self.beta, self.alpha).value_and_grad(d.mirrored())[1]


def power(x: Distribution, exponent: float) -> Tensor:
    """Return prob^exponent, ``[C, V]``, from the logits: a small power of an underflowed probability need not be small."""
    if exponent == 1.0:
        return x.prob.clone()
    return (x.logits * exponent).exp_().mul_((x.log_norm * -exponent).exp_())


def _cross_power(d: Distributions, a: float, b: float) -> Tensor:
    """Return p^a q^b, ``[C, V]``, as one exponential of the sum of the logarithms."""
    logs = (d.p.logits * a).add_(d.q.logits, alpha=b)
    return logs.exp_().mul_((d.p.log_norm * -a).sub_(d.q.log_norm, alpha=b).exp_())


def _at_alpha_zero(d: Distributions, b: float) -> tuple[Tensor, Tensor]:
    """Return value ``[C]`` and e ``[C, V]``: d / d log q of b q^b log(q / p) - q^b is b^2 q^b log(q / p)."""
    log_ratio = d.log_ratio().neg_()
    if b == 0.0:
        return log_ratio.square().sum(-1).mul_(0.5), log_ratio
    student = power(d.q, b)
    e = log_ratio.mul_(student)
    return (e.sum(-1) * b - student.sum(-1) + power(d.p, b).sum(-1)).div_(b * b), e


def _at_beta_zero(d: Distributions, a: float) -> tuple[Tensor, Tensor]:
    """Return value ``[C]`` and e ``[C, V]``: d / d log q of a p^a log(p / q) + q^a is a (q^a - p^a)."""
    teacher, student = power(d.p, a), power(d.q, a)
    value = (dot(teacher, d.log_ratio()) * a - teacher.sum(-1) + student.sum(-1)).div_(a * a)
    return value, student.sub_(teacher).div_(a)
