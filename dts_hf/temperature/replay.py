"""The temperatures of a finished run once more, deaf to this one: what is left of a policy when nothing feeds it back.

An open loop: the run that is repeated may have had another seed, student or order of rows. What its policy reacted to is
gone, its schedule stays. A policy whose gain comes from reacting must beat its own trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.parts.recorded_run import RecordedRun, read_trace, step_at


class Replay(TemperaturePolicy):
    """T_s and T_t of each optimizer step as the log of ``run`` has them, for all rows alike.

    Of a policy with a temperature per row that is the mean over rows; the factor is T_s T_t, and a ``kd_ratio`` that its
    policy scheduled is not repeated. Where the log has a line every n steps, all n run at the mean of their line
    (``training.logging_steps: 1`` records each); the steps after its last line take that line's.

    The trace is read when training begins and is part of every checkpoint: a resumed run does not need ``run`` any more.
    A run of another length than the recorded one is refused.

    Args:
        run: the run directory of a finished run.
    """

    name = "replay"
    reads = "nothing"
    any_text = True
    formula = "T_s, T_t = those of step k of the run"
    use = (
        "As the yoked control of a policy that reacts to training (`dts`, `dtkd`, `adakd`, `ctkd`): the same temperatures "
        "at the same steps, but not because of this run."
    )
    cost = "none"

    def __init__(self, run: str | None = None) -> None:
        super().__init__()
        self.trace = TemperatureTrace("run", run)
        self.run = self.trace.run
        self.mechanisms = (self.trace,)

    @property
    def temperature(self) -> float:
        """That of the student; 1 until the run was read."""
        return self._pair()[0]

    @property
    def highest(self) -> float | None:
        """The highest one of the trace, of either model; None until the run was read."""
        return max(map(max, self.trace.recorded)) if self.trace.recorded else None

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give the recorded temperatures of this step, whatever the logits are.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``, not read.
            rows: not read.

        Returns:
            T_s and T_t, each ``[]``.

        Raises:
            ValueError: ``begin_run`` has not been called, and no state was loaded.
        """
        self.trace.check_read(self.name)
        like = student_logits.detach()
        return Temperatures(*(torch.full((), value, dtype=like.dtype, device=like.device) for value in self._pair()))

    def _pair(self) -> list[float]:
        """[T_s, T_t] in force."""
        trace = self.trace.recorded
        return trace[step_at(self.progress, len(trace))] if trace else [1.0, 1.0]


class TemperatureTrace(RecordedRun):
    """[T_s, T_t] of each optimizer step of a finished run."""

    def read(self, steps: int | None) -> list[list[float]]:
        """Both columns of the log.

        Raises:
            UserError: see ``read_trace``; or a temperature is not above 0.
        """
        columns = [self._column(name) for name in ("temperature", "teacher_temperature")]
        return [list(pair) for pair in zip(*columns, strict=True)]

    def _column(self, name: str) -> list[float]:
        """A step whose value was non-finite keeps the one before it."""
        trace = read_trace(self.option, self.run, name)
        held = next(value for value in trace if value is not None)  # the first steps take the first value there is
        column = []
        for value in trace:
            held = held if value is None else value
            column.append(held)
        if min(column) <= 0:
            raise UserError(
                f"temperature.{self.option}: {self.run}: its log has a {name} of {min(column):g}, expected above 0"
            )
        return column
