"""Batches of tokenised rows: padded, or packed end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dts_hf.alignment import batch as alignment
from dts_hf.data.encoding import Example
from dts_hf.data.routes import TEACHER
from dts_hf.data.teacher_context import TEACHER_BATCH, TEACHER_IDS, TEACHER_LABELS, check_same_labels
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.packed_attention import cu_seqlens_mask

#: The ``row_id`` of a tokenised row that brings none.
NO_ROW = -1


@dataclass
class Collator:
    """Base of our collators: they take of a row what they know, and return its ``row_id`` and the number of its teacher.

    Where the teacher reads more than the student, a batch for it comes besides, under the names of ``TEACHER_BATCH``.

    Args:
        of_rows: gives what else a batch has of its rows, in their order, such as states out of a cache; None: nothing.
    """

    of_rows: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = field(default=None, kw_only=True)

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch = {**self.tokens(examples), **self.more(examples)}
        if TEACHER_IDS not in examples[0]:
            return batch
        for example in examples:
            check_same_labels(example.get("row_id"), example["labels"], example[TEACHER_LABELS])
        read = [{"input_ids": example[TEACHER_IDS], "labels": example[TEACHER_LABELS]} for example in examples]
        return batch | {TEACHER_BATCH[name]: value for name, value in self.tokens(read).items()}

    def tokens(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The tokens of rows as a batch.

        Args:
            examples: each with ``input_ids`` and ``labels``.
        """
        raise NotImplementedError

    def more(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """What is one number a row, ``[rows]`` each, and what ``of_rows`` gives."""
        found = {"row_id": torch.tensor([example.get("row_id", NO_ROW) for example in examples])}
        if TEACHER in examples[0]:
            found[TEACHER] = torch.tensor([example[TEACHER] for example in examples])
        return found if self.of_rows is None else found | self.of_rows([*map(alignment.as_read, examples)])


@dataclass
class PaddedCollator(Collator):
    """Pad rows on the right to the longest of the batch.

    The mask comes from lengths, never from token ids: with pad == eos a mask by id would hide every row's end.

    Args:
        pad_token_id: fills ``input_ids``; hidden by the mask and by the labels, so any valid id will do.
        pad_to_multiple_of: round the width up to a multiple of this.
        teacher_pad_id: as ``pad_token_id``, of a teacher with another tokenizer.

    Returns (of a call):
        ``input_ids``, ``attention_mask``, ``labels`` [B, T] and ``row_id`` [B], all int64; ``teacher_number`` [B] too, where
        rows have one of several; the teacher's side where it has another tokenizer (``alignment.batch``); and what
        ``of_rows`` gives.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    teacher_pad_id: int = 0

    def tokens(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        step = self.pad_to_multiple_of or 1
        width = -(-max(len(example["input_ids"]) for example in examples) // step) * step
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(examples), width), dtype=torch.int64)
        for k, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[k, :length] = torch.tensor(example["input_ids"])
            labels[k, :length] = torch.tensor(example["labels"])
            attention_mask[k, :length] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **alignment.padded(examples, self.teacher_pad_id),
        }


@dataclass
class PackedCollator(Collator):
    """Lay the rows of a batch one after the other in a single row, without padding.

    ``position_ids`` restart at 0 for each row. Transformers (>= 5) reads the boundaries from them and lets no token
    attend across, but **only when it gets neither an attention mask nor a KV cache**: call the model with
    ``use_cache=False``, or the boundaries are silently ignored. Some families always ignore them:
    ``packing_check.check_packing`` tells.

    Args:
        cu_seqlens: also give ``cu_seqlens``, the ``packed_attention.cu_seqlens_mask`` of the rows: the attention mask of a
            model for which ``check_packing`` returned True.

    Returns (of a call):
        ``input_ids``, ``position_ids``, ``labels`` [1, sum of T] and ``row_id`` [rows], all int64. The first label of
        each row is -100: after the shift it would be predicted from the row before. The teacher's side where it has
        another tokenizer (``alignment.batch``), and what ``of_rows`` gives.
    """

    cu_seqlens: bool = False

    def tokens(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [i for example in examples for i in example["input_ids"]]
        positions = [i for example in examples for i in range(len(example["input_ids"]))]
        labels = [i for example in examples for i in (IGNORE_INDEX, *example["labels"][1:])]
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            **alignment.packed(examples, self.cu_seqlens),
        }
        if self.cu_seqlens:
            batch["cu_seqlens"] = cu_seqlens_mask([len(example["input_ids"]) for example in examples])
        return batch
