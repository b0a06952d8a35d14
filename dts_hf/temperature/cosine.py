"""The half cosine of DTS without its gap: the control that shows what the gap itself is worth."""

from __future__ import annotations

from typing import ClassVar

from dts_hf.temperature.base import TemperaturePolicy, check_range, half_cosine


class Cosine(TemperaturePolicy):
    """T(p) = max(t_init S(p), t_min), S(p) = (1 + cos(pi p)) / 2 (DTS, arXiv 2511.13767, Eq. 4 and 7).

    The curve aims at zero and is cut at ``t_min``, as in the paper: [3, 1] reaches its floor at 61 % of the run.
    It has no momentum; ``dts`` logs the same cosine with its own momentum beside its temperature.

    Args:
        t_init: temperature of the first step.
        t_min: floor, above 0.
    """

    name: ClassVar[str] = "cosine"
    paper: ClassVar[str | None] = "arXiv 2511.13767"
    formula: ClassVar[str] = "T = max(t_init (1 + cos(pi progress)) / 2, t_min)"
    use: ClassVar[str] = "The control for `dts`: the same curve, deaf to the gap."
    cost: ClassVar[str] = "none"

    def __init__(self, t_init: float = 3.0, t_min: float = 1.0) -> None:
        super().__init__()
        self.t_init, self.t_min, _ = check_range(self.name, t_init, t_min, t_init)

    @property
    def temperature(self) -> float:
        return max(self.t_init * half_cosine(self.progress), self.t_min)

    @property
    def cosine(self) -> float | None:
        return self.temperature
