"""Checks of the loaded models: their weights, their heads, and what each of them thinks of the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.prompt_templates import get_template
from dts_hf.data.rows import Row
from dts_hf.doctor.diagnosis import Check
from dts_hf.doctor.effect import Sample
from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response, sequence_numbers
from dts_hf.models.head import Head, check_head, head_of, loss_in_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.recipe.schema import Recipe
    from dts_hf.training.trainer import DistillationTrainer

#: A teacher whose cross-entropy is above this share of ln V has learned next to nothing.
UNTRAINED = 0.95
#: Nats per label by which the teacher must like its own chat template better for a warning.
BETTER_BY = 0.2
#: Bits of the mantissa of low-precision weights, the leading one included.
MANTISSA = {torch.bfloat16: 8, torch.float16: 11}


def check_weights(check: Check, role: str, model: nn.Module, *, causal: bool = True) -> bool:
    """Numbers that are none, and a head that the loss cannot represent. Returns whether the model can be examined on."""
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    check.values[role] = {"class": type(model).__name__, "parameters": parameters, "trained": trained}
    adapters = f", {millions(trained)} of them trained" if role == "student" and trained < parameters else ""
    check.summary = f"{millions(parameters)} weights{adapters} ({type(model).__name__}, {dtype_name(model)})"
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        check.error(
            "weights-not-finite",
            f"the {role} has non-finite weights, among them {broken[0]} ({len(broken)} tensors)",
            "Its files are broken, or it was saved after a run that diverged",
        )
    if causal and not broken:
        try:
            check_head(model, role=role)
            check.summary += "; its head gives the model's own logits"
        except UserError as error:
            check.error("head", str(error))
    return not broken


def check_step_size(check: Check, model: nn.Module, learning_rate: float) -> None:
    """Weights kept in bf16 or fp16 swallow steps below half of their spacing; Adam's steps are about the learning rate."""
    swallowed = total = 0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in MANTISSA:
            spacing = weight.detach().float().abs().clamp(min=1e-30).log2().floor().exp2() * 2.0 ** (
                1 - MANTISSA[weight.dtype]
            )
            swallowed += int((spacing / 2 > learning_rate).sum())
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
    """The type of the weights, in words."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def millions(count: float) -> str:
    """A number of weights for people."""
    if count < 1e6:
        return f"{count:,.0f}"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


# ------------------------------------------------------------------------------------------------------------ a sample


@torch.no_grad()
def take_sample(trainer: DistillationTrainer, data: EncodedDataset, rows: Sequence[int]) -> Sample:
    """Run student and teacher on some rows, without dropout and in the precision of their weights.

    Args:
        trainer: built, not yet trained.
        data: tokenised rows.
        rows: places in ``data``.
    """
    student: Any = trainer.model
    was_training = student.training
    student.eval()
    found: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
    counted = 0
    try:
        for batch, labels in _batches(trainer, data, rows):
            seen: list[Tensor] = []

            def keep(states: Tensor, head: Head, seen: list[Tensor] = seen) -> Tensor:
                seen.append(states)
                return states.new_zeros(())

            with loss_in_head(student, keep):
                student(**batch, use_cache=False)
            states, targets = select_response(seen[0], labels)
            numbers = sequence_numbers(labels) + counted
            counted += len(labels)
            found.append((states.float(), trainer.teacher.states(batch, labels), targets, numbers))
    finally:
        student.train(was_training)
    students = [states for states, _, _, _ in found]
    teachers = [states for _, states, _, _ in found if states is not None]
    head, teacher_head = head_of(student).cut(trainer.vocab_size), trainer.teacher.head
    return Sample(
        torch.cat(students),
        in_fp32(head),
        None if teacher_head is None else torch.cat(teachers),
        None if teacher_head is None else teacher_head.cut(trainer.vocab_size),
        torch.cat([targets for _, _, targets, _ in found]),
        torch.cat([numbers for _, _, _, numbers in found]),
    )


def in_fp32(head: Head) -> Head:
    """The head without its graph, so exact that gradients can be subtracted from each other."""
    bias = None if head.bias is None else head.bias.detach().float()
    return replace(head, weight=head.weight.detach().float(), bias=bias)


def _batches(trainer: DistillationTrainer, data: EncodedDataset, rows: Sequence[int]) -> Any:
    collator = PaddedCollator(int(trainer.processing_class.pad_token_id))  # type: ignore[union-attr, arg-type]
    size = min(8, trainer.args.per_device_train_batch_size)
    ordered = sorted(rows, key=data.lengths.__getitem__)
    for start in range(0, len(ordered), size):
        batch = collator([data[index] for index in ordered[start : start + size]])
        batch = {name: value.to(trainer.args.device) for name, value in batch.items() if name != "row_id"}
        labels = batch.pop("labels")
        yield batch, labels


# ----------------------------------------------------------------------------------------------- teacher and student


def check_teacher(
    check: Check, eval_loss: DistillationLoss, sample: Sample, classes: int, *, cut: bool = False
) -> None:
    """Cross-entropy of both on the same labels, at T = 1.

    Args:
        eval_loss: the trainer's, at T = 1.
        classes: ids that the loss sees; ln of it is what blind guessing costs.
        cut: the student is made of layers of the teacher.
    """
    with torch.no_grad():
        sums = eval_loss(
            sample.student_states, sample.student_head, sample.teacher_states, sample.teacher_head, sample.targets,
            max(len(sample.targets), 1), sample.sequences,
        ).sums  # fmt: skip
    rows = max(float(sums["rows"]), 1.0)
    mean = {name: float(sums[name]) / rows for name in ("ce", "teacher_ce", "kl", "top1_agreement")}
    guess = math.log(classes)
    check.values = {"labels": int(rows), "student_ce": mean["ce"], "guess": guess}
    if sample.teacher_states is None:
        check.summary = f"student {mean['ce']:.2f} nats per label ({int(rows):,} labels); there is no teacher"
    else:
        check.values |= {"teacher_ce": mean["teacher_ce"], "kl": mean["kl"], "agreement": mean["top1_agreement"]}
        check.summary = (
            f"teacher {mean['teacher_ce']:.2f}, student {mean['ce']:.2f}, guessing {guess:.2f} nats per label; "
            f"KL {mean['kl']:.2f}, same first choice {mean['top1_agreement']:.0%}"
        )
    if not all(math.isfinite(value) for value in mean.values()):
        check.error("loss-not-finite", "the cross-entropy on real rows is non-finite", "")
        return
    # A pruned student of a teacher that itself knows nothing is not to blame on the layers.
    cut = cut and not mean.get("teacher_ce", 0.0) > guess
    if mean["ce"] > guess:
        check.warn(
            "student-worse-than-guessing",
            f"the student needs {mean['ce']:.2f} nats per label, and guessing evenly among {classes:,} ids costs "
            f"{guess:.2f}: "
            + ("without the layers that were left out it knows nothing" if cut else "it knows nothing of these rows"),
            "student.init.layers: keep more layers, or others (a list: some models bear it better to lose their last layers "
            "than every second one), or train on many more tokens: it starts from less than nothing"
            if cut
            else "Are its weights trained, and the prompt template the one it knows? From random weights: train much longer",
        )
    if sample.teacher_states is None:
        return
    if mean["teacher_ce"] > UNTRAINED * guess:
        check.error(
            "teacher-untrained",
            f"the teacher needs {mean['teacher_ce']:.2f} nats per label, and guessing evenly among {classes:,} ids "
            f"costs {guess:.2f}: it knows nothing of these rows",
            "Are its weights trained, its tokenizer its own, and the prompt template the one it knows?",
        )
    elif mean["teacher_ce"] > mean["ce"]:
        check.warn(
            "teacher-worse",
            f"the teacher is worse than the student on these rows, by {mean['teacher_ce'] - mean['ce']:.2f} nats per label",
            "Fine-tune the teacher on this data first, or look at the prompt template",
        )


@torch.no_grad()
def check_chat_form(
    check: Check,
    trainer: DistillationTrainer,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    found: float,
) -> None:
    """Whether the teacher knows these rows better in its own chat form than in the recipe's template.

    Args:
        tokenizer: the teacher's.
        rows: those that ``found``, the teacher's cross-entropy in the recipe's template, was measured on.
    """
    limits = {"max_length": recipe.data.max_length, "max_prompt_length": recipe.data.max_prompt_length}
    data, _ = encode_rows(rows, tokenizer, get_template("chat"), long_rows=recipe.data.long_rows, **limits)  # type: ignore[arg-type]
    head = trainer.teacher.head
    if head is None:
        return
    total = labels_seen = 0.0
    head = head.cut(trainer.vocab_size)
    for batch, labels in _batches(trainer, data, range(len(data))):
        states = trainer.teacher.states(batch, labels)
        assert states is not None
        targets = select_response(labels[..., None], labels)[1]
        sums = trainer.eval_loss(states, head, states, head, targets, 1, sequence_numbers(labels)).sums
        total += float(sums["teacher_ce"])
        labels_seen += len(targets)
    in_chat = total / max(labels_seen, 1)
    check.values["teacher_ce_chat"] = in_chat
    if in_chat < found - BETTER_BY:
        check.warn(
            "chat-template-unused",
            f"in its own chat template the teacher needs {in_chat:.2f} nats per label, in '{recipe.data.prompt_template}' "
            f"{found:.2f}",
            "data.prompt_template: chat",
        )
