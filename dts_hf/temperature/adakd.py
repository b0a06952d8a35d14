"""AdaKD's inverse-difficulty temperature (IDTS, arXiv 2510.11615): sharp targets for hard tokens, soft ones for easy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from dts_hf.errors import UserError, nearest
from dts_hf.registry import Between, PositiveFloat
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.parts.logit_statistics import bhattacharyya
from dts_hf.temperature.parts.token_selection import Keep, TokenSelection

#: log s is counted in bins of 1/16 nat from e^-8 (where fp32 cannot tell two distributions apart) to e^0 = 1.
_LOG_LOW, _BINS = -8.0, 128
_BINS_PER_NAT = _BINS / -_LOG_LOW
#: A share of tokens.
KEEP = Between(0.0, 1.0, "high")


class AdaKD(TemperaturePolicy):
    """T_i = t_base exp(-c tanh(log(s_i / median s))), with s_i the Hellinger distance of teacher and student at T = 1.

    A token as hard as the median runs at ``t_base``, the hardest at t_base e^-c, the easiest at t_base e^c; both models
    share T_i, and the loss of a token is T_i^2 D.

    The paper's median is over the batch. Here it is the median of the last optimizer step, over all its micro-batches
    and ranks, read from a histogram of log s: the result then depends neither on chunks nor on how a batch is split.
    The first step has no median and runs at ``t_base``.

    The paper's token filter (LATF), which trains on the hardest tokens alone, is ``keep``; it is off by default, and does
    not need a moving T: ``{c: 0, keep: auto}`` is the filter alone.

    Args:
        t_base: temperature of a token of median difficulty; 1 in the paper.
        c: half the log-range of T; 0.5 in the paper. 0 is a constant temperature, below 0 the paper's inverse control.
        keep: the share of tokens, the hardest, that the soft loss trains on, above 0; ``auto`` moves it (LATF). 1 is all.
        keep_min: the smallest share of ``auto``; 0.1 in the authors' code.
        keep_step: by how much of itself ``auto`` moves the share; 0.05 in the authors' script.
        keep_band: how far the mean loss has to move, relative to its reference, before it does; 0.05 in that script.
        keep_warmup: the share of the run in which ``auto`` keeps everything; 0.05 in that script.
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
        " Which tokens are kept is held too, and drops nothing: a token enters or leaves at once."
    )
    cost = "one exponential and 3 plain passes over both logits"
    state_fields = ("log_median",)

    def __init__(
        self,
        t_base: PositiveFloat = 1.0,
        c: Annotated[float, Between(-5.0, 5.0)] = 0.5,
        keep: Annotated[float, KEEP] | Literal["auto"] = 1.0,
        keep_min: Annotated[float, KEEP] = 0.1,
        keep_step: Annotated[float, Between(0.0, 1.0, "none")] = 0.05,
        keep_band: Annotated[float, Between(0.0, 1.0, "low")] = 0.05,
        keep_warmup: Annotated[float, Between(0.0, 1.0, "low")] = 0.05,
    ) -> None:
        super().__init__()
        self.t_base = self.checked("t_base", t_base)
        self.c = self.checked("c", c)
        self.moves = self.c != 0.0
        self.keep = _check_keep(self.name, keep)
        self.keep_min, self.keep_step = self.checked("keep_min", keep_min), self.checked("keep_step", keep_step)
        self.keep_band = self.checked("keep_band", keep_band)
        self.keep_warmup = self.checked("keep_warmup", keep_warmup)
        self.selection: TokenSelection | None = None
        if self.keep != 1.0:
            given = (self.keep_min, self.keep_step, self.keep_band, self.keep_warmup)
            self.selection = TokenSelection(self.keep, *given)
            self.mechanisms = (self.selection,)
        self.log_median: float | None = None

    @property
    def temperature(self) -> float:
        """t_base: the temperature of a token of median difficulty."""
        return self.t_base

    @property
    def highest(self) -> float:
        """The bound t_base e^|c|, which the easiest tokens come near to; below 0 of ``c`` the hardest."""
        return self.t_base * math.exp(abs(self.c))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its T_i, from its difficulty s_i and the median of the last step.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: the log-sum-exps of the same rows, ``[C]``.

        Returns:
            One T_i for both models, ``[C, 1]`` (``[]`` in the first step); ``observed`` has the row's bin of the histogram
            of log s, one-hot, ``[C, 128]``, so that its mean over the step is that histogram. With ``keep`` also ``weight``
            ``[C, 1]``, and whether the row is kept as one more column.
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
        if self.selection is None:
            return Temperatures(t, t, observed=observed)
        weight = self.selection.weights(log_s).unsqueeze(-1)
        return Temperatures(t, t, observed=torch.cat([observed, (weight > 0).to(observed.dtype)], -1), weight=weight)

    def end_step(self, stats: StepStats) -> None:
        """Take median and threshold of log s from the histogram of the step; one without finite numbers keeps the last."""
        super().end_step(stats)
        histogram = stats.observed[:_BINS]
        median = _log_quantile(histogram, 0.5)
        if median is None:
            return
        self.log_median = median
        if self.selection is not None:
            keep = self.selection.take(self.progress, stats.kd, stats.observed[_BINS])
            self.selection.log_threshold = None if keep == 1.0 else _log_quantile(histogram, 1.0 - keep)


def _check_keep(policy: str, value: object) -> Keep:
    """``keep`` as a share, or ``auto``.

    Raises:
        UserError: it is neither.
    """
    if value == "auto":
        return "auto"
    if value not in KEEP:
        raise UserError(
            f"temperature.keep: got {value!r} for policy '{policy}', expected a number above 0 to 1, or auto."
            f"{nearest(str(value), ['auto'])}"
        )
    return float(value)  # type: ignore[arg-type]


def _log_quantile(shares: Sequence[float], share: float) -> float | None:
    """The log s with ``share`` of the rows below it, from the shares of the bins, linear inside one; None without rows."""
    total = sum(shares)
    if not math.isfinite(total) or total <= 0.0:
        return None
    below = 0.0
    for index, part in enumerate(shares):
        if part > 0.0 and below + part >= share * total:
            return _LOG_LOW + (index + (share * total - below) / part) / _BINS_PER_NAT
        below += part
    return None
