"""POCL's rising temperature (arXiv 2506.05695): four stages, each softer and with more weight on the teacher."""

from __future__ import annotations

import math
from typing import Annotated

from dts_hf.registry import Between, PositiveFloat, Share
from dts_hf.temperature.base import TemperaturePolicy, check_flag, check_temperature


class POCL(TemperaturePolicy):
    """T and kd_ratio rise in equal stages: T 1, 1.33, 1.67, 2 and kd_ratio 0.7, 0.8, 0.9, 1 as published.

    The opposite direction of DTS. The paper adds harder training rows with each stage; that data curriculum is not part
    of this policy, which is the schedule alone. Its code leaves the T^2 factor out for some divergences; here it is
    there for all or for none (``temperature_scaling``).

    Args:
        t_start: temperature of the first stage.
        t_end: temperature of the last stage.
        stages: number of stages, from 1; with 1 the run stays at ``t_start``.
        schedule_kd_ratio: whether the weight of the soft loss follows the stages too; it then replaces ``loss.kd_ratio``
            in training (``eval_loss`` keeps the recipe's).
        kd_start: that weight in the first stage.
        kd_end: that weight in the last stage.

    Raises:
        UserError: an option is out of range.
    """

    name = "pocl"
    reads = "nothing"
    any_text = True
    paper = "arXiv 2506.05695"
    formula = "T = t_start + (t_end - t_start) k / (stages - 1) in stage k = 0 ... stages - 1"
    use = (
        "You order your data from easy to hard, or want the counterpart of a falling schedule. kd_ratio moves with T: "
        "set schedule_kd_ratio to false to see the temperature alone, and compare with `linear`."
    )
    cost = "none"

    def __init__(
        self,
        t_start: PositiveFloat = 1.0,
        t_end: PositiveFloat = 2.0,
        stages: Annotated[int, Between(low=1)] = 4,
        schedule_kd_ratio: bool = True,
        kd_start: Share = 0.7,
        kd_end: Share = 1.0,
    ) -> None:
        super().__init__()
        self.t_start = check_temperature(self.name, "t_start", t_start)
        self.t_end = check_temperature(self.name, "t_end", t_end)
        self.stages = self.checked_whole("stages", stages)
        self.schedule_kd_ratio = check_flag("schedule_kd_ratio", schedule_kd_ratio)
        self.kd_start = self.checked("kd_start", kd_start)
        self.kd_end = self.checked("kd_end", kd_end)

    @property
    def temperature(self) -> float:
        """That of the present stage."""
        return self.t_start + (self.t_end - self.t_start) * self._height

    @property
    def ends(self) -> tuple[float, ...]:
        """t_start and t_end, or t_start where there is one stage."""
        return (self.t_start, self.t_end) if self.stages > 1 else (self.t_start,)

    @property
    def kd_ratio(self) -> float | None:
        """That of the present stage; None where the recipe's stays."""
        return self.kd_start + (self.kd_end - self.kd_start) * self._height if self.schedule_kd_ratio else None

    @property
    def _height(self) -> float:
        """How far up the stairs, 0 to 1."""
        # Progress is step / steps in floating point: the first step of a stage may come out an ulp below its border.
        stage = min(math.floor(self.progress * self.stages + 1e-9), self.stages - 1)
        return stage / max(self.stages - 1, 1)
