"""A straight line over the run: falling (an annealing) or rising (a curriculum), by its two ends."""

from __future__ import annotations

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import TemperaturePolicy, check_temperature


class Linear(TemperaturePolicy):
    """T(p) = t_init + (t_end - t_init) p, with p the share of optimizer steps done.

    Args:
        t_init: temperature at the first step.
        t_end: temperature at the end of the run.
    """

    name = "linear"
    reads = "nothing"
    any_text = True
    formula = "T = t_init + (t_end - t_init) progress"
    use = "A schedule with no parts to tune: falling as an annealing, rising as a curriculum."
    cost = "none"

    def __init__(self, t_init: PositiveFloat = 3.0, t_end: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.t_init = check_temperature(self.name, "t_init", t_init)
        self.t_end = check_temperature(self.name, "t_end", t_end)

    @property
    def ends(self) -> tuple[float, ...]:
        """t_init and t_end."""
        return self.t_init, self.t_end

    @property
    def temperature(self) -> float:
        """The point of the line at the present progress."""
        return self.t_init + (self.t_end - self.t_init) * self.progress
