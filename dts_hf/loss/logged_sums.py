"""Sums over micro-batches and ranks, so that every logged number is a mean over labels and not a mean of means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_MINIMUM, _MAXIMUM = "_min", "_max"
#: Before the names of what a policy wants logged (``TemperaturePolicy.log_values``).
OF_POLICY = "policy_"


class SumMeter:
    """Adds the ``sums`` of ``LossOutput`` over calls; names ending in ``_min`` or ``_max`` keep the extreme instead."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add one micro-batch; nothing leaves the device."""
        for name, value in sums.items():
            self._values[name] = _combine(name, self._values[name], value) if name in self._values else value.detach()

    def reduce(self, accelerator: Any) -> Totals:
        """Totals over all ranks, with one gather, and start again from nothing. Every rank must call it."""
        names = sorted(self._values)
        if not names:
            return Totals()
        device = self._values[names[0]].device
        precise = torch.float32 if device.type == "mps" else torch.float64
        shapes = [self._values[name].shape for name in names]
        flat = torch.cat([self._values[name].to(precise).reshape(-1) for name in names]).unsqueeze(0)
        ranks = accelerator.gather(flat).tolist()
        self._values = {}
        totals = Totals()
        columns = zip(*ranks, strict=True)
        for name, shape in zip(names, shapes, strict=True):
            values = [_total(name, next(columns)) for _ in range(shape.numel())]
            if shape:
                totals.vectors[name] = tuple(values)
            else:
                totals[name] = values[0]
        return totals


class Totals(dict[str, float]):
    """Numbers by name; ``vectors`` holds what is more than one number (a policy's ``observed``)."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: dict[str, tuple[float, ...]] = {}


class MeanLog:
    """Adds the totals of optimizer steps between two log lines, as plain numbers; its means pass through ``named``."""

    def __init__(self, named: Callable[[dict[str, float]], dict[str, float]] = dict) -> None:
        self.named = named
        self.totals: dict[str, float] = {}

    def add(self, totals: dict[str, float]) -> None:
        for name, value in totals.items():
            if name in self.totals and name.endswith(_MINIMUM):
                value = min(value, self.totals[name])
            elif name in self.totals and name.endswith(_MAXIMUM):
                value = max(value, self.totals[name])
            elif name in self.totals:
                value += self.totals[name]
            self.totals[name] = value

    def pop(self) -> dict[str, float]:
        """The means since the last call (see ``means``); empty when nothing was added."""
        totals, self.totals = self.totals, {}
        return self.named(means(totals)) if totals else {}


def means(totals: dict[str, float]) -> dict[str, float]:
    """Turn sums over rows into the numbers that are logged (nats per label, shares, temperatures)."""
    rows = totals["rows"] or math.nan
    mean = {name: value / rows for name, value in totals.items() if not name.endswith((_MINIMUM, _MAXIMUM))}
    return {
        "ce_loss": mean["ce"],
        "kd_loss": mean["kd"],
        "teacher_ce": mean["teacher_ce"],
        "gap": mean["ce"] - mean["teacher_ce"],
        "kl": mean["kl"],
        "student_entropy": mean["student_entropy"],
        "teacher_entropy": mean["teacher_entropy"],
        "student_entropy_at_t": mean["student_entropy_at_t"],
        "teacher_entropy_at_t": mean["teacher_entropy_at_t"],
        # How many words the teacher really offers at this temperature: exp of its mean entropy.
        "effective_support": math.exp(mean["teacher_entropy_at_t"]),
        "top1_agreement": mean["top1_agreement"],
        "temperature": mean["temperature"],
        "teacher_temperature": mean["teacher_temperature"],
        "temperature_min": totals["temperature_min"],
        "temperature_max": totals["temperature_max"],
        **({"aux_loss": mean["aux"]} if "aux" in mean else {}),
        **{name.removeprefix(OF_POLICY): value for name, value in mean.items() if name.startswith(OF_POLICY)},
    }


def _total(name: str, ranks: Sequence[float]) -> float:
    if name.endswith(_MINIMUM):
        return min(ranks)
    if name.endswith(_MAXIMUM):
        return max(ranks)
    try:
        return math.fsum(ranks)
    except (OverflowError, ValueError):  # inf - inf
        return sum(ranks)


def _combine(name: str, old: Tensor, new: Tensor) -> Tensor:
    if name.endswith(_MINIMUM):
        return torch.minimum(old, new)
    if name.endswith(_MAXIMUM):
        return torch.maximum(old, new)
    return old + new.detach()
