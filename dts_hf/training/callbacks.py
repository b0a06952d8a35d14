"""What happens beside the optimizer steps: an interruption, work before the first one, the run directory, progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text
from transformers import TrainerCallback, TrainerState, TrainingArguments

from dts_hf import console
from dts_hf.console import duration, say
from dts_hf.runs.directory import RunDirectory
from dts_hf.training.signals import at_once, stopped_at

#: A narrower terminal shows no bar: the numbers say more.
WIDTH_OF_A_BAR = 110


class InterruptionCallback(TrainerCallback):
    """Leaves training with a complete checkpoint once all processes know that one was asked to stop.

    It stands directly after what looks at the finished step: the state is that of this step, and what else the step
    would do (a held-out evaluation may take longer than the cluster waits) is made up for on resume.

    Args:
        save_now: saves a complete checkpoint of the step that has just ended; see ``ResumableTrainer``.
    """

    def __init__(self, save_now: Callable[[], Path | None]) -> None:
        self.save_now = save_now
        self.stop_agreed = False  # all ranks know, since the same step, that one of them was asked to stop

    def agree(self, stop: bool) -> None:
        """Take whether any rank was asked to stop; the same on all of them, before ``on_step_end``."""
        self.stop_agreed = stop

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.stop_agreed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.stop_agreed:
            raise stopped_at(state.global_step, self.save_now())


class BeforeTrainingCallback(TrainerCallback):
    """Does ``work`` before the first optimizer step of a run, not of a resumed one; every process does it.

    For what needs the student in the wrapper that trains it: before ``train`` there is none, and an evaluation would
    make a DeepSpeed engine of its own, which ZeRO-1 and 2 refuse and training could not use.

    Args:
        work: what is to be done.
        exclude_from_timing: makes the context in which it happens, for it is no training; see ``ResumableTrainer``.
    """

    def __init__(
        self, work: Callable[[], None], exclude_from_timing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.work: Callable[[], None] | None = work
        self.exclude_from_timing = exclude_from_timing

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        work, self.work = self.work, None  # a retry with a smaller batch begins again
        if work is None or state.global_step > 0:
            return
        with self.exclude_from_timing(), at_once():
            work()


class RunLogCallback(TrainerCallback):
    """Appends every log line of the main process to ``log.jsonl`` of the run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Scores from before training that an earlier attempt has made are in the Trainer's history, too, as in the log."""
        if state.is_world_process_zero and state.global_step == 0 and not state.log_history:
            for record in self.run.read_log():
                if record.get("kind") == "eval" and record.get("step") == 0:
                    logs = {key: value for key, value in record.items() if key not in ("kind", "step")}
                    state.log_history.append({**logs, "step": 0})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        kind = "eval" if "eval_loss" in logs else "train" if "loss" in logs else None
        if kind is not None:
            self.run.append_log({"kind": kind, "step": state.global_step, **logs})


class GenerationEvalCallback(TrainerCallback):
    """Scores generated answers every ``every_steps`` optimizer steps, the last one left out (the student is scored anyway).

    Args:
        score: runs the generation and returns the scores; it must leave the training RNG untouched.
        every_steps: optimizer steps between two scorings.
        record: takes (step, epoch, scores) on the main process.
    """

    def __init__(
        self,
        score: Callable[[], dict[str, Any] | None],
        every_steps: int,
        record: Callable[[int, float, dict[str, Any]], None],
    ) -> None:
        self.score, self.every_steps, self.record = score, every_steps, record
        self.scored_step = 0

    def is_due(self, state: TrainerState) -> bool:
        """Whether the step that has ended is one to score, and was not scored yet."""
        step = state.global_step
        # The last step is left out: the finished student is scored anyway.
        return step % self.every_steps == 0 and step < state.max_steps and step != self.scored_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.is_due(state):
            scores = self.score()
            self.scored_step = state.global_step
            if scores is not None and state.is_world_process_zero:
                self.record(state.global_step, float(state.epoch or 0.0), scores)


class StepColumn(ProgressColumn):
    """Steps, text and times of the live line: where the terminal is narrow the text is cut, and never the time left.

    Args:
        screen: whose width it has.
        beside: columns of the terminal that other columns of the line take.
    """

    max_refresh = 0.5

    def __init__(self, screen: Console, beside: int) -> None:
        super().__init__()
        self.screen, self.beside = screen, beside

    def render(self, task: RichTask) -> Text:
        """The line as it is now."""
        count = f"{task.completed:.0f}/{task.total or 0:.0f}"
        elapsed, left = (None if seconds is None else timedelta(seconds=int(seconds)) for seconds in
                         (task.elapsed, task.time_remaining))  # fmt: skip
        times = f"{elapsed or '-:--:--'} left {'-:--:--' if left is None else left}"
        room = max(0, self.screen.width - self.beside - len(count) - len(times) - 3)
        text = task.description if len(task.description) <= room else task.description[: max(0, room - 1)] + "…"
        return Text(" ".join(filter(None, (count, text if room > 1 else "", times))), no_wrap=True)


def _columns(screen: Console) -> list[ProgressColumn]:
    """What the live line shows; a narrow terminal has no bar."""
    if screen.width < WIDTH_OF_A_BAR:
        return [TextColumn("distil"), StepColumn(screen, len("distil "))]
    return [TextColumn("distil"), BarColumn(bar_width=20), StepColumn(screen, len("distil ") + 21)]


class ProgressCallback(TrainerCallback):
    """The main process: a live line on a terminal, elsewhere one for each line of the log, and one every 30 s.

    Steps, loss, temperature, gap, tokens per second, time left.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.task: Any = None
        self.said = self.began = 0.0  # monotonic seconds of the last line off a terminal, and of the first step
        self.first_step = self.batches = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        screen = Console(stderr=True)  # stdout is for results
        self.said = self.began = time.monotonic()
        self.first_step, self.batches = state.global_step, 0
        self.progress = Progress(*_columns(screen), console=screen, disable=not screen.is_terminal)
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
            self._say_now_and_then(f"step {state.global_step}/{state.max_steps}", self._left(state))

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """A held-out evaluation may take minutes between two steps."""
        self.batches += 1
        self._say_now_and_then(
            f"step {state.global_step}/{state.max_steps}: held-out rows, batch {self.batches:,}", ""
        )

    def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
        self.batches = 0

    def _say_now_and_then(self, text: str, left: str) -> None:
        """A line off a terminal, unless there was one in the last 30 s."""
        now = time.monotonic()
        if (
            self.progress is None
            or self.progress.console.is_terminal
            or now - self.said < console.SECONDS_BETWEEN_LINES
        ):
            return
        self.said = now
        say(f"{text}, {duration(now - self.began)} so far{left}")

    def _left(self, state: TrainerState) -> str:
        done, seconds = state.global_step - self.first_step, time.monotonic() - self.began
        return f", about {duration(seconds / done * (state.max_steps - state.global_step))} left" if done else ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.progress is None or not logs:
            return
        if "tokens_per_second" in logs:
            # Without a teacher there is neither, and steps of the student's own text alone have no gap
            shown = (("kl", "kl {:.3f}"), ("gap", "gap {:+.2f}"), ("temperature", "T {:.2f}"))
            distance = "".join(
                f"{words.format(logs[name])}  " for name, words in shown if "kl" in logs and name in logs
            )
            text = f"loss {float(logs['loss']):.3f}  {distance}{logs['tokens_per_second']:,.0f} tok/s"
            self.progress.update(self.task, description=text)
            if not self.progress.console.is_terminal:
                self.said = time.monotonic()
                say(f"step {state.global_step}/{state.max_steps}  {text}{self._left(state)}")
        elif "eval_ce_loss" in logs:
            text = f"step {state.global_step}/{state.max_steps}  held out: loss {logs['eval_loss']:.3f}"
            if "eval_kl" in logs:
                text += f"  kl {logs['eval_kl']:.3f}  top-1 agreement {logs['eval_top1_agreement']:.1%}"
            if self.progress.console.is_terminal:
                self.progress.console.print(text)
            else:
                say(text)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal its cursor back; also after an error, when there is no ``on_train_end``."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
