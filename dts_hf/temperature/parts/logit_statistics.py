"""Statistics of each row of logits over the vocabulary, blind to a shift: standard deviation, and peak above the mean.

A temperature that is a multiple of ``deviation_of(z)`` makes softmax(z / T) the same at every scale of z.

Each function takes logits, or a ``LogitSummary`` of them: what kernels have measured in passing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dts_hf.temperature.base import RowStats

#: A row flatter than this, in logit units, has no deviation: rounding would invent one, and dividing by it overflows.
FLAT = 1e-3


class LogitSummary:
    """What a policy whose ``reads`` is "summary" may ask of the logits of a chunk without having them.

    It stands where the logits would, so it has their ``shape`` ``[C, V]``, and the ``dtype`` and ``device`` of what it
    answers. Arithmetic with it fails, as it should.

    Args:
        shape: of the logits.
        like: a tensor of the dtype and on the device of the answers.
    """

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device

    def detach(self) -> LogitSummary:
        """Itself: nothing hangs in a graph."""
        return self

    def standard_deviation(self) -> Tensor:
        """As the function of that name, ``[C, 1]``."""
        raise NotImplementedError

    def sharpness(self) -> Tensor:
        """As the function of that name, ``[C, 1]``."""
        raise NotImplementedError

    def overlap(self) -> Tensor:
        """The Bhattacharyya coefficient of student and teacher at T = 1, ``[C]``."""
        raise NotImplementedError


def standard_deviation(logits: Tensor | LogitSummary) -> Tensor:
    """Unbiased standard deviation of each row, ``[C, V] -> [C, 1]``; 0 for a vocabulary of one.

    Two passes: centred first, so large offsets cost no digits. ``torch.std`` is one pass and, along the vocabulary of
    a small block in cache, ten times slower.
    """
    if isinstance(logits, LogitSummary):
        return logits.standard_deviation()
    centred = logits - logits.mean(-1, keepdim=True)
    return torch.sqrt(centred.square_().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1))


def deviation_of(logits: Tensor | LogitSummary) -> tuple[Tensor, Tensor]:
    """The standard deviation to divide each row by, ``[C, V] -> [C, 1]``, and which rows have one, ``[C, 1]`` bool.

    A flat row is divided by 1, as it is: standardised, it would be anything.
    """
    deviation = standard_deviation(logits.detach())
    has_one = deviation > FLAT
    return torch.where(has_one, deviation, torch.ones_like(deviation)), has_one


def sharpness(logits: Tensor | LogitSummary) -> Tensor:
    """The k = max z - mean z of each row, ``[C, V] -> [C, 1]``: the statistic of DTKD (arXiv 2404.12711)."""
    if isinstance(logits, LogitSummary):
        return logits.sharpness()
    return logits.amax(-1, keepdim=True) - logits.mean(-1, keepdim=True)


def bhattacharyya(
    student_logits: Tensor | LogitSummary, teacher_logits: Tensor | LogitSummary, rows: RowStats
) -> Tensor:
    """The coefficient sum sqrt(p q) of each row at T = 1, ``[C, V] x [C, V] -> [C]``, detached."""
    if isinstance(student_logits, LogitSummary) or isinstance(teacher_logits, LogitSummary):
        return cast(LogitSummary, student_logits).overlap()
    # exp((z_s - lse_s + z_t - lse_t) / 2): one exponential in all
    mean_norm = (rows.student_lse + rows.teacher_lse).detach().mul_(-0.5).unsqueeze(-1)
    return torch.add(mean_norm, student_logits.detach() + teacher_logits.detach(), alpha=0.5).exp_().sum(-1)
