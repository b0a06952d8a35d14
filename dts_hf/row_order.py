"""Row counts that several processes can share out evenly, without taking a row twice.

Accelerate would repeat rows. Here single tokens without a label fill the last batches: they add nothing to any sum, and
every process still runs the same number of forwards, which sharded models need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: The ``row_id`` of what only fills a batch.
FILLER = -2


def filler(row: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """The first token of ``row``, with ``labels`` that no loss counts."""
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
    by_token = {name: row[name][:1] for name in names if name in row}
    return {**row, **by_token, "labels": labels, "row_id": FILLER}


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch, padded or packed, belong to rows of the data: bool ``[B, T]``."""
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    if "row_id" not in inputs:
        return real
    row_is_real = inputs["row_id"] != FILLER
    if len(row_is_real) == len(ids):  # a row of the batch is one row of the data
        return real & row_is_real.unsqueeze(-1)
    positions = inputs.get("position_ids")
    if positions is None:  # laid end to end by a collator of the user's, which never sees a filler among other rows
        return real
    return real & row_is_real[(positions == 0).reshape(-1).cumsum(0) - 1].view_as(ids)


class FilledUp(Dataset[dict[str, Any]]):
    """``dataset``, then fillers up to a multiple of the global batch.

    Args:
        dataset: rows with ``input_ids``, and their ``lengths``.
        multiple: rows of a batch of all processes together.
        without_label: makes a filler of the first row.
        longest_first: rows by falling length, for less padding; otherwise as they stand.
    """

    def __init__(
        self,
        dataset: Any,
        multiple: int,
        without_label: Callable[[Mapping[str, Any]], dict[str, Any]],
        longest_first: bool = False,
    ) -> None:
        self.dataset, self.without_label = dataset, without_label
        self.order = list(range(len(dataset)))
        if longest_first:
            self.order.sort(key=lambda index: -dataset.lengths[index])
        self.fillers = -len(dataset) % multiple

    def __len__(self) -> int:
        return len(self.order) + self.fillers

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # without it, iterating over this data set would never end
        if index < len(self.order):
            return dict(self.dataset[self.order[index]])
        return self.without_label(self.dataset[0])


class FillersLast(Sampler[int]):
    """The order of ``sampler`` over a ``FilledUp`` data set's own rows, then its fillers, up to ``total`` indices."""

    def __init__(self, sampler: Sampler[int], total: int) -> None:
        self.sampler, self.total = sampler, total
        assert isinstance(sampler, Sized)
        self.own = len(sampler)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(self.own, self.total)


def total_steps(args: TrainingArguments, rows: int, devices: int = 1) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.per_device_train_batch_size * devices))
    if args.dataloader_drop_last:
        batches = rows // (args.per_device_train_batch_size * devices)
    return max(1, math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs))
