"""Memory, disk and time of a recipe beside what this machine has."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dts_hf.data.encoding import EncodedDataset
from dts_hf.doctor.diagnosis import Check, Diagnosis
from dts_hf.doctor.estimate import Memory, Plan, Strategy, TeacherPlacement, Workload, disk_needed, estimate_memory
from dts_hf.doctor.shapes import ModelShape
from dts_hf.errors import UserError
from dts_hf.models.loading import ModelSource
from dts_hf.models.pruning import pruned_config
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.memory import available_bytes, total_bytes

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dts_hf.recipe.schema import Recipe, Student

GB = 1e9
#: Up to this share of the device's memory an estimate counts as fitting without a word: it is good to 20 %.
COMFORTABLE = 0.85
#: How many devices the table of strategies is for, where the machine has but one.
FLEET = 8


def device_of(args: TrainingArguments) -> dict[str, Any]:
    """Name of the device that the run will use, and the memory in bytes that is free there now."""
    host = min(available_bytes(), _cgroup_room())
    if args.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(args.device)
        name, count = torch.cuda.get_device_name(args.device), torch.cuda.device_count()
        return {"type": "cuda", "name": name, "memory": free, "total": total, "count": count, "host": host}
    return {
        "type": args.device.type,
        "name": args.device.type.upper(),
        "memory": host,
        "total": total_bytes(),
        "count": 1,
    }


def _cgroup_room(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may still take under Docker, Kubernetes or SLURM; infinite where nothing limits it.

    Each group from the process's own up to the root may have a limit; the page cache that a group could give back counts
    as free.

    Args:
        membership: the groups of the process, as the kernel lists them.
        root: where the groups are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return math.inf
    room = math.inf
    for _, controllers, group in (line for line in lines if len(line) == 3):
        if controllers == "":  # version 2
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = root / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / group.strip("/")
        # In a container the path may be that of the host, which is not mounted: then its own group is the root.
        for folder in (own, *own.parents):
            if folder.is_relative_to(base):
                room = min(room, _group_room(folder, limit, used, cache))
    return room


def _group_room(folder: Path, limit: str, used: str, cache: str) -> float:
    """What one control group leaves; infinite where it sets no limit."""
    try:
        room = float((folder / limit).read_text()) - float((folder / used).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
    with contextlib.suppress(OSError, ValueError):
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        room += float(entries.get(cache, 0))
    return max(0.0, room)


# ------------------------------------------------------------------------------------------------------------- memory


def shapes_from_configs(recipe: Recipe) -> tuple[ModelShape, ModelShape | None] | None:
    """(student, teacher) without loading a weight; None where the files hold no plain configuration (GGUF)."""
    from transformers import AutoConfig

    if recipe.task is not None:
        return None

    def config_of(name: str, key: str, revision: str | None, remote_code: bool) -> Any:
        source = ModelSource.resolve(name, key)
        if source.gguf_file is not None:
            return None
        return AutoConfig.from_pretrained(source.location, revision=revision, trust_remote_code=remote_code)

    teacher, student = recipe.teacher, recipe.student
    teacher_config = student_config = None
    if teacher is not None:
        teacher_config = config_of(teacher.model, "teacher.model", teacher.revision, teacher.trust_remote_code)
    if student.model is not None:
        student_config = config_of(student.model, "student.model", student.revision, student.trust_remote_code)
    elif teacher_config is not None and student.init is not None:
        student_config = pruned_config(teacher_config, student.init.layers)
    if student_config is None or (teacher is not None and teacher_config is None):
        return None
    return (
        ModelShape.from_config(student_config),
        None if teacher_config is None else ModelShape.from_config(teacher_config),
    )


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
        data: tokenised training rows.
        student: counts its own adapters, where it is loaded.
        beside: bytes of ordinary memory that rows and tokenizers take.
    """
    batch = min(args.per_device_train_batch_size, len(data))
    responses = [length - prompt for length, prompt in zip(data.lengths, data.prompt_lengths, strict=True)]
    if recipe.data.responses == "teacher":  # its answers may be longer than those of the data
        longest = recipe.data.teacher_max_new_tokens
        responses = [longest] * len(data)
        lengths = [min(prompt + longest, recipe.data.max_length) for prompt in data.prompt_lengths]
    else:
        lengths = data.lengths
    order = sorted(range(len(data)), key=lambda index: -lengths[index])[:batch]
    packed = recipe.data.packing
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return Workload(
        rows=1 if packed else batch,
        tokens=sum(lengths[index] for index in order) if packed else lengths[order[0]],
        labelled=sum(responses[index] for index in order),
        accumulation=args.gradient_accumulation_steps,
        student_dtype=recipe.student.dtype,
        teacher_dtype="float32" if recipe.teacher is None else recipe.teacher.dtype,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        gradient_checkpointing=bool(args.activation_checkpointing),
        lora_parameters=_lora_parameters(recipe.student, shape, student),
        logits_budget_mb=recipe.loss.logits_budget_mb,
        autocast=autocast,
        attention="packed" if packed else "sdpa",
        device="cuda" if args.device.type == "cuda" else "cpu",
        beside=beside if args.device.type == "cpu" else 0.0,
    )


def _lora_parameters(student: Student, shape: ModelShape, model: nn.Module | None) -> int | None:
    if student.lora is None:
        return None
    if model is not None:
        return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    attention = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width)
    mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
    return student.lora.r * shape.layers * (attention + mlp)


def plans(recipe: Recipe, devices: int, launched: Plan) -> list[Plan]:
    """The strategy of this launch first, then the others on ``devices`` devices; a teacher that can be divided both ways."""
    if devices == 1:
        return [launched]
    home: TeacherPlacement = "replicated" if launched.teacher == "sharded" else launched.teacher
    names: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "fsdp2")
    fleet = [Plan(name, devices, home) for name in names]
    if home == "replicated":
        fleet += [Plan("zero3", devices, "sharded"), Plan("fsdp2", devices, "sharded")]
    return [launched, *(plan for plan in fleet if plan != launched)]


def launched_plan(recipe: Recipe, devices: int) -> Plan:
    """What ``dts-hf train`` on this machine would be: one process, or one for each device."""
    teacher: TeacherPlacement = "none"
    if recipe.teacher is not None:
        quantization = recipe.teacher.quantization
        teacher = recipe.teacher.placement if quantization == "none" else quantization
    if devices == 1:
        return Plan("single", 1, "replicated" if teacher == "sharded" else teacher)
    return Plan("ddp", devices, teacher)


@dataclass(frozen=True)
class Fits:
    """What this machine has the memory for.

    Attributes:
        loads: both models on one device, and a few rows through them.
        trains: the doctor's own three steps, which one process makes.
    """

    loads: bool
    trains: bool


def check_memory(
    check: Check,
    diagnosis: Diagnosis,
    recipe: Recipe,
    shapes: tuple[ModelShape, ModelShape | None],
    workload: Workload,
    devices: int | None,
) -> Fits:
    """Estimate every strategy and compare with the device.

    A launch that does not fit is an error, and a warning where another strategy does on devices that are there: those
    of this machine, or those that the user named.
    """
    device = diagnosis.device
    launched = launched_plan(recipe, devices or device["count"])
    fleet = devices or (device["count"] if device["count"] > 1 else FLEET)
    room = device["memory"]
    found: list[tuple[Plan, Memory]] = []
    for plan in plans(recipe, fleet, launched):
        memory = estimate_memory(*shapes, workload, plan)
        found.append((plan, memory))
        diagnosis.memory.append(
            {"strategy": plan.strategy, "devices": plan.devices, "placement": plan.teacher,
             **{name: round(value) if isinstance(value, float) else value for name, value in memory.as_dict().items()},
             "fits": memory.total <= room}
        )  # fmt: skip
    alone = estimate_memory(*shapes, workload, launched_plan(recipe, 1))
    loaded = alone.student + alone.teacher + alone.loss + alone.beside
    weights = alone.student + alone.teacher  # they pass through ordinary memory on their way to a GPU
    fits = Fits(loaded <= room and weights <= device.get("host", room), alone.total <= room)
    needed = found[0][1].total
    check.values = {
        "needed": round(needed),
        "device": room,
        "strategy": launched.strategy,
        "alone": round(alone.total),
    }
    check.summary = (
        f"about {gb(needed)} needed of {gb(room)} free on this {device['name']} ({describe_plan(launched)})"
    )
    if alone.beside > 0.05 * needed:
        check.summary += f", {gb(alone.beside)} of it rows and tokenizers"
    if needed <= COMFORTABLE * room:
        return fits
    smaller = next((plan for plan, memory in found[1:] if memory.total <= COMFORTABLE * room), None)
    too_much = needed > room
    text = (
        f"{describe_plan(launched)} needs about {gb(needed)} (weights of teacher {gb(found[0][1].teacher)}, student "
        f"{gb(found[0][1].student)}, optimizer {gb(found[0][1].optimizer)}), and {gb(room)} are free"
        + ("" if too_much else "; the estimate is good to 20 %")
    )
    savings = "; ".join(_savings(recipe, workload, found[0][1], device["type"]))
    if smaller is None:
        advice = f"{savings}; or more devices (see --devices)"
    else:
        check.values["smaller"] = describe_plan(smaller)
        advice = f"{describe_plan(smaller)} fits: {launch_line(recipe, smaller, diagnosis.recipe)}; or {savings}"
    there = smaller is not None and (devices or device["count"]) >= smaller.devices
    (check.error if too_much and not there else check.warn)(
        "too-little-memory" if too_much else "memory-tight", text, advice
    )
    return fits


def launch_line(recipe: Recipe, plan: Plan, path: str) -> str:
    """The command that trains in this way."""
    strategy = "ddp" if plan.strategy == "single" else plan.strategy
    words = [
        f"accelerate launch --config_file recipes/accelerate/{strategy}.yaml --num_processes {plan.devices}",
        f"-m dts_hf train {path}",
    ]
    placement = "replicated" if recipe.teacher is None else recipe.teacher.placement
    if plan.teacher in ("replicated", "sharded") and plan.teacher != placement:
        words.append(f"teacher.placement={plan.teacher}")
    return " ".join(words)


def _savings(recipe: Recipe, workload: Workload, memory: Memory, device_type: str) -> list[str]:
    """What makes the largest part smaller, in the words of the recipe; never empty."""
    training = memory.student + memory.gradients + memory.optimizer
    largest = max(training, memory.teacher, memory.activations + memory.loss)
    if largest == memory.teacher and recipe.teacher is not None:
        halved = ["teacher.dtype: bfloat16"] if recipe.teacher.dtype == "float32" else []
        packed = (
            ["teacher.quantization: 4bit"] if device_type == "cuda" and recipe.teacher.quantization == "none" else []
        )
        return [*halved, *packed, "a smaller teacher"]
    if largest == training:
        adapters = ["student.lora"] if recipe.student.lora is None else []
        return [*adapters, "a smaller student"]
    recompute = [] if workload.gradient_checkpointing else ["training.activation_checkpointing: true"]
    return [*recompute, "a smaller training.per_device_train_batch_size (and more gradient_accumulation_steps)"]


def describe_plan(plan: Plan) -> str:
    if plan.strategy == "single":
        return "one process"
    teacher = " with teacher.placement: sharded" if plan.teacher == "sharded" else ""
    return f"{plan.strategy} on {plan.devices} devices{teacher}"


# --------------------------------------------------------------------------------------------------------------- disk


def check_output(
    check: Check,
    recipe: Recipe,
    args: TrainingArguments,
    shape: ModelShape | None,
    workload: Workload | None,
    steps: int,
    devices: int = 1,
) -> None:
    """Room for the run directory under each strategy for ``devices``, and whether a run may be written there."""
    folder = Path(recipe.output.dir)
    if folder.is_dir() and any(folder.iterdir()) and not recipe.output.overwrite:
        check.warn(
            "output-not-empty",
            f"{folder} is not empty, so a new run would be refused",
            "Another output.dir, output.overwrite=true (--overwrite), or --resume to go on with the run in it",
        )
    else:
        try:
            RunDirectory.check_can_create(folder, recipe.output.overwrite)
        except UserError as error:
            check.error("output", str(error))
    existing = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    check.values = {"free": free}
    check.summary = f"{folder}: {gb(free)} free"
    count = _checkpoints(args, steps)
    if shape is not None and workload is not None:
        launched = launched_plan(recipe, devices)
        of_plan = {plan: _disk_of(args, shape, workload, plan, count) for plan in plans(recipe, devices, launched)}
        most = max(of_plan, key=of_plan.__getitem__)
        own, largest = of_plan[launched], of_plan[most]
        check.values |= {"needed": round(own), "needed_at_most": round(largest), "at_most_with": most.strategy}
        check.summary = f"{folder}: about {gb(own)} needed of {gb(free)} free ({describe_plan(launched)})"
        if largest > 1.01 * own:
            check.summary += f", {gb(largest)} under {most.strategy}"
        if largest > free:
            (check.error if own > free else check.warn)(
                "disk-full",
                f"the checkpoints and the student need about {gb(own)} ({describe_plan(launched)})"
                + (f", {gb(largest)} under {most.strategy}" if largest > 1.01 * own else "")
                + f", and {gb(free)} are free at {existing}",
                "Another output.dir, training.save_strategy: no, or a smaller training.save_total_limit",
            )
    if count and args.save_only_model:
        check.summary += (
            "; checkpoints of the weights alone (training.save_only_model): --resume cannot go on from them"
        )


def _disk_of(args: TrainingArguments, shape: ModelShape, workload: Workload, plan: Plan, checkpoints: int) -> float:
    """Bytes of the run directory under ``plan``."""
    if args.save_only_model:  # no optimizer state, and nothing of DeepSpeed's own
        plan, workload = Plan(teacher="none"), replace(workload, optimizer="sgd")
    return disk_needed(shape, workload, plan, checkpoints)


def _checkpoints(args: TrainingArguments, steps: int) -> int:
    """How many checkpoints stand beside each other at most."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    written = math.ceil(args.num_train_epochs) if strategy == "epoch" else max(1, int(steps // max(every, 1)))
    return min(written, args.save_total_limit or written)


# ------------------------------------------------------------------------------------------------------ measured memory


class PeakMemory:
    """The highest memory use between ``start`` and ``read``: of the GPU, or of this process beyond what it had before.

    Args:
        device: of the run.
        before: bytes of this process before any model was loaded.
    """

    def __init__(self, device: torch.device, before: int) -> None:
        self.device, self.before = device, before

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # Linux: forget the high-water mark of this process
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        mark = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
        return None if mark is None else max(0, int(mark.split()[1]) * 1024 - self.before)


def gb(value: float) -> str:
    """Bytes for people: ``850 MB``, ``12.3 GB``."""
    if value < 0.95 * GB:
        return f"{value / 1e6:,.0f} MB"
    return f"{value / GB:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``6 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def tokens_per_row(datasets: Sequence[EncodedDataset]) -> float:
    lengths = [length for dataset in datasets for length in dataset.lengths]
    return sum(lengths) / max(len(lengths), 1)
