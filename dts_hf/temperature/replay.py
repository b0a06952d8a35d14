"""The temperatures of a finished run once more, deaf to this one: what is left of a policy when nothing feeds it back.

An open loop: the run that is repeated may have had another seed, student or order of rows. What its policy reacted to is
gone, its schedule stays. A policy whose gain comes from reacting must beat its own trace.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.temperature._recorded_run import check_length, check_run, read_trace, step_at
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures


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

    name: ClassVar[str] = "replay"
    formula: ClassVar[str] = "T_s, T_t = those of step k of the run"
    use: ClassVar[str] = (
        "As the yoked control of a policy that reacts to training (`dts`, `dtkd`, `adakd`, `ctkd`): the same temperatures "
        "at the same steps, but not because of this run."
    )
    cost: ClassVar[str] = "none"
    state_fields: ClassVar[tuple[str, ...]] = ("trace",)

    def __init__(self, run: str | None = None) -> None:
        super().__init__()
        self.run = check_run("run", run)
        self.trace: list[list[float]] = []  # [T_s, T_t] of each step, once it is read

    def begin_run(self, steps: int | None = None) -> None:
        """Read the trace, unless a checkpoint has brought it.

        Raises:
            UserError: see ``read_trace`` and ``check_length``.
        """
        if not self.trace:
            columns = [self._column(name) for name in ("temperature", "teacher_temperature")]
            self.trace = [list(pair) for pair in zip(*columns, strict=True)]
        check_length("run", self.run, len(self.trace), steps)

    @property
    def temperature(self) -> float:
        """That of the student."""
        return self._pair()[0]

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """
        Raises:
            ValueError: ``begin_run`` has not been called, and no state was loaded.
        """
        if not self.trace:
            raise ValueError("replay: nothing was read yet; call begin_run before the first step")
        like = student_logits.detach()
        return Temperatures(*(torch.full((), value, dtype=like.dtype, device=like.device) for value in self._pair()))

    def _pair(self) -> list[float]:
        return self.trace[step_at(self.progress, len(self.trace))] if self.trace else [1.0, 1.0]

    def _column(self, name: str) -> list[float]:
        """A step whose value was non-finite keeps the one before it."""
        trace = read_trace("run", self.run, name)
        held = next(value for value in trace if value is not None)
        column = []
        for value in trace:
            held = held if value is None else value
            column.append(held)
        if min(column) <= 0:
            raise UserError(f"temperature.run: {self.run}: its log has a {name} of {min(column):g}, expected above 0")
        return column
