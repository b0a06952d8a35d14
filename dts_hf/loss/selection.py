"""The only shift and the only mask of the package.

Everywhere else ``labels`` are unshifted (the Hugging Face contract) and rows are already aligned with their targets.
Shapes: ``B`` batch, ``T`` time, ``H`` hidden, ``N`` labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100


def response_positions(labels: Tensor, count: int | None = None) -> Tensor:
    """Places in the flattened ``[B, T]`` grid whose state predicts a label: ``[N]`` int64 in reading order.

    The state at position i predicts the token at i + 1, so the label of position 0 is never a target and the last state
    never predicts one.

    Args:
        labels: ``[B, T]`` unshifted, ``IGNORE_INDEX`` where nothing is to be learned.
        count: N, where the host knows it (``count_targets`` before the batch went to its device): a GPU is then not waited
            for. None: the labels are counted where they are.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    if count is None:
        return predicts.reshape(-1).nonzero().squeeze(-1)
    # What ``nonzero`` gives, whose size only the device would know: a stable sort keeps the order of reading.
    return torch.sort(~predicts.reshape(-1), stable=True).indices[:count]


def select_response(states: Tensor, labels: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the states that predict a label, and those labels.

    Only the rows that come out of here meet a vocabulary-sized matmul.

    Args:
        states: ``[B, T, H]``.
        labels: ``[B, T]`` unshifted, ``IGNORE_INDEX`` where nothing is to be learned.
        positions: ``[N]``, ``response_positions(labels)`` where they are known already.

    Returns:
        rows ``[N, H]`` in reading order (differentiable) and targets ``[N]``; N may be 0.
    """
    kept = response_positions(labels) if positions is None else positions
    rows = states.reshape(-1, states.shape[-1]).index_select(0, kept.to(states.device))
    return rows, labels.reshape(-1).index_select(0, kept + 1)


def sequence_numbers(labels: Tensor, position_ids: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Which sequence each row of ``select_response`` belongs to: ``[N]`` int64, never falling.

    Args:
        labels: ``[B, T]`` unshifted.
        position_ids: ``[B, T]`` of packed sequences, 0 at the start of each; None: one sequence a line.
        positions: ``[N]``, ``response_positions(labels)`` where they are known already.
    """
    if position_ids is None:
        starts = torch.zeros_like(labels, dtype=torch.bool)
        starts[:, :1] = True
    else:
        starts = position_ids.expand_as(labels) == 0
    numbers = starts.reshape(-1).cumsum(0) - 1
    kept = response_positions(labels) if positions is None else positions
    return numbers.index_select(0, kept + 1)


def count_targets(labels: Tensor) -> Tensor:
    """How many rows ``select_response`` would keep, as a 0-d tensor."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last stretch of labels of a row begins and ends; (0, 0) of a row without a label."""
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORE_INDEX:  # what a template writes behind the last answer
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return start, end
