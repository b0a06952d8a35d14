"""A compact teacher made of a live one on the way, and the distribution that it stands for, in float64 and dense."""

from __future__ import annotations

import torch
from torch import Tensor

from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.selection import select_response
from dts_hf.models.head import Head
from dts_hf.teachers.live import LiveTeacher


class CompactedTeacher:
    """Answers with what a compact cache would have of ``model``: ``top_k`` logits of each row, and its tail.

    Attributes:
        asked: the teacher's logits ``[N, V]`` and the rows of the last call.
    """

    compact = True

    def __init__(self, model, top_k: int, dtype: torch.dtype = torch.float64) -> None:
        self.live, self.top_k, self.dtype = LiveTeacher(model), top_k, dtype
        self.head = Head(model.get_output_embeddings().weight.new_empty(model.config.vocab_size, 0))
        self.asked: tuple[Tensor, CompactRows]

    def to(self, device):
        return self

    @torch.no_grad()
    def states(self, batch, labels):
        states = self.live.states(batch, labels)
        targets = select_response(labels.unsqueeze(-1), labels)[1]
        logits = self.live.head(states)
        self.asked = logits, CompactRows.of(logits, targets, self.top_k, self.dtype)
        return self.asked[1]


def rebuilt(logits: Tensor, targets: Tensor, top_k: int, temperature: float | Tensor) -> Tensor:
    """[N, V]: the label and the top_k - 1 largest others as they are at T, what is left spread evenly over the others."""
    out = torch.softmax(logits / temperature, -1)
    for row, z, target in zip(out, logits.tolist(), targets.tolist()):
        others = sorted((-value, i) for i, value in enumerate(z) if i != target)  # equal ones: the smaller id first
        tail = [i for _, i in others[top_k - 1 :]]
        if tail:
            row[tail] = row[tail].sum() / len(tail)
    return out
