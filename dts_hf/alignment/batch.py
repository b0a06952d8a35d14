"""What a row, and a batch of rows, carry for a teacher with another tokenizer.

The student sees none of it. Shapes: ``B`` rows, ``T_t`` the teacher's time, ``N`` labels of the student in the batch and
``N_t`` of the teacher, both in reading order, ``M`` of them the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.packed_attention import cu_seqlens_mask

#: The name of a row's ``AlignedRow``.
ALIGNED = "aligned"
#: Of a batch: the teacher's tokens ``[B, T_t]``, which of them are there, or the places of packed ones ``[1, T_t]`` and the
#: mask of their rows; the teacher's labels ``[B, T_t]``, -100 on all but the answers' bytes that both sides cover.
TEACHER_IDS, TEACHER_MASK, TEACHER_LABELS = "teacher_input_ids", "teacher_attention_mask", "teacher_labels"
TEACHER_POSITIONS, TEACHER_CU_SEQLENS = "teacher_position_ids", "teacher_cu_seqlens"
#: Of a batch: the M labels that are the same, by their numbers among the N and the N_t, ``[M]`` int64 each.
PAIRS_STUDENT, PAIRS_TEACHER = "aligned_student", "aligned_teacher"
#: Of a batch: which of the N labels stand for bytes that the teacher's labels cover, too, ``[N]`` bool; and how many bytes
#: these are, ``[B]``.
COVERED, ANSWER_BYTES = "covered_labels", "answer_bytes"
KEYS = (
    TEACHER_IDS, TEACHER_MASK, TEACHER_LABELS, TEACHER_POSITIONS, TEACHER_CU_SEQLENS, PAIRS_STUDENT, PAIRS_TEACHER, COVERED,
    ANSWER_BYTES,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class AlignedRow:
    """One row as the teacher reads it, and what of it is the same.

    Attributes:
        ids: the teacher's tokens, prompt included, int32 ``[T_t]``; at least one.
        labels: the places of those that the teacher is asked for, rising, all above 0, ``[N_t]``.
        covered: which of the student's N labels the teacher's cover, bool ``[N]``.
        student, teacher: the M labels that are the same, by their numbers among the N and the N_t, ``[M]``.
        length: bytes of answers that both sides cover.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    covered: NDArray[np.bool_]
    student: NDArray[np.int32]
    teacher: NDArray[np.int32]
    length: int

    @classmethod
    def without_pairs(cls, first: int, labels: int) -> AlignedRow:
        """A row that the teacher is not asked about: one token of it, for a batch has no empty rows.

        Args:
            first: any id of the teacher.
            labels: N.
        """
        none = np.zeros(0, np.int32)
        return cls(np.array([first], np.int32), none, np.zeros(labels, np.bool_), none, none, 0)

    @property
    def unlabelled(self) -> AlignedRow:
        """What stands for this row where it only fills a batch: no label is left on either side."""
        return AlignedRow.without_pairs(int(self.ids[0]), 0)

    @property
    def teacher_labels(self) -> NDArray[np.int64]:
        """The teacher's labels, unshifted, ``[T_t]``."""
        found = np.full(len(self.ids), IGNORE_INDEX, np.int64)
        found[self.labels] = self.ids[self.labels]
        return found


def as_read(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as its teacher reads it, where that has another tokenizer: its tokens and its labels, in the student's place.

    Whoever knows states by the rows that they are of (a cache, a server) is asked for these.

    Args:
        example: a row; one without ``ALIGNED`` is the same for both.
    """
    row = example.get(ALIGNED)
    if row is None:
        return example
    rest = {key: value for key, value in example.items() if key != ALIGNED}
    return {**rest, "input_ids": row.ids.tolist(), "labels": row.teacher_labels.tolist()}


def padded(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """The teacher's side of a padded batch; nothing where rows have none.

    Args:
        examples: rows.
        pad: fills the teacher's ids; hidden by the mask and by the labels, so any id that the teacher has will do.
    """
    rows = [example[ALIGNED] for example in examples if ALIGNED in example]
    if not rows:
        return {}
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
        labels[k, : len(row.ids)] = torch.from_numpy(row.teacher_labels)
        mask[k, : len(row.ids)] = 1
    return {TEACHER_IDS: ids, TEACHER_MASK: mask, TEACHER_LABELS: labels, **_pairs(rows)}


def packed(examples: Sequence[Mapping[str, Any]], cu_seqlens: bool) -> dict[str, Tensor]:
    """The teacher's side of a packed batch, its rows end to end as well; nothing where rows have none.

    Args:
        examples: rows.
        cu_seqlens: the rows' boundaries travel as an attention mask, too (``PackedCollator``).
    """
    rows = [example[ALIGNED] for example in examples if ALIGNED in example]
    if not rows:
        return {}
    places = np.concatenate([np.arange(len(row.ids)) for row in rows])
    batch = {
        TEACHER_IDS: torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)).unsqueeze(0),
        TEACHER_POSITIONS: torch.from_numpy(places).unsqueeze(0),
        TEACHER_LABELS: torch.from_numpy(np.concatenate([row.teacher_labels for row in rows])).unsqueeze(0),
    }
    if cu_seqlens:
        batch[TEACHER_CU_SEQLENS] = cu_seqlens_mask([len(row.ids) for row in rows])
    return batch | _pairs(rows)


def teacher_batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher's model is called with, out of a batch."""
    names = {
        TEACHER_IDS: "input_ids", TEACHER_MASK: "attention_mask", TEACHER_POSITIONS: "position_ids",
        TEACHER_CU_SEQLENS: "attention_mask",
    }  # fmt: skip
    return {name: inputs[key] for key, name in names.items() if key in inputs}


def _pairs(rows: Sequence[AlignedRow]) -> dict[str, Tensor]:
    """The pairs of all rows by their numbers in the batch."""
    ours, theirs = [0], [0]
    for row in rows:
        ours.append(ours[-1] + len(row.covered))
        theirs.append(theirs[-1] + len(row.labels))
    student = np.concatenate([row.student.astype(np.int64) + first for row, first in zip(rows, ours, strict=False)])
    teacher = np.concatenate([row.teacher.astype(np.int64) + first for row, first in zip(rows, theirs, strict=False)])
    return {
        PAIRS_STUDENT: torch.from_numpy(student),
        PAIRS_TEACHER: torch.from_numpy(teacher),
        COVERED: torch.from_numpy(np.concatenate([row.covered for row in rows])),
        ANSWER_BYTES: torch.tensor([row.length for row in rows]),
    }
