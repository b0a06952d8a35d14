"""A teacher that runs on every batch: frozen backbone, no gradient, no head, no KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.distributed.sharding import is_sharded
from dts_hf.loss.selection import select_response
from dts_hf.models.head import Head, backbone_of, head_of, loss_in_head
from dts_hf.teachers.shared_answers import SharedAnswers


class LiveTeacher:
    """Runs ``model``'s backbone in its own dtype and keeps only the rows that carry a label.

    It is never handed to ``accelerator.prepare``, which would wrap its forward into fp32 copies.

    Args:
        model: a causal language model, whole or sharded by ``sharding.shard_teacher``; it is frozen and put into
            evaluation mode.

    Attributes:
        shared: where the states of a batch are looked for before the model runs; None: it runs on every batch.
    """

    shared: SharedAnswers | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()
        self.backbone = backbone_of(model)

    @property
    def head(self) -> Head:
        """Its weights are shares where the model is sharded: see ``head.gather_head``."""
        return head_of(self.model)

    def to(self, device: torch.device) -> LiveTeacher:
        """Move to ``device``, unless its weights are shares of several processes, each of which has a device."""
        if not is_sharded(self.model) and self.head.weight.device != device:
            self.model.to(device)
        return self

    def states(self, batch: dict[str, Any], labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Final states ``[N, H_t]`` of the rows that carry a label; see ``Teacher.states``.

        ``positions`` ``[N]`` are those of the labels where they are known (``selection.response_positions``).
        """
        if self.shared is None or is_sharded(self.model):  # a sharded one runs on all processes at once, or on none
            return self._computed(batch, labels, positions)
        return self.shared.get(batch, labels, lambda: self._computed(batch, labels, positions))

    @torch.no_grad()
    def _computed(self, batch: dict[str, Any], labels: Tensor, positions: Tensor | None) -> Tensor:
        # Utilities that call train() recursively must not switch the teacher's dropout on.
        self.model.eval()
        # The teacher keeps its own precision whatever autocast the student trains under.
        with torch.autocast(labels.device.type, enabled=False):
            if is_sharded(self.model):  # its weights are gathered by hooks that start from the whole model
                with loss_in_head(self.model, lambda states, head: states):
                    states = self.model(**batch, use_cache=False).logits
            else:
                states = self.backbone(**batch, use_cache=False).last_hidden_state
        return select_response(states, labels, positions)[0]
