"""A straight line over the run: falling (an annealing) or rising (a curriculum), by its two ends."""

from __future__ import annotations

import math
from typing import ClassVar

from dts_hf.temperature.base import TemperaturePolicy, check_number


class Linear(TemperaturePolicy):
    """T(p) = t_init + (t_end - t_init) p, with p the share of optimizer steps done.

    Args:
        t_init, t_end: temperature at the first step and at the end of the run.
    """

    name: ClassVar[str] = "linear"
    formula: ClassVar[str] = "T = t_init + (t_end - t_init) progress"
    use: ClassVar[str] = "A schedule with no parts to tune: falling as an annealing, rising as a curriculum."
    cost: ClassVar[str] = "none"

    def __init__(self, t_init: float = 3.0, t_end: float = 1.0) -> None:
        super().__init__()
        self.t_init = check_number(self.name, "t_init", t_init, low=0.0, high=math.inf, low_open=True)
        self.t_end = check_number(self.name, "t_end", t_end, low=0.0, high=math.inf, low_open=True)

    @property
    def ends(self) -> tuple[float, ...]:
        return self.t_init, self.t_end

    @property
    def temperature(self) -> float:
        return self.t_init + (self.t_end - self.t_init) * self.progress
