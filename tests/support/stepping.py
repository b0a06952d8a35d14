"""A policy led through a run without any model: the statistics of a step, and the temperatures that they lead to."""

from __future__ import annotations

from collections.abc import Iterable

from dts_hf.temperature import StepStats, TemperaturePolicy


def stats(gap: float, observed: tuple[float, ...] = ()) -> StepStats:
    return StepStats(student_ce=2.0 + gap, teacher_ce=2.0, kd=1.0, num_items=10, observed=observed)


def walk(policy: TemperaturePolicy, progresses: Iterable[float], gaps: Iterable[float]) -> list[float | None]:
    """Temperatures in force at each step; gaps[k] is what step k measured."""
    seen = []
    for progress, gap in zip(progresses, gaps):
        policy.begin_step(progress)
        seen.append(policy.temperature)
        policy.end_step(stats(gap))
    return seen
