"""The doctor's straight line for a recipe with a ``task:`` section: classification, and STS-B's regression."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from dts_hf.classification.data import LabelledDataset, encode_labelled
from dts_hf.classification.models import for_model, load_classifier, load_task_student, takes_type_ids
from dts_hf.classification.run import make_task_trainer, task_arguments
from dts_hf.classification.tasks import GlueTask, LabelledRow, get_task, load_labelled
from dts_hf.doctor.diagnosis import Check, Diagnosis, PicturedRow, Segment, Skipped, need
from dts_hf.doctor.effect import Sample, check_effect, check_schedule
from dts_hf.doctor.models import check_step_size, check_teacher, check_weights
from dts_hf.doctor.resources import check_output, device_of
from dts_hf.doctor.run import (
    LOOKED_AT,
    arguments,
    devices_of,
    one_device,
    steps_of_run,
    three_steps,
    trial_recipe,
    use_of_teacher,
)
from dts_hf.doctor.tokens import MANY_ROWS, check_tokenizers, spaced_indices
from dts_hf.models.head import Head
from dts_hf.models.loading import load_tokenizers
from dts_hf.runs.memory import resident_bytes

if TYPE_CHECKING:
    from dts_hf.classification.trainer import ClassificationDistillationTrainer
    from dts_hf.recipe.schema import Recipe

#: Rows on which teacher and student are compared.
SAMPLE_ROWS = 64


def examine_task(diagnosis: Diagnosis, recipe: Recipe, folder: Path, devices: int | None = None) -> None:
    """A recipe for a classifier. Memory is measured, not estimated: the estimator knows language models."""
    before = resident_bytes()
    assert recipe.task is not None
    task = get_task(recipe.task.subset)
    recipe, args = arguments(diagnosis, recipe, folder)
    assert recipe.task is not None

    train: list[LabelledRow] | None = None
    with diagnosis.check("rows") as check:
        data = recipe.data
        train = load_labelled(data.train, task, split=data.train_split, limit=data.max_train_rows)
        validation: list[LabelledRow] = []
        if data.validation is not None:
            limit = data.max_validation_rows
            validation = load_labelled(data.validation, task, split=data.validation_split, limit=limit)
        check_labelled_rows(check, task, train, validation)
    tokenizer: Any = None
    teacher_tokenizer: Any = None
    with diagnosis.check("tokenizers") as check:
        tokenizer, teacher_tokenizer = load_tokenizers(recipe)
        check_tokenizers(check, tokenizer, teacher_tokenizer)

    teacher: PreTrainedModel | None = None
    student: nn.Module | None = None
    if recipe.teacher is not None:
        wanted = recipe.teacher
        with diagnosis.check("teacher") as check:
            teacher = load_classifier(
                wanted.model, task, key="teacher.model", dtype=wanted.dtype, revision=wanted.revision,
                quantization=wanted.quantization, trust_remote_code=wanted.trust_remote_code, fresh_head=False,
            )  # fmt: skip
            teacher.requires_grad_(False).eval()
            teacher = teacher if check_weights(check, "teacher", teacher, causal=False) else None
    set_seed(42 if args is None else args.seed)
    with diagnosis.check("student") as check:
        if recipe.student.init is not None:
            need(teacher, "the teacher that it is cut from")
        found = load_task_student(recipe.student, teacher, task)
        student = found if check_weights(check, "student", found, causal=False) else None
        if student is not None and args is not None:
            check_step_size(check, student, args.learning_rate)

    encoded: LabelledDataset | None = None
    with diagnosis.check("data") as check:
        rows = need(train, "rows")
        looked_at = [rows[index] for index in spaced_indices(LOOKED_AT, len(rows))]
        type_ids = takes_type_ids(student) or takes_type_ids(teacher)
        encoded, cut = encode_labelled(
            looked_at, need(tokenizer, "a tokenizer"), max_length=recipe.task.max_length, type_ids=type_ids
        )
        check_task_limits(check, encoded, cut, len(rows))
        diagnosis.picture = labelled_picture(task, encoded, tokenizer)

    trainer: ClassificationDistillationTrainer | None = None
    sample: Sample | None = None
    world = devices_of(diagnosis, devices)
    steps = steps_of_run(args, None if train is None else len(train), world)
    with diagnosis.check("cross-entropy") as check:
        trial = trial_recipe(recipe, folder, max_steps=need(steps, "training arguments and rows"))
        trainer = make_task_trainer(
            trial, task, one_device(task_arguments(trial, task)), need(student, "the student"), teacher,
            need(tokenizer, "a tokenizer"), need(teacher_tokenizer, "a tokenizer"), {"train": need(encoded, "rows")},
        )  # fmt: skip
        sample = logits_of(trainer, need(encoded, "rows"), spaced_indices(SAMPLE_ROWS, len(need(encoded, "rows"))))
        compare(check, trainer, task, sample)
    for name in ("effect", "temperature"):
        with diagnosis.check(name) as check:
            if task.regression:
                raise Skipped("squared errors know no temperature")
            loss, sampled = need(trainer, "a trainer").loss, need(sample, "a sample of rows")
            if name == "effect":
                check_effect(check, loss, sampled, use_of_teacher(recipe))
            else:
                check_schedule(check, loss, sampled, need(steps, "rows"), classes="classes")
    with diagnosis.check("steps") as check:
        three_steps(check, diagnosis, trainer, encoded, before, steps, world)
    with diagnosis.check("output") as check:
        check_output(check, recipe, need(args, "training arguments"), None, None, steps or 1, world)
    if args is not None:
        diagnosis.device = device_of(args) | {"memory": diagnosis.device["memory"]}


# ------------------------------------------------------------------------------------------------------------- checks


def check_labelled_rows(
    check: Check, task: GlueTask, train: Sequence[LabelledRow], validation: Sequence[LabelledRow]
) -> None:
    """Classes that never occur, and rows that are both trained on and scored."""
    counts = Counter(row.label for row in train)
    shares = ", ".join(f"{name} {counts[number] / len(train):.0%}" for number, name in enumerate(task.labels))
    check.summary = f"{len(train):,} to train on ({shares or 'scores'}), {len(validation):,} held out"
    missing = [name for number, name in enumerate(task.labels) if not counts[number]]
    if missing:
        check.warn("class-missing", f"no training row has the label {', '.join(missing)}", "Are the labels in order?")
    seen = {row.texts for row in train}
    leaked = [row.id for row in validation if row.texts in seen]
    if len(leaked) > MANY_ROWS * max(len(validation), 1):  # GLUE itself repeats a few
        check.warn(
            "leak",
            f"{len(leaked):,} of {len(validation):,} held-out rows are also in the training rows (such as '{leaked[0]}')",
            "Take them out of data.validation",
        )


def check_task_limits(check: Check, data: LabelledDataset, cut: int, rows: int) -> None:
    share = cut / len(data)
    looked = "" if rows == len(data) else f" (looked at {len(data):,})"
    check.summary = f"{share:.1%} of {rows:,} rows cut{looked}; longest {max(data.lengths)} tokens"
    check.values = {"rows": len(data), "cut": cut, "longest": max(data.lengths)}
    if cut == len(data):
        check.error("every-row-cut", "every text is cut at task.max_length", "Raise task.max_length")
    elif share > MANY_ROWS:
        check.warn("many-rows-cut", f"{share:.1%} of the texts are cut at task.max_length", "Raise task.max_length")


def labelled_picture(task: GlueTask, data: LabelledDataset, tokenizer: Any) -> list[PicturedRow]:
    """Two rows with the label that is learned."""
    pictured = []
    for index in spaced_indices(2, len(data)):
        row = data[index]
        label = f" {row['labels']:g}" if task.regression else f" {task.labels[int(row['labels'])]}"
        segments = [
            Segment("masked", data.lengths[index], tokenizer.decode(row["input_ids"])),
            Segment("end", 1, label),
        ]
        pictured.append(PicturedRow(data.row_ids[index], segments))
    return pictured


@torch.no_grad()
def logits_of(trainer: ClassificationDistillationTrainer, data: LabelledDataset, rows: Sequence[int]) -> Sample:
    """Student and teacher on some rows: the states of an example are its logits, and the head is the identity."""
    student: Any = trainer.model
    was_training = student.training
    student.eval()
    students, teachers, targets = [], [], []
    for start in range(0, len(rows), 16):
        batch = trainer.data_collator([data[index] for index in rows[start : start + 16]])
        batch = {name: value.to(trainer.args.device) for name, value in batch.items() if name != "row_id"}
        targets.append(batch.pop("labels"))
        students.append(student(**for_model(student, batch)).logits.float())
        teachers.append(trainer.classifier.logits(batch))
    student.train(was_training)
    identity = Head(torch.eye(trainer.task.outputs, device=trainer.args.device))
    known = [logits for logits in teachers if logits is not None]
    return Sample(
        torch.cat(students),
        identity,
        torch.cat(known) if known else None,
        identity if known else None,
        torch.cat(targets),
        torch.arange(len(rows), device=trainer.args.device),
    )


def compare(check: Check, trainer: ClassificationDistillationTrainer, task: GlueTask, sample: Sample) -> None:
    """Teacher and student against the labels."""
    if task.regression:
        errors = {"student": float((sample.student_states[:, 0] - sample.targets).square().mean())}
        spread_of_labels = float(sample.targets.float().var(unbiased=False))
        if sample.teacher_states is not None:
            errors["teacher"] = float((sample.teacher_states[:, 0] - sample.targets).square().mean())
        words = ", ".join(f"{who} {error:.2f}" for who, error in errors.items())
        check.summary = f"squared error: {words}; always saying the mean costs {spread_of_labels:.2f}"
        check.values = {**errors, "guess": spread_of_labels}
        if errors.get("teacher", 0.0) > spread_of_labels:
            check.warn("teacher-worse", "the teacher is worse than always saying the mean", "Fine-tune it first")
        return
    check_teacher(check, trainer.eval_loss, sample, task.outputs)
    if sample.teacher_states is None:
        return
    right = float((sample.teacher_states.argmax(-1) == sample.targets).float().mean())
    commonest = max(Counter(sample.targets.tolist()).values()) / len(sample.targets)
    check.values |= {"teacher_accuracy": right, "commonest": commonest}
    check.summary += f"; teacher right in {right:.0%}, always the commonest label {commonest:.0%}"
    # The names that make the teacher look best, one for each of its outputs
    table = torch.zeros(task.outputs, task.outputs)
    for guess, label in zip(sample.teacher_states.argmax(-1).tolist(), sample.targets.tolist(), strict=True):
        table[guess, label] += 1
    named = [
        sum(float(table[guess, label]) for guess, label in enumerate(order)) / len(sample.targets)
        for order in permutations(range(task.outputs))
    ]
    by_luck = 1 / math.sqrt(len(sample.targets))  # two standard errors of a share of a half, the widest
    if right < commonest and max(named) > commonest + by_luck:
        # That it is worse than guessing follows from this and is no problem of its own
        check.problems = [
            problem for problem in check.problems if problem.code not in ("teacher-untrained", "teacher-worse")
        ]
        check.error(
            "labels-swapped",
            f"the teacher is right in {right:.0%} of {len(sample.targets)} rows, and would be in {max(named):.0%} with "
            "its labels in another order",
            "Correct id2label in its config.json",
        )
