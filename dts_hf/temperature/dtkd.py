"""Dynamic Temperature KD (DTKD, arXiv 2404.12711): each token splits 2 tau between teacher and student by sharpness."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from dts_hf.registry import Between, PositiveFloat
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_temperature
from dts_hf.temperature.parts.logit_statistics import sharpness


class DTKD(TemperaturePolicy):
    """T_t = 2 tau k_t / (k_t + k_s), T_s = 2 tau k_s / (k_t + k_s) per token, with k = max z - mean z.

    The sharper of the two gets the higher temperature, so that both maxima are equal after division: k_t / T_t =
    k_s / T_s. T_t + T_s = 2 tau, and the loss is T_t T_s D.

    Differences from the paper and its code:

    - k is the maximum minus the mean. The raw maximum of the published code is not shift invariant, and where logits
      are negative (GPT-2) its ratio turns round or passes a pole. The paper's log-sum-exp is at least log V: at V = 50k
      all rows would be alike.
    - k_t / k_s is kept in [1 / clamp, clamp].
    - The released code also raises the weight of both terms over the first 20 epochs and gives cross-entropy weight 1;
      here ``kd_ratio`` is the weight, from the first step on.
    - T is held constant; in the released code the gradient flows through the student's maximum.

    The authors' erratum (README of their code): the derivation of Eq. 4-5 is wrong, so the formula is an empirical
    rule, untested by them on language models.

    Args:
        tau: the mean of the two temperatures; 4 in the paper (100 classes).
        clamp: bound of the ratio, from 1 (both temperatures equal tau).
        w_kd: weight of a second term tau^2 D at the fixed temperature tau, relative to the first. The paper adds one:
            its code has alpha 3 and beta 1, so w_kd = 1/3. It costs another softmax of both models.
    """

    name = "dtkd"
    reads = "summary"
    any_text = True
    paper = "arXiv 2404.12711"
    formula = "T_t = 2 tau k_t / (k_t + k_s), T_s = 2 tau k_s / (k_t + k_s), k = max z - mean z, per token"
    use = (
        "Teacher and student differ in confidence, token by token, and you do not want one temperature for both. "
        "Compare with `constant` at T = tau."
    )
    held = (
        "T_s, T_t and with them the factor T_s T_t = 4 tau^2 k_s k_t / (k_s + k_t)^2. Dropped is the force through the "
        "student's largest logit: k / T = (k_s + k_t) / 2 tau is the same for both models, so with it the student would "
        "lower the loss without coming nearer to its teacher, by shrinking its logits: the factor gets smaller and both "
        "distributions flatter, until the clamp stops it."
    )
    cost = "2 reading passes per model (maximum, mean); with w_kd > 0 a second softmax of both models"

    def __init__(
        self,
        tau: PositiveFloat = 2.0,
        clamp: Annotated[float, Between(low=1.0)] = 3.0,
        w_kd: Annotated[float, Between(low=0.0)] = 0.0,
    ) -> None:
        super().__init__()
        self.tau = check_temperature(self.name, "tau", tau)
        self.clamp = self.checked("clamp", clamp)
        self.w_kd = self.checked("w_kd", w_kd)

    @property
    def temperature(self) -> float:
        """tau: the mean of the two temperatures of every row."""
        return self.tau

    @property
    def companions(self) -> tuple[tuple[float, float], ...]:
        """The paper's second term, ``w_kd`` tau^2 D at the fixed temperature tau."""
        return ((self.tau, self.w_kd),) if self.w_kd > 0 else ()

    @property
    def highest(self) -> float:
        """That of the sharper model where the clamp acts, 2 tau clamp / (clamp + 1)."""
        return 2.0 * self.tau * self.clamp / (self.clamp + 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its two temperatures, by the ratio k_t / k_s of its sharpnesses.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: not read.

        Returns:
            T_s and T_t, each ``[C, 1]``.
        """
        # T_s = 2 tau k_s / (k_t + k_s) = 2 tau / (1 + ratio), and T_t is ratio times that.
        ratio = (_sharpness(teacher_logits) / _sharpness(student_logits)).clamp_(1.0 / self.clamp, self.clamp)
        student = 2.0 * self.tau / (1.0 + ratio)
        return Temperatures(student, student * ratio)


def _sharpness(logits: Tensor) -> Tensor:
    """The k = max - mean of each row, ``[C, V] -> [C, 1]``, above 0 also for constant logits: 0 / 0 would be NaN."""
    logits = logits.detach()
    return sharpness(logits).clamp_(min=torch.finfo(logits.dtype).tiny)
