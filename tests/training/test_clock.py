"""What is no training counts for no lap, and before the first step for no total; also one such thing inside another."""

from __future__ import annotations

import pytest

from dts_hf.training import clock as module
from dts_hf.training.clock import TrainingClock


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number that a test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_laps_and_total(watch: list[float]) -> None:
    clock = TrainingClock()
    watch[0] += 3
    assert clock.new_lap() == 3
    watch[0] += 2
    assert (clock.new_lap(), clock.seconds) == (2, 5)
    clock.seconds_before = 10  # of the attempt before a resume
    clock.stop()
    watch[0] += 50
    assert clock.seconds == 15
    clock.start()
    assert clock.seconds == 0


@pytest.mark.parametrize("from_total", [True, False])
def test_what_is_left_out(watch: list[float], from_total: bool) -> None:
    clock = TrainingClock()
    watch[0] += 1
    with clock.exclude(from_total=from_total):
        watch[0] += 4
        with clock.exclude(from_total=from_total):  # an evaluation within the work before training
            watch[0] += 8
        watch[0] += 16
    watch[0] += 2
    assert clock.new_lap() == 3
    assert clock.seconds == (3 if from_total else 31)


def test_an_error_inside_is_left_out_too(watch: list[float]) -> None:
    clock = TrainingClock()
    with pytest.raises(KeyError), clock.exclude(from_total=True):
        watch[0] += 5
        raise KeyError
    assert clock.new_lap() == clock.seconds == 0
