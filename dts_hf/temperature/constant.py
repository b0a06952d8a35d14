"""A fixed temperature, the baseline no method beats consistently (Unified Revisit, arXiv 2603.02430)."""

from __future__ import annotations

import math
from typing import ClassVar

from dts_hf.temperature.base import TemperaturePolicy, check_number


class Constant(TemperaturePolicy):
    """T = ``value`` for the whole run (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        value: the temperature, above 0.
    """

    name: ClassVar[str] = "constant"
    paper: ClassVar[str | None] = "arXiv 1503.02531"
    formula: ClassVar[str] = "T = value"
    use: ClassVar[str] = "Always: the baseline. Sweep 1, 2 and 4 before you believe in any other policy."
    cost: ClassVar[str] = "none"

    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.value = check_number(self.name, "value", value, low=0.0, high=math.inf, low_open=True)

    @property
    def temperature(self) -> float:
        return self.value
