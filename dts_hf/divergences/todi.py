"""Token-wise mixture of the two KL divergences."""

from __future__ import annotations

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, dot


class ToDi(Divergence):
    """sum w p log(p / q) + (1 - w) q log(q / p) with w = sigmoid(log p / q) held constant (arXiv 2505.16297).

    Each vocabulary entry leans to forward KL where the teacher gives it more, to reverse KL where the student does.
    The sigmoid is p / (p + q), so w p - (1 - w) q = p - q: the value is KL(p || q) + KL(q || p) whatever the weights, and
    only the gradient tells ToDi from the symmetric KL (worked out here). With h = q^2 / (p + q) log(p / q) it is
    q_j - p_j - h_j + q_j sum_k h_k.
    """

    name = "todi"
    title = "Token-wise (ToDi)"
    paper = "arXiv 2505.16297"
    formula = "sum w p log(p / q) + (1 - w) q log(q / p), w = p / (p + q) constant"
    gradient = "q - p - h + q sum(h), h = q^2 / (p + q) log(p / q)"
    use = "Symmetric KL that decides entry by entry: raises what the student lacks, lowers what it has too much of."
    held = (
        "The weights w. Dropped is the force that would move w itself: with it the gradient would be that of KL(p || q) + "
        "KL(q || p), which ToDi has as its value, and nothing would be left of the method. As in its paper."
    )

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        p, q = d.p.prob, d.q.prob
        log_ratio = d.log_ratio()
        difference = q - p
        value = (difference * log_ratio).sum(-1).neg_()
        # d / d log q_j, w held: -w p + (1 - w) q (log(q / p) + 1). With w = p / (p + q), (1 - w) q - w p is q - p,
        # which adds up to 0, and (1 - w) q log(q / p) = -h, to be centred.
        # q / (p + q) first, as q^2 underflows; where both are 0 the ratio does not matter. ``mixture`` is half of p + q.
        h = log_ratio.mul_(q / d.mixture(0.5)).mul_(q).mul_(0.5)
        return value, difference.sub_(h).addcmul_(q, h.sum(-1, keepdim=True))

    def teacher_grad(self, d: Distributions) -> Tensor:
        # Exchanging p and q exchanges w and 1 - w: the formula stays what it is.
        return self.value_and_grad(d.mirrored())[1]

    def held_slope(self, d: Distributions) -> Tensor:
        # d value / d w = (p + q) log(p / q), and d w = w (1 - w) d log(p / q) with w (1 - w) (p + q) = p q / (p + q).
        weighted = d.log_ratio().mul_(d.p.log_prob_slope().sub_(d.q.log_prob_slope()))
        return dot(weighted, (d.q.prob / d.mixture(0.5)).mul_(d.p.prob)) * 0.5
