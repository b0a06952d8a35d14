"""What a teacher alone reads before a row's last question, and the row that it then answers with the student's own tokens.

Privileged context: a demonstration (SDFT, arXiv 2601.19897) or the verified solution (OPSD, arXiv 2601.18734). The positions
of the answer differ from the student's, so the two are aligned by the labels that they have in common, and never by place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX

#: Of a tokenised row: what the teacher reads, and which of it is learned.
TEACHER_IDS, TEACHER_LABELS = "teacher_input_ids", "teacher_labels"
#: What a batch for the student has under such names, one for the teacher has under these; the student never sees them.
TEACHER_BATCH = {
    name: f"teacher_{name}" for name in ("input_ids", "attention_mask", "position_ids", "labels", "cu_seqlens")
}


class TeacherSide(NamedTuple):
    """One row as the teacher reads it.

    Attributes:
        ids: its tokens.
        labels: the same with ``IGNORE_INDEX`` where nothing is learned; what is left are the student's labels, in order.
    """

    ids: list[int]
    labels: list[int]


def teacher_side(prompt: Sequence[int], answer: Sequence[int], learned: Sequence[int] | None = None) -> TeacherSide:
    """The row of a teacher whose prompt is another than the student's.

    Args:
        prompt: the teacher's whole prompt, what it alone reads among it (``with_teacher_prefix`` words it).
        answer: the tokens that the student answers with, or has generated.
        learned: their labels, ``IGNORE_INDEX`` on those that are not learned; None: all are.
    """
    labels = answer if learned is None else learned
    return TeacherSide([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + [*labels])


def with_teacher_prefix(row: Row) -> Row:
    """``row`` as its teacher reads it: ``row.teacher_prefix`` and an empty line before the last question.

    That is the last message of the user that comes before the answer; of an instruction the instruction, of a finished
    prompt the prompt. A row without such a text is as it is.

    Raises:
        UserError: a text that is learned whole has no question.
    """
    if not row.teacher_prefix:
        return row
    if row.kind == "text":
        raise UserError(
            f"row '{row.id}': data.teacher_prefix_column names a text for the teacher, but this row is learned whole: "
            "nothing comes before it. Expected rows with a prompt and a response"
        )
    text = f"{row.teacher_prefix}\n\n"
    if row.messages is None:
        return dataclasses.replace(row, instruction=text + row.instruction)
    place = max((k for k, message in enumerate(row.messages) if message["role"] == "user"), default=None)
    if place is None:
        raise UserError(
            f"row '{row.id}': data.teacher_prefix_column names a text for the teacher, which comes before the user's last "
            "message, and there is none"
        )
    asked = {**row.messages[place], "content": text + row.messages[place]["content"]}
    messages = (*row.messages[:place], asked, *row.messages[place + 1 :])
    return dataclasses.replace(row, messages=messages, instruction=text + row.instruction)


def split_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any] | None:
    """Of a batch what its teacher reads, as a model's arguments, and the labels ``[B, T]`` of that; None: the student's."""
    if TEACHER_BATCH["labels"] not in inputs:
        return None
    read = {name: inputs[key] for name, key in TEACHER_BATCH.items() if key in inputs}
    labels = read.pop("labels")
    if "cu_seqlens" in read:
        read["attention_mask"] = read.pop("cu_seqlens")
    return read, labels


def check_same_labels(row_id: Any, labels: Sequence[int], of_teacher: Sequence[int]) -> None:
    """Both sides must learn the same tokens: the first of a row is predicted by nothing.

    Raises:
        ValueError: they do not, so that states would be compared that have nothing to do with each other.
    """
    ours, theirs = ([label for label in side[1:] if label != IGNORE_INDEX] for side in (labels, of_teacher))
    if ours != theirs:
        raise ValueError(
            f"row {row_id}: {len(ours)} labels of the student and {len(theirs)} of the teacher are not the same tokens"
        )
