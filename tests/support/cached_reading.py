"""For a process that is spawned: it imports this file alone, and not what a test does."""

from __future__ import annotations

from typing import Any


def rows_in_worker(cache: Any, numbers: range, queue: Any) -> None:
    queue.put([cache.row(number).sum().item() for number in numbers])
