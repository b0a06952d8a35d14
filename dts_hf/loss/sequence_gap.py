"""The gap of a whole sequence, for policies that set one temperature for it (``needs_sequence_gap``).

The gap of a row is student CE - teacher CE at T = 1, that of a sequence the mean over its rows. It must be known before
the temperature of any of them, so chunks keep sequences whole.

Shapes: ``N`` labelled rows, ``C`` rows of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def whole_sequences(sequences: Tensor, chunk: int) -> Iterator[list[slice]]:
    """Cut the rows into chunks that hold whole sequences, as many as fit.

    Args:
        sequences: ``[N]`` int64, never falling: which sequence each row belongs to.
        chunk: how many rows a chunk holds at most.

    Yields:
        one slice: a chunk of whole sequences. Several slices: one sequence that no chunk holds, cut into chunks; its gap
        has to be measured over all of them first, and their logits are then computed twice.
    """
    start = stop = 0
    for length in sequences.unique_consecutive(return_counts=True)[1].tolist():
        if stop > start and stop + length - start > chunk:
            yield [slice(start, stop)]
            start = stop
        stop += length
        if length > chunk:
            yield [slice(first, min(first + chunk, stop)) for first in range(start, stop, chunk)]
            start = stop
    if stop > start:
        yield [slice(start, stop)]


def row_gaps(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Student CE - teacher CE at T = 1 of each row, ``[C]``, from logits ``[C, V]`` and ``targets`` ``[C]``."""
    picked = targets.unsqueeze(-1)  # [C, 1]
    chosen = (teacher.gather(-1, picked) - student.gather(-1, picked)).squeeze(-1)  # [C]
    return student.logsumexp(-1) - teacher.logsumexp(-1) + chosen


def sequence_means(gaps: Tensor, sequences: Tensor) -> Tensor:
    """For each row ``[C]`` the mean of ``gaps`` ``[C]`` over the rows of its sequence, all of them in this chunk."""
    numbers, inverse = sequences.unique_consecutive(return_inverse=True)
    sums = gaps.new_zeros(2, len(numbers))
    sums.index_add_(1, inverse, torch.stack([gaps, torch.ones_like(gaps)]))
    return (sums[0] / sums[1])[inverse]
