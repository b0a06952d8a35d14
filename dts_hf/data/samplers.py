"""The order of the rows, and row counts that several processes can share out evenly without taking a row twice.

Accelerate would repeat rows. Here dummy rows, single tokens without a label, fill the last batches: they add nothing to any
sum, and every process still runs the same number of forwards, which sharded models need.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from dts_hf.alignment.batch import ALIGNED
from dts_hf.data.teacher_context import TEACHER_IDS, TEACHER_LABELS
from dts_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


#: The ``row_id`` of what only fills a batch.
DUMMY_ROW = -2


def dummy_row(row: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """The first token of ``row``, with ``labels`` that no loss counts."""
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
    by_token = {name: row[name][:1] for name in names if name in row}
    aligned = {ALIGNED: row[ALIGNED].unlabelled} if ALIGNED in row else {}
    if TEACHER_IDS in row:
        by_token |= {TEACHER_IDS: row[TEACHER_IDS][:1], TEACHER_LABELS: labels}
    return {**row, **by_token, **aligned, "labels": labels, "row_id": DUMMY_ROW}


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch, padded or packed, belong to rows of the data: bool ``[B, T]``."""
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    if "row_id" not in inputs:
        return real
    row_is_real = inputs["row_id"] != DUMMY_ROW
    if len(row_is_real) == len(ids):  # a row of the batch is one row of the data
        return real & row_is_real.unsqueeze(-1)
    positions = inputs.get("position_ids")
    if positions is None:  # laid end to end by a collator of the user's, which never sees a dummy row among other rows
        return real
    return real & row_is_real[(positions == 0).reshape(-1).cumsum(0) - 1].view_as(ids)


class PadToMultiple(Dataset[dict[str, Any]]):
    """``dataset``, then dummy rows up to a multiple of the global batch.

    Args:
        dataset: rows with ``input_ids``, and their ``lengths``.
        multiple: rows of a batch of all processes together.
        without_label: makes a dummy row of the first row.
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
        self.dummy_rows = -len(dataset) % multiple

    def __len__(self) -> int:
        return len(self.order) + self.dummy_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # without it, iterating over this data set would never end
        if index < len(self.order):
            return dict(self.dataset[self.order[index]])
        return self.without_label(self.dataset[0])


class SomeRows(Dataset[dict[str, Any]]):
    """At most ``most`` rows of a data set, spread evenly over it, whatever its order: nothing is drawn.

    Args:
        dataset: rows, and their ``lengths``.
        most: how many at most.
    """

    def __init__(self, dataset: Any, most: int) -> None:
        count = min(most, len(dataset))
        self.dataset, self.places = dataset, [place * len(dataset) // count for place in range(count)]
        self.lengths = [dataset.lengths[place] for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.dataset[self.places[index]])


def check_whole_batch(rows: int, batch: int) -> None:
    """Refuse to leave out the incomplete last batch where it is the only one: an epoch would have no step, for ever.

    Args:
        rows: of the training data.
        batch: rows of a batch of all processes together.

    Raises:
        UserError: there are fewer of them.
    """
    if rows < batch:
        raise UserError(
            f"training.dataloader_drop_last: got True, which leaves out batches that are not full, and {rows} rows of "
            f"train_dataset fill none of {batch}; expected more rows, a smaller batch, or False",
            everywhere=True,
        )


class FilledStream(IterableDataset[dict[str, Any]]):
    """The rows of a stream, then dummy rows up to a multiple of a step's rows: ``PadToMultiple`` for rows without a number.

    They are passed on a step at a time. So where the stream raises, all processes do so in the same step.

    Args:
        stream: rows with ``input_ids``; each time that it is iterated over is a pass.
        multiple: rows of an optimizer step of all processes together.
        without_label: makes a dummy row of the first row.
        whole: of an incomplete last step, the rows beyond a multiple of this are left out.

    Raises (when it is iterated over):
        UserError: nothing would be left.
    """

    def __init__(
        self, stream: Any, multiple: int, without_label: Callable[[Mapping[str, Any]], dict[str, Any]], whole: int = 1
    ) -> None:
        self.stream, self.multiple, self.without_label, self.whole = stream, multiple, without_label, whole

    def set_epoch(self, epoch: int) -> None:
        """Begin this pass next."""
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows, first = iter(self.stream), None
        while step := list(islice(rows, self.multiple)):
            if first is None:
                first = step[0]
                check_whole_batch(len(step), self.whole)
            if len(step) < self.multiple:
                step = step[: len(step) - len(step) % self.whole]
                step += [self.without_label(first) for _ in range(-len(step) % self.multiple)]
            yield from step


class DummyRowsLast(Sampler[int]):
    """The order of ``sampler`` over a ``PadToMultiple`` data set's own rows, then its dummy rows, up to ``total``."""

    def __init__(self, sampler: Sampler[int], total: int) -> None:
        self.sampler, self.total = sampler, total
        assert isinstance(sampler, Sized)
        self.own = len(sampler)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(self.own, self.total)


def total_steps(args: TrainingArguments, rows: int, devices: int = 1, packs: int | None = None) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them.

    Args:
        args: of the run.
        rows: of an epoch.
        devices: that share them out.
        packs: of an epoch, where they are the batches (see ``PackSampler``); None: a batch is a number of rows.
    """
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.per_device_train_batch_size * devices))
    if packs is not None:
        batches = math.ceil(packs / devices)
    elif args.dataloader_drop_last:
        batches = rows // (args.per_device_train_batch_size * devices)
    return max(1, math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs))


class LengthGroupedSampler(Sampler[int]):
    """Shuffle rows so that each batch holds rows of similar length, the same way on every rank and after a resume.

    The order is a function of ``(seed, epoch)`` alone. The sampler of ``transformers`` draws from the global
    generator: another order after a resume, and other orders on ranks whose generators have drifted apart.

    Rows are shuffled, cut into pools of ``pool_batches`` batches, sorted inside a pool, cut into batches, and the
    batches shuffled. The batch with the longest row comes first in epoch 0, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each row (``EncodedDataset.lengths``).
        batch_size: rows that should be of similar length: one micro-batch times the number of processes.
        seed: of the run.
        pool_batches: batches sorted together; more means less padding and less randomness.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, pool_batches: int = 50) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        # At least four pools, or short and long rows of a small set would meet in the same batches in every epoch.
        self.pool_batches = max(1, min(pool_batches, len(self.lengths) // (4 * batch_size)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"length groups {self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        whole = len(order) - len(order) % self.batch_size
        # Rows that fill no batch go last: anywhere else they would shift every later batch across the groups.
        order, rest = order[:whole], order[whole:]
        pool = self.pool_batches * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, pool):
            ordered = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [ordered[k : k + self.batch_size] for k in range(0, len(ordered), self.batch_size)]
        draw.shuffle(batches)
        if self.epoch == 0 and batches:
            longest = max(range(len(batches)), key=lambda k: self.lengths[batches[k][-1]])
            batches[0], batches[longest] = batches[longest], batches[0]
        return iter([index for batch in [*batches, rest] for index in batch])


# ------------------------------------------------------------------------------------------------- batches of equal cost


def best_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in packs of at most ``tokens``: the longest first, each into the fullest pack that has room for it.

    Args:
        lengths: tokens of each row, none above ``tokens``.
        tokens: the budget.

    Returns:
        The places of the rows in each pack.
    """
    tokens = min(tokens, sum(lengths))
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # packs by the tokens that they have room for
    rooms = (
        0  # bit n is set where there is a pack with room for n tokens: the least one that will do is the lowest bit
    )
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = tokens, len(packs)
            packs.append([])
        packs[pack].append(row)
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


class PackSampler(Sampler[tuple[int, ...]]):
    """Packs of rows that fill a budget of tokens, the same ones on every rank and after a resume.

    Which *lengths* lie together is settled once, by ``best_fit`` over the whole data set; in each epoch rows of equal length
    change places, and the packs come in another order. So every epoch takes every row once, in the same number of packs, and
    the steps of a run are known before it begins. The order is a function of ``(seed, epoch)`` alone. A pack with the most
    tokens comes first in epoch 0, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each row.
        tokens: the budget, which no row exceeds.
        seed: of the run.
        multiple: empty packs are added at the end up to a multiple of this, the number of processes.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int = 0, multiple: int = 1) -> None:
        self.lengths, self.seed, self.epoch = list(lengths), seed, 0
        self.packs = best_fit(self.lengths, tokens)
        self.empty = -len(self.packs) % multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.packs) + self.empty

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        draw = random.Random(f"packs {self.seed} {self.epoch}")
        of_length: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(self.lengths):
            of_length[length].append(row)
        for rows in of_length.values():
            draw.shuffle(rows)
        packs = [tuple(of_length[self.lengths[row]].pop() for row in pack) for pack in self.packs]
        draw.shuffle(packs)
        if self.epoch == 0 and packs:
            fullest = max(range(len(packs)), key=lambda pack: sum(self.lengths[row] for row in packs[pack]))
            packs[0], packs[fullest] = packs[fullest], packs[0]
        yield from packs
        yield from [()] * self.empty


class Packs(Dataset[list[dict[str, Any]]]):
    """The rows of a data set by the packs of a ``PackSampler``: one of them is a batch, an empty one a dummy row.

    Args:
        dataset: rows with ``input_ids``.
        without_label: makes a dummy row of the first row.
    """

    def __init__(self, dataset: Any, without_label: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.dataset, self.without_label = dataset, without_label

    def __len__(self) -> int:
        return len(self.dataset)  # rows, which is what the Trainer counts

    def __getitem__(self, pack: tuple[int, ...]) -> list[dict[str, Any]]:
        return [dict(self.dataset[row]) for row in pack] or [self.without_label(self.dataset[0])]

    def __getitems__(self, packs: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """What a data loader asks for, and its collator gets: the rows of a batch, one after the other."""
        return [row for pack in packs for row in self[pack]]
