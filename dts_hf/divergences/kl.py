"""The two Kullback-Leibler divergences and their mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, check_option, dot
from dts_hf.registry import Share


class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q); gradient q - p (Hinton et al. 2015, arXiv 1503.02531).

    d / d log q_j is -p_j, which adds up to -1: centred it is -p_j + q_j.
    """

    name = "forward_kl"
    title = "Forward KL"
    paper = "arXiv 1503.02531"
    formula = "KL(p || q) = sum p log(p / q)"
    gradient = "q - p"
    use = "The default: the student covers all that the teacher does. Gains from T above 1."

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return d.forward_kl(), d.q.prob.sub_(d.p.prob)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return forward_teacher_grad(d.log_ratio(), d)


class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p); gradient q_j (log q_j - log p_j - KL) (as used by MiniLLM, arXiv 2306.08543).

    d / d log q_j is q_j (log(q_j / p_j) + 1); centred, the 1 leaves and the sum is KL(q || p).
    """

    name = "reverse_kl"
    title = "Reverse KL"
    paper = "arXiv 2306.08543"
    formula = "KL(q || p) = sum q log(q / p)"
    gradient = "q (log(q / p) - D)"
    use = "The student keeps to the teacher's main modes; for a student too small to cover them all. T of 1 or below."

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        log_ratio = d.log_ratio().neg_()
        value = dot(d.q.prob, log_ratio)
        return value, log_ratio.sub_(value.unsqueeze(-1)).mul_(d.q.prob)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return d.p.prob - d.q.prob


class SymmetricKL(Divergence):
    """(1 - weight) KL(p || q) + weight KL(q || p); weight = 0.5 is half of Jeffreys' divergence.

    As in DistiLLM's code (arXiv 2402.03898), which sets weight = 0.9. The gradient is the same mixture of the two KLs'
    gradients.

    Args:
        weight: that of reverse KL, from 0 to 1.
    """

    name = "symmetric_kl"
    title = "Symmetric KL"
    paper = "arXiv 2402.03898"
    formula = "(1 - weight) KL(p || q) + weight KL(q || p)"
    gradient = "(1 - weight) (q - p) + weight q (log(q / p) - KL(q || p))"
    use = "A fixed compromise between covering and keeping to the modes."

    def __init__(self, weight: Share = 0.5) -> None:
        self.weight = check_option(self, "weight", weight)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return mixed_kl(d.log_ratio(), d, d.q.log_norm.new_full((), self.weight))

    def teacher_grad(self, d: Distributions) -> Tensor:
        forward = forward_teacher_grad(d.log_ratio(), d).mul_(1.0 - self.weight)
        return forward.add_(d.p.prob - d.q.prob, alpha=self.weight)


def mixed_kl(log_ratio: Tensor, d: Distributions, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return value ``[C]`` and gradient ``[C, V]`` of (1 - w) KL(p || q) + w KL(q || p), w held constant.

    Args:
        log_ratio: log p - log q, ``[C, V]``; overwritten.
        d: the two distributions; ``d.q.prob`` is overwritten.
        weight: w, ``[]`` or ``[C, 1]``.
    """
    p, q = d.p.prob, d.q.prob
    forward = dot(p, log_ratio).unsqueeze(-1)
    weighted = log_ratio.mul_(q)
    reverse = weighted.sum(-1, keepdim=True).neg_()
    value = torch.lerp(forward, reverse, weight).squeeze(-1)
    # (1 - w) (q - p) + w q (log(q / p) - KL(q || p)), put in order of what is in the buffers:
    # q (1 - w - w KL(q || p)) - w q log(p / q) - (1 - w) p
    grad = q.mul_(1.0 - weight - weight * reverse).addcmul_(weighted, -weight)
    return value, grad.addcmul_(p, weight - 1.0)


def forward_teacher_grad(log_ratio: Tensor, d: Distributions) -> Tensor:
    """Return p (log(p / q) - KL(p || q)), the gradient of forward KL by the teacher's logits, in place of ``log_ratio``.

    d / d log p_j of sum p log(p / q) is p_j (log(p_j / q_j) + 1); centred, the 1 leaves and the sum is KL(p || q).

    Args:
        log_ratio: log p - log q, ``[C, V]``.
        d: the two distributions.
    """
    return log_ratio.sub_(dot(d.p.prob, log_ratio).unsqueeze(-1)).mul_(d.p.prob)
