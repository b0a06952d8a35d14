"""``ClassificationDistillationTrainer``: the distillation trainer for sequence classification, and STS-B's regression.

Temperature, divergence, loss, meters, log lines and checkpoints are those of language models: the states of an example
are its logits, and the head is the identity. Only what a batch is and how models answer it differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dts_hf.classification.data import LabelledCollator, LabelledDataset, check_task_labels, encode_labelled, labelled
from dts_hf.classification.glue_tasks import GlueTask, LabelledRow, get_task, parse_labelled
from dts_hf.classification.models import (
    ClassifierTeacher,
    fit_to_tokenizer,
    for_model,
    label_order,
    load_classifier,
    takes_type_ids,
)
from dts_hf.data.containers import as_rows
from dts_hf.data.encoding import EncodingReport
from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.data.tokenised import rows_of
from dts_hf.distributed.launch import prepare_deepspeed
from dts_hf.distributed.sharding import check_placement, shard_teacher
from dts_hf.divergences import Divergence
from dts_hf.errors import UserError
from dts_hf.evaluation.glue_metrics import GlueMetric
from dts_hf.loss.distillation_loss import DistillationLoss, check_has_teacher
from dts_hf.loss.logged_sums import LogColumns
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.loss.statistics import CE, KD, ROWS, TEACHER_CE
from dts_hf.models.checks import check_apart, check_finite, check_positions
from dts_hf.models.head import Head
from dts_hf.models.loading import load_tokenizer, unwrapped
from dts_hf.models.vocabulary import shared_prefix
from dts_hf.temperature import TemperaturePolicy
from dts_hf.training.arguments import check_for_classifiers, checked_arguments
from dts_hf.training.datasets import RowReader
from dts_hf.training.distillation_base import DistillationBase
from dts_hf.training.even_batches import count_tokens
from dts_hf.training.pair import check_whole
from dts_hf.training.tracking import model_facts


class ClassificationDistillationTrainer(DistillationBase):
    """Distil ``teacher``, a sequence classifier, into ``model``.

    loss = (1 - kd_ratio) CE + kd_ratio T_s T_t D(p_T, q_T) over the examples of an optimizer step, on any number of
    processes and micro-batches. STS-B: both parts are squared errors, to the label and to the teacher's score, and no
    temperature is involved.

    Args:
        model: the student, or the name or folder of one (a new head is drawn where it has none).
        teacher: a sequence classifier with the same tokenizer, its name or folder; None learns from labels alone.
        task: the name of a GLUE task, or a ``GlueTask``.
        temperature, divergence, kd_ratio, args: as in ``DistillationTrainer``.
        train_dataset: rows with the task's fields and ``label`` in a list, a data set or a data frame, or a
            ``LabelledDataset``; a stream is read whole, before training.
        eval_dataset: the same kinds; ``evaluate`` adds the task's metrics, as ``eval_accuracy``, and the teacher's.
        processing_class: the tokenizer; by default the student's own.
        max_length: for rows, tokens.
        temperature_scaling, logits_budget_mb, kernels, logits_dtype, teacher_tokenizer, teacher_placement: as in
            ``DistillationTrainer``.
        kwargs: as in ``DistillationTrainer``.

    Attributes:
        task: what is learned.
        classifier: the teacher.
        predicted: logits of the last evaluation by row: ``{"student": {row: [C]}, "teacher": ...}``. ``predict`` returns
            those of the student as ``predictions`` ``[rows, C]``, with ``label_ids`` ``[rows]``, in the order of the rows.

    Raises:
        UserError: anything that does not fit together, before the first step.
    """

    def __init__(
        self,
        model: nn.Module | str,
        teacher: nn.Module | str | None,
        task: GlueTask | str,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float = "dts",
        divergence: Divergence | Mapping[str, Any] | str = "forward_kl",
        kd_ratio: float = 0.5,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int = 128,
        temperature_scaling: str = "squared",
        logits_budget_mb: float | None = None, kernels: str = "auto", logits_dtype: str = "auto",
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_placement: str = "replicated",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        # 1. Arguments that cannot be honoured, before anything is loaded.
        check_for_classifiers(kwargs)
        args = checked_arguments(args, kwargs, type(self))
        check_placement(teacher_placement)
        check_has_teacher(teacher is not None, kd_ratio)
        self.task = task = get_task(task) if isinstance(task, str) else task
        # 2. Two classifiers of the same task that read the same tokens.
        model, teacher, tokenizer = set_up_classifiers(model, teacher, task, processing_class, teacher_tokenizer)
        prepare_deepspeed(args, model)
        self.classifier = ClassifierTeacher(teacher)
        # 3. Rows, loss and temperature. Squared errors know none, and without a teacher there is nothing to soften.
        softened = teacher is not None and not task.regression
        models = [(model, "the student"), *([] if teacher is None else [(teacher, "the teacher")])]
        type_ids = takes_type_ids(model) or takes_type_ids(teacher)
        encode_options = {"tokenizer": tokenizer, "max_length": max_length, "type_ids": type_ids}
        self.metric = GlueMetric(task.subset)
        self.predicted: dict[str, dict[int, list[float]]] = {}
        self._seen: list[tuple[Tensor, ...]] = []
        loss_options = {"temperature_scaling": temperature_scaling, "logits_budget_mb": logits_budget_mb,
                        "kernels": kernels, "logits_dtype": logits_dtype}  # fmt: skip
        collator = LabelledCollator(int(tokenizer.pad_token_id), task.regression)
        super().__init__(
            model, args, collator, train_dataset, eval_dataset, tokenizer,
            temperature=temperature if softened else 1.0, divergence=divergence, kd_ratio=kd_ratio,
            classes=task.outputs, loss_options=loss_options,
            columns=LogColumns(teacher=teacher is not None, regression=task.regression),
            rows=LabelledRows(task, encode_options, models), facts=model_facts("teacher", teacher), **kwargs,
        )  # fmt: skip
        if teacher_placement == "sharded" and teacher is not None:
            shard_teacher(teacher, self.args.device)
        self.classifier.to(self.args.device)
        if teacher is not None:
            self.compile_layers(teacher, "the teacher")

    @property
    def teacher_model(self) -> nn.Module | None:
        return self.classifier.model

    # ------------------------------------------------------------------------------------------------------- the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Teacher and student on the same batch; returns example_sum / num_items_in_batch * num_processes."""
        labels = inputs["labels"]
        batch = {key: value for key, value in inputs.items() if key not in ("labels", "row_id")}
        kept = labelled(labels)
        normalizer = self.normalizer(labels, num_items_in_batch)
        logits = model(**for_model(self.accelerator.unwrap_model(model), batch)).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answers = self.classifier.logits(batch)
        with torch.autocast(labels.device.type, enabled=False):  # the identity must not round the logits
            teacher = logits.detach() if answers is None else answers.to(logits.dtype)
            loss_fn, meter = self.loss_and_meter(model.training)
            loss_of = self._squared_errors if self.task.regression else self._class_loss
            loss, sums = loss_of(logits[kept], teacher[kept], labels[kept], normalizer, loss_fn)
        meter.add({**sums, "tokens": count_tokens(inputs)})
        outputs = {"loss": loss, "logits": logits.detach(), "teacher_logits": teacher}
        return (loss, outputs) if return_outputs else loss

    def _class_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, normalizer: Tensor, loss_fn: DistillationLoss
    ) -> tuple[Tensor, dict[str, Any]]:
        identity = Head(torch.eye(self.task.outputs, dtype=student.dtype, device=student.device))
        rows = torch.arange(len(labels), device=labels.device)  # each example is a sequence of its own
        output = loss_fn(student, identity, teacher, identity, labels, normalizer, rows)
        return output.loss, output.sums

    def _squared_errors(
        self, student: Tensor, teacher: Tensor, labels: Tensor, normalizer: Tensor, loss_fn: DistillationLoss
    ) -> tuple[Tensor, dict[str, Any]]:
        """STS-B: ce and teacher_ce are squared errors to the labels, kd the one to the teacher's score."""
        score, answer = student[:, 0], teacher[:, 0]
        to_label, to_teacher = (score - labels.to(score.dtype)).square(), (score - answer).square()
        total = ((1 - loss_fn.kd_ratio) * to_label + loss_fn.kd_ratio * to_teacher).sum()
        sums = {
            ROWS: torch.as_tensor(float(len(labels)), device=score.device),
            CE.sum: to_label.detach().sum(),
            TEACHER_CE.sum: (answer - labels.to(score.dtype)).square().sum(),
            KD.sum: to_teacher.detach().sum(),
        }
        return total / normalizer.to(total), sums

    def count_items(self, labels: Tensor) -> Tensor:
        """How many examples of ``labels`` ``[B]`` have a label, as a 0-d tensor."""
        return labelled(labels).sum()

    # -------------------------------------------------------------------------------------------------- held-out rows

    def keep_outputs(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Keep the logits of all ranks for the metrics."""
        columns = (inputs["row_id"], inputs["labels"], outputs["logits"], outputs["teacher_logits"])
        self._seen.append(tuple(column.cpu() for column in self.accelerator.gather(columns)))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The losses at T = 1, and the task's metrics of the student and (``teacher_...``) of the teacher."""
        self._seen = []
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self._seen:
            prefix = kwargs.get("metric_key_prefix", "eval")  # evaluate and predict give it by name
            rows, labels, student, teacher = (torch.cat(column) for column in zip(*self._seen, strict=True))
            output.metrics.update(
                {f"{prefix}_{name}": value for name, value in self._scores(rows, labels, student, teacher).items()}
            )
            # Batches come longest first: sorted by number the rows stand as they were given, behind those that only fill
            order = rows.argsort()[int((rows == DUMMY_ROW).sum()) :]
            output = output._replace(predictions=student[order].numpy(), label_ids=labels[order].numpy())
        return output

    def _scores(self, rows: Tensor, labels: Tensor, student: Tensor, teacher: Tensor) -> dict[str, float]:
        """The task's metrics; ``predicted`` is set.

        Args:
            rows: numbers ``[N]``; ``DUMMY_ROW`` only fills a batch.
            labels: ``[N]``.
            student: logits ``[N, C]``.
            teacher: logits ``[N, C]``; those of the student where there is no teacher.
        """
        real = rows != DUMMY_ROW
        self.predicted = {}
        scores: dict[str, float] = {}
        known = {"student": student} if self.classifier.model is None else {"student": student, "teacher": teacher}
        for name, logits in known.items():
            chosen = (logits[:, 0] if self.task.regression else logits.argmax(-1))[real]
            metrics = self.metric.compute(predictions=chosen.tolist(), references=labels[real].tolist()) or {}
            scores |= {key if name == "student" else f"teacher_{key}": value for key, value in metrics.items()}
            self.predicted[name] = dict(zip(rows[real].tolist(), logits[real].tolist(), strict=True))
        return scores


class LabelledRows(RowReader):
    """Rows of a task: texts that are to be encoded, or a ``LabelledDataset``.

    Args:
        task: what the labels must be of.
        encode_options: what ``encode_labelled`` takes besides the rows.
        models: that read the rows, with what errors call them; no row may have more tokens than they have positions.
    """

    def __init__(
        self, task: GlueTask, encode_options: Mapping[str, Any], models: Sequence[tuple[nn.Module, str]]
    ) -> None:
        super().__init__()
        self.task, self.encode_options, self.models = task, encode_options, models
        self.dummy_labels = float("nan") if task.regression else IGNORE_INDEX

    def read(self, dataset: Any, name: str) -> tuple[LabelledDataset, EncodingReport]:
        """Texts are encoded; labels and lengths are checked.

        Raises:
            UserError: there is no row, or one is wrong.
        """
        if not isinstance(dataset, LabelledDataset):
            rows = [
                row
                if isinstance(row, LabelledRow)
                else parse_labelled(row, self.task, f"{name}: row {k}", f"{name}-{k}")
                for k, row in enumerate(rows_of(as_rows(dataset, name)), 1)
            ]
            if not rows:
                raise UserError(f"{name}: there are no rows in it; expected rows {self.task.row_format}")
            dataset = encode_labelled(rows, **self.encode_options)
        check_task_labels(dataset.labels, self.task, name)
        for model, role in self.models:
            check_positions(model, role, max(dataset.lengths), "Lower task.max_length")  # type: ignore[arg-type]
        return dataset, dataset.report or EncodingReport(rows=len(dataset), kept=len(dataset))


def set_up_classifiers(
    student: nn.Module | str | None,
    teacher: nn.Module | str | None,
    task: GlueTask,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[nn.Module, nn.Module | None, PreTrainedTokenizerBase]:
    """Load what is a name, undo what an earlier trainer has done to a model, and check that both read the same batches.

    Args:
        student: as ``ClassificationDistillationTrainer`` takes it.
        teacher: the same.
        task: whose classes they must have, in its order.
        tokenizer: the student's; by default the one that its name brings.
        teacher_tokenizer: compared with it; by default the one that the teacher's name brings, else the same.

    Returns:
        Student, teacher and the tokenizer of both.

    Raises:
        UserError: something is missing, or the two do not fit each other or the task.
    """
    # 1. Names become models.
    if student is None:
        raise UserError("model: got None, expected the student, its name or its folder")
    if isinstance(student, str):
        tokenizer = tokenizer or load_tokenizer(student, key="model")
        student = load_classifier(student, task, key="model")
    if isinstance(teacher, str):
        teacher_tokenizer = teacher_tokenizer or load_tokenizer(teacher, key="teacher")
        dtype = str(next(student.parameters()).dtype).split(".")[-1]
        teacher = load_classifier(teacher, task, key="teacher", dtype=dtype, fresh_head=False)
    if tokenizer is None:
        raise UserError("processing_class: got None, expected the student's tokenizer")
    if tokenizer.pad_token_id is None:
        raise UserError("processing_class: has no padding token, which classifiers end at; set pad_token = eos_token")
    check_whole(student)
    # 2. Without what an earlier trainer has put around them; the teacher may be the student of one.
    student, teacher = unwrapped(student), None if teacher is None else unwrapped(teacher)
    if teacher is not None:
        check_apart(student, teacher)
    # 3. The same classes in the same order, over the same tokens.
    for classifier, name in ((student, "the student"), (teacher, "the teacher")):
        if classifier is None:
            continue
        check_finite(classifier, name)
        fit_to_tokenizer(classifier, tokenizer, name)
        names = {int(number): str(label) for number, label in classifier.config.id2label.items()}  # type: ignore[union-attr, operator]
        if label_order(names, task, name, is_trained=classifier is student) is not None:
            raise UserError(
                f"{name}: its classes are {', '.join(names.values())}, in the task's order {task.describe_labels}; "
                "load it with dts_hf.classification.models.load_classifier, which reorders them"
            )
    other = teacher_tokenizer or tokenizer
    shared = shared_prefix(tokenizer, other)
    if teacher is not None and shared < max(len(tokenizer), len(other)):
        raise UserError(
            f"teacher and student have different tokenizers (from id {shared} on), but read the same batches: choose "
            "a student of the teacher's family, or prune one from it (student.init: {from: teacher, layers: N})"
        )
    return student, teacher, tokenizer
