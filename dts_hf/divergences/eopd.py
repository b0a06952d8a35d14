"""Reverse KL, and forward KL where the teacher is unsure."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, check_option, dot
from dts_hf.divergences.kl import forward_teacher_grad
from dts_hf.errors import UserError, nearest
from dts_hf.registry import PositiveFloat

Mode = Literal["add", "switch"]
MODES: tuple[Mode, ...] = ("add", "switch")


class EOPD(Divergence):
    """KL(q || p), plus weight KL(p || q) on tokens where the teacher's entropy is above ``entropy`` (arXiv 2603.07079).

    Entropy-aware on-policy distillation: reverse KL takes variety away where the teacher has some, so forward KL is put
    beside it there. The abstract says that it is added; two digests of the paper say that it takes the place of reverse KL:
    ``mode`` is either. The entropy is that of the teacher at T = 1, in nats, whatever the temperature: at T = 2 nearly every
    token of a language model is above the paper's threshold, which the default is. Which tokens have it is the teacher's
    matter and nothing of the student's, so nothing is held in the student's gradient. Over two classes no entropy is above
    log 2 = 0.69: there a lower threshold is needed. The method is made for text of the student's own (``on_policy``); use on
    the text of a data set is ours.

    Args:
        entropy: nats above which the teacher counts as unsure, at T = 1.
        weight: of forward KL there, above 0.
        mode: ``add`` forward KL there, or ``switch`` to it.

    Raises:
        UserError: an option is out of range, or ``mode`` is neither.
    """

    name = "eopd"
    title = "Entropy-aware (EOPD)"
    paper = "arXiv 2603.07079"
    formula = "KL(q || p) + weight [H > entropy] KL(p || q), H of the teacher at T = 1; mode switch: one or the other"
    gradient = "q (log(q / p) - KL(q || p)) + weight [H > entropy] (q - p)"
    use = (
        "On text of the student's own, where reverse KL alone makes it say ever fewer things. On other text it is our use, "
        "not the paper's."
    )

    def __init__(self, entropy: PositiveFloat = 0.8, weight: PositiveFloat = 1.0, mode: Mode = "add") -> None:
        self.entropy = check_option(self, "entropy", entropy)
        self.weight = check_option(self, "weight", weight)
        if mode not in MODES:
            raise UserError(
                f"loss.divergence.mode: got {mode!r} for 'eopd', expected one of {', '.join(MODES)}."
                f"{nearest(str(mode), MODES)}"
            )
        self.mode = mode

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        forward, reverse = self._shares(d)
        log_ratio = d.log_ratio()
        of_forward = dot(d.p.prob, log_ratio).unsqueeze(-1)
        weighted = log_ratio.mul_(d.q.prob).neg_()
        of_reverse = weighted.sum(-1, keepdim=True)
        value = (forward * of_forward + reverse * of_reverse).squeeze(-1)
        grad = d.q.prob.mul_(forward - reverse * of_reverse).addcmul_(weighted, reverse)
        return value, grad.addcmul_(d.p.prob, forward, value=-1.0)

    def teacher_grad(self, d: Distributions) -> Tensor:
        forward, reverse = self._shares(d)
        grad = forward_teacher_grad(d.log_ratio(), d).mul_(forward)
        return grad.addcmul_(d.p.prob - d.q.prob, reverse)

    def _shares(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """The factors of forward and of reverse KL, ``[C, 1]`` each."""
        entropy = d.p.entropy() if d.teacher_entropy is None else d.teacher_entropy
        unsure = (entropy > self.entropy).to(d.p.prob.dtype).unsqueeze(-1)
        return unsure * self.weight, 1.0 - unsure if self.mode == "switch" else unsure.new_ones(unsure.shape)
