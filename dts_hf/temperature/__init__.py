"""Temperature policies, one file each. ``build_temperature`` finds them by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from dts_hf.errors import UserError, nearest
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures

__all__ = ["RowStats", "StepStats", "TemperaturePolicy", "Temperatures", "build_temperature", "temperature_policies"]


@cache
def temperature_policies() -> dict[str, type[TemperaturePolicy]]:
    """Every policy in this folder by its name: a new paper is a new file here, and nothing else is edited."""
    found: dict[str, type[TemperaturePolicy]] = {}
    for module_info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            is_policy = inspect.isclass(value) and issubclass(value, TemperaturePolicy) and "name" in vars(value)
            if is_policy and value.__module__ == module.__name__:
                found[value.name] = value
    return found


def build_temperature(name: str, **options: Any) -> TemperaturePolicy:
    """Build a policy: ``build_temperature("dts", rule="gap", t_init=3.0, t_min=1.0, t_max=3.0, momentum=0.9)``.

    Raises:
        UserError: unknown name, unknown option, or a value out of range; the message names the nearest right word.
    """
    policies = temperature_policies()
    if name not in policies:
        raise UserError(
            f"temperature.name: got {name!r}, expected one of {', '.join(policies)}.{nearest(name, policies)}"
        )
    known = [option for option in inspect.signature(policies[name].__init__).parameters if option != "self"]
    for option in options:
        if option not in known:
            raise UserError(
                f"temperature.{option}: unknown option of policy '{name}', expected one of {', '.join(known)}."
                f"{nearest(option, known)}"
            )
    return policies[name](**options)
