"""Statistics of each row of logits over the vocabulary, blind to a shift: standard deviation, and peak above the mean.

A temperature that is a multiple of ``deviation_of(z)`` makes softmax(z / T) the same at every scale of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A row flatter than this, in logit units, has no deviation: rounding would invent one, and dividing by it overflows.
FLAT = 1e-3


def standard_deviation(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of each row, ``[C, V] -> [C, 1]``; 0 for a vocabulary of one.

    Two passes: centred first, so large offsets cost no digits. ``torch.std`` is one pass and, along the vocabulary of
    a small block in cache, ten times slower.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return torch.sqrt(centred.square_().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1))


def deviation_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The standard deviation to divide each row by, ``[C, V] -> [C, 1]``, and which rows have one, ``[C, 1]`` bool.

    A flat row is divided by 1, as it is: standardised, it would be anything.
    """
    deviation = standard_deviation(logits.detach())
    has_one = deviation > FLAT
    return torch.where(has_one, deviation, torch.ones_like(deviation)), has_one


def sharpness(logits: Tensor) -> Tensor:
    """The k = max z - mean z of each row, ``[C, V] -> [C, 1]``: the statistic of DTKD (arXiv 2404.12711)."""
    return logits.amax(-1, keepdim=True) - logits.mean(-1, keepdim=True)
