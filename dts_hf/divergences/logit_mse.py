"""Squared distance of the logits: no softmax at all."""

from __future__ import annotations

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence


class LogitMSE(Divergence):
    """1/V sum (c u - c u_t)^2, c x = x - mean(x) (the first phase of Annealing-KD, arXiv 2104.07163).

    The paper takes the teacher's logits times Phi = 1 / T_t and the student's as they are. Ours are centred first, because
    a softmax does not see a shift and a language model's logits have an arbitrary one. Gradient 2/V (c u_j - c u_t,j).
    It is twice the limit of T^2 KL(p || q) for T to infinity (worked out here), so its gradient is as small as 1/V; it is
    not in nats.
    """

    name = "logit_mse"
    title = "Logit MSE"
    paper = "arXiv 2104.07163"
    formula = "1/V sum (c u - c u_t)^2, c x = x - mean(x)"
    gradient = "2/V (c u - c u_t)"
    use = (
        "The first phase of Annealing-KD, with its temperature policy. Every token of the vocabulary weighs the same."
    )

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        difference = d.q.logits - d.p.logits
        difference.sub_(difference.mean(-1, keepdim=True))
        # The mean leaves the gradient as it is: c is a projection, and c u - c u_t has a mean of 0 already.
        return difference.square().mean(-1), difference.mul_(2.0 / difference.shape[-1])

    def teacher_grad(self, d: Distributions) -> Tensor:
        return self.value_and_grad(d)[1].neg_()
