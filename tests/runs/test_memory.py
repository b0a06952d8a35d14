"""Memory of the machine and of this process: the figures of the system's own tools."""

from __future__ import annotations

import sys

import pytest
import torch

from dts_hf.runs.memory import available_bytes, resident_bytes, total_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the others do not tell as much")
def test_memory_that_is_taken_is_counted() -> None:
    before = resident_bytes()
    held = torch.ones(50 << 20, dtype=torch.uint8)
    assert before + 45e6 < resident_bytes() < before + 70e6 and len(held) == 50 << 20
    assert before < available_bytes() < total_bytes()


def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise FileNotFoundError

    now = resident_bytes()
    monkeypatch.setattr("dts_hf.runs.memory.Path.read_text", refuse)
    assert available_bytes() == total_bytes() > 0
    assert resident_bytes() > 0.9 * now  # the most that it ever held
