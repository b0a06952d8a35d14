"""The training that would begin: its arguments, and three real optimizer steps with the real trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dts_hf.console import duration, gb
from dts_hf.doctor.diagnosis import Check, need
from dts_hf.errors import RunError
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.memory import PeakMemory
from dts_hf.training.distillation_base import DistillationBase

STEPS = 3
#: No further step is begun after so many seconds.
ENOUGH_SECONDS = 180.0
#: The loss grows in the steps by so many nats and by this factor: it explodes. Batches differ by less.
EXPLODES = (1.0, 1.5)
#: Measured memory beyond this share of the estimate is said, and bytes that libraries loaded late may take besides.
ABOVE_ESTIMATE, LOADED_LATE = 1.2, 0.25e9
#: What is looked at of each tensor to see whether it moved.
WATCHED = 64


def check_training(check: Check, recipe: Recipe, args: TrainingArguments, device: str) -> None:
    """Precision, batch and learning rate in words; a rate that is too high, a warm-up that never ends.

    Args:
        check: takes what is found.
        recipe: names the type of the weights.
        args: those of the run.
        device: its name.
    """
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else f"{recipe.student.dtype} weights"
    accumulated = f" x {args.gradient_accumulation_steps}" if args.gradient_accumulation_steps > 1 else ""
    optimizer, schedule = (str(getattr(kind, "value", kind)) for kind in (args.optim, args.lr_scheduler_type))
    tokens = recipe.data.pack_tokens
    batch = (
        f"{args.per_device_train_batch_size}{accumulated} rows"
        if tokens is None
        else f"{tokens:,}{accumulated} tokens"
    )
    check.summary = f"on {device}, {precision}, {batch} a step, learning rate {args.learning_rate:g} ({schedule})"
    # Adam and its kin divide by the gradient's size, so the rate is what every weight moves by in a step, and weights are
    # about 0.02 to 0.1 large. SGD's step is as large as the (clipped) gradient makes it.
    highest, usual = (1.0, "0.01 to 0.1") if optimizer.startswith("sgd") else (1e-2, "1e-5 to 1e-3")
    if args.learning_rate > highest:
        check.warn(
            "learning-rate-too-high",
            f"training.learning_rate is {args.learning_rate:g}; with {optimizer} rates above {highest:g} destroy what the "
            "student knows",
            f"training.learning_rate: {usual}, the smaller the larger the model",
        )
    if args.max_steps > 0 and args.warmup_steps >= max(args.max_steps, 2):
        check.warn(
            "warmup-too-long",
            f"training.warmup_steps is {args.warmup_steps:g} of {args.max_steps} steps: the learning rate never gets to "
            "its value",
            "Fewer warmup_steps",
        )


class Laps(TrainerCallback):
    """Takes the time and the tokens of each step, and ends training after ``steps`` of them. The first begins with it."""

    def __init__(self, steps: int, tokens_seen: Callable[[], float]) -> None:
        self.steps, self.tokens_seen = steps, tokens_seen
        self.began = self.last = time.monotonic()
        self.seconds: list[float] = []
        self.tokens: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last = now
        control.should_training_stop = len(self.seconds) >= self.steps or now - self.began > ENOUGH_SECONDS

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in (kwargs.get("logs") or {}):
            self.tokens.append(self.tokens_seen() - sum(self.tokens))


def check_steps(
    check: Check,
    trainer: DistillationBase,
    steps: int,
    tokens_per_batch: float,
    devices: int,
    *,
    before: int,
    estimate: float | None,
    room: float,
) -> None:
    """Train for three steps of the real schedule, and judge them.

    Args:
        check: takes what is found.
        trainer: built with ``logging_steps`` 1; its student is changed.
        steps: optimizer steps of the whole run.
        tokens_per_batch: of one device, the mean of the whole run.
        devices: of the whole run; the time of a step is that of one of them.
        before: bytes of this process before any model was loaded.
        estimate: of the memory that the steps take.
        room: free bytes of the device.
    """
    args, student = trainer.args, need(trainer.model, "a student")
    laps = Laps(min(STEPS, steps), lambda: trainer.tokens_seen)
    trainer.add_callback(laps)
    weights, memory = _watch(student), PeakMemory(args.device, before)
    try:
        trainer.train()
    except RunError as error:  # the loss was non-finite in all of them
        check.error("step-not-finite", str(error))
        return
    peak = memory.read()
    moved = sum(bool((old != new).any()) for old, new in zip(weights, _watch(student), strict=True))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses, norms = ([float(line[name]) for line in lines if name in line] for name in ("loss", "grad_norm"))
    # The last step alone: the ones before pay for what is made once (kernels, buffers, optimizer state).
    done = len(laps.seconds)
    per_token = laps.seconds[-1] / max(laps.tokens[done - 1], 1.0)
    per_step = per_token * tokens_per_batch * args.gradient_accumulation_steps
    check.values = {
        "steps": done, "seconds": laps.seconds, "tokens": laps.tokens, "seconds_per_step": per_step,
        "seconds_per_step_from": f"step {done} of {done}, per token, one device", "steps_of_run": steps,
        "devices": devices, "seconds_of_training": per_step * steps, "losses": losses, "grad_norms": norms,
        "tensors_moved": moved, "tensors_trained": len(weights), "peak_bytes": peak,
    }  # fmt: skip
    spread = f" on {devices} devices, as on one and without their communication," if devices > 1 else ""
    check.summary = (
        f"{duration(per_step)} per step ({1 / max(per_token, 1e-9):,.0f} tokens/s, by the last of {done}), "
        f"{steps:,} steps{spread} take {duration(per_step * steps)}"
        + ("" if peak is None else f"; peak memory {gb(peak)}")
    )
    _judge_steps(check, losses, norms, args.learning_rate)
    if peak is not None and estimate is not None:
        check.values["estimated_bytes"] = estimate
        if peak > ABOVE_ESTIMATE * estimate + LOADED_LATE:
            text = f"the steps took {gb(peak)}, {peak / estimate:.1f} times the estimate ({gb(estimate)})"
            advice = "Count on what was measured: the estimates of the other strategies are too low by about as much"
            check.warn("memory-above-estimate", text, advice)
    if peak is not None and peak > room:
        check.error("too-little-memory", f"the steps took {gb(peak)}, and {gb(room)} were free", "")


def _judge_steps(check: Check, losses: Sequence[float], norms: Sequence[float], learning_rate: float) -> None:
    """Whether ``losses`` and ``norms`` (of the gradient) are those of a training that learns."""
    loss_list, norm_list = (", ".join(f"{value:.3g}" for value in values) or "none" for values in (losses, norms))
    if not all(math.isfinite(value) for value in (*losses, *norms)):
        advice = "A lower learning rate, bf16 instead of fp16, or look at the weights of the models"
        check.error("step-not-finite", f"losses {loss_list}, gradient norms {norm_list} in the first steps", advice)
    elif norms and max(norms) == 0:
        check.error("gradient-zero", "the gradient is zero in every step: nothing would be learned", "")
    elif not check.values["tensors_moved"]:
        check.error(
            "weights-do-not-move",
            f"{check.values['steps']} optimizer steps changed none of the {check.values['tensors_trained']} trained tensors",
            "A higher training.learning_rate, fewer training.warmup_steps, or student.dtype: float32",
        )
    elif losses and losses[-1] > max(losses[0] + EXPLODES[0], EXPLODES[1] * losses[0]):
        text = f"the loss grows in the first steps: {loss_list} (gradient norms {norm_list})"
        advice = f"A lower training.learning_rate than {learning_rate:g}, or training.warmup_steps"
        check.warn("loss-explodes", text, advice)


def _watch(model: nn.Module) -> list[Tensor]:
    """Some numbers of every trained tensor."""
    flat = [weight.detach().flatten() for weight in model.parameters() if weight.requires_grad]
    return [numbers[:: max(1, numbers.numel() // WATCHED)].clone() for numbers in flat]
