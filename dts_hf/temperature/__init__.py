"""Temperature policies, one file each. ``build_temperature`` finds them by name."""

from __future__ import annotations

from functools import cache
from typing import Any

from dts_hf.registry import build, classes_beside
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures

__all__ = ["RowStats", "StepStats", "TemperaturePolicy", "Temperatures", "build_temperature", "temperature_policies"]


@cache
def temperature_policies() -> dict[str, type[TemperaturePolicy]]:
    """Every policy in this folder by its name: a new paper is a new file here, and nothing else is edited."""
    return classes_beside(__name__, __path__, TemperaturePolicy)


def build_temperature(name: str, **options: Any) -> TemperaturePolicy:
    """Build a policy: ``build_temperature("dts", rule="gap", t_init=3.0, t_min=1.0, t_max=3.0, momentum=0.9)``.

    Raises:
        UserError: unknown name, unknown option, or a value out of range; the message names the nearest right word.
    """
    return build(temperature_policies(), name, options, name_key="temperature.name", key="temperature", noun="policy")
