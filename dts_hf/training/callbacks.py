"""What happens around an optimizer step: the temperature moves, the run directory is written, people see progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dts_hf.errors import UserError
from dts_hf.loss.logged_sums import SumMeter
from dts_hf.loss.statistics import CE, KD, ROWS
from dts_hf.training.signals import asked_to_stop, at_once, stopped_at

if TYPE_CHECKING:
    from dts_hf.runs.directory import RunDirectory
    from dts_hf.training.trainer import DistillationTrainer


logger = logging.getLogger(__name__)
#: In the reduction of a step: how many processes were asked to stop.
STOP_ASKED = "stop_asked"
#: A run ends after so many steps in a row whose loss is non-finite.
BROKEN_STEPS = 3


class TemperatureCallback(TrainerCallback):
    """``begin_step`` before every optimizer step, one reduction over ranks and ``end_step`` after it.

    The statistics are those of all micro-batches of all ranks, so every rank computes the same temperature and the
    schedule does not depend on how a step was split.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self.broken_steps = 0  # in a row, their loss was non-finite
        self.labelled_steps = self.unlabelled_steps = 0  # since ``train`` was called

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.broken_steps = self.labelled_steps = self.unlabelled_steps = 0
        if state.global_step == 0:  # a second train(), or a retry with a smaller batch, is a new run
            self.trainer.reset_statistics()
        self.trainer.prepare_temperature(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.rows_of_step.clear()
        self.trainer.step_meter = SumMeter()  # a step that an exception broke off has left its sums
        self.trainer.temperature.begin_step(state.global_step / max(state.max_steps, 1))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # One signalled process stops all, at this step: what each of them knows travels with the sums of the loss.
        asked = torch.full((), float(asked_to_stop() is not None), device=args.device)
        self.trainer.step_meter.add({STOP_ASKED: asked})
        totals = self.trainer.step_meter.reduce(self.trainer.accelerator)
        self.trainer.stop_agreed = totals.pop(STOP_ASKED) > 0
        if not totals or not totals[ROWS]:  # no label in the whole step: nothing was learned, nor about the gap
            self.unlabelled_steps += 1
            if self.unlabelled_steps == 1 and state.is_world_process_zero:
                logger.warning("step %d: none of its rows has a label, so it teaches nothing", state.global_step)
            return
        self.labelled_steps += 1
        policy = self.trainer.temperature
        # What is in force in the step that ends here
        totals.add_policy_values({"temperature_cosine": policy.cosine, **policy.log_values()})
        self.trainer.mean_log.add(totals)
        policy.end_step(totals.step_stats())
        if math.isfinite(totals[CE.sum]) and math.isfinite(totals[KD.sum]):
            self.broken_steps = 0
            return
        self.broken_steps += 1
        control.should_save = False  # the weights may be broken: the last good checkpoint stays the newest
        if self.broken_steps == BROKEN_STEPS:
            self.trainer.stop_broken_run(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.unlabelled_steps and not self.labelled_steps:  # an iterable data set is not seen whole before
            raise UserError(
                f"train_dataset: none of the rows of {self.unlabelled_steps:,} steps has a label, so nothing was trained; "
                "expected labels other than -100",
                everywhere=True,
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.broken_steps:
            control.should_save = False  # save_strategy epoch asks again, after on_step_end


class InterruptionCallback(TrainerCallback):
    """Leaves training with a complete checkpoint once all processes know that one was asked to stop.

    It stands directly after ``TemperatureCallback``: the state is that of the finished step, and what else the step
    would do (a held-out evaluation may take longer than the cluster waits) is made up for on resume.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.stop_agreed:
            raise stopped_at(state.global_step, self.trainer.save_checkpoint_now())


class OrderCallback(TrainerCallback):
    """Tells our sampler the epoch. Accelerate's own ``set_epoch`` does not reach it on a resume with several processes."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class BeforeTrainingCallback(TrainerCallback):
    """Does ``work`` before the first optimizer step of a run, not of a resumed one; every process does it.

    For what needs the student in the wrapper that trains it: before ``train`` there is none, and an evaluation would
    make a DeepSpeed engine of its own, which ZeRO-1 and 2 refuse and training could not use.
    """

    def __init__(self, trainer: DistillationTrainer, work: Callable[[], None]) -> None:
        self.trainer = trainer
        self.work: Callable[[], None] | None = work

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        work, self.work = self.work, None  # a retry with a smaller batch begins again
        if work is None or state.global_step > 0:
            return
        began = time.monotonic()
        with at_once():
            work()
        self.trainer.no_training_since(began)


class RunLogCallback(TrainerCallback):
    """Appends every log line of the main process to ``log.jsonl`` of the run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
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
        # The last step is left out: the finished student is scored anyway.
        wanted = state.global_step % self.every_steps == 0 and state.global_step < state.max_steps
        return wanted and self.scored_step != state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_due(state):
            scores = self.score()
            self.scored_step = state.global_step
            if scores is not None and state.is_world_process_zero:
                self.record(state.global_step, float(state.epoch or 0.0), scores)


class ProgressCallback(TrainerCallback):
    """One live line on the main process: steps, loss, temperature, gap, tokens per second, time left."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.task: Any = None
        self.started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        columns = (TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        # On a terminal the line is live; in a file or a CI log rich prints it once, at the end.
        columns += (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # type: ignore[assignment]
        self.progress = Progress(*columns, console=Console(stderr=True))  # stdout is for results
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress is None or not logs:
            return
        if "tokens_per_second" in logs:
            distance = (
                f"kl {logs['kl']:.3f}  gap {logs['gap']:+.2f}  T {logs['temperature']:.2f}  " if "kl" in logs else ""
            )
            text = f"loss {float(logs['loss']):.3f}  {distance}{logs['tokens_per_second']:,.0f} tok/s"
            self.progress.update(self.task, description=text)
            if not self.progress.console.is_terminal:
                self.progress.console.print(f"step {state.global_step}/{state.max_steps}  {text}")
        elif "eval_ce_loss" in logs:
            text = f"step {state.global_step}/{state.max_steps}  held out: loss {logs['eval_loss']:.3f}"
            if "eval_kl" in logs:
                text += f"  kl {logs['eval_kl']:.3f}  top-1 agreement {logs['eval_top1_agreement']:.1%}"
            self.progress.console.print(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal its cursor back; also after an error, when there is no ``on_train_end``."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
