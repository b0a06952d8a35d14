"""Temperature policies, one file each. ``build_temperature`` finds them by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from dts_hf.errors import UserError
from dts_hf.registry import build, classes_beside
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures

__all__ = [
    "RowStats",
    "StepStats",
    "TemperaturePolicy",
    "Temperatures",
    "build_policy",
    "build_temperature",
    "temperature_policies",
]


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


def build_policy(spec: TemperaturePolicy | Mapping[str, Any] | str | float) -> TemperaturePolicy:
    """A policy from itself, ``{"name": "dts", "rule": "gap"}``, its name, or a number (constant).

    Raises:
        UserError: a mapping without a name, or see ``build_temperature``.
    """
    if isinstance(spec, TemperaturePolicy):
        return spec
    if isinstance(spec, str):
        return build_temperature(spec)
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise UserError(
                f"temperature: got {dict(spec)!r}, expected a mapping with a name, as in {{'name': 'dts'}}"
            )
        return build_temperature(**spec)
    return build_temperature("constant", value=spec)
