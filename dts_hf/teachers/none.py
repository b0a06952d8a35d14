"""No teacher: plain fine-tuning on labels, with everything else (packing, loss head, evaluation, reports) unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NoTeacher:
    """Stands where a teacher would; only for ``kd_ratio: 0``."""

    head = None
    takes_cu_seqlens = True

    def states(self, batch: dict[str, Any], labels: Tensor) -> None:
        """There are none."""
        return None

    def to(self, device: torch.device) -> NoTeacher:
        """There is nothing to move."""
        return self
