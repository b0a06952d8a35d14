"""How much of the training is on the student's own text, and how that text is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from dts_hf.errors import UserError, nearest

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OnPolicySettings:
    """Mixed data: in a share of the optimizer steps the student answers the prompts itself.

    Args:
        fraction: of the optimizer steps whose rows the student answers (lambda of GKD), at the beginning of the run.
        schedule: ``constant``, or ``linear`` or ``cosine`` from ``fraction`` to ``end_fraction`` over the run.
        end_fraction: at the end of the run; only with ``linear`` and ``cosine``.
        temperature: of sampling; nothing to do with the temperature of the loss.
        top_p: draw from the likeliest tokens that together have this probability (nucleus sampling); 1: from all.
        max_new_tokens: longest answer in tokens, its end included.
        batch_size: prompts that one process answers at the same time; in fp32 it changes speed and memory alone.
        seed: of the coin and of the text; None: that of the training.

    Raises:
        UserError: a value out of range, or a schedule without an end (or the other way round).
    """

    fraction: float = 0.5
    schedule: Schedule = "constant"
    end_fraction: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "end_fraction"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise UserError(f"on_policy.{name}: got {value!r}, expected a share of the steps, from 0 to 1")
        if self.schedule not in get_args(Schedule):
            known = get_args(Schedule)
            raise UserError(
                f"on_policy.schedule: got {self.schedule!r}, expected one of {', '.join(known)}."
                f"{nearest(str(self.schedule), known)}"
            )
        if problem := schedule_problem(self.schedule, self.end_fraction):
            raise UserError(f"on_policy.{problem}")
        if not (_is_number(self.temperature) and self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"on_policy.temperature: got {self.temperature!r}, expected a number above 0")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"on_policy.top_p: got {self.top_p!r}, expected a number above 0, at most 1")
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (name == "seed" and value is None):
                raise UserError(f"on_policy.{name}: got {value!r}, expected a whole number of at least {least}")

    def fraction_at(self, progress: float) -> float:
        """The probability that a step is answered by the student.

        Args:
            progress: of the run, 0 to 1.
        """
        if self.end_fraction is None:
            return self.fraction
        done = min(max(progress, 0.0), 1.0)
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.fraction + (self.end_fraction - self.fraction) * done


def schedule_problem(schedule: str, end_fraction: float | None) -> str:
    """What is wrong with a schedule and its end taken together; empty where nothing is."""
    if schedule == "constant" and end_fraction is not None:
        return f"end_fraction: got {end_fraction:g} with schedule 'constant', expected schedule 'linear' or 'cosine'"
    if schedule != "constant" and end_fraction is None:
        return f"end_fraction: is missing, expected the fraction that the schedule '{schedule}' ends with, from 0 to 1"
    return ""


def on_policy_settings(given: OnPolicySettings | Mapping[str, Any] | None) -> OnPolicySettings | None:
    """The settings that a trainer was given, checked; None: training is on the data alone.

    Raises:
        UserError: a name that there is not, or a value out of range.
    """
    if given is None or isinstance(given, OnPolicySettings):
        return given
    names = [field.name for field in dataclasses.fields(OnPolicySettings)]
    if not isinstance(given, Mapping):
        raise UserError(f"on_policy: got {given!r}, expected a mapping with {', '.join(names)}")
    for name in given:
        if name not in names:
            raise UserError(
                f"on_policy: {name!r} is no option of it, expected {', '.join(names)}.{nearest(str(name), names)}"
            )
    return OnPolicySettings(**given)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
