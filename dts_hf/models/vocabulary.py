"""Whether the ids of teacher and student mean the same, and over which of them they are compared."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from dts_hf.errors import UserError, nearest
from dts_hf.models.head import head_of

logger = logging.getLogger(__name__)

MODES = ("strict", "truncate_to_tokenizer", "intersect")


@dataclass(frozen=True)
class VocabularyPlan:
    """``size``: the ids that the loss sees. ``note``: what was cut, for the log and the card; empty if nothing was."""

    size: int
    note: str = ""


def align_vocabularies(
    student: nn.Module,
    teacher: nn.Module,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    mode: str = "strict",
) -> VocabularyPlan:
    """Find the ids on which teacher and student can be compared.

    Args:
        student: the model that learns.
        teacher: the model that is imitated.
        student_tokenizer: of the student.
        teacher_tokenizer: of the teacher.
        mode: ``strict`` wants equal widths; ``truncate_to_tokenizer`` cuts both heads to the tokenizer's length (padded
            embeddings, such as Qwen's 151,936 and 152,064); ``intersect`` keeps the leading ids that both share.

    Raises:
        UserError: an unknown mode; the tokenizers differ, or the widths do in ``strict`` mode.
    """
    shared = check_tokenizers(student_tokenizer, teacher_tokenizer, mode)
    widths = (head_of(student).vocab_size, head_of(teacher).vocab_size)
    return plan_for(widths, student_tokenizer, len(teacher_tokenizer), shared, mode)


def check_tokenizers(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, mode: str
) -> int:
    """How many leading ids mean the same in both, where they are enough for ``mode``.

    Args:
        student_tokenizer: of the student.
        teacher_tokenizer: of the teacher.
        mode: as in ``align_vocabularies``.

    Raises:
        UserError: an unknown mode, or the tokenizers differ.
    """
    _check_mode(mode)
    tokens = (len(student_tokenizer), len(teacher_tokenizer))
    shared = shared_prefix(student_tokenizer, teacher_tokenizer)
    if shared < max(tokens) and (mode != "intersect" or shared < min(tokens)):
        if shared == min(tokens):  # one has all tokens of the other, and more
            longer = student_tokenizer if tokens[0] > tokens[1] else teacher_tokenizer
            raise _added_tokens(longer, shared, "student" if longer is teacher_tokenizer else "teacher")
        ours, theirs = (t.convert_ids_to_tokens(shared) for t in (student_tokenizer, teacher_tokenizer))
        raise UserError(
            f"teacher and student have different tokenizers: {tokens[0]:,} and {tokens[1]:,} entries, id {shared} is "
            f"{ours!r} for the student and {theirs!r} for the teacher. dts_hf compares distributions id by id: choose a "
            "student of the teacher's family, prune one from it (student.init: {from: teacher, layers: N}), or compare what "
            "both share (teacher.alignment: overlap)"
        )
    return shared


def plan_for(
    widths: tuple[int, int], tokenizer: PreTrainedTokenizerBase, teacher_tokens: int, shared: int, mode: str
) -> VocabularyPlan:
    """Over which ids two heads are compared.

    Args:
        widths: rows of the student's head and of the teacher's.
        tokenizer: the student's; where ``mode`` is strict the teacher's is the same.
        teacher_tokens: length of the teacher's tokenizer.
        shared: as ``check_tokenizers`` gives it.
        mode: as in ``align_vocabularies``.

    Raises:
        UserError: an unknown mode, or the widths differ in ``strict`` mode.
    """
    _check_mode(mode)
    tokens = (len(tokenizer), teacher_tokens)
    if mode == "strict":
        if widths[0] != widths[1]:
            if min(widths) < max(tokens):
                raise _added_tokens(tokenizer, min(widths), "student" if widths[0] < widths[1] else "teacher")
            raise UserError(
                f"teacher.vocab_alignment: strict, but the student's head has {widths[0]:,} rows and the teacher's "
                f"{widths[1]:,}. The tokenizer is the same ({tokens[0]:,} entries), so the rest is padding: "
                "use truncate_to_tokenizer"
            )
        return VocabularyPlan(widths[0])
    size = min(*widths, max(tokens) if mode == "truncate_to_tokenizer" else min(shared, *widths))
    cut = [
        f"{width - size:,} of the {who}'s {width:,}" for who, width in zip(("student", "teacher"), widths, strict=True)
    ]
    note = f"vocabulary cut to {size:,} ids ({mode}): left out {cut[0]} and {cut[1]}" if size < max(widths) else ""
    if note:
        logger.warning(note)
    return VocabularyPlan(size, note)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError(
            f"vocab_alignment: got {mode!r}, expected one of {', '.join(MODES)}.{nearest(str(mode), MODES)}"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase, known: int, role: str) -> UserError:
    """``tokenizer`` has tokens from the id ``known`` on that the model ``role`` does not know."""
    ids = list(range(known, min(known + 3, len(tokenizer))))
    tokens = [repr(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    more = ", ..." if len(tokenizer) - known > len(tokens) else ""
    other = "teacher" if role == "student" else "student"
    return UserError(
        f"the {role} does not know the tokens from id {known} on that were added for the {other} "
        f"({', '.join(tokens)}{more}), so their distributions cannot be compared id by id: add them to the "
        f"{role}'s tokenizer and model, too (resize_token_embeddings({len(tokenizer)}), with rows that are trained), or do "
        "without them. "
        f"teacher.vocab_alignment: intersect compares the first {known:,} ids, on rows without the added tokens"
    )


def shared_prefix(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> int:
    """How many leading ids mean the same token in both."""
    if first is second:
        return len(first)
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (first, second))
    limit = min(len(first), len(second))
    return next((index for index in range(limit) if ours.get(index) != theirs.get(index)), limit)
