"""Labelled texts as tokens, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dts_hf.classification.glue_tasks import GlueTask, LabelledRow
from dts_hf.data.collators import Collator
from dts_hf.data.encoding import EncodedDataset, EncodingReport
from dts_hf.errors import UserError
from dts_hf.files import text_digest
from dts_hf.loss.selection import IGNORE_INDEX


class LabelledDataset(EncodedDataset):
    """Tokenised texts, each with one label.

    Attributes:
        labels: class numbers, or scores.
        type_ids: which of two texts a token belongs to, for models that ask for it; else None.
    """

    def __init__(
        self,
        row_ids: Sequence[str],
        ids: Sequence[Sequence[int]],
        labels: Sequence[float],
        type_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(row_ids, ids, [len(row) for row in ids])
        self.labels = list(labels)
        # A list takes eight times as much.
        self.type_ids = None if type_ids is None else [bytes(row) for row in type_ids]

    @cached_property
    def digest(self) -> str | None:
        return text_digest(f"{super().digest} {self.labels} {self.type_ids}")

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        row: dict[str, Any] = {"input_ids": self.ids[index].tolist(), "labels": self.labels[index], "row_id": index}
        if self.type_ids is not None:
            row["token_type_ids"] = list(self.type_ids[index])
        return row


def encode_labelled(
    rows: Sequence[LabelledRow], tokenizer: PreTrainedTokenizerBase, *, max_length: int, type_ids: bool = False
) -> LabelledDataset:
    """Tokenise the texts with the tokenizer's own special tokens; the second text of a pair follows the first.

    Tokenizers of encoders put a separator between them; those of GPT-2 and LLaMA put nothing, so a line break is.

    Args:
        rows: from ``load_labelled``.
        tokenizer: student's and teacher's.
        max_length: tokens; of a pair the longer text is shortened first, always at its end.
        type_ids: also make ``token_type_ids`` (BERT).

    Returns:
        The data set; ``report.prompts_cut`` says how many rows were shortened.

    Raises:
        UserError: ``max_length`` leaves no room for text.
    """
    pair = len(rows[0].texts) == 2
    if max_length <= tokenizer.num_special_tokens_to_add(pair=pair) + pair:
        raise UserError(f"task.max_length: got {max_length}, which leaves no room for text beside the special tokens")
    # In front of the second text: at the end of the first one, shortening would take it away.
    between = "" if separates(tokenizer) else "\n"
    columns = [[row.texts[0] for row in rows], *([[between + row.texts[1] for row in rows]] if pair else [])]
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": type_ids, "verbose": False}
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, **options)
    whole = tokenizer(*columns, **options)["input_ids"]
    ids = encoded["input_ids"]
    cut = sum(len(short) < len(full) for short, full in zip(ids, whole, strict=True))
    dataset = LabelledDataset(
        [row.id for row in rows], ids, [row.label for row in rows], encoded["token_type_ids"] if type_ids else None
    )
    dataset.report = EncodingReport(len(rows), len(rows), prompts_cut=cut, prompt_tokens=sum(dataset.lengths))
    return dataset


def separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts special tokens between the two texts of a pair."""
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)


@dataclass
class LabelledCollator(Collator):
    """Pad on the right to the longest row; the mask comes from lengths, never from token ids.

    Args:
        pad_token_id: the one the models know, too: a decoder is read at its last token that is not this one.
        regression: labels are fp32 scores, not int64 classes.

    Returns (of a call):
        ``input_ids``, ``attention_mask`` (and ``token_type_ids``) ``[B, T]``, ``labels`` and ``row_id`` ``[B]``.
    """

    pad_token_id: int
    regression: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": torch.full((len(examples), width), self.pad_token_id),
            "attention_mask": torch.zeros(len(examples), width, dtype=torch.int64),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = torch.zeros(len(examples), width, dtype=torch.int64)
        for k, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["attention_mask"][k, :length] = 1
            for name in batch.keys() - {"attention_mask"}:
                batch[name][k, :length] = torch.tensor(example[name])
        dtype = torch.float32 if self.regression else torch.int64
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=dtype)
        batch["row_id"] = torch.tensor([example["row_id"] for example in examples])
        return batch


def labelled(labels: Tensor) -> Tensor:
    """Which of ``labels`` ``[B]`` are labels, and no filling."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX


def check_task_labels(labels: Sequence[float], task: GlueTask, name: str) -> None:
    """Refuse a data set made by hand whose labels the task does not have.

    Raises:
        UserError: the first such row.
    """
    for index, label in enumerate(labels):
        if not task.has_label(label):
            raise UserError(
                f"{name}: row {index}: label {label!r}, expected {task.describe_labels} (task {task.subset})"
            )
