"""Three real optimizer steps with the real trainer: do they run, do weights move, how long and how large are they?"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dts_hf.doctor.diagnosis import Check, Diagnosis
from dts_hf.doctor.resources import PeakMemory, duration, gb
from dts_hf.errors import RunError

if TYPE_CHECKING:
    from dts_hf.training.trainer import DistillationTrainer

STEPS = 3
#: No further step is begun after so many seconds.
ENOUGH_SECONDS = 180.0
#: The loss grows in the steps by so many nats and by this factor: it explodes. Batches differ by less.
EXPLODES = (1.0, 1.5)
#: Measured memory beyond this share of the estimate is said, and bytes that libraries loaded late may take besides.
ABOVE_ESTIMATE, LOADED_LATE = 1.2, 0.25e9
#: What is looked at of each tensor to see whether it moved.
WATCHED = 64


class Laps(TrainerCallback):
    """Takes the time and the tokens of each step, and ends training after ``steps`` of them."""

    def __init__(self, trainer: DistillationTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        self.began = self.last = time.monotonic()
        self.seconds: list[float] = []
        self.tokens: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = self.last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) >= self.steps or now - self.began > ENOUGH_SECONDS:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.tokens.append(self.trainer.tokens_seen - sum(self.tokens))


def check_steps(
    check: Check,
    diagnosis: Diagnosis,
    trainer: DistillationTrainer,
    peak: PeakMemory,
    *,
    steps: int,
    tokens_per_step: float,
    devices: int = 1,
) -> None:
    """Train for three steps of the real schedule, and judge them.

    Args:
        trainer: built with ``logging_steps`` 1; its student is changed.
        peak: memory meter.
        steps: optimizer steps of the whole run.
        tokens_per_step: mean real tokens of an optimizer step of the whole run, on each device.
        devices: of the whole run; the time of a step is that of one of them.
    """
    student: Any = trainer.model
    laps = Laps(trainer, min(STEPS, steps))
    trainer.add_callback(laps)
    before = _watch(student)
    peak.start()
    try:
        trainer.train()
    except RunError as error:  # the loss was non-finite in all of them
        check.error("step-not-finite", str(error))
        return
    bytes_at_peak = peak.read()
    moved = sum(bool((old != new).any()) for old, new in zip(before, _watch(student), strict=True))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    # The last step alone: the ones before pay for what is made once (kernels, buffers, optimizer state).
    per_token = laps.seconds[-1] / max(laps.tokens[len(laps.seconds) - 1], 1.0)
    per_step = per_token * tokens_per_step
    losses = [float(line["loss"]) for line in lines]
    norms = [float(line["grad_norm"]) for line in lines if "grad_norm" in line]
    check.values = {
        "steps": len(laps.seconds),
        "seconds": laps.seconds,
        "tokens": laps.tokens,
        "seconds_per_step": per_step,
        "seconds_per_step_from": f"step {len(laps.seconds)} of {len(laps.seconds)}, per token, one device",
        "steps_of_run": steps,
        "devices": devices,
        "seconds_of_training": per_step * steps,
        "losses": losses,
        "grad_norms": norms,
        "tensors_moved": moved,
        "tensors_trained": len(before),
        "peak_bytes": bytes_at_peak,
    }
    spread = f" on {devices} devices, as on one and without their communication," if devices > 1 else ""
    measured = "" if bytes_at_peak is None else f"; peak memory {gb(bytes_at_peak)}"
    check.summary = (
        f"{duration(per_step)} per step ({1 / max(per_token, 1e-9):,.0f} tokens/s, by the last of {len(laps.seconds)}), "
        f"{steps:,} steps{spread} take {duration(per_step * steps)}{measured}"
    )
    if not all(math.isfinite(value) for value in (*losses, *norms)):
        check.error(
            "step-not-finite",
            f"losses {_shown(losses)}, gradient norms {_shown(norms)} in the first steps",
            "A lower learning rate, bf16 instead of fp16, or look at the weights of the models",
        )
    elif norms and max(norms) == 0:
        check.error("gradient-zero", "the gradient is zero in every step: nothing would be learned", "")
    elif not moved:
        check.error(
            "weights-do-not-move",
            f"{len(laps.seconds)} optimizer steps changed none of the {len(before)} trained tensors",
            "A higher training.learning_rate, fewer training.warmup_steps, or student.dtype: float32",
        )
    elif losses and losses[-1] > max(losses[0] + EXPLODES[0], EXPLODES[1] * losses[0]):
        check.warn(
            "loss-explodes",
            f"the loss grows in the first steps: {_shown(losses)} (gradient norms {_shown(norms)})",
            f"A lower training.learning_rate than {trainer.args.learning_rate:g}, or training.warmup_steps",
        )
    estimate = next((c.values.get("alone") for c in diagnosis.checks if c.name == "memory"), None)
    if bytes_at_peak is not None and estimate is not None:
        check.values["estimated_bytes"] = estimate
        if bytes_at_peak > ABOVE_ESTIMATE * estimate + LOADED_LATE:
            check.warn(
                "memory-above-estimate",
                f"the steps took {gb(bytes_at_peak)}, {bytes_at_peak / estimate:.1f} times the estimate ({gb(estimate)})",
                "Count on what was measured: the estimates of the other strategies are too low by about as much",
            )
    room = diagnosis.device.get("memory")
    if bytes_at_peak is not None and room is not None and bytes_at_peak > room:
        check.error("too-little-memory", f"the steps took {gb(bytes_at_peak)}, and {gb(room)} were free", "")


def _watch(model: nn.Module) -> list[Tensor]:
    """Some numbers of every trained tensor."""
    watched = []
    for weight in model.parameters():
        if weight.requires_grad:
            flat = weight.detach().flatten()
            watched.append(flat[:: max(1, flat.numel() // WATCHED)].clone())
    return watched


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values) or "none"
