"""The doctor's walk for a classifier, or STS-B's regression. Its memory is measured: the estimate knows language models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from transformers import PreTrainedModel

from dts_hf.classification.data import LabelledDataset
from dts_hf.classification.glue_tasks import GlueTask
from dts_hf.classification.models import ClassifierTeacher, for_model
from dts_hf.classification.task import Classification
from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.data.encoding import EncodedDataset
from dts_hf.doctor.diagnosis import Check, PicturedRow, Segment, Skipped, need
from dts_hf.doctor.effect import Sample
from dts_hf.doctor.models import batches, check_teacher
from dts_hf.doctor.tokens import MANY_ROWS, check_leak, spaced
from dts_hf.doctor.walk import Walk
from dts_hf.models.head import Head
from dts_hf.task import Rows

#: Rows on which teacher and student are compared, and so many of them at a time.
SAMPLE_ROWS, BATCH = 64, 16


class ClassifierWalk(Walk):
    """A recipe with a ``task:`` section."""

    task: Classification
    classes = "classes"

    def check_rows(self, check: Check, rows: Rows) -> None:
        """Classes that never occur, and rows that are both trained on and scored."""
        glue, counts = self.task.glue, Counter(row.label for row in rows.train)
        shares = ", ".join(f"{name} {counts[number] / len(rows.train):.0%}" for number, name in enumerate(glue.labels))
        check.summary = f"{len(rows.train):,} to train on ({shares or 'scores'}), {len(rows.validation):,} held out"
        missing = [name for number, name in enumerate(glue.labels) if not counts[number]]
        if missing:
            text = f"no training row has the label {', '.join(missing)}"
            check.warn("class-missing", text, "Are the labels in order?")
        seen = {row.texts for row in rows.train}
        leaked = [row.id for row in rows.validation if row.texts in seen]
        if len(leaked) > MANY_ROWS * len(rows.validation):  # GLUE itself repeats a few
            check_leak(check, leaked, len(rows.validation), "rows")

    def check_data(self, check: Check, data: EncodedDataset, rows: int) -> None:
        assert isinstance(data, LabelledDataset) and data.report is not None  # encode_labelled has written it
        cut = data.report.prompts_cut
        share = cut / len(data)
        looked = "" if rows == len(data) else f" (looked at {len(data):,})"
        check.summary = f"{share:.1%} of {rows:,} rows cut{looked}; longest {max(data.lengths)} tokens"
        check.values = {"rows": len(data), "cut": cut, "longest": max(data.lengths)}
        if cut == len(data):
            check.error("every-row-cut", "every text is cut at task.max_length", "Raise task.max_length")
        elif share > MANY_ROWS:
            text = f"{share:.1%} of the texts are cut at task.max_length"
            check.warn("many-rows-cut", text, "Raise task.max_length")
        two = spaced(range(len(data)), 2)
        self.diagnosis.picture = [_pictured(self.task.glue, data, index, self.tokenizer) for index in two]

    def compare(self, check: Check) -> None:
        trainer: Any = self.make_trainer()
        self.sample = self.sample_of()
        if self.task.glue.regression:
            compare_scores(check, self.sample)
            return
        cut = self.recipe.student.is_cut
        check_teacher(check, trainer.eval_loss, self.sample, self.task.glue.outputs, cut)
        if self.sample.teacher_states is not None:
            check_label_order(check, self.sample)

    def sample_of(self, teacher: PreTrainedModel | None = None) -> Sample:
        if teacher is not None and self.task.glue.regression:
            raise Skipped("a regression has no probabilities to compare")
        trainer: Any = need(self.trainer, "a trainer")
        asked = trainer.classifier if teacher is None else ClassifierTeacher(teacher)
        return take_sample(trainer, need(self.data, "rows"), asked)

    def small_sample(self) -> Sample:
        """All rows of the sample: there are few classes.

        Raises:
            Skipped: the task is a regression.
        """
        if self.task.glue.regression:
            raise Skipped("squared errors know no temperature")
        return need(self.sample, "a sample of rows")


def _pictured(task: GlueTask, data: LabelledDataset, index: int, tokenizer: Any) -> PicturedRow:
    """A row with the label that is learned."""
    row = data[index]
    label = f" {row['labels']:g}" if task.regression else f" {task.labels[int(row['labels'])]}"
    text = Segment("masked", data.lengths[index], tokenizer.decode(row["input_ids"]))
    return PicturedRow(data.row_ids[index], [text, Segment("end", 1, label)])


@torch.no_grad()
def take_sample(
    trainer: ClassificationDistillationTrainer,
    data: EncodedDataset,
    teacher: ClassifierTeacher,
    rows: Sequence[int] | None = None,
) -> Sample:
    """Student and teacher on some rows: the states of an example are its logits, and the head is the identity.

    Args:
        trainer: built, not yet trained.
        data: tokenised rows.
        teacher: answers them.
        rows: places in ``data``; None: 64 of them at even distances.
    """
    student: Any = trainer.model
    rows = spaced(range(len(data)), SAMPLE_ROWS) if rows is None else rows
    students, teachers, targets = [], [], []
    for _, batch, labels in batches(trainer, trainer.data_collator, data, rows, BATCH):
        targets.append(labels)
        students.append(student(**for_model(student, batch)).logits.float())
        teachers.append(teacher.logits(batch))
    identity = Head(torch.eye(trainer.task.outputs, device=trainer.args.device))
    numbers = torch.arange(len(rows), device=trainer.args.device)
    known = [logits for logits in teachers if logits is not None]
    taught: tuple[Any, Any] = (torch.cat(known), identity) if known else (None, None)
    return Sample(torch.cat(students), identity, *taught, torch.cat(targets), numbers)


def compare_scores(check: Check, sample: Sample) -> None:
    """Squared errors of teacher and student beside that of always saying the mean."""
    models = {"student": sample.student_states, "teacher": sample.teacher_states}
    known = {who: states[:, 0] for who, states in models.items() if states is not None}
    errors = {who: float((scores - sample.targets).square().mean()) for who, scores in known.items()}
    guess = float(sample.targets.float().var(unbiased=False))
    listed = ", ".join(f"{who} {error:.2f}" for who, error in errors.items())
    check.summary = f"squared error: {listed}; always saying the mean costs {guess:.2f}"
    check.values = {**errors, "guess": guess}
    if errors.get("teacher", 0.0) > guess:
        check.warn("teacher-worse", "the teacher is worse than always saying the mean", "Fine-tune it first")


def check_label_order(check: Check, sample: Sample) -> None:
    """Whether the teacher would be right far more often with the names of its labels in another order."""
    assert sample.teacher_states is not None
    answers, labels = sample.teacher_states.argmax(-1).tolist(), sample.targets.tolist()
    pairs, rows = Counter(zip(answers, labels, strict=True)), len(labels)
    right, commonest = sum(pairs[k, k] for k in set(labels)) / rows, max(Counter(labels).values()) / rows
    check.values |= {"teacher_accuracy": right, "commonest": commonest}
    check.summary += f"; teacher right in {right:.0%}, always the commonest label {commonest:.0%}"
    orders = permutations(range(sample.student_head.vocab_size))
    best = max(sum(pairs[answer, label] for answer, label in enumerate(order)) for order in orders) / rows
    by_luck = 1 / math.sqrt(rows)  # two standard errors of a share of a half, the widest
    if right < commonest and best > commonest + by_luck:
        # That it is worse than guessing follows from this and is no problem of its own
        follows = ("teacher-untrained", "teacher-worse")
        check.problems = [problem for problem in check.problems if problem.code not in follows]
        check.error(
            "labels-swapped",
            f"the teacher is right in {right:.0%} of {rows} rows, and would be in {best:.0%} with its labels in another "
            "order",
            "Correct id2label in its config.json",
        )
