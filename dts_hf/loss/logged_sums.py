"""Sums over micro-batches and ranks, so that every logged number is a mean over labels and not a mean of means.

Which sums there are, and what the log calls them: ``loss/statistics.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dts_hf.loss import statistics as stats
from dts_hf.temperature.base import StepStats

_TENSORS: dict[stats.Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "min": torch.minimum, "max": torch.maximum,
}  # fmt: skip


class SumMeter:
    """Adds the ``sums`` of ``LossOutput`` over calls, and whatever else is to be added up over ranks."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add one micro-batch: tensors ``[...]`` of any shape, the same one in every call. Nothing leaves the device."""
        for name, value in sums.items():
            new, old = value.detach(), self._values.get(name)
            self._values[name] = new if old is None else _TENSORS[stats.reduction_of(name)](old, new)

    def reduce(self, accelerator: Any) -> Totals:
        """Totals over all ranks, with one gather, and start again from nothing. Every rank must call it."""
        names = sorted(self._values)
        if not names:
            return Totals()
        device = self._values[names[0]].device
        precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        shapes = [self._values[name].shape for name in names]
        flat = torch.cat([self._values[name].to(precise).reshape(-1) for name in names]).unsqueeze(0)
        ranks = accelerator.gather(flat).tolist()  # [ranks, numbers]
        self._values = {}
        totals = Totals()
        columns = zip(*ranks, strict=True)
        for name, shape in zip(names, shapes, strict=True):
            values = [_reduced(name, next(columns)) for _ in range(shape.numel())]
            if shape:
                totals.vectors[name] = tuple(values)
                if name.partition(stats.OF_TEACHER)[0] in stats.IN_BINS:
                    totals[name] = math.fsum(map(abs, values))
            else:
                totals[name] = values[0]
        return totals


class Totals(dict[str, float]):
    """Reduced sums by name; ``vectors`` holds what is more than one number (a policy's ``observed``, bins of confidence)."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: dict[str, tuple[float, ...]] = {}

    def step_stats(self) -> StepStats:
        """What the policy is told of the optimizer step; there must have been a row."""
        first = f"{stats.ROWS}{stats.OF_TEACHER}"
        teachers = [name.removeprefix(first) for name, rows in self.items() if name.startswith(first) and rows]
        by_teacher = {teacher: self._step_stats(f"{stats.OF_TEACHER}{teacher}") for teacher in teachers}
        return replace(self._step_stats(), by_teacher=by_teacher)

    def _step_stats(self, suffix: str = "") -> StepStats:
        """Those of the rows whose sums have names with this ending."""
        rows = self[stats.ROWS + suffix]
        seen = self.get(stats.ALIGNED, rows)  # the policy looks at no other row
        return StepStats(
            student_ce=self[stats.CE.sum + suffix] / rows,
            teacher_ce=self[stats.TEACHER_CE.sum + suffix] / rows,
            kd=self[stats.KD.sum + suffix] / rows,
            num_items=rows,
            temperature_grad=self.get(stats.TEMPERATURE_GRAD + suffix, 0.0) / rows,
            observed=tuple(value / max(seen, 1.0) for value in self.vectors.get(stats.OBSERVED + suffix, ())),
        )

    def of_generated_text(self) -> Totals:
        """Those of a step whose labels are the student's own text, apart from labels of the data.

        What is measured on labels has names of its own; the others keep theirs too, and are of both kinds. Those of each of
        several teachers are of the data alone.
        """
        found = Totals()
        hidden = {name for statistic in stats.OF_LABELS for name in statistic.sums}
        found.update(
            {name: value for name, value in self.items() if stats.OF_TEACHER not in name and name not in hidden}
        )
        apart = {stats.ROWS, *(name for statistic in stats.GENERATED_LABELS for name in statistic.sums)}
        for name, value in self.items():
            if name == stats.ROWS or f"{stats.OF_GENERATED}{name}" in apart:
                found[f"{stats.OF_GENERATED}{name}"] = value
        return found

    def add_policy_values(self, values: Mapping[str, float | None]) -> None:
        """Put what the policy wants logged beside the sums, weighted with the rows like them; None is left out."""
        rows = self[stats.ROWS]
        self.update({f"{stats.OF_POLICY}{name}": value * rows for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class LogColumns:
    """Which statistics mean something in a run, and what they are called there.

    Args:
        teacher: there is one; without it the log has the student's own numbers alone.
        regression: the sums hold squared errors (STS-B), and temperatures say nothing.
        teachers: the names of several.
    """

    teacher: bool = True
    regression: bool = False
    teachers: tuple[str, ...] = ()

    def means(self, totals: Mapping[str, float], *, held_out: bool = False) -> dict[str, float]:
        """The numbers of one log line, by their name in it.

        Args:
            totals: sums over the rows that the line is about.
            held_out: the line is about held-out rows, at T = 1 (the names are then without their ``eval_``).
        """
        means: dict[str, float] = {}
        generated = totals.get(f"{stats.OF_GENERATED}{stats.ROWS}", 0.0)
        of_data = {**totals, stats.ROWS: totals[stats.ROWS] - generated}
        for statistic in stats.STATISTICS:
            name = statistic.regression if self.regression else statistic.log
            hidden = (statistic.needs_teacher and not self.teacher) or (held_out and not statistic.held_out)
            if name and not hidden and all(part in totals for part in statistic.sums):
                means[name] = statistic.number(of_data if statistic in stats.OF_LABELS else totals)
        if self.teacher and 0.0 < generated < totals[stats.ROWS]:
            for statistic in stats.OF_BOTH:
                own = totals[f"{stats.OF_GENERATED}{statistic.sum}"]
                of_data[statistic.sum] = totals[statistic.sum] - own
                means[f"{stats.OF_DATA}{statistic.log}"] = statistic.number(of_data)
        if self.teacher and not self.regression:
            rows = totals[stats.ROWS] or math.nan
            of_policy = {name: value for name, value in totals.items() if name.startswith(stats.OF_POLICY)}
            means.update({name.removeprefix(stats.OF_POLICY): value / rows for name, value in of_policy.items()})
        for teacher in self.teachers:
            means.update(self._of_teacher(teacher, totals, held_out))
        return means

    def _of_teacher(self, teacher: str, totals: Mapping[str, float], held_out: bool) -> dict[str, float]:
        """What the line says of the rows of one of several teachers: how many labels they have and, if any, the means."""
        end = f"{stats.OF_TEACHER}{teacher}"
        of_teacher = {name.removesuffix(end): value for name, value in totals.items() if name.endswith(end)}
        rows = of_teacher.get(stats.ROWS, 0.0)
        shown = [one for one in stats.BY_TEACHER if rows and (one.held_out or not held_out)]
        shown += [one for one in stats.HELD_OUT_BY_TEACHER if rows and held_out and one.sum in of_teacher]
        return {f"{stats.LABELS}{end}": round(rows), **{f"{one.log}{end}": one.number(of_teacher) for one in shown}}


class MeanLog:
    """Adds the totals of optimizer steps between two log lines, as plain numbers that fit into a checkpoint."""

    def __init__(self, columns: LogColumns) -> None:
        self.columns = columns
        self.totals: dict[str, float] = {}

    def add(self, totals: Mapping[str, float]) -> None:
        """Add one optimizer step."""
        for name, value in totals.items():
            old = self.totals.get(name)
            self.totals[name] = value if old is None else _reduced(name, (value, old))

    def pop(self) -> dict[str, float]:
        """The means since the last call; empty when nothing was added."""
        totals, self.totals = self.totals, {}
        return self.columns.means(totals) if totals else {}


class StepSums:
    """The meters that ``compute_loss`` fills and the callbacks read.

    Args:
        columns: the statistics that mean something in this kind of run, and what the log calls them.

    Attributes:
        step_meter: sums of the optimizer step that runs, this rank's.
        eval_meter: sums of the evaluation that runs, this rank's.
        mean_log: totals of all ranks since the last log line.
        tokens_seen: real tokens (no padding) of all ranks, up to the last log line.
    """

    def __init__(self, columns: LogColumns) -> None:
        self.columns = columns
        self.reset()

    def reset(self) -> None:
        """Start a run from nothing."""
        self.step_meter, self.eval_meter, self.mean_log = SumMeter(), SumMeter(), MeanLog(self.columns)
        self.tokens_seen = 0.0


def _reduced(name: str, values: Sequence[float]) -> float:
    """One number of those of several ranks or steps."""
    reduction = stats.reduction_of(name)
    if reduction != "sum":
        return min(values) if reduction == "min" else max(values)
    try:
        return math.fsum(values)  # exact: the order of ranks cannot show
    except (OverflowError, ValueError):  # inf - inf
        return sum(values)
