"""The contract between a teacher and the loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dts_hf.loss.compact_rows import CompactRows
from dts_hf.models.head import Head


class Teacher(Protocol):
    """Answers a batch with the states that its head turns into logits.

    With packing the batch's ``attention_mask`` may be a ``packed_attention.cu_seqlens_mask``; a teacher of your own
    says ``takes_cu_seqlens = True`` where it knows that, or does not look at the mask. One that answers with
    ``CompactRows`` in the place of states says ``compact = True``; the weight of its head is ``[V, 0]``.
    """

    @property
    def head(self) -> Head | None:
        """Turns its states into logits (its weights may be shares of FSDP2 or ZeRO-3); None for ``NoTeacher``."""
        ...

    def states(self, batch: dict[str, Any], labels: Tensor) -> Tensor | CompactRows | None:
        """Final states of the labelled rows, ``[N, H_t]``, in the order of ``selection.select_response``; no gradient.

        Args:
            batch: what the student sees (``input_ids`` and ``attention_mask`` or ``position_ids``).
            labels: ``[B, T]`` unshifted.
        """
        ...

    def to(self, device: torch.device) -> Teacher:
        """Move to the student's device."""
        ...
