"""What one device works on, and how the work of a recipe is spread: the two things that memory depends on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import TrainingArguments

from dts_hf.data.encoding import EncodedDataset
from dts_hf.loss.road import default_budget_mb, free_bytes
from dts_hf.recipe.schema import Recipe, Student
from dts_hf.temperature import temperature_policies
from dts_hf.training.model_shape import ModelShape

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
TeacherPlacement = Literal[
    "none", "replicated", "sharded", "8bit", "4bit", "fp8", "int8", "cached", "copied", "shared"
]


@dataclass(frozen=True)
class Workload:
    """What one device works on.

    Attributes:
        rows: of a micro-batch; 1 when packed.
        tokens: of a row with its padding, or of the packed row.
        labelled: labels of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        student_dtype, teacher_dtype: of the weights, ``float32``, ``bfloat16`` or ``float16``.
        optimizer: as in ``TrainingArguments.optim``.
        gradient_checkpointing: only the inputs of the blocks are kept for the backward pass.
        lora_parameters: weights of the adapters; None when all weights are trained.
        logits_budget_mb: MiB for one chunk of logits; None: the default of the loss on this device, with room to spare.
        fused: the loss runs in its kernels (CUDA alone), and keeps the logits of a chunk and nothing beside them.
        logits_dtype: of the logits there: ``auto``, that of the matmuls, or ``float32``.
        autocast: dtype of the matmuls where it is not the weights' own (``bf16: true``), else None.
        attention: ``sdpa``, or ``packed`` (rows end to end).
        device: ``cpu`` or ``cuda``; on a CPU the loss works in small blocks.
        beside: bytes that rows and tokenizers take where the device's memory is theirs too, on a CPU: they are not
            estimated, ``dts-hf doctor`` has loaded them already.
        other_teachers: bytes of the weights of further teachers, each of which also makes the loss another gradient of the
            head for its rows.
        teachers: how many names there are.
        teacher_tokens: as ``tokens``, of the rows as their teacher reads them; 0: they are the student's.
        running_mean: bytes of the running mean of the trained weights, which checkpoints hold; 0: there is none.
        answered: tokens of prompts and answers that a student which answers itself keeps in its cache at a time.
        rounded: the student's layers round their weights in every forward (``student.quantize``).
    """

    rows: int
    tokens: int
    labelled: int
    accumulation: int = 1
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    lora_parameters: int | None = None
    logits_budget_mb: float | None = None
    fused: bool = False
    logits_dtype: str = "auto"
    autocast: str | None = None
    attention: str = "sdpa"
    device: str = "cuda"
    beside: float = 0.0
    other_teachers: float = 0.0
    teachers: int = 1
    teacher_tokens: int = 0
    running_mean: float = 0.0
    answered: int = 0
    rounded: bool = False


@dataclass(frozen=True)
class Plan:
    """How the work is spread.

    Attributes:
        strategy: what is divided by the number of devices.
        devices: all of them, of all nodes.
        teacher: where it lives. ``sharded`` spreads it over all devices, ``8bit``, ``4bit``, ``fp8`` and ``int8`` are
            whole and quantised, ``cached`` keeps its head alone and reads its states from disk. Of a student that teaches
            itself: ``copied`` is a second model, ``shared`` the student's own below its adapter.
        bucket: DeepSpeed's ``reduce_bucket_size``, in weights; None: H x H, as ``dts_hf.distributed.launch`` sets it.
        live: DeepSpeed's ``stage3_max_live_parameters``; None: a tenth of the student, as ``distributed.launch`` sets it.
    """

    strategy: Strategy = "single"
    devices: int = 1
    teacher: TeacherPlacement = "replicated"
    bucket: int | None = None
    live: int | None = None

    def describe(self) -> str:
        """It in a few words, for a line of the doctor."""
        if self.strategy == "single":
            return "one process"
        teacher = " with teacher.placement: sharded" if self.teacher == "sharded" else ""
        return f"{self.strategy} on {self.devices} devices{teacher}"


def workload_of(
    recipe: Recipe,
    args: TrainingArguments,
    shape: ModelShape,
    data: EncodedDataset,
    student: nn.Module | None = None,
    beside: float = 0.0,
) -> Workload:
    """The heaviest micro-batch that the training rows can make: the longest rows together.

    Args:
        recipe: says how the models are loaded and trained.
        args: of its training.
        shape: of the student.
        data: tokenised training rows.
        student: counts its own adapters, where it is loaded.
        beside: bytes of ordinary memory that rows and tokenizers take.
    """
    cuda = args.device.type == "cuda"
    fused = cuda and _has_kernels(recipe)
    batch = min(args.per_device_train_batch_size, len(data))
    responses = data.target_counts
    lengths, read = list(data.lengths), None if data.for_teacher is None else list(data.teacher_lengths)
    if recipe.data.responses == "teacher":  # its answers may be longer than those of the data
        longest = recipe.data.teacher_max_new_tokens
        responses = [longest] * len(data)
        lengths = [min(prompt + longest, recipe.data.max_length) for prompt in _prompts(data)]
    packed_lengths, own, answered = lengths, recipe.data.on_policy, 0
    # No limit but its own cuts the student's text
    if own is not None and (own.fraction != 0 or own.end_fraction or own.adaptive):
        responses = [max(of_data, own.max_new_tokens) for of_data in responses]
        asked = [prompt + own.max_new_tokens for prompt in _prompts(data)]
        lengths = [max(pair) for pair in zip(lengths, asked, strict=True)]
        answered = max(asked) * min(own.batch_size, batch * args.gradient_accumulation_steps)
        if read is not None:
            read = [max(n, data.teacher_spans(row)[-1][0] + own.max_new_tokens) for row, n in enumerate(read)]
    order = sorted(range(len(data)), key=lambda index: -lengths[index])[:batch]
    packed, budget = bool(recipe.data.packing), recipe.data.pack_tokens
    tokens = sum(lengths[index] for index in order) if packed else lengths[order[0]]
    labelled = sum(responses[index] for index in order)
    longest_read = sorted(read or [0], reverse=True)[:batch]
    teacher_tokens = sum(longest_read) if packed else longest_read[0]
    if budget is not None:  # whichever rows fill it: as many labels as those with the largest share of them bring
        filled = min(budget, sum(packed_lengths))
        labelled = _most_labels(packed_lengths, responses, filled)
        # Packs are made of the rows of the data: with answers of the student's in them they may be longer
        tokens = filled if lengths is packed_lengths else _most_labels(packed_lengths, lengths, filled)
        teacher_tokens = 0 if read is None else _most_labels(packed_lengths, read, filled)
    lora = _lora_parameters(recipe.student, shape, student)
    return Workload(
        rows=1 if packed else batch,
        tokens=tokens,
        labelled=labelled,
        accumulation=args.gradient_accumulation_steps,
        student_dtype=recipe.student.dtype,
        teacher_dtype="float32" if recipe.teacher is None else recipe.teacher.dtype,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        gradient_checkpointing=bool(args.activation_checkpointing),
        lora_parameters=lora,
        teacher_tokens=teacher_tokens,
        running_mean=4.0 * (shape.parameters if lora is None else lora) if _has_mean(recipe) else 0.0,
        logits_budget_mb=recipe.loss.logits_budget_mb or default_budget_mb(fused, free_bytes(args.device)),
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        attention="packed" if packed else "sdpa",
        fused=fused, logits_dtype=recipe.loss.logits_dtype, device="cuda" if cuda else "cpu",
        beside=beside if args.device.type == "cpu" else 0.0,
        answered=answered,
        rounded=recipe.student.quantize is not None,
    )  # fmt: skip


def _prompts(data: EncodedDataset) -> list[int]:
    """Tokens before the last answer of each row."""
    return [data.spans(row)[-1][0] for row in range(len(data))]


def _has_kernels(recipe: Recipe) -> bool:
    known = temperature_policies()[recipe.temperature.name].without_kernels is None
    wanted = recipe.loss.kernels != "torch" and recipe.loss.divergence.name != "adaptive_kl" and known
    return wanted and importlib.util.find_spec("triton") is not None


def _has_mean(recipe: Recipe) -> bool:
    """Whether the teacher is a running mean of the student."""
    return recipe.teacher is not None and recipe.teacher.kind == "self" and recipe.teacher.weights == "ema"


def _most_labels(lengths: Sequence[int], responses: Sequence[int], tokens: int) -> int:
    """The most ``responses`` of rows of ``tokens`` tokens at most, the last row cut to fit."""
    labels = 0.0
    for length, response in sorted(zip(lengths, responses, strict=True), key=lambda row: -row[1] / row[0]):
        labels += response * min(1.0, tokens / length)
        tokens -= min(tokens, length)
        if not tokens:
            break
    return math.ceil(labels)


def _lora_parameters(student: Student, shape: ModelShape, model: nn.Module | None) -> int | None:
    if student.lora is None:
        return None
    if model is not None:
        return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    attention = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width)
    mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
    return student.lora.r * shape.layers * (attention + mlp)


def launched_plan(recipe: Recipe, devices: int) -> Plan:
    """What ``dts-hf train`` on this machine would be: one process, or one for each device."""
    teacher: TeacherPlacement = "none"
    if recipe.teacher is not None and recipe.teacher.kind == "self":
        teacher = "copied" if recipe.student.lora is None else "shared"
    if recipe.teacher is not None and recipe.keeps_teacher:
        quantization = recipe.teacher.quantization
        teacher = recipe.teacher.placement if quantization == "none" else quantization
    if devices == 1:
        return Plan("single", 1, "replicated" if teacher == "sharded" else teacher)
    return Plan("ddp", devices, teacher)


def plans(devices: int, launched: Plan) -> list[Plan]:
    """``launched`` first, then the other strategies on ``devices`` devices; a teacher that can be divided both ways."""
    if devices == 1:
        return [launched]
    home: TeacherPlacement = "replicated" if launched.teacher == "sharded" else launched.teacher
    names: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "fsdp2")
    if home == "shared":  # weights that a strategy spreads cannot be both models'
        names = ("ddp", "zero2")
    fleet = [Plan(name, devices, home) for name in names]
    if home == "replicated":
        fleet += [Plan("zero3", devices, "sharded"), Plan("fsdp2", devices, "sharded")]
    return [launched, *(plan for plan in fleet if plan != launched)]


def launch_line(recipe: Recipe, plan: Plan, path: str) -> str:
    """The command that trains in this way."""
    placement = "replicated" if recipe.teacher is None else recipe.teacher.placement
    moved = plan.teacher in ("replicated", "sharded") and plan.teacher != placement
    return (
        f"accelerate launch --config_file recipes/accelerate/{plan.strategy}.yaml --num_processes {plan.devices} "
        f"-m dts_hf train {path}" + (f" teacher.placement={plan.teacher}" if moved else "")
    )


def checkpoints_kept(args: TrainingArguments, steps: int) -> int:
    """How many checkpoints stand beside each other at most."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    written = math.ceil(args.num_train_epochs) if strategy == "epoch" else max(1, int(steps // max(every, 1)))
    return min(written, args.save_total_limit or written)
