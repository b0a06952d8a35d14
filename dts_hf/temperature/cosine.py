"""The half cosine of DTS without its gap: the control that shows what the gap itself is worth."""

from __future__ import annotations

from statistics import fmean

from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import (
    RowStats,
    TemperaturePolicy,
    Temperatures,
    check_range,
    check_temperature,
    half_cosine,
)
from dts_hf.temperature.parts.recorded_run import RecordedRun, read_trace

#: The log of a run at T = t_min may say a little less: its means are those of fp32 sums.
_ROUNDING = 1e-5


class Cosine(TemperaturePolicy):
    """T(p) = max(t_init S(p), t_min), S(p) = (1 + cos(pi p)) / 2 (DTS, arXiv 2511.13767, Eq. 4 and 7).

    The curve aims at zero and is cut at ``t_min``, as in the paper: [3, 1] reaches its floor at 61 % of the run.
    It has no momentum; ``dts`` logs the same cosine with its own momentum beside its temperature.

    ``match_mean_of`` solves t_init so that the mean T over this run's steps is the mean student temperature of a finished
    run. The floor stays: means from ``t_min`` upward can be had, at most at twice the mean. The two runs may differ in
    length. The answer is part of every checkpoint, so a resumed run does not need the other one any more.

    Args:
        t_init: temperature of the first step, 3 when left out; not with ``match_mean_of``.
        t_min: floor, above 0.
        match_mean_of: the run directory of a finished run whose mean T this one is to have.

    Raises:
        UserError: an option is out of range, or t_init is given beside ``match_mean_of``.
    """

    name = "cosine"
    reads = "nothing"
    any_text = True
    paper = "arXiv 2511.13767"
    formula = "T = max(t_init (1 + cos(pi progress)) / 2, t_min)"
    use = (
        "The control for `dts`: the same curve, deaf to the gap. It is also colder than `dts`, which never goes below it; "
        "`match_mean_of` takes that difference away."
    )
    cost = "none"

    def __init__(
        self, t_init: PositiveFloat | None = None, t_min: PositiveFloat = 1.0, match_mean_of: str | None = None
    ) -> None:
        super().__init__()
        self.t_init: float | None = None
        self.match_mean_of: str | None = None
        self.matched: MatchedStart | None = None
        if match_mean_of is None:
            start = 3.0 if t_init is None else t_init
            self.t_init, self.t_min, _ = check_range(self.name, start, t_min, start)
            return
        self.matched = MatchedStart(match_mean_of, check_temperature(self.name, "t_min", t_min))
        if t_init is not None:
            raise UserError(
                f"temperature.t_init: got {t_init!r} with match_mean_of, which sets it; expected one of the two"
            )
        self.t_min, self.match_mean_of = self.matched.t_min, self.matched.run
        self.mechanisms = (self.matched,)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give the temperature of this step, whatever the logits are.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``, not read.
            rows: not read.

        Returns:
            One temperature for all rows and both models, ``[]``.

        Raises:
            ValueError: ``match_mean_of``, and ``begin_run`` has not been called.
        """
        if self.matched is not None:
            self.matched.check_read(self.name)
        return super().forward(student_logits, teacher_logits, rows)

    @property
    def ends(self) -> tuple[float, ...]:
        """t_init, as given or solved, and t_min."""
        return self._start, self.t_min

    @property
    def highest(self) -> float | None:
        """t_init; None until the other run was read."""
        return None if self.matched is not None and not self.matched.recorded else self._start

    @property
    def temperature(self) -> float:
        """Eq. 4 and 7, without momentum."""
        return max(self._start * half_cosine(self.progress), self.t_min)

    @property
    def cosine(self) -> float | None:
        """The temperature itself."""
        return self.temperature

    @property
    def _start(self) -> float:
        """t_init; the floor until the other run was read."""
        if self.matched is None:
            assert self.t_init is not None  # one of the two is there
            return self.t_init
        return self.matched.recorded[0] if self.matched.recorded else self.t_min


class MatchedStart(RecordedRun):
    """[t_init] at which the mean T over this run's steps is the mean student temperature of a finished run.

    Args:
        run: its run directory.
        t_min: the floor of the cosine, above 0.
    """

    def __init__(self, run: object, t_min: float) -> None:
        super().__init__("match_mean_of", run)
        self.t_min = t_min

    def read(self, steps: int | None) -> list[float]:
        """Solve t_init; the mean is over ``steps``, or over as many steps as the recorded run has.

        Raises:
            UserError: see ``read_trace``; or the mean is below ``t_min``.
        """
        trace = read_trace(self.option, self.run, "temperature")
        mean = fmean(value for value in trace if value is not None)
        if mean < self.t_min * (1 - _ROUNDING):
            raise UserError(
                f"temperature.{self.option}: the mean T of {self.run} is {mean:.4g}, and a cosine with t_min "
                f"{self.t_min:g} has a mean of {self.t_min:g} or more; expected a lower t_min"
            )
        return [start_for_mean(mean, self.t_min, steps or len(trace))]

    def steps_needed(self) -> int | None:
        """Any number: a mean has no length."""
        return None


def start_for_mean(mean: float, t_min: float, steps: int) -> float:
    """The t_init at which max(t_init S(k / steps), t_min), k = 0 ... steps - 1, has this mean (at least ``t_min``)."""
    curve = [half_cosine(step / steps) for step in range(steps)]
    # Without the floor the mean would be lower, so this t_init is too high.
    low, high = t_min, max(mean / fmean(curve), t_min)
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_low = fmean(max(middle * value, t_min) for value in curve) < mean
        low, high = (middle, high) if too_low else (low, middle)
    return high
