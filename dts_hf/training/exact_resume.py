"""What a checkpoint of ``transformers.Trainer`` leaves out, and a resumed run needs to end like one that never stopped.

``progress.json``: the sums that were not logged yet, where ``log.jsonl`` stood, and what the step still had to do (its log
line, a held-out evaluation, the end of its epoch). ``rank_R.json``: what process R alone knows. ``temperature.json``: the
policy's state. Weights, optimizer, schedule, order of the rows and random generators are the Trainer's own files.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from dts_hf.distributed.launch import strategy_of
from dts_hf.errors import UserError
from dts_hf.files import write_json_atomic
from dts_hf.runs.checkpoints import INTERRUPTED, PROGRESS, read_complete, rotate, why_not_resumable
from dts_hf.runs.directory import RunDirectory
from dts_hf.temperature.constant import Constant
from dts_hf.training.callbacks import GenerationEvalCallback

if TYPE_CHECKING:
    from dts_hf.training.trainer import DistillationTrainer


TEMPERATURE_STATE = "temperature.json"
#: Learning rate schedules that do not ask how long the run is.
WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
#: Strategies whose checkpoints are the same files, whatever the number of processes.
SAME_FILES = ("single", "ddp")


class ExactResume(TrainerCallback):
    """Saves and restores this state for its trainer; on resume it first finishes the step that the checkpoint cut short.

    Callbacks that are added to the finished trainer (log, scores) stand after it.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self.logits_budget_mb = trainer.loss.logits_budget_mb  # as asked for; memory may have run out since
        self.grad_norm: Any = None  # of the last step, for its log line
        self.learning_rate: float | None = None
        self.resumed_from: Path | None = None
        self.seconds_before = 0.0  # of training, in the attempts before this one
        self._began, self._ended = time.monotonic(), 0.0
        self._epoch_ended = False
        self._restored: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Of training, all attempts together."""
        return self.seconds_before + (self._ended or time.monotonic()) - self._began

    def leave_out(self, seconds: float) -> None:
        """So much of the time since ``begin`` was no training."""
        self._began += seconds

    def begin(self, folder: Path | None) -> None:
        """``train`` starts: from nothing, or from the checkpoint ``folder``.

        Raises:
            UserError: it is not complete, holds the weights alone, or this run cannot go on from it exactly.
        """
        self.resumed_from, self.seconds_before = folder, 0.0
        self._began, self._ended = time.monotonic(), 0.0
        self._restored = {}
        if folder is not None:
            why = why_not_resumable(folder)
            if why is not None:
                raise UserError(f"cannot resume from {folder}: {why}")
            check_layout(self.trainer, folder)

    def check_length(self, steps: int) -> None:
        """Refuse to go on from a checkpoint of a run of another length, where anything is scheduled over the whole run.

        Args:
            steps: optimizer steps of the run as it is launched now.

        Raises:
            UserError: going on would give numbers of neither run.
        """
        if self.resumed_from is None:
            return
        trainer, args = self.trainer, self.trainer.args
        then = self._state_then()
        was = then.max_steps
        if was == steps:
            return
        if then.global_step > steps:
            raise UserError(
                f"{self.resumed_from}: its step is {then.global_step:,}, behind the end of a run of {steps:,} steps "
                "(max_steps, num_train_epochs), so nothing would be trained; expected a longer run, or an earlier checkpoint"
            )
        own = trainer.lr_scheduler is not None and not trainer._created_lr_scheduler  # the user answers for it
        same_warmup = args.get_warmup_steps(was) == args.get_warmup_steps(steps)
        schedule = SchedulerType(args.lr_scheduler_type).value
        scheduled = [] if own or (schedule in WITHOUT_END and same_warmup) else [f"learning rate ({schedule})"]
        if not isinstance(trainer.temperature, Constant):
            scheduled.append(f"temperature ({trainer.temperature.name})")
        if scheduled:
            raise UserError(
                f"{self.resumed_from}: written by a run of {was:,} steps; this is one of {steps:,} (max_steps, "
                f"num_train_epochs). What is scheduled over the whole run, as {' and '.join(scheduled)} may be, would have "
                "the values of neither. Set the length back, or start a new run with the student of this checkpoint; only "
                "lr_scheduler_type constant with a constant temperature can go on"
            )

    def _state_then(self) -> TrainerState:
        assert self.resumed_from is not None
        return TrainerState.load_from_json(str(self.resumed_from / TRAINER_STATE_NAME))

    # ------------------------------------------------------------------------------------------------ save and load

    def save(self, folder: Path) -> None:
        """Write the three files into ``folder``; every process calls it."""
        trainer, args = self.trainer, self.trainer.args
        folder.mkdir(parents=True, exist_ok=True)
        own = {
            "unlogged_loss": float(trainer._tr_loss),
            "logits_budget_mb": trainer.loss.logits_budget_mb,
            "logits_budget_mb_asked_for": self.logits_budget_mb,
        }
        write_json_atomic(folder / f"rank_{args.process_index}.json", own)
        progress = {
            "tokens_seen": trainer.tokens_seen,
            "unlogged": trainer.mean_log.totals,
            "last_logged_step": trainer._globalstep_last_logged,
            "grad_norm": None if self.grad_norm is None else float(self.grad_norm),
            "learning_rate": self.learning_rate,
            "due": self._due(),
            "seconds": self.seconds,
            "log_bytes": RunDirectory(str(args.output_dir)).log_size(),
        }
        if args.should_save:
            state = {"name": trainer.temperature.name, "state": trainer.temperature.state()}
            write_json_atomic(folder / TEMPERATURE_STATE, state)
            write_json_atomic(folder / PROGRESS, progress)

    def _due(self) -> dict[str, bool]:
        """What the finished optimizer step still has to do."""
        control, state = self.trainer.control, self.trainer.state
        interrupted = self.trainer.interrupting
        epoch_is_over = float(state.epoch or 0).is_integer() or control.should_training_stop
        return {
            "generate": any(callback.is_due(state) for callback in self._generations()),
            "log": control.should_log,
            "evaluate": control.should_evaluate,
            "save": control.should_save and interrupted,  # else this is that save
            "end_epoch": epoch_is_over and not self._epoch_ended,
            "stop": control.should_training_stop,
        }

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote; the rest follows in ``on_train_begin``.

        Raises:
            UserError: the checkpoint was written by another temperature policy.
        """
        trainer = self.trainer
        record = json.loads((folder / TEMPERATURE_STATE).read_text(encoding="utf-8"))
        if record.get("name") != trainer.temperature.name or "state" not in record:
            path, name = folder / TEMPERATURE_STATE, trainer.temperature.name
            raise UserError(f"{path}: written by another temperature policy, expected '{name}'")
        trainer.temperature.load_state(record["state"])
        self._restored = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        trainer.tokens_seen = self._restored["tokens_seen"]
        trainer.mean_log.totals = {name: _number(value) for name, value in self._restored["unlogged"].items()}
        self.seconds_before = self._restored["seconds"]
        world = read_complete(folder)["processes"]
        same = world == trainer.args.world_size
        ranks = [
            json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            for rank in ([trainer.args.process_index] if same else range(world))
        ]
        # Of other processes the mean, which is what will be logged
        self._restored["unlogged_loss"] = statistics.fmean(_number(rank["unlogged_loss"]) for rank in ranks)
        if same and ranks[0]["logits_budget_mb_asked_for"] == self.logits_budget_mb:
            trainer.loss.logits_budget_mb = ranks[0]["logits_budget_mb"]

    # -------------------------------------------------------------------------------------------------- callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        restored, self._restored = self._restored, {}
        if not restored:
            return
        trainer, due, then = self.trainer, restored["due"], self._state_then()
        if then.global_step >= then.max_steps < state.max_steps:  # it had come to its end, and is to go on
            due = {**due, "stop": False, "end_epoch": due["end_epoch"] and float(state.epoch or 0).is_integer()}
        state.compute_steps(args, state.max_steps)  # the Trainer has put back those of the checkpoint
        state.best_model_checkpoint = self._best_checkpoint() or state.best_model_checkpoint
        self._rotate_again(args, state)
        trainer._tr_loss = torch.tensor(restored["unlogged_loss"], device=args.device)
        trainer._total_loss_scalar -= restored["unlogged_loss"]  # train() returns the mean over its own steps
        trainer._globalstep_last_logged = restored["last_logged_step"]
        self.grad_norm, self.learning_rate = restored["grad_norm"], restored["learning_rate"]
        args.eval_on_start = False  # it was done when the run started
        # In the order of the Trainer's loop
        for callback in self._generations():
            if due["generate"]:
                callback.on_step_end(args, state, control)
            callback.scored_step = state.global_step
        control.should_log, control.should_evaluate, control.should_save = due["log"], due["evaluate"], due["save"]
        self._log_evaluate_save()
        if due["end_epoch"]:
            trainer.control = trainer.callback_handler.on_epoch_end(args, state, trainer.control)
            self._log_evaluate_save()
        trainer.control.should_training_stop |= due["stop"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ended = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_ended = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_ended = True

    def _best_checkpoint(self) -> str | None:
        """The best one so far where the run is now; the Trainer forgets it when the folder has been moved."""
        assert self.resumed_from is not None
        state = self._state_then()
        best = (
            _run_of(self.resumed_from) / Path(state.best_model_checkpoint).name
            if state.best_model_checkpoint
            else None
        )
        return str(best) if best is not None and best.is_dir() else None

    def _rotate_again(self, args: TrainingArguments, state: TrainerState) -> None:
        """Remove what the checkpoint made useless: it was whole before older ones went, and the kill may have come then."""
        assert self.resumed_from is not None
        run = _run_of(self.resumed_from)
        if args.should_save and run.resolve() == Path(str(args.output_dir)).resolve():
            limit = args.save_total_limit if self.resumed_from.parent == run else None
            rotate(run, state.global_step, limit, keep=[state.best_model_checkpoint])

    def _log_evaluate_save(self) -> None:
        trainer = self.trainer
        position = (trainer._tr_loss, self.grad_norm, trainer.model_wrapped, None, float(trainer.state.epoch or 0))
        trainer._maybe_log_save_evaluate(*position, None, time.time(), learning_rate=self.learning_rate)

    def _generations(self) -> Iterator[GenerationEvalCallback]:
        found = self.trainer.callback_handler.callbacks
        return (callback for callback in found if isinstance(callback, GenerationEvalCallback))


# ------------------------------------------------------------------------------------- what a resume must have the same


def layout(trainer: DistillationTrainer) -> dict[str, Any]:
    """How the rows of an optimizer step are shared out and what they are computed in, for ``complete.json``."""
    args = trainer.args
    rows: Any = trainer.train_dataset
    return {
        "processes": args.world_size,
        "strategy": strategy_of(trainer.accelerator),
        "rows_per_device": trainer._train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "rows": len(rows) if hasattr(rows, "__len__") else None,
        "length_bucket_size": trainer.length_bucket_size(rows),
        "mixed_precision": trainer.accelerator.mixed_precision,  # a launcher may have chosen it
    }


def check_layout(trainer: DistillationTrainer, folder: Path) -> None:
    """Refuse to go on from ``folder`` where the numbers could not be those of the run that wrote it.

    Another number of processes is fine where the files are the same ones (one process, DDP), every optimizer step has
    the same rows, and nothing random happens in the student's forward; equal then means to rounding.

    Raises:
        UserError: it cannot be exact; says why, and what to launch instead.
    """
    was, now = read_complete(folder), layout(trainer)
    if trainer.args.auto_find_batch_size:  # the Trainer goes on with the size that it had found
        now["rows_per_device"] = was["rows_per_device"]
    if trainer.args.ignore_data_skip:
        raise UserError("training.ignore_data_skip: got true, which would start the epoch again; expected false")
    if was["rows"] != now["rows"]:
        raise UserError(f"{folder}: written with {was['rows']} training rows, now there are {now['rows']}")
    if all(was[key] == now[key] for key in now):
        return
    why = _why_not_exact(trainer, was, now)
    if why is not None:
        raise UserError(
            f"{folder}: written by {_describe_layout(was)}; this is {_describe_layout(now)}. It cannot go on "
            f"exactly: {why}. Start it as it was"
        )


def _why_not_exact(trainer: DistillationTrainer, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if was["mixed_precision"] != now["mixed_precision"]:
        return (
            f"mixed precision was {was['mixed_precision']!r} and would be {now['mixed_precision']!r} (training.bf16, "
            "training.fp16, or the launcher's choice)"
        )
    if not {was["strategy"], now["strategy"]} <= {*SAME_FILES}:
        return "checkpoints of sharded training fit the same strategy and number of processes only"
    before, after = (side["processes"] * side["rows_per_device"] * side["accumulation"] for side in (was, now))
    if before != after:
        return f"an optimizer step had {before} rows and would have {after}"
    together = was["length_bucket_size"], now["length_bucket_size"]
    if None in together:
        return "the order of the rows is not one of dts_hf"
    if together[0] != together[1]:
        return (
            f"batches are made of {together[0]} rows of similar length, and would be of {together[1]} (rows per device "
            "times processes; training.train_sampling_strategy: random does not depend on it)"
        )
    if trainer.args.dataloader_drop_last and now["rows"] % before:
        return f"{now['rows']} rows are no multiple of {before}, so other rows would be dropped at the end of an epoch"
    random = random_parts(trainer.model)  # type: ignore[arg-type]  # there is one
    if trainer.neftune_noise_alpha is not None:
        random.append("training.neftune_noise_alpha")
    if random:
        return f"each process draws its own random numbers for {', '.join(random[:3])}"
    return None


def random_parts(model: nn.Module) -> list[str]:
    """What of ``model`` is random in training: dropout modules, and other modules' dropout rates above zero, by name."""
    found = set()
    for module in model.modules():
        rates = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        for name, rate in rates.items():  # such as attention_dropout, layerdrop
            if (name == "p" or "drop" in name) and isinstance(rate, float) and rate > 0:
                found.add(type(module).__name__ if name == "p" else f"{type(module).__name__}.{name}")
    return sorted(found)


def _describe_layout(side: Mapping[str, Any]) -> str:
    return (
        f"{side['strategy']} on {side['processes']} process{'es' if side['processes'] > 1 else ''}, "
        f"{side['rows_per_device']} rows each, accumulation {side['accumulation']}"
    )


def _run_of(checkpoint: Path) -> Path:
    parent = checkpoint.parent
    return parent.parent if parent.name == INTERRUPTED else parent


def _number(value: float | None) -> float:
    """JSON has no NaN."""
    return math.nan if value is None else value
