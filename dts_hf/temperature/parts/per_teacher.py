"""One temperature policy for each of several teachers: the same options, states of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dts_hf.errors import UserError
from dts_hf.temperature.base import Probe, Reads, RowStats, StepStats, TemperaturePolicy, Temperatures


class PerTeacher(TemperaturePolicy):
    """Copies of one policy, each of which is told of the rows of its own teacher alone.

    It stands where a policy stands in a trainer; the loss asks the copy of the teacher whose rows it has (``of_teacher``).
    A step without a row of a teacher leaves that teacher's copy as it was, but for the progress of training.

    Args:
        policy: as it is before the first step.
        teachers: their names.
    """

    def __init__(self, policy: TemperaturePolicy, teachers: Sequence[str]) -> None:
        super().__init__()
        self.name = policy.name  # type: ignore[misc]  # on cards and in checkpoints it is that policy
        self.teachers = tuple(teachers)
        # Not a ModuleDict, which refuses names that it has methods of
        self.policies = nn.ModuleList(copy.deepcopy(policy) for _ in teachers)

    @property
    def _first(self) -> TemperaturePolicy:
        return next(iter(self._by_name.values()))

    @property
    def _by_name(self) -> dict[str, TemperaturePolicy]:
        return dict(zip(self.teachers, self.policies, strict=True))  # type: ignore[arg-type]

    def of_teacher(self, teacher: str | None) -> TemperaturePolicy:
        return self if teacher is None else self._by_name[teacher]

    @property
    def any_text(self) -> bool:  # type: ignore[override]
        return self._first.any_text

    @property
    def holding(self) -> bool:
        return self._first.holding

    @holding.setter
    def holding(self, value: bool) -> None:
        for policy in self._by_name.values():
            policy.holding = value

    @property
    def temperature(self) -> float:
        """The mean over teachers."""
        return sum(policy.temperature for policy in self._by_name.values()) / len(self.teachers)

    @property
    def cosine(self) -> float | None:
        return self._first.cosine  # of progress alone, so the same for all

    @property
    def ends(self) -> tuple[float, ...]:
        return self._first.ends

    @property
    def highest(self) -> float | None:
        return self._first.highest

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self._first.moves

    @property
    def needs_sequence_gap(self) -> bool:
        return self._first.needs_sequence_gap

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        return self._first.reads

    def log_values(self) -> dict[str, float]:
        """Those of each teacher, as ``NAME/TEACHER``."""
        values = ((teacher, policy.log_values()) for teacher, policy in self._by_name.items())
        return {f"{name}/{teacher}": value for teacher, logged in values for name, value in logged.items()}

    def counters(self) -> dict[str, int]:
        """Those of each teacher, as ``NAME/TEACHER``."""
        values = ((teacher, policy.counters()) for teacher, policy in self._by_name.items())
        return {f"{name}/{teacher}": count for teacher, counted in values for name, count in counted.items()}

    def check_classes(self, classes: int) -> None:
        for policy in self._by_name.values():
            policy.check_classes(classes)

    def begin_run(self, steps: int | None = None) -> None:
        for policy in self._by_name.values():
            policy.begin_run(steps)

    def begin_step(self, progress: float) -> None:
        super().begin_step(progress)
        for policy in self._by_name.values():
            policy.begin_step(progress)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """There is no temperature of all teachers: ``of_teacher`` has the policy that answers.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: ``[C]`` each.

        Raises:
            TypeError: always.
        """
        raise TypeError("one policy per teacher: ask of_teacher(name)")

    def end_step(self, stats: StepStats) -> None:
        """Tell each teacher's policy of its own rows (``StepStats.by_teacher``)."""
        for teacher, policy in self._by_name.items():
            if teacher in stats.by_teacher:
                policy.end_step(stats.by_teacher[teacher])

    @property
    def probe(self) -> Probe | None:
        return self._first.probe

    def take_held_out(self, stats: StepStats) -> None:
        """Tell each teacher's policy of its own rows; one that has none among them keeps its gap."""
        for teacher, policy in self._by_name.items():
            if teacher in stats.by_teacher:
                policy.take_held_out(stats.by_teacher[teacher])

    def describe(self) -> dict[str, Any]:
        return {**self._first.describe(), "per_teacher": True}

    def state(self) -> dict[str, Any]:
        """The state of each teacher's policy, by name."""
        return {teacher: policy.state() for teacher, policy in self._by_name.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned.

        Raises:
            UserError: it is of other teachers, or of one policy for all of them.
        """
        if {*state} != {*self.teachers}:
            raise UserError(
                f"temperature state of '{self.name}': got {sorted(state)}, expected one for each of the teachers "
                f"{sorted(self.teachers)}; was the checkpoint written with other teachers, or with one state for all "
                "(loss.temperature_per_teacher)?"
            )
        for teacher, policy in self._by_name.items():
            policy.load_state(state[teacher])
