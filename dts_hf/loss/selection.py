"""The only shift and the only mask of the package.

Everywhere else ``labels`` are unshifted (the Hugging Face contract) and rows are already aligned with their targets.
Shapes: ``B`` batch, ``T`` time, ``H`` hidden, ``N`` labelled rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def select_response(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the states that predict a label, and those labels.

    The state at position i predicts the token at i + 1, so the label of position 0 is never a target and the last state
    never predicts one. Only the rows that come out of here meet a vocabulary-sized matmul.

    Args:
        states: ``[B, T, H]``.
        labels: ``[B, T]`` unshifted, ``IGNORE_INDEX`` where nothing is to be learned.

    Returns:
        rows ``[N, H]`` in reading order (differentiable) and targets ``[N]``; N may be 0.
    """
    width = states.shape[-1]
    keep = _kept(labels)
    # Positions in the flattened [B, T] grid: the shifted grid has T - 1 columns, so add one per finished row. (T = 1 has no
    # target; the maximum spares the division by zero.) Indices and not a mask: a mask would be counted on the host again.
    index = keep + torch.div(keep, max(labels.shape[1] - 1, 1), rounding_mode="floor")
    rows = states.reshape(-1, width).index_select(0, index.to(states.device))
    return rows, labels[:, 1:].reshape(-1).index_select(0, keep)


def sequence_numbers(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Which sequence each row of ``select_response`` belongs to: ``[N]`` int64, never falling.

    Args:
        labels: ``[B, T]`` unshifted.
        position_ids: ``[B, T]`` of packed sequences, 0 at the start of each; None: one sequence a line.
    """
    if position_ids is None:
        starts = torch.zeros_like(labels, dtype=torch.bool)
        starts[:, :1] = True
    else:
        starts = position_ids.expand_as(labels) == 0
    numbers = starts.reshape(-1).cumsum(0).view_as(labels) - 1
    return numbers[:, 1:].reshape(-1).index_select(0, _kept(labels))


def _kept(labels: Tensor) -> Tensor:
    """Indices of the labels that count in the flattened ``[B, T - 1]`` grid."""
    return (labels[:, 1:] != IGNORE_INDEX).reshape(-1).nonzero().squeeze(-1)


def count_targets(labels: Tensor) -> Tensor:
    """How many rows ``select_response`` would keep, as a 0-d tensor."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()
