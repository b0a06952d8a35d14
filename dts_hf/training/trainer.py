"""``DistillationTrainer``: Hugging Face's Trainer whose loss runs teacher and student on the same batch.

The name is also used by TRL (always on-policy) and DistillKit; ``DTSDistillationTrainer`` is the same class under a
name that cannot be confused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from dts_hf.alignment import batch as alignment_keys
from dts_hf.data.chat_templates import end_of_turn_ids
from dts_hf.data.collators import Collator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.routes import TEACHER, OwnRows
from dts_hf.data.samplers import real_tokens
from dts_hf.data.streams import RowStream, Sample
from dts_hf.data.targets import TrainOn
from dts_hf.data.teacher_context import TEACHER_BATCH
from dts_hf.data.tokenised import NUM_LABELS, TokenisedDataset
from dts_hf.distributed.launch import strategy_of
from dts_hf.distributed.sharding import check_placement, shard_teacher
from dts_hf.divergences import Divergence
from dts_hf.errors import UserError
from dts_hf.loss.compact_served import check_served
from dts_hf.loss.distillation_loss import check_has_teacher
from dts_hf.loss.logged_sums import LogColumns
from dts_hf.loss.selection import response_positions, select_response, sequence_numbers
from dts_hf.loss.statistics import AUX, OF_TEACHER, ROWS
from dts_hf.models.head import Head, head_of, loss_in_head
from dts_hf.models.router import collects_router_logits
from dts_hf.on_policy.settings import OnPolicySettings
from dts_hf.teachers.aligned import CommonIds, aligned_share
from dts_hf.teachers.asked_ahead import TICKET
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.cached.teacher import LOGPROBS, MISSING, STATES, CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_teacher import CopyTeacher, SelfTeacher, TeacherOfItself
from dts_hf.teachers.several import SeveralTeachers, Share, gathered, loss_of_shares, naming_teacher, routing_of
from dts_hf.temperature import TemperaturePolicy
from dts_hf.training.arguments import checked_arguments, in_order
from dts_hf.training.datasets import LanguageRows, check_aligned, try_collator
from dts_hf.training.even_batches import count_tokens
from dts_hf.training.exact_resume import ExtraState, Progress
from dts_hf.training.pair import AnyTeacher, Pair, identity_of_states, pack_tokens, set_up_models
from dts_hf.training.projection import PROJECTORS_FILE, Projection, check_projectable
from dts_hf.training.replay_trainer import REPLAY, ReplayTrainer
from dts_hf.training.self_teaching import (
    FollowCallback,
    check_launch_of_self,
    columns_with_prefix,
    load_mean,
    mean_of,
    objective_of_teacher,
    record_of,
    saved_mean,
)
from dts_hf.training.student import first_student, made_by

#: What our own collators put into a batch for a teacher alone.
FOR_TEACHERS = (STATES, MISSING, LOGPROBS, TICKET, *TEACHER_BATCH.values())
#: Columns of a batch that neither model is given; those of ``alignment`` are a batch of the teacher's own.
NOT_FOR_MODELS = frozenset(
    {"labels", "row_id", "cu_seqlens", NUM_LABELS, TEACHER, REPLAY, *FOR_TEACHERS, *alignment_keys.KEYS}
)


def is_for_teachers(key: str) -> bool:
    """Whether a column of a batch is for a teacher alone, or for one of several (``KEY/NAME``)."""
    return key.partition(OF_TEACHER)[0] in FOR_TEACHERS


def seen_by_models(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that a model is called with."""
    return {key: value for key, value in inputs.items() if key not in NOT_FOR_MODELS and not is_for_teachers(key)}


class DistillationTrainer(ReplayTrainer):
    """Distil ``teacher`` into ``model``.

    Args:
        model: the student, or the name or folder of one; None with ``model_init``.
        teacher: a causal language model, its name or folder (then its weights are in bfloat16, as in a recipe), or anything
            with the ``Teacher`` interface, such as a ``CachedTeacher``; a ``SelfTeacher`` where the student teaches itself
            (docs/self_distillation.md); None with ``kd_ratio`` 0 is plain fine-tuning.
        temperature: a policy, ``{"name": "dts", "rule": "gap"}``, a policy's name, or a number (constant).
        divergence: ``"forward_kl"``, ``{"name": "jsd", "beta": 0.5}``, ...
        kd_ratio: loss = (1 - kd_ratio) ce_loss + kd_ratio kd_loss.
        args: ``transformers.TrainingArguments``; the trainer works on a copy.
        train_dataset: rows (``instruction``/``input``/``output`` or ``messages``), or tokenised rows with unshifted
            ``input_ids`` and ``labels`` (see ``data.tokenised``): a list, a data set, a data frame; or a stream, that is an
            iterable data set or a generator function. docs/datasets.md has them all.
        eval_dataset: the same kinds, or a dictionary of several.
        processing_class: the tokenizer; by default the student's own.
        temperature_scaling: ``"squared"`` or ``"none"`` (see ``DistillationLoss``).
        logits_budget_mb, kernels, logits_dtype: memory for one chunk of logits, MiB, and who computes it in what (see
            ``DistillationLoss``).
        prompt_template: for rows; ``auto``: the tokenizer's chat template where it has one, else ``alpaca``.
        train_on: for rows: ``last_turn``, ``all_turns`` or ``completion``; None: ``completion`` for prompt/completion
            rows, else ``all_turns``. See ``data.targets.TextCutter``.
        max_length, max_prompt_length, long_rows: for rows; see ``data.encoding.encode_rows`` (tokens).
        columns: for rows; our names of columns and theirs, as ``{"instruction": "ask", "output": "gold"}``.
        packing: lay the rows of a batch end to end, without padding. ``{"tokens": 8192}`` also fills each training batch to
            so many tokens by best fit, whatever ``args.per_device_train_batch_size``, so that steps cost the same.
        vocab_alignment: ``strict``, ``truncate_to_tokenizer`` or ``intersect``.
        alignment: ``overlap`` lets the teacher have another tokenizer (``teacher_tokenizer``): it reads rows in its own
            template, and is compared on the bytes and tokens that both share; ``dual_space`` compares whole distributions
            there, through learned maps between the two models' states. See docs/other_tokenizers.md.
        teacher_tokenizer: compared with the student's; by default the teacher's own when ``teacher`` is a name.
        router_aux_loss: ``model`` adds the auxiliary loss of a mixture of experts where the model itself would (its
            configuration's ``output_router_logits`` and ``router_aux_loss_coef``), logged as ``aux_loss``; ``none`` leaves
            it out. Held-out losses never have it. See ``models.router.Router``.
        teachers: several by name, in the place of ``teacher``; the same object or folder under two names is one model in
            memory. Each row has one of them (``teacher_column``), or all have every row (``teacher_weights``). See
            docs/several_teachers.md.
        teacher_weights: of their losses, by name, adding up to 1.
        teacher_column: of the rows, with the name of their teacher; that of the training rows and of held-out ones.
        default_teacher: of rows that name none; None: that is an error.
        temperature_per_teacher: each teacher has a state of the temperature's policy of its own, which sees its rows alone;
            False: one state sees all rows.
        teacher_prefix_column: of rows of text, with a text that the teacher alone reads, before the last question: a
            demonstration, or the verified solution. Held-out rows need it, too. See docs/self_distillation.md.
        teacher_placement: ``replicated``, the whole teacher on every process, or ``sharded``, spread over all of them
            (see ``distributed.sharding.shard_teacher``).
        on_policy: ``OnPolicySettings`` or a mapping of its options, such as ``{"fraction": 0.5}``: in that share of the
            steps the student answers the prompts itself, and learns what the teacher says of its text. See
            docs/on_policy.md.
        data_collator: makes the batches of tokenised rows instead of our own padding. Rows come to it as they are, with
            the columns that ``args.remove_unused_columns`` leaves; labels may be its work
            (``DataCollatorForLanguageModeling`` with ``mlm=False``).
        peft_config: of an adapter that the student gets, such as ``peft.LoraConfig``; the output layer has none.
        quantize: train for a quantised form, as ``{"scheme": "int4_weight_only", "group_size": 32}``: every forward sees the
            weights of the student's layers rounded (see ``models.fake_quantization``). Needs torchao; not with adapters.
        model_init: makes the student, anew for every ``train``; takes nothing, or the trial of a
            ``hyperparameter_search``.
        kwargs: ``predict_with_generate``, ``generation`` and ``compute_metrics`` (see ``GeneratingTrainer``), everything
            else that ``Trainer`` takes, and ``model_card``, which returns the text of the model card that
            ``push_to_hub`` uploads, in the place of ours. With ``args.push_to_hub`` a student is uploaded at saves too,
            unless ``args.hub_strategy`` is ``end``; never more than ``hub.staging`` lets go.

    Attributes:
        encoding_reports: what became of the rows, by data set: ``"train_dataset"``, ``"eval_dataset"`` or
            ``"eval_dataset['name']"``, and of the last call ``"evaluate"`` and ``"predict"``. Where rows are dropped, cut,
            or kept without a label that counts, it is logged as a warning.

    There are no logits: ``compute_loss(..., return_outputs=True)`` returns ``{"loss": loss}`` beside the loss,
    ``prediction_step`` the loss and two None, and the ``predictions`` of ``predict`` are None or generated token ids.

    Raises:
        UserError: anything that does not fit together, before the first step.
    """

    #: The maps of dual space, where the alignment is that.
    projection: Projection | None = None

    @in_order
    def __init__(
        self,
        model: nn.Module | str | None = None,
        teacher: nn.Module | Teacher | SelfTeacher | str | None = None,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float = "dts",
        divergence: Divergence | Mapping[str, Any] | str = "forward_kl",
        kd_ratio: float = 0.5,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        temperature_scaling: str = "squared",
        logits_budget_mb: float | None = None, kernels: str = "auto", logits_dtype: str = "auto",
        prompt_template: str = "auto", train_on: TrainOn | None = None,
        max_length: int = 512, max_prompt_length: int = 256, long_rows: str = "drop",
        columns: Mapping[str, str | None] | None = None, packing: bool | Mapping[str, int] = False,
        vocab_alignment: str = "strict", alignment: str | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        teacher_placement: str = "replicated",
        teachers: Mapping[str, AnyTeacher] | None = None, teacher_weights: Mapping[str, float] | None = None,
        teacher_column: str | None = None, default_teacher: str | None = None, temperature_per_teacher: bool = False,
        teacher_prefix_column: str | None = None, router_aux_loss: str = "model",
        on_policy: OnPolicySettings | Mapping[str, Any] | None = None, quantize: Mapping[str, Any] | None = None,
        data_collator: Any = None, peft_config: Any = None, model_init: Callable[..., nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        # 1. Two models that can be compared, and batches that both read.
        args = checked_arguments(args, kwargs, type(self))
        check_placement(teacher_placement)
        routing = routing_of(teacher, teachers, teacher_column, default_teacher, teacher_weights)
        check_has_teacher(teacher is not None or bool(teachers), kd_ratio)
        model = first_student(model, model_init, args, **kwargs)
        pair = set_up_models(model, teachers or teacher, processing_class, teacher_tokenizer, vocab_alignment, args,
                             peft_config, teacher_weights, alignment, quantize)  # fmt: skip
        self.pair, self.peft_config, self.quantize, self.router_choice = pair, peft_config, quantize, router_aux_loss
        self.teacher, self.vocab_size, self.vocab_note = pair.teacher, pair.vocabulary.size, pair.vocabulary.note
        self.router = pair.router(router_aux_loss)
        collator = pair.collator(bool(packing), data_collator, args)
        columns = columns_with_prefix(columns, teacher_prefix_column, pair.teacher, data_collator)
        # 2. Rows, loss and temperature; without a teacher there is nothing to soften.
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "long_rows": long_rows,
                  "train_on": train_on}  # fmt: skip
        rows = LanguageRows(pair, prompt_template, limits, collator, columns, routing)
        self.alignment, self.common = alignment, None if rows.aligner is None else CommonIds(rows.aligner.common)
        loss_options = {"temperature_scaling": temperature_scaling, "logits_budget_mb": logits_budget_mb,
                        "kernels": kernels, "logits_dtype": logits_dtype}  # fmt: skip
        super().__init__(
            pair.student, args, collator, train_dataset, eval_dataset, pair.tokenizer,
            temperature=temperature if pair.taught else 1.0, divergence=divergence, kd_ratio=kd_ratio,
            classes=self.vocab_size if self.common is None else len(self.common.common), loss_options=loss_options,
            columns=LogColumns(pair.taught, teachers=tuple(teachers or ())), temperature_per_teacher=temperature_per_teacher,
            rows=rows, pack_tokens=pack_tokens(packing), facts=pair.facts(), on_policy=on_policy, **kwargs,
        )  # fmt: skip
        self.model_init = model_init  # type: ignore[assignment]
        # 3. What needs the Trainer: a collator of the user's as the data loaders call it, and the device.
        self._try_collator(pair)
        self._place_teachers(teacher_placement == "sharded", (teacher, *(teachers or {}).values()))
        self._check_cache()
        self._start_projection()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        check_aligned(self.train_dataset, self.loss.kd_ratio)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def teacher_model(self) -> nn.Module | None:
        live = isinstance(self.teacher, LiveTeacher) and not isinstance(self.teacher, CopyTeacher)  # no other model
        return cast(LiveTeacher, self.teacher).model if live else None

    @property
    def teacher_models(self) -> dict[str, nn.Module]:
        if not isinstance(self.teacher, SeveralTeachers):
            return super().teacher_models
        live = ((name, one) for name, one in self.teacher.by_name.items() if isinstance(one, LiveTeacher))
        return {f"teachers.{name}": one.model for name, one in live}

    @property
    def several(self) -> dict[str, Any]:
        if not isinstance(self.teacher, SeveralTeachers):
            return {}
        weights = self.teacher.weights or {}
        elsewhere = {name: identity_of_states(one) for name, one in self.teacher.by_name.items()}
        return {
            name: {"weight": weights.get(name), **({} if identity is None else {"model": identity.model})}
            for name, identity in elsewhere.items()
        }

    @property
    def itself(self) -> dict[str, Any]:
        return self.teacher.spec.facts if isinstance(self.teacher, TeacherOfItself) else {}

    def describe_objective(self) -> dict[str, Any]:
        aligned = {} if self.alignment is None else {"alignment": self.alignment}
        router = self.router.coefficient if self.router else None
        return {
            **super().describe_objective(), "router_aux_loss": router, **objective_of_teacher(self.teacher), **aligned
        }  # fmt: skip

    @property
    def teacher_records(self) -> dict[str, dict[str, Any]]:
        if isinstance(self.teacher, TeacherOfItself):
            return {"teacher": record_of(self.teacher)}
        by_key: dict[str, Teacher] = {"teacher": self.teacher}
        if isinstance(self.teacher, SeveralTeachers):
            by_key = {f"teachers.{name}": one for name, one in self.teacher.by_name.items()}
        return {key: one.record() for key, one in by_key.items() if isinstance(one, (CachedTeacher, RemoteTeacher))}

    def step_callbacks(self) -> list[TrainerCallback]:
        mean = mean_of(self.teacher)
        follow = [] if mean is None else [FollowCallback(mean, lambda: cast(nn.Module, self.model))]
        return [*follow, *super().step_callbacks()]  # first: a held-out gap is measured at the end of a step, too

    def extra_state(self) -> ExtraState:
        extra = super().extra_state()
        if not self.args.save_only_model and self.args.should_save:
            extra.tensors |= saved_mean(self.teacher)
        if self.projection is not None:
            extra.tensors[PROJECTORS_FILE] = self.projection.state()
        return extra

    def load_extra_state(self, folder: Path, progress: Progress) -> None:
        super().load_extra_state(folder, progress)
        load_mean(self.teacher, folder)
        if self.projection is not None:
            self.projection.load(folder / PROJECTORS_FILE)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A student of ``model_init``, with its adapter, that fits the teacher as the first one did.

        Raises:
            UserError: it is no model, or does not fit.
        """
        assert self.model_init is not None
        self.pair = self.pair.with_student(made_by(self.model_init, trial), self.peft_config, self.quantize)
        self.router = self.pair.router(self.router_choice)
        if isinstance(self.rows, LanguageRows):
            self.rows.models = self.pair.models()
        self.compile_layers(self.pair.student, "the student")
        config: Any = self.pair.student.config
        config.use_cache = self.args.use_cache  # as the Trainer's __init__ does
        self._start_projection()
        return self.pair.student

    def _place_teachers(self, shard: bool, given: Sequence[Any]) -> None:
        check_launch_of_self(self.teacher, strategy_of(self.accelerator), shard)
        for teacher, _ in self.pair.live:
            if shard and not any(teacher is one for one in given):  # an object of the user's stays as it is
                shard_teacher(teacher.model, self.args.device)
        self.teacher.to(self.args.device)
        for teacher, role in self.pair.live:
            self.compile_layers(teacher.model, role)

    @property
    def _distinct(self) -> list[tuple[Teacher, list[str]]]:
        """The teacher without a name, or each of several once, with all its names."""
        return self.teacher.distinct if isinstance(self.teacher, SeveralTeachers) else [(self.teacher, [""])]

    def _check_cache(self) -> None:
        """A cached teacher must know its rows, and its states must be those that its head reads; a server must take them."""
        held_out: Any = self.eval_dataset
        named = {f"eval_dataset['{key}']": rows for key, rows in held_out.items()} if isinstance(held_out, dict) else {
            "eval_dataset": held_out}  # fmt: skip
        for teacher, names in self._distinct:
            places = self.teacher.places(names) if isinstance(self.teacher, SeveralTeachers) else None
            with naming_teacher(names[0]):
                for name, dataset in {"train_dataset": self.train_dataset, **named}.items():
                    self._check_rows(teacher, dataset, name, places)
        self._check_compact()

    def _check_compact(self) -> None:
        """What a compact cache has kept must be enough for the loss."""
        for teacher, names in self._distinct:
            with naming_teacher(names[0]):
                policy = self.temperature.of_teacher(names[0] or None)
                if isinstance(teacher, CachedTeacher):
                    teacher.check_loss(policy, self.loss.divergence, self.vocab_size)
                elif getattr(teacher, "compact", False):
                    check_served(policy, self.loss.divergence)

    def check_loss_of_trial(self) -> None:
        super().check_loss_of_trial()
        self._check_compact()

    def _check_rows(self, teacher: Teacher, dataset: Any, name: str, places: Collection[int] | None) -> None:
        """Refuse rows that ``teacher`` does not answer; of several those with these ``places``, None: it has every row."""
        own = dataset if places is None or dataset is None else OwnRows(dataset, places)
        if isinstance(teacher, CachedTeacher) and isinstance(dataset, (TokenisedDataset, EncodedDataset)):
            rows: Any = self.rows  # LanguageRows
            template = rows.encode_options["template"] if isinstance(dataset, EncodedDataset) else None
            if rows.aligner is not None:
                template = rows.aligner.teacher.cutter.template
            teacher.check_rows(own, name, self.pair.teacher_tokenizer or self.pair.tokenizer, template)
        if isinstance(teacher, RemoteTeacher):
            teacher.check_rows(own, name)

    def _try_collator(self, pair: Pair) -> None:
        """Refuse a collator of the user's that makes no batch to learn from, of any of the data sets."""
        if isinstance(self.data_collator, Collator):
            return
        held_out: Any = self.eval_dataset
        smallest = min(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        for given in (self.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])):
            dataset: Any = given.sample() if isinstance(given, RowStream) else given
            if not isinstance(dataset, (TokenisedDataset, EncodedDataset, Sample)) or not len(dataset):
                continue
            end_to_end = try_collator(self.data_collator, self.collate, dataset, smallest)
            if end_to_end:
                pair.check_packing(self.args, own_mask=False)

    # ------------------------------------------------------------------------------------------ the maps of dual space

    def _start_projection(self) -> None:
        """Begin with maps between these two models, where there are any."""
        if self.alignment != "dual_space":
            return
        assert self.common is not None
        own, theirs = head_of(self.pair.student), cast(Head, self.teacher.head)
        if self.projection is not None:
            self.projection.start(own, theirs)
            return
        check_projectable(self.accelerator, self.optimizer)
        self.projection = Projection(own, theirs, self.common.on(self.args.device), self.args.device)
        self.add_callback(self.projection)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, which has the maps of dual space as well."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projection is not None:
            self.projection.join(optimizer)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.projection is not None and self.accelerator.sync_gradients:
            self.projection.reduce()
        return loss

    def end_token_ids(self) -> list[int]:
        rows: Any = self.rows  # LanguageRows
        return [*super().end_token_ids(), *end_of_turn_ids(self.pair.tokenizer, rows.encode_options["template"])]

    # ------------------------------------------------------------------------------------------------------- the batch

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

        Args:
            model: the student in its wrapper.
            inputs: ``input_ids`` and ``labels`` ``[B, T]``, with what else the collator gives.
            return_outputs: also return ``{"loss": loss}``; there are no logits.
            num_items_in_batch: labels of the whole optimizer step, all ranks together.
        """
        # 1. What the models see of the batch, and what the loss is divided by.
        labels = inputs["labels"]
        batch = seen_by_models(inputs)
        if "cu_seqlens" in inputs:
            batch["attention_mask"] = inputs["cu_seqlens"]
        normalizer = self.normalizer(labels, num_items_in_batch)
        positions = response_positions(labels, self.labels_on_host(inputs))
        loss_fn, meter = self.loss_and_meter(model.training)
        # What the student has said itself is no label: the divergence alone (docs/on_policy.md)
        kd_ratio = 1.0 if self.generated_step and model.training else None
        pseudo_labels = self.pseudo_labels and model.training
        by_sequence = loss_fn.temperature.needs_sequence_gap
        sequences = sequence_numbers(labels, batch.get("position_ids"), positions) if by_sequence else None
        # 2. The teacher: [N, H_t], the states of the rows that carry a label; of several each one's of its rows.
        shares = self.shares(inputs, batch, labels, positions)
        sums: dict[str, Tensor] = {}

        # 4. The loss, in the place of the student's output layer: states [B, T, H] -> [N, H] -> [].
        def loss_of_states(states: Tensor, head: Head) -> Tensor:
            rows, targets = select_response(states, labels, positions)
            own_head = head.cut(self.vocab_size)
            output = loss_of_shares(
                loss_fn, whole_shares, rows, own_head, targets, normalizer, sequences, kd_ratio, pseudo_labels
            )
            sums.update(output.sums, loss=output.loss.detach())
            return output.loss

        # 3. The student. The teacher's head is read outside of its context, where its scale and soft-cap are on.
        student = cast(nn.Module, self.model)  # unwrap_model(model) searches the installed packages each time: 5 ms
        with gathered(shares, self.vocab_size) as whole_shares, loss_in_head(student, loss_of_states):
            outputs = model(**batch, **self._router_options(model.training), use_cache=False)
        loss = _exact(outputs.logits, sums.pop("loss"))
        # 5. The one term that is no sum over rows.
        if self.router is not None and model.training:
            aux_loss = self._router_loss(outputs.router_logits, inputs)
            # Each micro-batch counts by its labels: over all of them and all ranks the weights add up to num_processes.
            loss = loss + (self.router.coefficient * aux_loss * sums[ROWS] / normalizer).to(loss.dtype)
            sums[AUX.sum] = aux_loss.detach() * sums[ROWS]
        # 6. The sums are reduced once a step, by TemperatureCallback.
        of_texts = self.take_sums_of_texts() if model.training else {}
        meter.add({**sums, **of_texts, "tokens": count_tokens(inputs)})
        return (loss, {"loss": loss}) if return_outputs else loss

    def shares(
        self, inputs: Mapping[str, Any], batch: dict[str, Any], labels: Tensor, positions: Tensor
    ) -> list[Share]:
        """What the teacher, or each of several, says of a batch; see ``ReplayTrainer.shares``.

        Args:
            inputs: the batch as the collator made it.
            batch: what the student sees of it.
            labels: ``[B, T]`` unshifted.
            positions: ``[N]``, ``selection.response_positions(labels)``.
        """
        if self.common is None:
            given = {key: value for key, value in inputs.items() if is_for_teachers(key)}
            return super().shares(inputs, {**batch, **given}, labels, positions)
        projectors = None if self.projection is None else self.projection.projectors
        return [aligned_share(self.teacher, inputs, self.common, projectors)]

    def _router_options(self, training: bool) -> dict[str, Any]:
        """Where the student's configuration asks for the router's loss, collect what it needs, or save the work."""
        collects = collects_router_logits(cast(nn.Module, self.model))
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


DTSDistillationTrainer = DistillationTrainer


def _exact(returned: Tensor, exact: Tensor) -> Tensor:
    """The loss ``[]`` that a model returned, undone what FSDP2 in bf16 rounds of it; the gradient is whole anyway.

    Args:
        returned: with the graph.
        exact: the same number as the loss gave it, detached.
    """
    if returned.dtype == exact.dtype:
        return returned
    loss = returned.to(exact.dtype)
    return loss + (exact - loss).detach()
