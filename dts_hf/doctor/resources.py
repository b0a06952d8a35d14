"""Memory and disk that a recipe needs, beside what this machine has."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from dts_hf.console import gb
from dts_hf.doctor.diagnosis import Check, Diagnosis
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory
from dts_hf.training.memory_estimate import Memory, disk_needed, estimate_memory
from dts_hf.training.model_shape import ModelShape, Shapes
from dts_hf.training.workload import Plan, Workload, checkpoints_kept, launch_line, launched_plan, plans

#: Up to this share of the device's memory an estimate counts as fitting without a word: it is good to 20 %.
COMFORTABLE = 0.85
#: How many devices the table of strategies is for, where the machine has but one.
FLEET = 8


def check_memory(
    check: Check, diagnosis: Diagnosis, recipe: Recipe, shapes: Shapes, workload: Workload, devices: int | None
) -> tuple[bool, bool]:
    """Estimate every strategy and compare with the device.

    A launch that does not fit is an error, and a warning where another strategy does on devices that are there: those
    of this machine, or those that the user named.

    Args:
        check: takes what is found.
        diagnosis: knows the device, and takes the table.
        recipe: may save memory in several ways.
        shapes: of its models.
        workload: of one device.
        devices: that the user named.

    Returns:
        whether both models and a few rows fit on one device, and whether the doctor's own three steps do, which one
        process makes.
    """
    device = diagnosis.device
    room, there = device["memory"], devices or device["count"]
    launched = launched_plan(recipe, there)
    fleet = plans(FLEET if there == 1 and devices is None else there, launched)
    estimates = {plan: estimate_memory(*shapes, workload, plan) for plan in fleet}
    diagnosis.memory = [
        {"strategy": plan.strategy, "devices": plan.devices, "placement": plan.teacher, **memory.as_dict(),
         "fits": memory.total <= room}
        for plan, memory in estimates.items()
    ]  # fmt: skip
    alone = estimate_memory(*shapes, workload, launched_plan(recipe, 1))
    loaded = alone.student + alone.teacher + alone.loss + alone.beside
    weights = alone.student + alone.teacher  # they pass through ordinary memory on their way to a GPU
    fits = (loaded <= room and weights <= device.get("host", room), alone.total <= room)
    memory = estimates.pop(launched)
    needed = memory.total
    check.values = {
        "needed": round(needed),
        "device": room,
        "strategy": launched.strategy,
        "alone": round(alone.total),
    }
    check.summary = f"about {gb(needed)} needed of {gb(room)} free on this {device['name']} ({launched.describe()})"
    if alone.beside > 0.05 * needed:
        check.summary += f", {gb(alone.beside)} of it rows and tokenizers"
    if needed <= COMFORTABLE * room:
        return fits
    text = (
        f"{launched.describe()} needs about {gb(needed)} (weights of teacher {gb(memory.teacher)}, student "
        f"{gb(memory.student)}, optimizer {gb(memory.optimizer)}), and {gb(room)} are free"
    )
    smaller = next((plan for plan, other in estimates.items() if other.total <= COMFORTABLE * room), None)
    advice = _savings(recipe, workload, memory, device["type"])
    if smaller is None:
        advice += "; or more devices (see --devices)"
    else:
        check.values["smaller"] = smaller.describe()
        advice = f"{smaller.describe()} fits: {launch_line(recipe, smaller, diagnosis.recipe)}; or {advice}"
    if needed <= room:
        check.warn("memory-tight", f"{text}; the estimate is good to 20 %", advice)
    elif smaller is not None and smaller.devices <= there:
        check.warn("too-little-memory", text, advice)
    else:
        check.error("too-little-memory", text, advice)
    return fits


def _savings(recipe: Recipe, workload: Workload, memory: Memory, device_type: str) -> str:
    """What makes the largest part smaller, in the words of the recipe; never empty."""
    training = memory.student + memory.gradients + memory.optimizer
    largest = max(training, memory.teacher, memory.activations + memory.loss)
    if largest == memory.teacher and recipe.teacher is not None and recipe.teacher.kind == "self":
        return "student.lora, whose teacher has no weights of its own; a smaller student"
    if largest == memory.teacher and recipe.teacher is not None:
        halved = ["teacher.dtype: bfloat16"] if recipe.teacher.dtype == "float32" else []
        packs = device_type == "cuda" and recipe.student.init is None and recipe.teacher.quantization == "none"
        return "; ".join(
            [*halved, *(["teacher.quantization: int8, fp8 or 4bit"] if packs else []), "a smaller teacher"]
        )
    if largest == training:
        return "student.lora; a smaller student" if recipe.student.lora is None else "a smaller student"
    recompute = "" if workload.gradient_checkpointing else "training.gradient_checkpointing: true; "
    batch = "training.per_device_train_batch_size" if recipe.data.pack_tokens is None else "data.packing.tokens"
    return f"{recompute}a smaller {batch} (and more gradient_accumulation_steps)"


def check_output(
    check: Check,
    recipe: Recipe,
    args: TrainingArguments,
    work: tuple[ModelShape, Workload] | None,
    steps: int,
    devices: int,
) -> None:
    """Room for the run directory under each strategy, and whether a run may be written there.

    Args:
        check: takes what is found.
        recipe: names the directory.
        args: say how often a checkpoint is written, and how many are kept.
        work: shape of the student, and what one device works on; None where nothing is known.
        steps: of the run.
        devices: of the run.
    """
    folder = Path(recipe.output.dir)
    if folder.is_dir() and any(folder.iterdir()) and not recipe.output.overwrite:
        advice = "Another output.dir, output.overwrite=true (--overwrite), or --resume to go on with the run in it"
        check.warn("output-not-empty", f"{folder} is not empty, so a new run would be refused", advice)
    else:
        try:
            RunDirectory.check_can_create(folder, recipe.output.overwrite)
        except UserError as error:
            check.error("output", str(error))
    existing = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    check.values, check.summary = {"free": free}, f"{folder}: {gb(free)} free"
    count = checkpoints_kept(args, steps)
    if work is not None:
        launched = launched_plan(recipe, devices)
        shape, workload = work
        # Without optimizer state and DeepSpeed's own form.
        alone = Plan(teacher="none") if args.save_only_model else None
        workload = replace(workload, optimizer="sgd") if alone else workload
        needs = {plan: disk_needed(shape, workload, alone or plan, count) for plan in plans(devices, launched)}
        most = max(needs, key=needs.__getitem__)
        needed, largest = needs[launched], needs[most]
        check.values |= {"needed": round(needed), "needed_at_most": round(largest), "at_most_with": most.strategy}
        under = f", {gb(largest)} under {most.strategy}" if largest > 1.01 * needed else ""
        check.summary = f"{folder}: about {gb(needed)} needed of {gb(free)} free ({launched.describe()}){under}"
        if largest > free:
            (check.error if needed > free else check.warn)(
                "disk-full",
                f"the checkpoints and the student need about {gb(needed)} ({launched.describe()}){under}, and {gb(free)} "
                f"are free at {existing}",
                "Another output.dir, training.save_strategy: no, or a smaller training.save_total_limit",
            )
    if count and args.save_only_model:
        check.summary += "; checkpoints of weights alone (training.save_only_model): --resume cannot go on from them"
