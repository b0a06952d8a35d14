"""Variants that fail in every way, for ``harness.measure``, whose workers import this file (and nothing slow with it)."""

from __future__ import annotations

import os
from typing import Any

import torch


def build(name: str, _options: None) -> Any:
    from harness import Missing, Task

    def step() -> dict[str, Any]:
        if name == "too big":
            raise torch.OutOfMemoryError("no room")
        if name == "broken":
            raise ValueError("not\ntoday")
        if name == "dies":
            os._exit(3)
        return {"kl": torch.tensor(0.5)}

    if name == "absent":
        raise Missing("no such package")
    return Task(step)
