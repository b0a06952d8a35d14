"""A teacher that runs on every batch: frozen backbone, no gradient, no head, no KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.head import backbone_of, head_of
from dts_hf.response import select_response


class LiveTeacher:
    """Runs ``model``'s backbone in its own dtype and keeps only the rows that carry a label.

    It is never handed to ``accelerator.prepare``, which would wrap its forward into fp32 copies.

    Args:
        model: a causal language model; it is frozen and put into evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()
        self.backbone = backbone_of(model)
        self.head = head_of(model)

    def to(self, device: torch.device) -> LiveTeacher:
        if self.head.weight.device != device:
            self.model.to(device)
            self.head = head_of(self.model)
        return self

    @torch.no_grad()
    def states(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        # Utilities that call train() recursively must not switch the teacher's dropout on.
        self.backbone.eval()
        # The teacher keeps its own precision whatever autocast the student trains under.
        with torch.autocast(labels.device.type, enabled=False):
            states = self.backbone(**batch, use_cache=False).last_hidden_state
        return select_response(states, labels)[0]
