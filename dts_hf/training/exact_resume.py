"""What a checkpoint of ``transformers.Trainer`` leaves out, and a resumed run needs to end like one that never stopped.

``progress.json``: what is equal on all processes: the sums that were not logged yet, where ``log.jsonl`` stood, and what
the step still had to do (its log line, a held-out evaluation, the end of its epoch). ``rank_R.json``: what process R alone
knows. A trainer adds files of its own (``temperature.json``: the policy's state). Weights, optimizer, schedule, order of
the rows and random generators are the Trainer's own files.

The functions here read and write these files, and judge whether a launch can go on from them; they know of the trainer
only what they are told.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from dts_hf.console import say
from dts_hf.distributed.checkpoint_reading import asks_for_code
from dts_hf.errors import RunError, UserError, is_passing
from dts_hf.files import write_json_atomic
from dts_hf.recipe.yaml_files import leaves
from dts_hf.runs.checkpoints import (
    INTERRUPTED,
    PROGRESS,
    UNREADABLE,
    mark_unreadable,
    newest_whole,
    read_complete,
    rotate,
    why_best_is_lost,
    why_not_resumable,
)
from dts_hf.runs.comparison import as_text
from dts_hf.runs.failures import is_lost_peer
from dts_hf.training.clock import TrainingClock

#: Learning rate schedules that do not ask how long the run is.
WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
#: Says of a checkpoint why another machine cannot go on from it, whose disk has a part of it; None where it can.
Elsewhere = Callable[[Path], str | None]
#: Strategies whose checkpoints are the same files, whatever the number of processes: plain ones, and those of FSDP2, whole
#: or in pieces (which ``torch.distributed.checkpoint`` shares out anew).
SAME_FILES = (("single", "ddp"), ("fsdp2",))


# ---------------------------------------------------------------------------------------------------------- the files


@dataclass
class ExtraState:
    """What a kind of trainer keeps in its checkpoints besides.

    Attributes:
        shared: equal on all processes; goes into ``progress.json``.
        process: this process's; goes into its ``rank_R.json``.
        files: JSON files of its own, by name, equal on all processes.
        tensors: likewise safetensors files, each with its tensors by name.
    """

    shared: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Progress:
    """What was read back.

    Attributes:
        shared: all of ``progress.json``: what ``ResumableTrainer.save_progress`` and ``ExtraState.shared`` put there.
        process: see ``ExtraState``; None where another number of processes wrote the checkpoint.
        unlogged_loss: this process's sum of losses since the last log line; where another number of processes wrote it, the
            mean of theirs, which is what is logged.
    """

    shared: dict[str, Any]
    process: dict[str, Any] | None
    unlogged_loss: float


def write_progress(folder: Path, extra: ExtraState, *, rank: int, shared_too: bool) -> None:
    """Write the files into ``folder``; every process calls it.

    Args:
        folder: the checkpoint; made where it is not there.
        extra: what goes into them.
        rank: of this process.
        shared_too: this process writes what is equal on all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"rank_{rank}.json", extra.process)
    if shared_too:
        for name, content in {**extra.files, PROGRESS: extra.shared}.items():
            write_json_atomic(folder / name, content)
        for name, tensors in extra.tensors.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})


def read_progress(folder: Path, rank: int, world: int) -> Progress:
    """Read what ``write_progress`` wrote, on process ``rank`` of ``world``."""
    shared = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    writers = read_complete(folder)["processes"]
    ranks = [
        json.loads((folder / f"rank_{number}.json").read_text(encoding="utf-8"))
        for number in ([rank] if writers == world else range(writers))
    ]
    unlogged_loss = statistics.fmean(number_or_nan(of_rank["unlogged_loss"]) for of_rank in ranks)
    return Progress(shared, ranks[0] if writers == world else None, unlogged_loss)


def place_in_stream(checkpoint: Path, first_row: str) -> tuple[int, int] | None:
    """Which pass over a stream the run of ``checkpoint`` was in, and how many of its steps it had taken.

    Args:
        checkpoint: its folder.
        first_row: digest of the first row as it is now.

    Returns:
        None where an older version, which does not tell, wrote it.

    Raises:
        UserError: the stream begins with another row than then.
    """
    place = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")).get("stream")
    if place is None:
        return None
    if place["first_row"] != first_row:
        raise UserError(
            f"{checkpoint}: train_dataset begins with another row than when it was written, so where it stood cannot be "
            "told; expected the same rows in the same order (shuffle with a seed)"
        )
    return int(place["pass"]), int(place["steps"])


def number_or_nan(value: float | None) -> float:
    """JSON has no NaN."""
    return math.nan if value is None else value


def state_then(checkpoint: Path) -> TrainerState:
    """The Trainer's state as it was when ``checkpoint`` was written."""
    return cast(TrainerState, TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)))


def checkpoint_to_resume(given: str | Path | bool | None, run: Path, best: bool, elsewhere: Elsewhere) -> Path | None:
    """The checkpoint that ``train(resume_from_checkpoint=given)`` means; None: none. Its files are read once, all of them.

    Args:
        given: a folder; True: the newest in ``run`` whose files are whole. What is newer and is not is said.
        run: where the checkpoints of this run are.
        best: at its end the run puts the weights of its best step back.
        elsewhere: what other machines say of their parts of a checkpoint.

    Raises:
        UserError: there is none, or it is not complete, is damaged, or holds the weights alone.
    """

    def also(folder: Path) -> str | None:
        return elsewhere(folder) or (why_best_is_lost(folder) if best else None)

    if given is True:
        found = newest_whole(run, also)
        if found.checkpoint is None:
            why = "".join(f"; {folder.name}: {why}" for folder, why in found.ignored[:3])
            raise UserError(f"{run}: holds no complete checkpoint to resume from{why}")
        for folder, why in found.ignored:
            say(f"{folder} is ignored: {why}")
        return found.checkpoint
    if not isinstance(given, (str, Path)):
        return None
    why_not = why_not_resumable(given, contents=True) or also(Path(given))
    if why_not is not None:
        raise UserError(f"cannot resume from {Path(given)}: {why_not}")
    return Path(given)


@contextmanager
def loading(checkpoint: str | Path | None) -> Iterator[None]:
    """Within it the files of ``checkpoint`` are loaded. Where that fails on them, the next start takes an older one.

    Raises:
        RunError: they cannot be loaded, although they are as they were written.
    """
    try:
        yield
    except Exception as error:
        refusals = (UserError, RunError)
        if checkpoint is None or isinstance(error, refusals) or asks_for_code(error):
            raise
        if is_passing(error) or is_lost_peer(error):  # of the machine, and not of the files
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        mark_unreadable(Path(checkpoint), f"{type(error).__name__}: {said}")
        raise RunError(
            f"{checkpoint} cannot be loaded, although its files are as they were written: {type(error).__name__}: {said}. "
            f"Start again with --resume: it takes the checkpoint before (remove {UNREADABLE} in it to try it again)"
        ) from error


# ------------------------------------------------------------------------------------------------ the step cut short


def what_is_due(
    control: TrainerControl, state: TrainerState, *, interrupted: bool, epoch_ended: bool
) -> dict[str, bool]:
    """What the optimizer step of a checkpoint still has to do once the checkpoint is written.

    Args:
        control: what the callbacks have asked for in this step.
        state: of the Trainer.
        interrupted: a signal asked for the checkpoint, and not the recipe.
        epoch_ended: ``on_epoch_end`` was called since the last epoch began.
    """
    epoch_is_over = float(state.epoch or 0).is_integer() or control.should_training_stop
    return {
        "log": control.should_log,
        "evaluate": control.should_evaluate,
        "save": control.should_save and interrupted,  # else this is that save
        "end_epoch": epoch_is_over and not epoch_ended,
        "stop": control.should_training_stop,
    }


def due_now(due: Mapping[str, bool], then: TrainerState, state: TrainerState) -> dict[str, bool]:
    """``due`` of a checkpoint whose state was ``then``, for the run that goes on; it may have been made longer."""
    if then.global_step >= then.max_steps < state.max_steps:  # it had come to its end, and is to go on
        return {**due, "stop": False, "end_epoch": due["end_epoch"] and float(state.epoch or 0).is_integer()}
    return dict(due)


def put_in_place(
    checkpoint: Path, then: TrainerState, state: TrainerState, args: TrainingArguments, whole: set[Path]
) -> None:
    """Make the state's best checkpoint one of this folder, and remove what ``checkpoint`` has made useless.

    Args:
        checkpoint: the one that is resumed from.
        then: its state.
        state: of the run that goes on; changed.
        args: of that run.
        whole: see ``rotate``.
    """
    run = checkpoint.parent.parent if checkpoint.parent.name == INTERRUPTED else checkpoint.parent
    best = run / Path(then.best_model_checkpoint).name if then.best_model_checkpoint else None
    if best is not None and best.is_dir():  # the Trainer forgets it when the folder has been moved
        state.best_model_checkpoint = str(best)
    # The checkpoint was whole before older ones went, and the kill may have come then.
    if args.should_save and run.resolve() == Path(str(args.output_dir)).resolve():
        limit = args.save_total_limit if checkpoint.parent == run else None
        rotate(run, state.global_step, limit, [state.best_model_checkpoint], whole)


class ResumeCallback(TrainerCallback):
    """Finishes the step that a checkpoint cut short before training goes on, and knows whether its epoch has ended.

    Callbacks that are added to the finished trainer (log, scores) stand after it.

    Args:
        finish_step: makes up for what was due; does nothing in a run that is not resumed.
        clock: stops with the training.
    """

    def __init__(self, finish_step: Callable[[], None], clock: TrainingClock) -> None:
        self.finish_step, self.clock = finish_step, clock
        self.epoch_ended = False

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.finish_step()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.clock.stop()

    def on_epoch_begin(self, *_: Any, **kwargs: Any) -> None:
        self.epoch_ended = False

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        self.epoch_ended = True


# ------------------------------------------------------------------------------------- what a resume must have the same


def check_length(
    checkpoint: Path, steps: int, args: TrainingArguments, *, own_scheduler: bool, scheduled: Sequence[str]
) -> None:
    """Refuse to go on from a checkpoint of a run of another length, where anything is scheduled over the whole run.

    Args:
        checkpoint: its folder.
        steps: optimizer steps of the run as it is launched now.
        args: of the run as it is launched now.
        own_scheduler: the learning rate's schedule is the user's own, who answers for it.
        scheduled: what else is scheduled over the whole run.

    Raises:
        UserError: going on would give numbers of neither run.
    """
    then = state_then(checkpoint)
    was = then.max_steps
    if was == steps:
        return
    if then.global_step > steps:
        raise UserError(
            f"{checkpoint}: its step is {then.global_step:,}, behind the end of a run of {steps:,} steps "
            "(max_steps, num_train_epochs), so nothing would be trained; expected a longer run, or an earlier checkpoint"
        )
    same_warmup = args.get_warmup_steps(was) == args.get_warmup_steps(steps)
    schedule = SchedulerType(args.lr_scheduler_type).value
    endless = own_scheduler or (schedule in WITHOUT_END and same_warmup)
    differing = [*([] if endless else [f"learning rate ({schedule})"]), *scheduled]
    if differing:
        raise UserError(
            f"{checkpoint}: written by a run of {was:,} steps; this is one of {steps:,} (max_steps, "
            f"num_train_epochs). What is scheduled over the whole run, as {' and '.join(differing)} may be, would have "
            "the values of neither. Set the length back, or start a new run with the student of this checkpoint; only "
            "lr_scheduler_type constant with a constant temperature can go on"
        )


def check_objective(checkpoint: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from ``checkpoint`` with another loss or temperature policy than it was trained with.

    Args:
        checkpoint: its folder.
        was: ``ResumableTrainer.describe_objective`` of then; empty where an older version wrote it.
        now: the same of now. An option that only one of the two knows is of another version.

    Raises:
        UserError: names what has changed.
    """
    before, after = leaves(was), leaves(now)
    named = [
        key for key in ("temperature.name", "divergence.name") if before.get(key, after.get(key)) != after.get(key)
    ]
    hidden = tuple(f"{key.partition('.')[0]}.options." for key in named)  # which are those of another one
    keys = [*named, *(key for key in before if key in after and key not in named and not key.startswith(hidden))]
    lines = [
        f"  {key}: was {as_text(before, key)}, now {as_text(after, key)}" for key in keys if before[key] != after[key]
    ]
    if lines:
        raise UserError(
            f"{checkpoint}: its loss is not the one that it was trained with, so going on would give numbers of neither:\n"
            + "\n".join(lines)
            + "\nSet it back, or train from the beginning (the student of this checkpoint may begin another run)"
        )


def check_layout(
    checkpoint: Path, layout: Mapping[str, Any], args: TrainingArguments, model: nn.Module, noise: float | None
) -> None:
    """Refuse to go on from ``checkpoint`` where the numbers could not be those of the run that wrote it.

    Another number of processes is fine where the files are the same ones (one process, DDP), every optimizer step has
    the same rows, and nothing random happens in the student's forward; equal then means to rounding.

    Args:
        checkpoint: its folder.
        layout: ``ResumableTrainer.layout`` of the launch that wants to go on.
        args: of that launch.
        model: the student.
        noise: NEFTune's, if the student is trained with it.

    Raises:
        UserError: it cannot be exact; says why, and what to launch instead.
    """
    was, now = read_complete(checkpoint), dict(layout)
    for key in (
        "device",
        "optim",
        "token_digest",
        "row_digest",
    ):  # which a checkpoint of an older version does not tell
        if was.get(key) is None or now[key] is None:
            was[key] = now[key]
    if args.auto_find_batch_size:  # the Trainer goes on with the size that it had found
        now["rows_per_device"] = was["rows_per_device"]
    if args.ignore_data_skip:
        raise UserError("training.ignore_data_skip: got true, which would start the epoch again; expected false")
    if was["rows"] != now["rows"]:
        raise UserError(f"{checkpoint}: written with {was['rows']} training rows, now there are {now['rows']}")
    # Checkpoints of older versions know of no batches that are filled to a number of tokens
    if all(was.get(key) == now[key] for key in now):
        return
    why = _why_not_exact(was, now, args.dataloader_drop_last)
    random = random_parts(model) + ([] if noise is None else ["training.neftune_noise_alpha"])
    if why is None and random:
        why = f"each process draws its own random numbers for {', '.join(random[:3])}"
    if why is not None:
        raise UserError(
            f"{checkpoint}: written by {_describe_layout(was)}; this is {_describe_layout(now)}. It cannot go on "
            f"exactly: {why}. Start it as it was"
        )


def _why_not_exact(was: Mapping[str, Any], now: Mapping[str, Any], drop_last: bool) -> str | None:
    """Why layouts that differ do not train on the same rows in the same way; None where they do."""
    if was["mixed_precision"] != now["mixed_precision"]:
        return (
            f"mixed precision was {was['mixed_precision']!r} and would be {now['mixed_precision']!r} (training.bf16, "
            "training.fp16, or the launcher's choice)"
        )
    if was["token_digest"] != now["token_digest"]:
        return "the tokens of the training rows are others"
    if was["row_digest"] != now["row_digest"]:
        return "the rows of train_dataset are others (their tokens, labels, or order)"
    if was["optim"] != now["optim"]:
        return f"the optimizer was {was['optim']} and would be {now['optim']} (training.optim)"
    if was["device"] != now["device"]:
        return f"the device was {was['device']} and would be {now['device']} (training.use_cpu decides)"
    if not any({was["strategy"], now["strategy"]} <= {*strategies} for strategies in SAME_FILES):
        if was["strategy"] != now["strategy"]:
            return f"{now['strategy']} cannot read the files of {was['strategy']}"
        return "DeepSpeed's files fit the same number of processes, rows and accumulation only"
    if was.get("tokens_per_device") != now["tokens_per_device"]:
        return "batches were filled to another number of tokens (data.packing)"
    # Batches that are filled to a number of tokens are the same ones, whoever takes them
    before, after = (side["processes"] * (side["rows_per_device"] or 1) * side["accumulation"] for side in (was, now))
    unit = "packs" if now["tokens_per_device"] else "rows"
    if before != after:
        return f"an optimizer step had {before} {unit} and would have {after}"
    together = was["length_bucket_size"], now["length_bucket_size"]
    if None in together:
        return "the order of the rows is not one of dts_hf"
    if together[0] != together[1]:
        return (
            f"batches are made of {together[0]} rows of similar length, and would be of {together[1]} (rows per device "
            "times processes; training.train_sampling_strategy: random does not depend on it)"
        )
    if drop_last and now["rows"] is None:
        return "rows at the end of a stream are dropped by the size of a batch"
    if drop_last and now["rows"] % before:
        return f"{now['rows']} rows are no multiple of {before}, so other rows would be dropped at the end of an epoch"
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
    tokens = side.get("tokens_per_device")
    batch = f"{side['rows_per_device']} rows" if tokens is None else f"packs of {tokens} tokens"
    return (
        f"{side['strategy']} on {side['processes']} process{'es' if side['processes'] > 1 else ''}, "
        f"{batch} each, accumulation {side['accumulation']}"
    )
