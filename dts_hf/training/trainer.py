"""``DistillationTrainer``: Hugging Face's Trainer whose loss runs teacher and student on the same batch.

The name is also used by TRL (always on-policy) and DistillKit; ``DTSDistillationTrainer`` is the same class under a
name that cannot be confused.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from dts_hf.data.collators import Collator, PackedCollator, PaddedCollator
from dts_hf.data.encoding import EncodedDataset, EncodingReport, encode_rows
from dts_hf.data.prompt_templates import get_template
from dts_hf.data.samplers import (
    DummyRowsLast,
    LengthGroupedSampler,
    PadToMultiple,
    dummy_row,
    real_tokens,
    total_steps,
)
from dts_hf.data.sources import rows_from_dataset
from dts_hf.data.tokenised import (
    EXPECTED_LABELS,
    TABLES,
    NumberedCollator,
    RowForm,
    TokenisedDataset,
    TokenisedStream,
    check_encoded,
    has_arrow_rows,
    rows_of,
)
from dts_hf.distributed.launch import check_launch, prepare_deepspeed
from dts_hf.distributed.processes import on_first_process, process
from dts_hf.distributed.sharding import is_sharded, shard_teacher
from dts_hf.divergences import Divergence
from dts_hf.errors import RunError, UserError
from dts_hf.files import write_json_atomic, write_text_atomic
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.logged_sums import MeanLog, SumMeter, means
from dts_hf.loss.selection import IGNORE_INDEX, count_targets, select_response, sequence_numbers
from dts_hf.models.checks import check_apart, check_positions
from dts_hf.models.head import Head, check_head, gather_head, head_of, loss_in_head
from dts_hf.models.loading import load_model, load_tokenizer, unwrapped
from dts_hf.models.packed_attention import check_packing
from dts_hf.models.router import router_of
from dts_hf.models.vocabulary import align_vocabularies
from dts_hf.runs.checkpoints import (
    INTERRUPTED,
    checkpoints,
    mark_complete,
    newest_complete,
    remove,
    rotate,
    why_not_resumable,
)
from dts_hf.runs.failures import one_sentence, writing
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.none import NoTeacher
from dts_hf.temperature import TemperaturePolicy, build_temperature
from dts_hf.temperature.constant import Constant
from dts_hf.training.callbacks import (
    BROKEN_STEPS,
    InterruptionCallback,
    OrderCallback,
    ProgressCallback,
    TemperatureCallback,
)
from dts_hf.training.exact_resume import ExactResume, layout
from dts_hf.training.signals import at_step_end, ignore_signals_in_worker

logger = logging.getLogger(__name__)
#: As the Trainer calls it.
TRAINING_ARGS_NAME = "training_args.bin"
#: Folder of ``args.output_dir`` that holds what is uploaded, while it is.
UPLOAD = ".hub_upload"
#: What is logged when there is no teacher.
WITHOUT_TEACHER = ("ce_loss", "student_entropy", "aux_loss")


class DistillationTrainer(Trainer):
    """Distil ``teacher`` into ``model``.

    Args:
        model: the student, or the name or folder of one.
        teacher: a causal language model, its name or folder, or anything with the ``Teacher`` interface; None with
            ``kd_ratio`` 0 is plain fine-tuning.
        temperature: a policy, ``{"name": "dts", "rule": "gap"}``, a policy's name, or a number (constant).
        divergence: ``"forward_kl"``, ``{"name": "jsd", "beta": 0.5}``, ...
        kd_ratio: loss = (1 - kd_ratio) ce_loss + kd_ratio kd_loss.
        args: ``transformers.TrainingArguments``.
        train_dataset: rows (``instruction``/``input``/``output`` or ``messages``), or tokenised rows with unshifted
            ``input_ids`` and ``labels`` (see ``tokenised``); on one process also an iterable data set of tokenised rows.
        eval_dataset: the same kinds but an iterable one, or a dictionary of several.
        processing_class: the tokenizer; by default the student's own.
        temperature_scaling: ``"squared"`` or ``"none"`` (see ``DistillationLoss``).
        logits_budget_mb: memory for one chunk of logits, MiB.
        prompt_template: for rows; ``chat`` where the tokenizer has a chat template, else ``alpaca``.
        max_length, max_prompt_length, long_rows: for rows; see ``data.encode_rows`` (tokens).
        packing: lay the rows of a batch end to end, without padding.
        vocab_alignment: ``strict``, ``truncate_to_tokenizer`` or ``intersect``.
        teacher_tokenizer: compared with the student's; by default the teacher's own when ``teacher`` is a name.
        router_aux_loss: ``model`` adds the auxiliary loss of a mixture of experts where the model itself would (its
            configuration's ``output_router_logits`` and ``router_aux_loss_coef``), logged as ``aux_loss``; ``none`` leaves
            it out. Held-out losses never have it. See ``router.Router``.
        teacher_placement: ``replicated``, the whole teacher on every process, or ``sharded``, spread over all of them
            (see ``sharding.shard_teacher``).
        model_card: returns the text of the model card that ``push_to_hub`` uploads. With ``args.push_to_hub`` nothing is
            uploaded while training runs, whatever ``args.hub_strategy``: ``push_to_hub`` does it, and ``save_model``.
        data_collator: makes the batches of tokenised rows instead of our own padding. Rows come to it as they are, with
            the columns that ``args.remove_unused_columns`` leaves; labels may be its work
            (``DataCollatorForLanguageModeling`` with ``mlm=False``).
        kwargs: everything else that ``Trainer`` takes.

    Attributes:
        encoding_reports: what became of the rows, by data set: ``"train_dataset"``, ``"eval_dataset"`` or
            ``"eval_dataset['name']"``, and of the last call ``"evaluate"`` and ``"predict"``. Where rows are dropped, cut,
            or kept without a label that counts, it is logged as a warning.

    There are no logits: ``compute_loss(..., return_outputs=True)`` returns the loss alone beside the loss, and
    ``predict(...).predictions`` is None; its ``metrics`` are those of ``evaluate``.

    Raises:
        UserError: anything that does not fit together, before the first step.
    """

    # Our loss is divided by the labels of the whole optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    _logged_at: float  # seconds of the monotonic clock

    def __init__(
        self,
        model: nn.Module | str,
        teacher: nn.Module | Teacher | str | None,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float = 2.0,
        divergence: Divergence | Mapping[str, Any] | str = "forward_kl",
        kd_ratio: float = 0.5,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        temperature_scaling: str = "squared",
        logits_budget_mb: float = 256,
        prompt_template: str | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
        long_rows: str = "drop",
        packing: bool = False,
        vocab_alignment: str = "strict",
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_placement: str = "replicated",
        router_aux_loss: str = "model",
        model_card: Callable[[], str] | None = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or TrainingArguments(output_dir="runs/distillation")
        check_launch(args)
        _check_arguments(args, kwargs)
        if model is None:
            raise UserError("model: got None, expected the student, its name or its folder")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model, key="model")
            model = load_model(model, key="model")
        if isinstance(teacher, str):
            teacher_tokenizer = teacher_tokenizer or load_tokenizer(teacher, key="teacher")
            teacher = load_model(teacher, key="teacher", dtype=str(next(model.parameters()).dtype).split(".")[-1])
        if processing_class is None:
            raise UserError("processing_class: got None, expected the student's tokenizer")
        if teacher is None and kd_ratio > 0:
            raise UserError(f"teacher: got None with kd_ratio {kd_ratio:g}; labels alone need kd_ratio 0")
        if is_sharded(model):
            raise UserError(
                "model: its weights are sharded over processes already, as from_pretrained makes them while "
                "TrainingArguments with ZeRO-3 exist; expected a whole model: load it within "
                "dts_hf.distributed.sharding.unsharded_init(), or give its name"
            )
        if router_aux_loss not in ("model", "none"):
            raise UserError(f"router_aux_loss: got {router_aux_loss!r}, expected 'model' or 'none'")
        model = unwrapped(model)
        if isinstance(teacher, nn.Module):  # it may be the student of an earlier trainer
            teacher = unwrapped(teacher)
        held = teacher.model if isinstance(teacher, LiveTeacher) else teacher
        if isinstance(held, nn.Module):
            check_apart(model, held)
        prepare_deepspeed(args, model)
        self._setup_teacher(model, teacher, processing_class, teacher_tokenizer, vocab_alignment)
        self.router = router_of(model) if router_aux_loss == "model" else None
        if packing and data_collator is not None:
            raise UserError("packing: got true and a data_collator; give one of them")
        self._row_options: dict[str, Any] = {
            "tokenizer": processing_class,
            "template": get_template(prompt_template or ("chat" if processing_class.chat_template else "alpaca")),
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "long_rows": long_rows,
        }
        # Without a teacher there is nothing to soften.
        self.temperature = Constant(1.0) if teacher is None else _temperature(temperature)
        options: dict[str, Any] = {
            "kd_ratio": kd_ratio,
            "temperature_scaling": temperature_scaling,
            "logits_budget_mb": logits_budget_mb,
        }
        self.loss = DistillationLoss(divergence, temperature=self.temperature, **options)
        # Held-out losses are taken at T = 1: they must not move because the schedule did.
        self.eval_loss = DistillationLoss(divergence, temperature=Constant(1.0), **options)
        self.temperature.check_classes(self.vocab_size)
        self._fresh_state = self.temperature.state()
        self.rows_of_step: list[Tensor] = []  # row_id of the micro-batches of the step that runs, this rank's
        self.interrupting = False  # the checkpoint being written is one that a signal asked for
        self.exact_resume = ExactResume(self)
        self.stop_agreed = False  # all ranks know, since the same step, that one of them was asked to stop
        self.reset_statistics()
        self.model_card = model_card
        self.train_sampler: LengthGroupedSampler | None = None
        pads = (processing_class.pad_token_id, processing_class.eos_token_id, 0)  # hidden: any of them will do
        collator = data_collator or (
            PackedCollator(self._check_packing(model, args.device))
            if packing
            else PaddedCollator(next(pad for pad in pads if pad is not None))
        )
        self.encoding_reports: dict[str, EncodingReport] = {}
        self.model, self.args, self.data_collator = model, args, collator  # the Trainer sets them again
        if isinstance(train_dataset, dict):
            raise UserError(f"train_dataset: got several ({', '.join(map(str, train_dataset))}), expected one of them")
        train_dataset = self._prepared_train_dataset = self._prepared(train_dataset, "train_dataset")
        eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        config = getattr(model, "config", None)
        self._use_cache = getattr(config, "use_cache", None)
        try:
            self.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]  # a missing package shows now
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[
                    TemperatureCallback(self),
                    InterruptionCallback(self),
                    OrderCallback(self),
                    ProgressCallback(),
                    *(callbacks or []),
                    self.exact_resume,
                ],
                **kwargs,
            )
        except (ValueError, ImportError, OSError, RuntimeError) as error:  # its checks raise these, as they come
            if one_sentence(error):  # out of memory, a full disk: nothing is wrong with the input
                raise
            raise UserError(f"training: transformers.Trainer refuses this: {error}") from error
        self.remove_callback(TqdmCallback)
        self.remove_callback(PrinterCallback)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            self._try_collator(dataset)
        if teacher_placement == "sharded" and isinstance(teacher, nn.Module):
            shard_teacher(teacher, self.args.device)
        self.teacher.to(self.args.device)
        self.loss.to(self.args.device)

    def _setup_teacher(
        self,
        model: nn.Module,
        teacher: nn.Module | Teacher | None,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        vocab_alignment: str,
    ) -> None:
        """Check that teacher and student can be compared, and set ``teacher``, ``vocab_size`` and ``vocab_note``."""
        check_head(model, role="student")
        if isinstance(teacher, nn.Module):
            if not is_sharded(teacher):  # otherwise it was checked when it was whole
                check_head(teacher, role="teacher")
            plan = align_vocabularies(model, teacher, tokenizer, teacher_tokenizer or tokenizer, vocab_alignment)
            self.vocab_size, self.vocab_note = plan.size, plan.note
            self.teacher: Teacher = LiveTeacher(teacher)
        else:
            self.teacher = NoTeacher() if teacher is None else teacher
            heads = [head for head in (head_of(model), self.teacher.head) if head is not None]
            self.vocab_size, self.vocab_note = min(head.vocab_size for head in heads), ""

    def _check_packing(self, student: nn.Module, device: torch.device, own_mask: bool = True) -> bool:
        """Whether the batches may carry the rows' boundaries as a mask; else both models go by ``position_ids``.

        Args:
            own_mask: False where a collator of the user's lays the rows end to end.

        Raises:
            UserError: student or teacher mixes packed rows.
        """
        live = isinstance(self.teacher, LiveTeacher)
        # A mixture of experts reads the mask as one of tokens, for its router's loss.
        cu_seqlens = own_mask and not _collects_router_logits(student)
        cu_seqlens = cu_seqlens and (live or getattr(self.teacher, "takes_cu_seqlens", False))
        cu_seqlens = check_packing(student, "the student", device, cu_seqlens)
        if isinstance(self.teacher, LiveTeacher):
            both = check_packing(self.teacher.model, "the teacher", device, cu_seqlens)
            if cu_seqlens and not both:
                check_packing(student, "the student", device, own_mask=False)
            cu_seqlens = both
        return cu_seqlens

    # ------------------------------------------------------------------------------------------------- the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Teacher and student on the same batch; returns token_sum / num_items_in_batch * num_processes.

        The factor undoes the mean over ranks that DDP, ZeRO and FSDP take of gradients. ``model`` is the wrapped model
        and is called as usual, so every wrapper's hooks fire; the loss itself runs where its output layer would.
        """
        labels = inputs["labels"]
        if model.training and "row_id" in inputs:
            self.rows_of_step.append(inputs["row_id"])
        batch = {key: value for key, value in inputs.items() if key not in ("labels", "row_id", "cu_seqlens")}
        tokens = count_tokens(inputs)
        if "cu_seqlens" in inputs:
            batch["attention_mask"] = inputs["cu_seqlens"]
        normalizer = self._normalizer(labels, num_items_in_batch)
        loss_fn, meter = (self.loss, self.step_meter) if model.training else (self.eval_loss, self.eval_meter)
        wanted = loss_fn.temperature.needs_sequence_gap
        sequences = sequence_numbers(labels, batch.get("position_ids")) if wanted else None
        student = cast(nn.Module, self.model)  # unwrap_model(model) searches the installed packages each time: 5 ms
        teacher_states = self.teacher.states(batch, labels)
        sums: dict[str, Tensor] = {}

        def loss_of_states(states: Tensor, head: Head) -> Tensor:
            rows, targets = select_response(states, labels)
            cut_teacher = None if teacher_head is None else self._cut(teacher_head)
            output = loss_fn(rows, self._cut(head), teacher_states, cut_teacher, targets, normalizer, sequences)
            sums.update(output.sums, loss=output.loss.detach())
            return output.loss

        with gather_head(self.teacher.head) as teacher_head, loss_in_head(student, loss_of_states):
            outputs = model(**batch, **self._router_options(model.training), use_cache=False)
        loss = outputs.logits
        exact = sums.pop("loss")
        if loss.dtype != exact.dtype:  # FSDP2 in bf16 rounds what a model returns; the gradient is whole
            loss = loss.to(exact.dtype)
            loss = loss + (exact - loss).detach()
        if self.router is not None and model.training:
            aux_loss = self._router_loss(outputs.router_logits, inputs)
            # Each micro-batch counts by its labels: over all of them and all ranks the weights add up to num_processes.
            loss = loss + (self.router.coefficient * aux_loss * sums["rows"] / normalizer).to(loss.dtype)
            sums["aux"] = aux_loss.detach() * sums["rows"]
        meter.add({**sums, "tokens": tokens})
        return (loss, {"loss": loss}) if return_outputs else loss

    def _router_options(self, training: bool) -> dict[str, Any]:
        """Where the student's configuration asks for the router's loss, collect what it needs, or save the work."""
        collects = _collects_router_logits(cast(nn.Module, self.model))
        return {"output_router_logits": training and self.router is not None} if collects else {}

    def _router_loss(self, router_logits: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self.router is not None
        aux_loss = self.router.loss(router_logits, real_tokens(inputs))
        if not aux_loss.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "router_aux_loss: nothing is left of the graph of the router's logits, as under gradient checkpointing with "
                "use_reentrant: true; expected use_reentrant: false (training.activation_checkpointing_kwargs), or "
                "router_aux_loss 'none'"
            )
        return aux_loss

    def _normalizer(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """num_items_in_batch / num_processes; without a count the loss is the mean over the labels of this batch."""
        if num_items_in_batch is None:
            num_items_in_batch = self._count(labels).clamp(min=1) * self.accelerator.num_processes
        precise = torch.float32 if labels.device.type == "mps" else torch.float64
        return torch.as_tensor(num_items_in_batch, dtype=precise) / self.accelerator.num_processes

    def _count(self, labels: Tensor) -> Tensor:
        """How many of ``labels`` the loss is taken over, as a 0-d tensor."""
        return count_targets(labels)

    def _cut(self, head: Head) -> Head:
        return head.cut(self.vocab_size)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Labels of the whole optimizer step: all micro-batches of all ranks, counted after the shift."""
        local = sum((self._count(batch["labels"]) for batch in batch_samples), torch.zeros((), dtype=torch.int64))
        return self.accelerator.gather(local.to(device).reshape(1)).sum().clamp(min=1)

    # --------------------------------------------------------------------------------------------------- the rows

    def _prepared(self, dataset: Any, name: str) -> Any:
        """``dataset`` as the data loaders take it, checked; what became of its rows is kept, and said if any was lost.

        Raises:
            UserError: a row is wrong, or none has a label.
        """
        if isinstance(dataset, dict):
            return {key: self._prepared(value, f"{name}['{key}']") for key, value in dataset.items()}
        if dataset is None or isinstance(dataset, (TokenisedDataset, TokenisedStream)):
            return dataset
        ready, report = self._read(dataset, name)
        if report is not None:
            self.encoding_reports[name] = report
            known = isinstance(dataset, EncodedDataset) and dataset.report is not None  # to whoever encoded it
            if not known and not report.is_whole and process()[0] == 0:
                logger.warning("%s: %s", name, report.summary())
        return ready

    def _read(self, dataset: Any, name: str) -> tuple[Any, EncodingReport | None]:
        """Rows of any kind as tokens, and what became of them; each row is read once at most."""
        as_they_are = not isinstance(self.data_collator, Collator)
        form = RowForm(name, self.vocab_size, as_they_are)
        if isinstance(dataset, EncodedDataset):
            report = self._check_encoded(dataset, form)
            return dataset, dataset.report or report
        streamed = isinstance(dataset, IterableDataset)
        if streamed:
            self._check_stream(name)
            if iter(dataset) is iter(dataset):
                raise UserError(
                    f"{name}: got an iterable data set that can be read once, and this check would take its first row; "
                    "expected one that begins anew each time (__iter__ as a generator function)"
                )
        elif not hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"):
            raise UserError(f"{name}: got {type(dataset).__name__}, which has no length; expected a list, or __len__")
        if has_arrow_rows(dataset) and dataset.format["type"] in TABLES:
            dataset = dataset.with_format(None)
        rows = rows_of(dataset)
        first = next(rows, None)
        if not isinstance(first, Mapping) or "input_ids" not in first:
            if streamed:
                found = ", ".join(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
                raise UserError(
                    f"{name}: an iterable data set must give tokenised rows (input_ids, labels), found {found}; expected "
                    "list(dataset), a datasets.Dataset, or rows that are tokenised as they come"
                )
            raw = rows_from_dataset(rows if first is None else chain([first], rows), name)
            encoded, report = encode_rows(raw, name=name, **self._row_options)
            self._check_encoded(encoded, form)
            return encoded, report
        if as_they_are and first.get("labels") is None:
            form = dataclasses.replace(form, labelled=False)
        if streamed:
            form.check(form.columns([first], 0), 0)
            return TokenisedStream(dataset, form), None
        if not hasattr(dataset, "__getitem__"):
            raise UserError(
                f"{name}: got {type(dataset).__name__}, expected a list or a data set that is read by number"
            )
        tokenised = TokenisedDataset(dataset, form, chain([first], rows))
        self._check_positions(max(tokenised.lengths), "Shorten the rows")
        return tokenised, tokenised.report

    def _check_encoded(self, dataset: EncodedDataset, form: RowForm) -> EncodingReport:
        report = check_encoded(dataset, form)
        self._check_positions(max(dataset.lengths), "Lower data.max_length")
        return report

    def _check_stream(self, name: str) -> None:
        if name != "train_dataset":
            raise UserError(
                f"{name}: got an iterable data set, but held-out rows are counted, sorted by length and read again at every "
                "evaluation; expected a list of its rows, as list(dataset.take(1000))"
            )
        if self.args.world_size > 1:
            raise UserError(
                f"{name}: got an iterable data set on {self.args.world_size} processes, which could not share out its rows "
                "evenly; expected one process, or a data set with a length"
            )

    def _check_positions(self, longest: int, advice: str) -> None:
        check_positions(self.model, "the student", longest, advice)  # type: ignore[arg-type]
        if isinstance(self.teacher, LiveTeacher):
            check_positions(self.teacher.model, "the teacher", longest, advice)  # type: ignore[arg-type]

    def _try_collator(self, dataset: Any) -> None:
        """A collator of the user's must make labels of the first row, and one batch of rows of different lengths.

        If it lays rows end to end, the models must keep them apart.
        """
        if isinstance(self.data_collator, Collator) or not isinstance(dataset, (TokenisedDataset, EncodedDataset)):
            return
        collator, name = self._get_collator_with_removed_columns(self.data_collator), type(self.data_collator).__name__
        try:
            batch = collator([dataset[0]] * 2)
        except Exception as error:  # whatever it raises
            raise UserError(f"data_collator: {name} cannot make a batch of the first row: {error}") from error
        if getattr(self.data_collator, "mlm", False):
            raise UserError(
                "data_collator: got mlm true, but a causal language model learns the next token; expected mlm=False"
            )
        if batch.get("labels") is None:
            raise UserError(
                f"data_collator: {name} makes no labels, and the rows have none; expected {EXPECTED_LABELS}"
            )
        if len(batch["input_ids"]) == 1:
            self._check_packing(cast(nn.Module, self.model), self.args.device, own_mask=False)
        lengths = dataset.lengths
        ends = [dataset[lengths.index(end)] for end in sorted({min(lengths), max(lengths)})]
        if len(ends) <= min(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size):
            try:
                collator(ends)
            except Exception as error:
                raise UserError(
                    f"data_collator: {name} cannot make a batch of the shortest and the longest row ({min(lengths):,} and "
                    f"{max(lengths):,} tokens): {error}"
                ) from error

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, Collator):
            return data_collator
        return NumberedCollator(super()._get_collator_with_removed_columns(data_collator, description))

    # ---------------------------------------------------------------------------------------------- held-out loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds the batch's sums to the meter; ``evaluation_loop`` turns them into means over labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loop, with its mean of batch means replaced by means over labels of all ranks, at T = 1.

        ``eval_loss`` weighs its parts by the trainer's own ``kd_ratio``, also where the policy has another: it must not
        move because a schedule did. ``eval_rows`` and ``eval_labels`` are how many of them it is the mean of.
        """
        self.eval_meter = SumMeter()  # an evaluation that was broken off has left its sums
        # A data loader draws its seed from the global generator: dropout in training must not change because of it.
        with torch.random.fork_rng(devices=[]):
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        rows = self.num_examples(dataloader)  # the Trainer counts what fills the last batches, too
        output = output._replace(num_samples=rows)
        totals = self.eval_meter.reduce(self.accelerator)
        if totals:
            values = means(totals)
            values["loss"] = (1 - self.loss.kd_ratio) * values["ce_loss"] + self.loss.kd_ratio * values["kd_loss"]
            values["labels"] = int(totals["rows"])
            for name in [name for name in values if "temperature" in name or name.endswith(("_at_t", "_support"))]:
                values.pop(name)  # at T = 1 they say nothing new
            own = {name: values.pop(name) for name in ("loss", "labels")}
            values = {**self._named(values), **own, "rows": rows}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        """The means that mean something in this run: without a teacher, those of the student alone."""
        if not isinstance(self.teacher, NoTeacher):
            return values
        return {name: values[name] for name in WITHOUT_TEACHER if name in values}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Longest rows first (less padding), filled up with label-free rows so that no rank evaluates a row twice."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in named:
                known = ", ".join(map(repr, named)) or "none with a name"
                raise UserError(f"evaluate: got '{dataset}', expected rows, or one of the eval_dataset: {known}")
            dataset = named[dataset]
        if dataset is None:
            raise UserError("eval_dataset: got None, expected held-out rows to evaluate on")
        own = dataset is self.eval_dataset or isinstance(eval_dataset, str)
        if not own or not isinstance(dataset, (EncodedDataset, TokenisedDataset)):
            dataset = self._prepared(dataset, "eval_dataset" if own else "evaluate")
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        return self._held_out_loader(dataset, key if own else None)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As for evaluation: ``predict`` is one that leaves no line in the log; its ``predictions`` are None."""
        if test_dataset is None:
            raise UserError("predict: got None, expected rows")
        return self._held_out_loader(self._prepared(test_dataset, "predict"), None)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of the data set behind a loader, without what only fills its batches."""
        dataset = getattr(dataloader, "dataset", None)
        return len(dataset.order) if isinstance(dataset, PadToMultiple) else super().num_examples(dataloader)

    def _held_out_loader(self, dataset: Any, key: str | None) -> DataLoader:
        kept = getattr(self, "_eval_dataloaders", {}) if self.args.dataloader_persistent_workers else {}
        if key in kept and cast(Any, kept[key].dataset).dataset is dataset:
            return cast(DataLoader, kept[key])
        multiple = self.args.eval_batch_size * self.accelerator.num_processes
        filled = PadToMultiple(dataset, multiple, self._without_label, longest_first=True)
        loader = partial(self._get_dataloader, filled, "Evaluation", self.args.eval_batch_size)
        return loader(sampler_fn=self._get_eval_sampler, dataloader_key=key)

    # ------------------------------------------------------------------------------------------- order, log, state

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with epochs that several processes can share out evenly: filled up with label-free rows.

        Accelerate would take rows twice instead, and the last step of an epoch would depend on the number of processes.
        """
        if self.train_dataset is not self._prepared_train_dataset:  # set from outside since
            self._prepared_train_dataset = self.train_dataset = self._prepared(self.train_dataset, "train_dataset")
        dataset: Any = self.train_dataset
        world = self.accelerator.num_processes
        if world == 1 or self.args.dataloader_drop_last or self.length_bucket_size(dataset) is None:
            return super().get_train_dataloader()
        filled = PadToMultiple(dataset, self._train_batch_size * world, self._without_label)
        return self._get_dataloader(
            filled, "Training", self._train_batch_size, sampler_fn=self._get_train_sampler, is_training=True
        )

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The Trainer's count without dummy rows; ``non_padding`` by length, for a padding token may be a real one, too."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        counted = (
            count_tokens(inputs) if self.args.include_num_input_tokens_seen == "non_padding" else count_cells(inputs)
        )
        seen = self.accelerator.gather(counted.to(self.args.device).reshape(1))
        self.state.num_input_tokens_seen += int(seen.sum())

    def _without_label(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The first token of ``row``, which only fills a batch."""
        return dummy_row(row, [IGNORE_INDEX])

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: DataLoader = super()._get_dataloader(*args, **kwargs)
        if (
            loader.num_workers
            and (loader.multiprocessing_context or torch.multiprocessing).get_start_method() == "fork"
        ):
            wanted = partial(ignore_signals_in_worker, loader.worker_init_fn)
            for part in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate iterates over the latter
                part.worker_init_fn = wanted
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Our own sampler wherever it can be: its order depends on seed and epoch alone, so ranks and resumes agree."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        own_rows: Any = dataset.dataset if isinstance(dataset, PadToMultiple) else dataset
        together = self.length_bucket_size(own_rows)
        if together is None or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self.train_sampler = LengthGroupedSampler(own_rows.lengths, together, seed=seed)
        return self.train_sampler if own_rows is dataset else DummyRowsLast(self.train_sampler, len(dataset))

    def length_bucket_size(self, dataset: Any) -> int | None:
        """On what the order of the rows depends besides seed and epoch: how many of similar length stand together.

        1 is a plain shuffle or no shuffle at all; None is an order that is not ours.
        """
        strategy = self.args.train_sampling_strategy
        if strategy in ("sequential", "random") and hasattr(dataset, "__len__"):
            return 1
        if not hasattr(dataset, "lengths") or strategy != "group_by_length":
            return None
        packed = isinstance(self.data_collator, PackedCollator)
        return 1 if packed else self.args.train_batch_size * self.accelerator.num_processes

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)  # PadToMultiple has sorted the rows already

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own, tried out at its last step: some divide by the steps that the warm-up leaves."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        try:
            for factor in getattr(scheduler, "lr_lambdas", ()):
                factor(num_training_steps)
        except ZeroDivisionError:
            raise UserError(
                f"training.warmup_steps: {self.args.warmup_steps:g} leaves none of {num_training_steps} steps to the "
                f"schedule {self.args.lr_scheduler_type}; expected a shorter warm-up, or more steps"
            ) from None
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over labels since the last log line to the Trainer's own numbers."""
        if "loss" in logs:
            totals = dict(self.mean_log.totals)
            values = self.mean_log.pop()
            if values:
                now = time.monotonic()
                values["tokens_per_second"] = totals["tokens"] / max(now - self._logged_at, 1e-9)
                self._logged_at = now
                self.tokens_seen += totals["tokens"]
                logs.update({**values, **{k: n for k, n in self.temperature.counters().items() if n}})
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from nothing or from a checkpoint (True: the newest complete one of ``args.output_dir``).

        A run that is resumed with another ``max_steps`` or ``num_train_epochs`` goes on where that is exact: with a learning
        rate and a temperature that do not depend on how long the run is (``lr_scheduler_type="constant"``, a constant
        temperature). Otherwise it is refused: both are scheduled over the whole run, so a longer one is another run.

        Raises:
            UserError: the checkpoint is not complete, holds the weights alone, was not written by dts_hf, or this launch
                cannot go on from it exactly.
            RunError: training cannot go on (see ``stop_broken_run``), the last step broke the weights, or the disk takes no
                checkpoint.
        """
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        if resume_from_checkpoint is True:
            folder = newest_complete(str(self.args.output_dir))
            if folder is None:
                newest = next(iter(reversed(checkpoints(str(self.args.output_dir)))), None)
                why = "" if newest is None else f"; {newest.name}: {why_not_resumable(newest)}"
                raise UserError(f"{self.args.output_dir}: holds no complete checkpoint to resume from{why}")
        self.exact_resume.begin(folder)
        self._logged_at = time.monotonic()
        self.stop_agreed = False
        try:
            with at_step_end():
                output = super().train(str(folder) if folder else None, *args, **kwargs)
                self._check_weights()  # of the last steps: no checkpoint has to follow them
                return output
        finally:
            if self._use_cache is not None:  # off for training; what is saved now is for generation
                self.model.config.use_cache = self._use_cache  # type: ignore[union-attr]
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    callback.close()

    @property
    def training_seconds(self) -> float:
        """How long ``train`` took, with the attempts before a resume."""
        return self.exact_resume.seconds

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock_stopped():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside does not count for ``tokens_per_second``."""
        stopped_at = time.monotonic()
        try:
            yield
        finally:
            self._logged_at += time.monotonic() - stopped_at

    def no_training_since(self, began: float) -> None:
        """What was done since ``began`` (monotonic seconds), before the first step, counts for no clock."""
        self._logged_at = time.monotonic()
        self.exact_resume.leave_out(self._logged_at - began)

    def prepare_temperature(self, steps: int | None) -> None:
        """Let the policy read what it needs besides this run; every process calls it and gets what the first one read.

        Args:
            steps: optimizer steps of the whole run; None where they are not known yet.

        Raises:
            UserError: it cannot be read, or does not fit a run of this length.
        """

        def read() -> dict[str, Any]:
            self.temperature.begin_run(steps)
            return self.temperature.state()

        state = on_first_process(read, self.args.process_index, self.args.world_size)
        self.temperature.load_state(state)
        if self.state.global_step == 0:  # a retry needs nothing read again: the other run may be gone by then
            self._fresh_state = state

    def planned_steps(self) -> int | None:
        """Optimizer steps that ``train`` will take; None where only the Trainer finds out (rows without a number)."""
        if not hasattr(self.train_dataset, "__len__"):
            return self.args.max_steps if self.args.max_steps > 0 else None
        devices = self.args.world_size * max(1, self.args.n_gpu)
        return total_steps(self.args, len(self.train_dataset), devices)  # type: ignore[arg-type]

    def reset_statistics(self) -> None:
        """Start a run from nothing: the temperature as it was given, and no sums."""
        self.temperature.load_state(copy.deepcopy(self._fresh_state))
        self.step_meter, self.eval_meter, self.mean_log = SumMeter(), SumMeter(), MeanLog(self._named)
        self.tokens_seen = 0.0  # real tokens (no padding) of all ranks, up to the last log line
        self._logged_at = time.monotonic()

    def stop_broken_run(self, step: int) -> None:
        """Write down which rows the step was made of, and end training; every rank calls it at the same step.

        Raises:
            RunError: always.
        """
        numbers = torch.cat(self.rows_of_step).tolist() if self.rows_of_step else []
        numbers = [number for number in numbers if number >= 0]
        names = getattr(self.train_dataset, "row_ids", None)
        folder = Path(str(self.args.output_dir))
        rows = [{"row": number, "id": names[number] if names else None} for number in numbers]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)  # of a machine whose processes write nothing else
            write_json_atomic(
                folder / f"broken_step-{step}.rank{self.args.process_index}.json", {"step": step, "rows": rows}
            )
        raise RunError(
            f"step {step}: the loss has been non-finite (NaN or Inf) for {BROKEN_STEPS} steps in a row, so training stops; "
            f"its rows are in {folder / f'broken_step-{step}.rank*.json'}. The newest checkpoint is from before. Usual "
            "causes: a learning rate too high, fp16 without a loss scale, broken rows, -inf logits (a masked vocabulary "
            "entry, a bias of -inf)",
            everywhere=True,
        )

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is not; such weights are no good checkpoint. All ranks call it.

        Raises:
            RunError: a weight is non-finite.
        """
        weights = cast(nn.Module, self.model).parameters()
        sums = [local_shard(p).detach().sum(dtype=torch.float32) for p in weights if p.requires_grad]
        finite = torch.stack(sums).isfinite().all() if sums else torch.ones((), dtype=torch.bool)
        if not bool(self.accelerator.gather(finite.reshape(1).to(self.args.device)).all()):
            raise RunError(
                f"step {self.state.global_step}: the student has non-finite weights, so it is not saved and "
                "training stops. The newest checkpoint is from before. Usual causes: a learning rate too high, fp16 "
                "without a loss scale",
                everywhere=True,
            )

    # ---------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint_now(self) -> Path | None:
        """Save a complete checkpoint of the optimizer step that has just ended, whatever the recipe saves, and return it.

        What this step still has to do (its log line, a held-out evaluation) is noted in it and made up for on resume.
        Every rank calls it at the same step, from an ``on_step_end`` after ``TemperatureCallback``; then training must end.
        It is whole, on the disk, when it returns.

        Returns:
            The folder, ``interrupted/checkpoint-STEP``; None, and nothing is written, where the loss was non-finite.
        """
        if any(isinstance(c, TemperatureCallback) and c.broken_steps for c in self.callback_handler.callbacks):
            return None
        only_model, self.args.save_only_model = self.args.save_only_model, False
        self.interrupting = True
        try:
            self._save_checkpoint(self.model_wrapped, None)
            return self._checkpoint_folder(None)
        finally:
            self.interrupting, self.args.save_only_model = False, only_model

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        # A place of its own: the Trainer must not take it for the checkpoint of an evaluation, or count it.
        return os.path.join(folder, INTERRUPTED) if self.interrupting else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder, resumed_from = self._checkpoint_folder(trial), self.exact_resume.resumed_from
        if resumed_from is not None and folder.resolve() == resumed_from.resolve():
            return  # made up for on resume: it is complete already, and still read from
        with self.clock_stopped(), writing(folder.parent):
            if self.args.should_save and folder.exists():
                remove(folder)  # what a killed run left of it
            self.accelerator.wait_for_everyone()
            self.exact_resume.save(folder)
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones are needed until the end
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                step, resumable = self.state.global_step, not self.args.save_only_model
                mark_complete(folder, step=step, resumable=resumable, **layout(self))
                run = folder.parent.parent if self.interrupting else folder.parent
                rotate(run, step, None if self.interrupting else limit, keep=[self.state.best_model_checkpoint])
            self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Not in _load_from_checkpoint, which the Trainer does not call under DeepSpeed.
        if checkpoint is not None:
            self.exact_resume.load(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        # The first place that knows how many steps the run has; nothing is loaded or written yet.
        values = super().set_initial_training_values(*args, **kwargs)
        self.exact_resume.check_length(values[-1])
        return values

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed where training had come to its end: the Trainer would take one more step.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.exact_resume.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.exact_resume.grad_norm

    def _get_learning_rate(self) -> float:
        self.exact_resume.learning_rate = super()._get_learning_rate()
        return self.exact_resume.learning_rate

    # ------------------------------------------------------------------------------------------------- the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The Trainer's, private unless ``private`` or ``args.hub_private_repo`` is False."""
        given = self.args.hub_private_repo if private is None else private
        super().init_hf_repo(token, True if given is None else given)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the student, its tokenizer and its card, from a folder made for it that holds nothing else.

        Never ``args.output_dir`` itself: logs, checkpoints and answers to held-out rows lie there. All processes call it.

        Args:
            private: of a repository that has to be made; None: ``args.hub_private_repo``, and where that is None, True.
            kwargs: as for ``Trainer.push_to_hub``, with ``tags`` a list or one tag.

        Returns:
            As ``Trainer.push_to_hub``.
        """
        own = str(self.args.output_dir)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)  # its name may be that of the folder
        if isinstance(kwargs.get("tags"), str):
            kwargs["tags"] = [kwargs["tags"]]
        name = kwargs.pop("model_name", None) or Path(self.args.hub_model_id or Path(own).absolute()).name
        self._finish_current_push()
        staged = Path(own) / UPLOAD
        main = self.is_world_process_zero()
        if main:
            _remove_all_of(staged)  # of a killed process
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staged)
        done: Any = None
        try:
            done = super().push_to_hub(commit_message, blocking, token, revision, private, model_name=name, **kwargs)
        finally:
            self.args.output_dir = own
            if main and (blocking or done is None):
                shutil.rmtree(staged, ignore_errors=True)
        if main and not blocking:
            self.push_in_progress = PushInProgress([done])  # type: ignore[assignment, arg-type]
            done.add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
        return done

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer's would upload ``args.output_dir`` as it is. Only the finished student leaves."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The Trainer's, but ``training_args.bin`` holds nobody's token and is not uploaded.

        Raises:
            UserError: the weights to upload are split over processes, and DeepSpeed does not gather them.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if folder.name == UPLOAD and state_dict == {}:  # the Trainer would put a checkpoint there, optimizer included
            raise UserError(
                "deepspeed: stage3_gather_16bit_weights_on_model_save is false, expected true: the student is in pieces and "
                "cannot be uploaded"
            )
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if folder.name == UPLOAD:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The distillation's own card where there is one, else the Trainer's with our tags."""
        if self.model_card is None:
            tags = ["dts_hf", "knowledge-distillation", self.temperature.name]
            more = kwargs.get("tags") or []
            more = [more] if isinstance(more, str) else more
            super().create_model_card(*args, **{**kwargs, "tags": [*tags, *more]})
        elif self.is_world_process_zero():
            write_text_atomic(Path(str(self.args.output_dir)) / "README.md", self.model_card())


DTSDistillationTrainer = DistillationTrainer


def _check_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the Trainer would take and this loss would ignore without a word, and say what to give instead."""
    if kwargs.get("model_init") is not None:
        raise UserError(
            "model_init: teacher and student are compared before training, so it is not supported; expected the student as "
            "model. For a search over hyperparameters make one trainer for each setting"
        )
    if "peft_config" in kwargs:
        raise UserError(
            "peft_config: expected the student with its adapter: model = peft.get_peft_model(model, peft_config); in a "
            "recipe, student.lora"
        )
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name}: the loss needs no logits, so it would never be called; expected None")
    if args.label_smoothing_factor:
        raise UserError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: it is not used here"
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"args.hub_strategy: got '{HubStrategy(args.hub_strategy).value}', expected 'end': a checkpoint lies among logs "
            "and held-out answers and is not uploaded; the finished student is, once"
        )
    # Our dummy rows make the batches of an epoch even; with these, accelerate counts steps and shares rows out otherwise.
    for name, expected in (("split_batches", False), ("even_batches", True)):
        value = getattr(args.accelerator_config, name)
        if value != expected:
            raise UserError(
                f"args.accelerator_config: got {name}: {value}, expected {name}: {expected}; "
                "per_device_train_batch_size is the batch of each process"
            )
    foreign = [name for name in ("lmbda", "beta", "packing", "max_length", "temperature") if hasattr(args, name)]
    if foreign:
        raise UserError(
            f"args: {type(args).__name__} has {', '.join(foreign)}, which would have no effect; expected "
            "transformers.TrainingArguments, and such options as arguments of the trainer"
        )


def _remove_all_of(folder: Path) -> None:
    """Or fail: what is left there would be uploaded. Of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a weight that ZeRO-3 or FSDP2 has split, else all of it."""
    if hasattr(parameter, "ds_tensor"):
        part: Tensor = parameter.ds_tensor
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        # Parts are of one size; what the last one has too much was never written to.
        return part[: max(0, parameter.ds_numel - rank * part.numel())]  # type: ignore[attr-defined]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[no-any-return, operator]


def count_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of a batch, as a 0-d tensor: neither padding nor dummy rows."""
    return real_tokens(inputs).sum()


def _collects_router_logits(model: nn.Module) -> bool:
    """Whether the model's own loss has an auxiliary one for its routers."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))  # type: ignore[operator, union-attr]


def count_cells(inputs: Mapping[str, Tensor]) -> Tensor:
    """Tokens of a batch with its padding, but without dummy rows, as a 0-d tensor."""
    return count_tokens({name: value for name, value in inputs.items() if name != "attention_mask"})


def _temperature(spec: TemperaturePolicy | Mapping[str, Any] | str | float) -> TemperaturePolicy:
    if isinstance(spec, TemperaturePolicy):
        return spec
    if isinstance(spec, str):
        return build_temperature(spec)
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise UserError(
                f"temperature: got {dict(spec)!r}, expected a mapping with a name, as in {{'name': 'dts'}}"
            )
        return build_temperature(**spec)
    return build_temperature("constant", value=spec)
