"""What runs are at: a live table on a terminal, elsewhere a line whenever a run begins or ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dts_hf.console import duration, printable, say
from dts_hf.experiments.estimate import Pace, Size, mean_of, measured
from dts_hf.experiments.sweep import Planned, Sweep
from dts_hf.files import last_lines
from dts_hf.runs.directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

SECONDS_BETWEEN_LOOKS = 1.0  # at the logs of the runs at work
END_OF_LOG = 16_384  # bytes; a line of it has one or two thousand


class Progress:
    """Shows what ``sweep`` is at, as a context around ``sweep.run``.

    Args:
        sweep: whose ``on_change`` and ``on_look`` are taken.
        console: where a table is drawn; None: stderr.
        command: whose runs they are; lines begin with it.
    """

    def __init__(self, sweep: Sweep, console: Console | None = None, command: str = "sweep") -> None:
        from rich.console import Console

        self.sweep, self.console, self.command = sweep, console or Console(stderr=True), command
        self.paces: dict[Planned, Pace | None] = {}  # of the runs that are done, each read once
        self.live: Live | None = None
        self.looked = 0.0
        sweep.on_change, sweep.on_look = self._changed, self._look

    def __enter__(self) -> Progress:
        from rich.live import Live

        if self.console.is_terminal:
            # It is drawn by who waits for the runs, not by a thread that would read what is being changed
            self.live = Live(self.screen(), console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.update(self.screen(), refresh=True)
            self.live.stop()

    def _changed(self) -> None:
        if self.live is None:
            say(f"{self.command}: {self.line()}")
        else:
            self._draw()

    def _look(self) -> None:
        if self.live is not None and time.monotonic() - self.looked >= SECONDS_BETWEEN_LOOKS:
            self._draw()

    def _draw(self) -> None:
        assert self.live is not None  # of who calls it
        self.live.update(self.screen(), refresh=True)
        self.looked = time.monotonic()

    # ------------------------------------------------------------------------------------------------- what is shown

    def line(self) -> str:
        """How many runs are done, failed, at work and left, which are at work, and how long the sweep will take."""
        at_work = "; ".join(run.label for run in self.sweep.at_work)
        return printable(self.counts() + (f"; at work: {at_work}" if at_work else "") + self.left())

    def counts(self) -> str:
        """How many runs have which state; those in the hands of another process are at work, too."""
        waiting, states = {*self.sweep.waiting}, self.sweep.states
        failed = sum(state == "failed" and run not in waiting for run, state in states.items())
        parts = {
            "at work": [*states.values()].count("running"), "failed": failed, "left": len(waiting),
        }  # fmt: skip
        done = [*states.values()].count("done")
        return ", ".join(
            [f"{done} of {len(states)} done", *(f"{count} {name}" for name, count in parts.items() if count)]
        )

    def left(self) -> str:
        """How long it will take, as the end of a sentence; empty where nothing is known of that yet."""
        seconds = self.seconds_left() if self.sweep.waiting or self.sweep.at_work else None
        return "" if seconds is None else f"; about {duration(seconds)} left"

    def seconds_left(self) -> float | None:
        """Until all runs of this sweep have ended; None: nobody knows.

        By the runs of the study that are done, else by how long those took that have ended here, else by how far those are
        that are at work.
        """
        sweep, now = self.sweep, time.monotonic()
        for run, state in sweep.states.items():
            if state == "done" and run not in self.paces:
                self.paces[run] = measured(run.path, run.size)
        spent = {run: now - sweep.began[run] for run in sweep.at_work}
        pace, took = mean_of(self.paces.values()), sweep.seconds
        if pace is None and not took:
            shares = {run: share_done(run.path, run.size) for run in spent}
            took = [spent[run] / share for run, share in shares.items() if share > 0]
        if pace is None and not took:
            return None

        def left_of(run: Planned) -> float:
            whole = sum(took) / len(took) if pace is None else pace.seconds(run.size)
            return max(whole - spent.get(run, 0.0), 0.0)

        runs = [*sweep.waiting, *spent]
        return sum(map(left_of, runs)) / max(min(sweep.jobs, len(runs)), 1)

    def screen(self) -> Group:
        """The counts, and a row for each run at work: step, loss and KL of its last line, and seconds."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        counts = Text(printable(f"{self.sweep.study.folder}: {self.counts()}{self.left()}"))
        if not self.sweep.at_work:
            return Group(counts)
        table = Table()
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        for column in ("step", "loss", "KL", "seconds"):
            table.add_column(column, justify="right", no_wrap=True)
        for run in self.sweep.at_work:
            last = last_of_training(run.path)
            seconds = f"{time.monotonic() - self.sweep.began[run]:.0f}"
            cells = (printable(run.label), step_of(last, run.size), _cell(last, "loss"), _cell(last, "kl"), seconds)
            table.add_row(*map(Text, cells))
        return Group(counts, table)


def last_of_training(run: Path) -> Mapping[str, Any]:
    """The last line of training in a run's log; empty where there is none."""
    for line in reversed(last_lines(RunDirectory(run).log_path, END_OF_LOG)):
        try:
            record = json.loads(line)
        except ValueError:  # the first or the last one, cut
            continue
        if isinstance(record, dict) and record.get("kind") == "train":
            return record
    return {}


def share_done(run: Path, size: Size) -> float:
    """The share of its training that a run at work has done, by its log."""
    last = last_of_training(run)
    part, whole = ("step", float(size.steps)) if size.steps else ("epoch", size.epochs)
    value = last.get(part)
    return min(value / whole, 1.0) if isinstance(value, (int, float)) else 0.0


def step_of(last: Mapping[str, Any], size: Size) -> str:
    """``40 of 120``; of a run of epochs the whole is what its last line leads to expect."""
    step, epoch = last.get("step"), last.get("epoch")
    if not isinstance(step, int):
        return ""
    if size.steps is None and not (isinstance(epoch, (int, float)) and epoch > 0):
        return f"{step:,}"
    return f"{step:,} of {size.steps or round(step / epoch * size.epochs):,}"  # type: ignore[operator]  # a number, see above


def _cell(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""
