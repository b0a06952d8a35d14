"""AdaKD's inverse-difficulty temperature (IDTS, arXiv 2510.11615): sharp targets for hard tokens, soft ones for easy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from dts_hf.registry import Between, PositiveFloat
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.parts.logit_statistics import bhattacharyya

#: log s is counted in bins of 1/16 nat from e^-8 (where fp32 cannot tell two distributions apart) to e^0 = 1.
_LOG_LOW, _BINS = -8.0, 128
_BINS_PER_NAT = _BINS / -_LOG_LOW


class AdaKD(TemperaturePolicy):
    """T_i = t_base exp(-c tanh(log(s_i / median s))), with s_i the Hellinger distance of teacher and student at T = 1.

    A token as hard as the median runs at ``t_base``, the hardest at t_base e^-c, the easiest at t_base e^c; both models
    share T_i, and the loss of a token is T_i^2 D.

    The paper's median is over the batch. Here it is the median of the last optimizer step, over all its micro-batches
    and ranks, read from a histogram of log s: the result then depends neither on chunks nor on how a batch is split.
    The first step has no median and runs at ``t_base``.

    Only the temperature of AdaKD: its token filter (LATF), which trains on the hardest tokens alone, is not part of it.

    Args:
        t_base: temperature of a token of median difficulty; 1 in the paper.
        c: half the log-range of T; 0.5 in the paper. 0 is a constant temperature, below 0 the paper's inverse control.
    """

    name = "adakd"
    reads = "summary"
    any_text = True
    paper = "arXiv 2510.11615"
    formula = "T_i = t_base exp(-c tanh(log(s_i / median s))), s = Hellinger(p, q) at T = 1, per token"
    use = (
        "Tokens differ much in difficulty; published with reverse KL. Compare with `constant` at t_base and at "
        "t_base e^-c (in the paper's Table 5 a fixed T = 0.61 has 1.1 of the 1.9 ROUGE-L points), and with -c."
    )
    held = (
        "T_i, through s_i. Dropped is the force that would move a token's difficulty for the sake of its T_i: for c above 0 "
        "a harder token has the smaller factor T_i^2, so a student would be paid for being wrong. As in its paper."
    )
    cost = "one exponential and 3 plain passes over both logits"
    state_fields = ("log_median",)

    def __init__(self, t_base: PositiveFloat = 1.0, c: Annotated[float, Between(-5.0, 5.0)] = 0.5) -> None:
        super().__init__()
        self.t_base = self.checked("t_base", t_base)
        self.c = self.checked("c", c)
        self.log_median: float | None = None

    @property
    def temperature(self) -> float:
        """t_base: the temperature of a token of median difficulty."""
        return self.t_base

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its T_i, from its difficulty s_i and the median of the last step.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: the log-sum-exps of the same rows, ``[C]``.

        Returns:
            One T_i for both models, ``[C, 1]`` (``[]`` in the first step); ``observed`` has the row's bin of the histogram
            of log s, one-hot, ``[C, 128]``, so that its mean over the step is that histogram.
        """
        overlap = bhattacharyya(student_logits.detach(), teacher_logits.detach(), rows)
        # s = sqrt(1 - overlap), so log s = log(1 - overlap) / 2; equal distributions (and rounding that makes the overlap
        # larger than 1) fall into the lowest bin.
        log_s = (1.0 - overlap).clamp_(min=math.exp(2 * _LOG_LOW)).log_().mul_(0.5)
        bins = ((log_s - _LOG_LOW) * _BINS_PER_NAT).long().clamp_(0, _BINS - 1)
        observed = log_s.new_zeros(len(log_s), _BINS).scatter_(-1, bins.unsqueeze(-1), 1.0)
        if self.log_median is None:
            t = torch.full((), self.t_base, dtype=log_s.dtype, device=log_s.device)
        else:
            t = (log_s - self.log_median).tanh_().mul_(-self.c).exp_().mul_(self.t_base).unsqueeze(-1)
        return Temperatures(t, t, observed=observed)

    def end_step(self, stats: StepStats) -> None:
        """Take the median of log s from the histogram of the step; one without finite numbers keeps the last."""
        median = _log_median(stats.observed)
        if median is not None:
            self.log_median = median


def _log_median(shares: Sequence[float]) -> float | None:
    """The median of log s from the shares of the bins, linear inside the bin; None without rows."""
    total = sum(shares)
    if not math.isfinite(total) or total <= 0.0:
        return None
    below = 0.0
    for index, share in enumerate(shares):
        if share > 0.0 and below + share >= 0.5 * total:
            return _LOG_LOW + (index + (0.5 * total - below) / share) / _BINS_PER_NAT
        below += share
    return None
