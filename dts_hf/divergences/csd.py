"""Concrete score distillation: differences of logits, not probabilities."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, dot
from dts_hf.errors import UserError, nearest

Weights = Literal["teacher", "student"]
WEIGHTS: tuple[Weights, ...] = ("teacher", "student")


class CSD(Divergence):
    """Var_w(d) = 1/2 sum_ij w_i w_j (d_i - d_j)^2 with d = u - u_t, our reading of arXiv 2509.25837.

    Concrete score matching wants every difference of two of the student's logits to be the teacher's, each pair with a
    weight of choice. With a product of two weights the V^2 pairs are a variance, two sums over V: the abstract says that it
    is linear in V, the rest we could not read. A softmax does not see a shift of the logits, and neither does this.

    ``teacher`` weighs with p: what the teacher may say counts. ``student`` weighs with q, held constant in the gradient 2 q
    (d - E_q d): what the student would say counts. To second order in d both are twice either KL (worked out here), so near
    the teacher they pull as a KL does, and far from it harder: the value grows with the square of the logits.

    Args:
        weights: whose probabilities weigh the pairs, ``teacher`` (covers what the teacher does) or ``student`` (keeps to its
            main modes).

    Raises:
        UserError: ``weights`` is neither.
    """

    name = "csd"
    title = "Concrete scores (CSD)"
    paper = "arXiv 2509.25837"
    formula = "Var_w(u - u_t), w = p, or q constant"
    gradient = "2 w (d - sum w d), d = u - u_t"
    use = "To compare with a KL: no logarithm of a probability that vanishes, and a pull that grows with the distance."
    held: str | None = (
        "The weights q, with `weights: student` alone. Dropped is the force that would lower the value by taking "
        "probability from tokens whose logit is wrong, whatever the teacher gives them."
    )

    def __init__(self, weights: Weights = "teacher") -> None:
        if weights not in WEIGHTS:
            raise UserError(
                f"loss.divergence.weights: got {weights!r} for 'csd', expected one of {', '.join(WEIGHTS)}."
                f"{nearest(str(weights), WEIGHTS)}"
            )
        self.weights = weights
        if weights == "teacher":
            self.held = None  # p is none of the student's

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        weight, difference = self._centred(d)
        weighted = weight * difference
        return dot(weighted, difference), weighted.mul_(2.0)

    def teacher_grad(self, d: Distributions) -> Tensor:
        weight, difference = self._centred(d)
        if self.weights == "student":
            return difference.mul_(weight).mul_(-2.0)
        # Through the logits -2 p d, and through the weights d^2 - Var of each, times p
        variance = dot(weight, difference.square()).unsqueeze(-1)
        return (difference - 2.0).mul_(difference).sub_(variance).mul_(weight)

    def held_slope(self, d: Distributions) -> Tensor:
        if self.weights == "teacher":
            return super().held_slope(d)
        weight, difference = self._centred(d)
        return dot(difference.square_().mul_(weight), d.q.log_prob_slope())

    def _centred(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """The weights, and d - E_w d in a fresh buffer, ``[C, V]`` each."""
        weight = d.p.prob if self.weights == "teacher" else d.q.prob
        difference = d.q.logits - d.p.logits
        return weight, difference.sub_(dot(weight, difference).unsqueeze(-1))
