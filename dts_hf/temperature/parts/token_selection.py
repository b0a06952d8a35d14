"""Which tokens the soft loss trains on: the hardest ones (LATF of AdaKD, arXiv 2510.11615).

A token is kept where its difficulty is at least the (1 - keep) quantile of the last optimizer step, over all its
micro-batches and processes, and its soft loss then counts 1 / keep times, that of the others not at all. So which tokens
are kept, and how much they count, depends on no cut of the batch, and the normaliser stays the labels of the step. The soft
loss is the mean over the kept tokens as far as a step keeps the share it should; what the step before really kept is logged
(``kept_tokens``). The paper takes the hardest of each micro-batch. The first step keeps everything. Cross-entropy is not
filtered; the paper trains without it.

``keep: auto`` moves the share by the soft loss, as in the authors' code: with a running mean of it (0.99 of the old), keep
falls by ``keep_step`` of itself, to ``keep_min`` at least, when the mean is further than ``keep_band`` below its reference,
and rises by as much, to 1 at most, when it is that far above; then the mean is the new reference. Until ``keep_warmup`` of
the run everything is kept, and the reference is the mean there (ours, as is the loss that is meant: the one reported).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dts_hf.temperature.base import Mechanism

Keep = float | Literal["auto"]
#: The weight of the old running mean of the loss, in the authors' code.
_MEMORY = 0.99


class TokenSelection(Mechanism):
    """The options ``keep`` and ``keep_...`` of a policy that knows how hard a token is.

    Args:
        keep: the share of tokens that is kept, or ``auto``.
        floor: of the share under ``auto``.
        step: by how much of itself the share moves.
        band: how far the mean loss may be from its reference, relative to that.
        warmup: the share of the run in which everything is kept, under ``auto``.
    """

    state_fields = ("kept", "log_threshold", "loss_mean", "loss_reference", "kept_tokens")

    def __init__(self, keep: Keep, floor: float, step: float, band: float, warmup: float) -> None:
        self.share, self.floor, self.step, self.band, self.warmup = keep, floor, step, band, warmup
        self.kept = 1.0  # the share in force
        self.log_threshold: float | None = None  # of log difficulty; None: everything is kept
        self.loss_mean: float | None = None
        self.loss_reference: float | None = None
        self.kept_tokens = 1.0  # what the last step has kept

    def weights(self, log_difficulty: Tensor) -> Tensor:
        """1 / keep for tokens that are kept, 0 for the others, ``[C] -> [C]``; 1 for all before the first step has ended."""
        if self.log_threshold is None:
            return torch.ones_like(log_difficulty)
        return (log_difficulty >= self.log_threshold).to(log_difficulty.dtype).div_(self.kept)

    def take(self, progress: float, loss: float, kept_tokens: float) -> float:
        """Take what the step measured, and say which share the next one keeps.

        Args:
            progress: of training, in [0, 1].
            loss: the mean soft loss of the step, as it is reported.
            kept_tokens: the share of tokens that it kept.
        """
        if math.isfinite(kept_tokens):
            self.kept_tokens = kept_tokens
        if self.share == "auto":
            self._follow(progress, loss)
        else:
            self.kept = float(self.share)
        return self.kept

    def _follow(self, progress: float, loss: float) -> None:
        """Move the share by the running mean of the loss; a loss that is non-finite says nothing."""
        if not math.isfinite(loss):
            return
        mean = loss if self.loss_mean is None else _MEMORY * self.loss_mean + (1.0 - _MEMORY) * loss
        self.loss_mean = mean
        if progress < self.warmup:
            return
        if self.loss_reference is None:
            self.loss_reference = mean
        elif mean < self.loss_reference * (1.0 - self.band):
            self.kept, self.loss_reference = max(self.floor, self.kept * (1.0 - self.step)), mean
        elif mean > self.loss_reference * (1.0 + self.band):
            self.kept, self.loss_reference = min(1.0, self.kept * (1.0 + self.step)), mean

    def log_values(self) -> dict[str, float]:
        """The share in force, and what the last step kept."""
        return {"keep": self.kept, "kept_tokens": self.kept_tokens}
