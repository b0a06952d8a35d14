"""A teacher with another tokenizer: it reads its own side of a batch (``alignment.batch``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dts_hf.alignment import batch as keys
from dts_hf.alignment.common import CommonVocabulary
from dts_hf.errors import UserError
from dts_hf.loss.dual_space import Projectors
from dts_hf.loss.overlap import Aligned
from dts_hf.loss.selection import select_response
from dts_hf.teachers.asked_ahead import TICKET
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.cached.teacher import LOGPROBS, MISSING, STATES
from dts_hf.teachers.several import Share

#: What ``of_rows`` of a teacher whose states come from elsewhere has put into a batch.
_FROM_ELSEWHERE = (STATES, MISSING, LOGPROBS, TICKET)


class CommonIds:
    """The common ids as tensors, moved to a device once."""

    def __init__(self, common: CommonVocabulary) -> None:
        self.common = common
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, ``[K]`` int64 each, in the same order."""
        if device not in self._on:
            sides: tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], ...] = (
                self.common.student,
                self.common.teacher,
            )
            first, second = (torch.from_numpy(side).to(device) for side in sides)
            self._on[device] = first, second
        return self._on[device]


def aligned_share(
    teacher: Teacher, inputs: Mapping[str, Tensor], common: CommonIds, projectors: Projectors | None = None
) -> Share:
    """What the teacher says of its own labels of a batch, and which of them are the student's.

    Args:
        teacher: reads its own tokens, in its own template; or has its states of them from elsewhere.
        inputs: the batch, with both sides.
        common: ids that mean the same.
        projectors: the maps of dual space; None: the overlap is compared.

    Raises:
        UserError: the batch has no side of the teacher.
    """
    if keys.TEACHER_LABELS not in inputs:
        raise UserError(
            "alignment: this batch does not say how the teacher reads its rows; expected rows of text, or an EncodedDataset "
            "that alignment.rows.RowAligner has aligned"
        )
    labels = inputs[keys.TEACHER_LABELS]
    given = {key: inputs[key] for key in _FROM_ELSEWHERE if key in inputs}
    states = cast(Tensor, teacher.states({**given, **keys.teacher_batch(inputs)}, labels))
    targets = select_response(labels.unsqueeze(-1), labels)[1]
    ours, theirs = common.on(labels.device)
    aligned = Aligned(
        targets, inputs[keys.PAIRS_STUDENT], inputs[keys.PAIRS_TEACHER], inputs[keys.COVERED],
        inputs[keys.ANSWER_BYTES].sum(), ours, theirs, projectors,
    )  # fmt: skip
    return Share(states, teacher.head, aligned=aligned)
