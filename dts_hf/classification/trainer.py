"""``ClassificationDistillationTrainer``: the distillation trainer for sequence classification, and STS-B's regression.

Temperature, divergence, loss, meters, log lines and checkpoints are those of language models: the states of an example
are its logits, and the head is the identity. Only what a batch is and how models answer it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dts_hf.classification.data import LabelledCollator, LabelledDataset, check_task_labels, encode_labelled, labelled
from dts_hf.classification.models import (
    ClassifierTeacher,
    fit_to_tokenizer,
    for_model,
    label_order,
    load_classifier,
    takes_type_ids,
)
from dts_hf.classification.tasks import GlueTask, LabelledRow, get_task, parse_labelled
from dts_hf.data.encoding import EncodingReport
from dts_hf.data.samplers import DUMMY_ROW, dummy_row
from dts_hf.data.tokenised import rows_of
from dts_hf.divergences import Divergence
from dts_hf.errors import UserError
from dts_hf.evaluation.glue import GlueMetric
from dts_hf.loss.chunk_walk import SUM_NAMES
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.checks import check_positions
from dts_hf.models.head import Head
from dts_hf.models.loading import load_tokenizer
from dts_hf.models.vocabulary import shared_prefix
from dts_hf.temperature import TemperaturePolicy
from dts_hf.temperature.constant import Constant
from dts_hf.training.trainer import WITHOUT_TEACHER, DistillationTrainer, count_tokens

# What ``meters.means`` makes of the sums, by the kind of run: name there -> name in the log.
REGRESSION = {"ce_loss": "label_mse", "teacher_ce": "teacher_mse", "kd_loss": "kd_loss"}


class ClassificationDistillationTrainer(DistillationTrainer):
    """Distil ``teacher``, a sequence classifier, into ``model``.

    loss = (1 - kd_ratio) CE + kd_ratio T_s T_t D(p_T, q_T) over the examples of an optimizer step, on any number of
    processes and micro-batches. STS-B: both parts are squared errors, to the label and to the teacher's score, and no
    temperature is involved.

    Args:
        model: the student, or the name or folder of one (a new head is drawn where it has none).
        teacher: a sequence classifier with the same tokenizer, its name or folder; None learns from labels alone.
        task: the name of a GLUE task, or a ``GlueTask``.
        temperature, divergence, kd_ratio, args: as in ``DistillationTrainer``.
        train_dataset: rows with the task's fields and ``label``, or a ``LabelledDataset``.
        eval_dataset: the same kinds; ``evaluate`` adds the task's metrics, as ``eval_accuracy``, and the teacher's.
        processing_class: the tokenizer; by default the student's own.
        max_length: for rows, tokens.
        kwargs: everything else that ``DistillationTrainer`` takes.

    Raises:
        UserError: anything that does not fit together, before the first step.
    """

    def __init__(
        self,
        model: nn.Module | str,
        teacher: nn.Module | str | None,
        task: GlueTask | str,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float = 2.0,
        divergence: Divergence | Mapping[str, Any] | str = "forward_kl",
        kd_ratio: float = 0.5,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int = 128,
        **kwargs: Any,
    ) -> None:
        self.task = get_task(task) if isinstance(task, str) else task
        if teacher is None and kd_ratio > 0:
            raise UserError(f"teacher: got None, but kd_ratio is {kd_ratio}; without a teacher it must be 0")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model, key="model")
            model = load_classifier(model, self.task, key="model")
        if isinstance(teacher, str):
            kwargs.setdefault("teacher_tokenizer", load_tokenizer(teacher, key="teacher"))
            dtype = str(next(model.parameters()).dtype).split(".")[-1]
            teacher = load_classifier(teacher, self.task, key="teacher", dtype=dtype, fresh_head=False)
        if processing_class is None:
            raise UserError("processing_class: got None, expected the student's tokenizer")
        if processing_class.pad_token_id is None:
            raise UserError(
                "processing_class: has no padding token, which classifiers end at; set pad_token = eos_token"
            )
        self._text_options: dict[str, Any] = {
            "tokenizer": processing_class,
            "max_length": max_length,
            "type_ids": takes_type_ids(model) or takes_type_ids(teacher),
        }
        self.metric = GlueMetric(self.task.subset)
        #: Logits of the last evaluation by row: ``{"student": {row: [C]}, "teacher": ...}``.
        self.predicted: dict[str, dict[int, list[float]]] = {}
        self._seen: list[tuple[Tensor, ...]] = []
        super().__init__(
            model,
            teacher,  # type: ignore[arg-type]  # _setup_teacher knows a classifier and None
            # Squared errors know no temperature, and without a teacher there is nothing to soften.
            Constant(1.0) if self.task.regression else temperature,
            divergence,
            kd_ratio,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            router_aux_loss="none",  # a classifier of transformers adds none either
            data_collator=LabelledCollator(int(processing_class.pad_token_id), self.task.regression),
            **kwargs,
        )

    def _setup_teacher(  # type: ignore[override]
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        vocab_alignment: str,
    ) -> None:
        for classifier, name in ((model, "the student"), (teacher, "the teacher")):
            if classifier is None:
                continue
            fit_to_tokenizer(classifier, tokenizer, name)
            names = {int(number): str(label) for number, label in classifier.config.id2label.items()}  # type: ignore[union-attr, operator]
            if label_order(names, self.task, name, is_trained=classifier is model) is not None:
                raise UserError(
                    f"{name}: its classes are {', '.join(names.values())}, in the task's order {self.task.describe_labels}; "
                    "load it with dts_hf.classification.models.load_classifier, which reorders them"
                )
        other = teacher_tokenizer or tokenizer
        shared = shared_prefix(tokenizer, other)
        if teacher is not None and shared < max(len(tokenizer), len(other)):
            raise UserError(
                f"teacher and student have different tokenizers (from id {shared} on), but read the same batches: choose "
                "a student of the teacher's family, or prune one from it (student.init: {from: teacher, layers: N})"
            )
        self.vocab_size, self.vocab_note = self.task.outputs, ""
        self.classifier = ClassifierTeacher(teacher)
        self.teacher = self.classifier  # type: ignore[assignment]  # only its to() is called from outside

    # ------------------------------------------------------------------------------------------------- the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Teacher and student on the same batch; returns example_sum / num_items_in_batch * num_processes."""
        labels = inputs["labels"]
        if model.training and "row_id" in inputs:
            self.rows_of_step.append(inputs["row_id"])
        batch = {key: value for key, value in inputs.items() if key not in ("labels", "row_id")}
        kept = labelled(labels)
        normalizer = self._normalizer(labels, num_items_in_batch)
        logits = model(**for_model(self.accelerator.unwrap_model(model), batch)).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answers = self.classifier.logits(batch)
        with torch.autocast(labels.device.type, enabled=False):  # the identity must not round the logits
            teacher = logits.detach() if answers is None else answers.to(logits.dtype)
            loss_of = self._squared_errors if self.task.regression else self._class_loss
            loss, sums = loss_of(logits[kept], teacher[kept], labels[kept], normalizer, model.training)
        meter = self.step_meter if model.training else self.eval_meter
        meter.add({**sums, "tokens": count_tokens(inputs)})
        outputs = {"loss": loss, "logits": logits.detach(), "teacher_logits": teacher}
        return (loss, outputs) if return_outputs else loss

    def _class_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, normalizer: Tensor, training: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        identity = Head(torch.eye(self.task.outputs, dtype=student.dtype, device=student.device))
        rows = torch.arange(len(labels), device=labels.device)  # each example is a sequence of its own
        loss_fn = self.loss if training else self.eval_loss
        output = loss_fn(student, identity, teacher, identity, labels, normalizer, rows)
        return output.loss, output.sums

    def _squared_errors(
        self, student: Tensor, teacher: Tensor, labels: Tensor, normalizer: Tensor, training: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """STS-B: ce and teacher_ce are squared errors to the labels, kd the one to the teacher's score."""
        score, wanted = student[:, 0], teacher[:, 0]
        to_label, to_teacher = (score - labels.to(score.dtype)).square(), (score - wanted).square()
        kd_ratio = self.loss.kd_ratio
        total = ((1 - kd_ratio) * to_label + kd_ratio * to_teacher).sum()
        sums = {name: torch.zeros((), dtype=score.dtype, device=score.device) for name in SUM_NAMES}
        found = {
            "rows": torch.as_tensor(float(len(labels)), device=score.device),
            "ce": to_label.detach().sum(),
            "teacher_ce": (wanted - labels.to(score.dtype)).square().sum(),
            "kd": to_teacher.detach().sum(),
            "temperature_min": sums["rows"].clone(),
            "temperature_max": sums["rows"].clone(),
        }
        return total / normalizer.to(total), {**sums, **found}

    def _count(self, labels: Tensor) -> Tensor:
        return labelled(labels).sum()

    # ------------------------------------------------------------------------------------------------- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds the batch's sums to the meter and keeps the logits of all ranks for the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        columns = (inputs["row_id"], inputs["labels"], outputs["logits"], outputs["teacher_logits"])
        self._seen.append(tuple(column.cpu() for column in self.accelerator.gather(columns)))
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The losses at T = 1, and the task's metrics of the student and (``teacher_...``) of the teacher."""
        self._seen = []
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._seen:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._scores().items()})
        return output

    def _scores(self) -> dict[str, float]:
        rows, labels, student, teacher = (torch.cat(column) for column in zip(*self._seen, strict=True))
        real = rows != DUMMY_ROW
        self.predicted = {}
        scores: dict[str, float] = {}
        for name, logits in (("student", student), ("teacher", teacher)):
            if name == "teacher" and self.classifier.model is None:
                continue
            chosen = (logits[:, 0] if self.task.regression else logits.argmax(-1))[real]
            found = self.metric.compute(predictions=chosen.tolist(), references=labels[real].tolist()) or {}
            scores |= {key if name == "student" else f"teacher_{key}": value for key, value in found.items()}
            self.predicted[name] = dict(zip(rows[real].tolist(), logits[real].tolist(), strict=True))
        return scores

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        """The means that mean something in this run, under their right names."""
        if self.classifier.model is None:
            values = {name: values[name] for name in WITHOUT_TEACHER if name in values}
        if self.task.regression:
            values = {REGRESSION[name]: value for name, value in values.items() if name in REGRESSION}
        return values

    def _without_label(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return dummy_row(row, float("nan") if self.task.regression else IGNORE_INDEX)

    def _read(self, dataset: Any, name: str) -> tuple[LabelledDataset, EncodingReport]:
        if not isinstance(dataset, LabelledDataset):
            rows = [
                row
                if isinstance(row, LabelledRow)
                else parse_labelled(row, self.task, f"{name}: row {k}", f"{name}-{k}")
                for k, row in enumerate(rows_of(dataset), 1)
            ]
            if not rows:
                raise UserError(f"{name}: there are no rows in it; expected rows {self.task.row_format}")
            dataset, _ = encode_labelled(rows, **self._text_options)
        check_task_labels(dataset.labels, self.task, name)
        for model, role in ((self.model, "the student"), (self.classifier.model, "the teacher")):
            if model is not None:
                check_positions(model, role, max(dataset.lengths), "Lower task.max_length")  # type: ignore[arg-type]
        return dataset, dataset.report or EncodingReport(rows=len(dataset), kept=len(dataset))
