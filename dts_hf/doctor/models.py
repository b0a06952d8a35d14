"""Checks of the loaded models: their weights, their vocabularies, and what each of them thinks of the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.teacher_context import split_batch
from dts_hf.doctor.diagnosis import Check, Skipped
from dts_hf.doctor.effect import Sample
from dts_hf.loss.compact_rows import joined
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.overlap import row_masses
from dts_hf.loss.selection import select_response, sequence_numbers
from dts_hf.models.head import Head, head_of, loss_in_head
from dts_hf.models.quantization import compare_heads
from dts_hf.models.vocabulary import align_vocabularies
from dts_hf.reporting.facts import format_count
from dts_hf.teachers.aligned import CommonIds, aligned_share
from dts_hf.teachers.base import Teacher
from dts_hf.training.distillation_base import DistillationBase
from dts_hf.training.trainer import DistillationTrainer, seen_by_models

#: A teacher whose cross-entropy is above this share of ln V has learned next to nothing.
UNTRAINED = 0.95
#: Mean KL of a quantised teacher from the full one, in nats per label, up to which nothing is said.
FAITHFUL = 0.02


def describe_weights(check: Check, role: str, model: nn.Module) -> None:
    """How many weights a model has, and how many of them are trained."""
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    check.values[role] = {"class": type(model).__name__, "parameters": parameters, "trained": trained}
    adapters = f", {format_count(trained)} of them trained" if role == "student" and trained < parameters else ""
    check.summary = f"{format_count(parameters)} weights{adapters} ({type(model).__name__}, {dtype_name(model)})"


def check_step_size(check: Check, model: nn.Module, learning_rate: float) -> None:
    """Weights kept in bf16 or fp16 swallow steps below half of their spacing; Adam's steps are about the learning rate."""
    swallowed = total = 0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            exponent = weight.detach().float().abs().clamp(min=1e-30).log2().floor()
            swallowed += int((exponent.exp2() * torch.finfo(weight.dtype).eps / 2 > learning_rate).sum())
            total += weight.numel()
    if total and swallowed / total > 0.5:
        check.warn(
            "steps-too-small",
            f"{swallowed / total:.0%} of the student's weights are {dtype_name(model)} numbers so large that a step of "
            f"training.learning_rate ({learning_rate:g}) is rounded away",
            "student.dtype: float32 with training.bf16: true (autocast), which keeps the weights exact. This concerns one "
            "process and DDP only: under ZeRO and FSDP2 with training.bf16, fp32 weights are kept beside them anyway",
        )


def dtype_name(model: nn.Module) -> str:
    """As a recipe writes it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def check_vocabulary(
    check: Check, models: Mapping[str, Any], tokenizers: Mapping[str, PreTrainedTokenizerBase], alignment: str | None
) -> None:
    """Widths of both heads beside the tokenizer's entries, and what the loss will see of them.

    Args:
        check: takes what is found.
        models: ``student`` and ``teacher``, as far as they are there.
        tokenizers: of both.
        alignment: the recipe's ``teacher.vocab_alignment``; None where the heads cannot be compared.
    """
    entries = len(tokenizers["student"])
    widths = {who: head_of(model).vocab_size for who, model in models.items()}
    check.values = {"tokenizer": entries, **widths}
    listed = " and ".join(f"{width:,} ({who})" for who, width in widths.items())
    check.summary = f"heads of {listed} ids for a tokenizer of {entries:,}"
    for who, model in models.items():
        rows = min(model.get_input_embeddings().weight.shape[0], widths[who])
        if len(tokenizers[who]) > rows:
            check.error(
                "token-without-row",
                f"the {who}'s tokenizer has {len(tokenizers[who]):,} entries, but its model {rows:,} rows: tokens were "
                "added and the model was not resized",
                "Use the model's own tokenizer, or model.resize_token_embeddings before training it",
            )
    if len(models) < 2 or alignment is None:
        return
    pair = tokenizers["student"], tokenizers["teacher"]
    plan = align_vocabularies(models["student"], models["teacher"], *pair, alignment)
    check.values["compared"] = plan.size
    if plan.note:
        check.summary += f"; {plan.note}"
    elif min(widths.values()) > entries:
        check.summary += f"; {plan.size - entries:,} rows of padding in both, which the loss sees"


# ------------------------------------------------------------------------------------------------------------ a sample


@torch.no_grad()
def take_sample(
    trainer: DistillationTrainer, data: EncodedDataset, rows: Sequence[int], teacher: Teacher | None = None
) -> Sample:
    """Run student and teacher on some rows, without dropout and in the precision of their weights.

    Args:
        trainer: built, not yet trained.
        data: tokenised rows.
        rows: places in ``data``.
        teacher: takes the place of the trainer's.
    """
    student: Any = trainer.model
    teacher = teacher or trainer.teacher
    if trainer.common is not None:
        return aligned_sample(trainer, trainer.common, data, rows, teacher)
    collator = _collator(trainer, teacher)
    ordered = sorted(rows, key=data.lengths.__getitem__)  # rows of like length together
    parts: list[tuple[Tensor, Any, Tensor, Tensor]] = []
    for first, batch, labels in batches(
        trainer, collator, data, ordered, min(8, trainer.args.per_device_train_batch_size)
    ):
        with loss_in_head(student, lambda states, head: states):  # states in the place of logits
            states = student(**seen_by_models(batch), use_cache=False).logits
        chosen, targets = select_response(states, labels)
        numbers = sequence_numbers(labels) + first
        read = split_batch(batch) or (batch, labels)
        parts.append((chosen.float(), teacher.states(*read), targets, numbers))
    students, teachers, all_targets, sequences = zip(*parts, strict=True)
    head, teacher_head = head_of(student).cut(trainer.vocab_size), teacher.head
    # Without its graph, and so exact that gradients can be subtracted from each other
    head = head.detached().in_float32()
    taught: tuple[Any, Any] = (None, None)
    if teacher_head is not None:
        taught = (joined(teachers), teacher_head.cut(trainer.vocab_size))
    return Sample(torch.cat(students), head, *taught, torch.cat(all_targets), torch.cat(sequences))


@torch.no_grad()
def aligned_sample(
    trainer: DistillationTrainer, common: CommonIds, data: EncodedDataset, rows: Sequence[int], teacher: Teacher
) -> Sample:
    """The same with a teacher of another tokenizer: the labels that are the same, over the ids that both have.

    Args:
        trainer: built, not yet trained.
        common: these ids.
        data: tokenised rows, aligned.
        rows: places in ``data``.
        teacher: reads them in its own tokens.

    Raises:
        Skipped: nothing of these rows is the same.
    """
    student: Any = trainer.model
    size = min(8, trainer.args.per_device_train_batch_size)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    head, teacher_head = head_of(student), cast(Head, teacher.head)
    ids, teacher_ids = common.on(trainer.args.device)
    for first, batch, labels in batches(trainer, _collator(trainer, teacher), data, list(rows), size):
        share = aligned_share(teacher, batch, common)
        with loss_in_head(student, lambda states, head: states):
            seen = seen_by_models(batch)
            states = student(**seen, use_cache=False).logits
        chosen, targets = select_response(states, labels)
        same, taught = share.aligned, cast(Tensor, share.states)
        assert same is not None
        numbers = sequence_numbers(labels) + first
        own, theirs = chosen[same.student], taught[same.teacher]
        mass = row_masses(trainer.eval_loss, own, head, targets[same.student], ids).mass
        other = row_masses(trainer.eval_loss, theirs, teacher_head, same.targets[same.teacher], teacher_ids).mass
        places = torch.searchsorted(ids, targets[same.student])
        parts.append((own.float(), theirs, places, numbers[same.student], mass, other))
    found = [torch.cat(part) for part in zip(*parts, strict=True)]
    if not len(found[0]):
        raise Skipped("nothing of the sample of rows is the same for student and teacher")
    head = head.take(ids)
    head = head.detached().in_float32()
    masses = float(found[4].mean()), float(found[5].mean())
    return Sample(found[0], head, found[1], teacher_head.take(teacher_ids), found[2], found[3], masses)


def _collator(trainer: DistillationTrainer, teacher: Teacher) -> PaddedCollator:
    """Pads, and brings what the trainer's own teacher has of the rows elsewhere."""
    pad: Any = trainer.processing_class.pad_token_id  # type: ignore[union-attr]
    of_rows = getattr(trainer.data_collator, "of_rows", None) if teacher is trainer.teacher else None
    return PaddedCollator(int(pad), of_rows=of_rows)


def batches(
    trainer: DistillationBase, collator: Any, data: EncodedDataset, rows: Sequence[int], size: int
) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
    """Yield (rows before it, batch, labels); meanwhile the student is in evaluation mode.

    Args:
        trainer: says on which device.
        collator: makes the batches.
        data: tokenised rows.
        rows: places in ``data``.
        size: rows of a batch.
    """
    student: Any = trainer.model
    was_training = student.training
    student.eval()
    try:
        for start in range(0, len(rows), size):
            batch = collator([data[index] for index in rows[start : start + size]])
            batch = {name: value.to(trainer.args.device) for name, value in batch.items() if name != "row_id"}
            yield start, batch, batch.pop("labels")
    finally:
        student.train(was_training)


# ----------------------------------------------------------------------------------------------- teacher and student


def check_teacher(check: Check, eval_loss: DistillationLoss, sample: Sample, classes: int, cut: bool) -> None:
    """Cross-entropy of both on the same labels, at T = 1.

    Args:
        check: takes what is found.
        eval_loss: the trainer's, at T = 1.
        sample: a real batch.
        classes: ids that the loss sees; ln of it is what blind guessing costs.
        cut: the student is made of layers of the teacher.
    """
    means, guess, rows = sample.means(eval_loss), math.log(classes), len(sample.targets)
    ce, teacher_ce, kl, agreement = (means[name] for name in ("ce", "teacher_ce", "kl", "top1_agreement"))
    check.values = {"labels": rows, "student_ce": ce, "guess": guess}
    if sample.teacher_states is None:
        check.summary = f"student {ce:.2f} nats per label ({rows:,} labels); there is no teacher"
    else:
        check.values |= {"teacher_ce": teacher_ce, "kl": kl, "agreement": agreement}
        check.summary = (
            f"teacher {teacher_ce:.2f}, student {ce:.2f}, guessing {guess:.2f} nats per label; "
            f"KL {kl:.2f}, same first choice {agreement:.0%}"
        )
    if not all(math.isfinite(value) for value in (ce, teacher_ce, kl)):
        check.error("loss-not-finite", "the cross-entropy on real rows is non-finite", "")
        return
    if ce > guess:
        # A pruned student of a teacher that itself knows nothing is not to blame on the layers.
        cut = cut and teacher_ce <= guess
        check.warn(
            "student-worse-than-guessing",
            f"the student needs {ce:.2f} nats per label, and guessing evenly among {classes:,} ids costs {guess:.2f}: "
            + ("without the layers that were left out it knows nothing" if cut else "it knows nothing of these rows"),
            "student.init: choose: search (evenly spaced layers are the worst start), or keep more layers, or train on many "
            "more tokens: it starts from less than nothing"
            if cut
            else "Are its weights trained, and the prompt template the one it knows? From random weights: train much longer",
        )
    if sample.teacher_states is None:
        return
    if teacher_ce > UNTRAINED * guess:
        check.error(
            "teacher-untrained",
            f"the teacher needs {teacher_ce:.2f} nats per label, and guessing evenly among {classes:,} ids costs "
            f"{guess:.2f}: it knows nothing of these rows",
            "Are its weights trained, its tokenizer its own, and the prompt template the one it knows?",
        )
    elif teacher_ce > ce:
        text = f"the teacher is worse than the student on these rows, by {teacher_ce - ce:.2f} nats per label"
        check.warn("teacher-worse", text, "Fine-tune the teacher on this data first, or look at the prompt template")


def check_faithful(check: Check, full: Sample, quantized: Sample) -> None:
    """How far the probabilities of a quantised teacher are from those of the full one, on the same labels."""
    pairs = [(sample.teacher_states, sample.teacher_head) for sample in (full, quantized)]
    found = compare_heads(*pairs[0], *pairs[1])  # type: ignore[arg-type]  # there is a teacher, as it is quantised
    kl, high, agreement = found.values()
    check.values = {"labels": len(full.targets), "limit": FAITHFUL, **found}
    check.summary = (
        f"KL {kl:.2g} nats per label from the full teacher (99th percentile {high:.2g}), "
        f"same first choice {agreement:.1%}"
    )
    if not kl <= FAITHFUL:
        text = f"the teacher is {kl:.3f} nats per label from what its files are, more than {FAITHFUL:g}"
        check.warn("teacher-unfaithful", text, "teacher.quantization: int8 (the closest), or none")


def check_rounding(check: Check, plain: Sample, rounded: Sample) -> None:
    """What rounding the student's weights costs before training (``student.quantize``), on the same labels.

    Args:
        check: takes what is found.
        plain: the student with its weights as they are.
        rounded: the same rows, seen by its layers as training will see them.
    """
    found = compare_heads(plain.student_states, plain.student_head, rounded.student_states, rounded.student_head)
    kl, high, agreement = found.values()
    check.values = {"labels": len(plain.targets), **found}
    check.summary = (
        f"KL {kl:.2g} nats per label from the unquantised student before training (99th percentile {high:.2g}), same first "
        f"choice {agreement:.1%}"
    )
    if not math.isfinite(kl):
        check.error("rounding-not-finite", "the student with rounded weights gives numbers that are non-finite", "")
