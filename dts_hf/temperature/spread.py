"""How spread out logits are over the vocabulary: the standard deviation, and the peak above the mean."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to (or the floor of) a standard deviation: constant logits have none.
EPS = 1e-7


def standard_deviation(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of each row, ``[C, V] -> [C, 1]``; 0 for a vocabulary of one.

    Two passes: centred first, so large offsets cost no digits. ``torch.std`` is one pass and, along the vocabulary of
    a small block in cache, ten times slower.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return torch.sqrt(centred.square_().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1))


def sharpness(logits: Tensor) -> Tensor:
    """k = max z - mean z of each row, ``[C, V] -> [C, 1]``: the statistic of DTKD (arXiv 2404.12711), blind to a shift."""
    return logits.amax(-1, keepdim=True) - logits.mean(-1, keepdim=True)
