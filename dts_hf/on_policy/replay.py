"""Rows that the student has said before, kept to be learned from again, with what the teacher said of them.

The teacher is frozen, so its states of a row are the same whenever it is asked: a row that is replayed costs no forward of
the teacher, and its loss at any temperature is exact. The student has moved on meanwhile, so the row is no longer one of
its own distribution: that is what DistiLLM (arXiv 2402.03898, section 3.2) accepts for a part of its steps.

Each process keeps the rows that it has generated. Memory, of all processes together, is bounded by

    capacity x (8 x tokens of a row + labels of a row x H x bytes of a number)

which for 1,000 rows of 128 labels and H = 4,096 in bfloat16 is 1 GiB; without states it is a few MB. Where the teacher reads
more than the student, a row that comes without states has the tokens of both; with states nobody reads the teacher's again.

Shapes: ``T`` tokens of a row, ``n`` its labels, ``N`` those of a batch, ``H`` hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.files import read_json, write_json_atomic
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.several import Share

FORMAT = 1
#: The name under which the states of the only teacher are kept; each of several has its own.
ONLY = ""


@dataclass(frozen=True, eq=False)
class ReplayRow:
    """A prompt and what the student answered; the labels tell where the one ends and the other begins.

    Attributes:
        input_ids: ``[T]`` int32.
        labels: ``[T]`` int32, unshifted; the last of them is the end of turn, unless the answer was truncated.
        row_id: of the data's row whose prompt it is.
        teacher: the number of its teacher, where each row has one of several.
        states: what the teacher said of its n labels, ``[n, H_t]`` in its own type, by the teacher's name (``ONLY`` where
            there is one). Empty: it is asked again.
        side: ``[2, T_t]`` int32, tokens and labels as its teacher reads it, where that is more than the student does and it
            is asked again.
    """

    input_ids: Tensor
    labels: Tensor
    row_id: int
    teacher: int | None = None
    states: Mapping[str, Tensor] = field(default_factory=dict)
    side: Tensor | None = None

    @property
    def label_count(self) -> int:
        """How many of its labels count: n."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        side = () if self.side is None else (self.side,)
        return sum(tensor.nbytes for tensor in (self.input_ids, self.labels, *side, *self.states.values()))


class ReplayBuffer:
    """The newest rows that this process has generated; the oldest goes for a new one.

    Args:
        capacity: rows of this process (``share_of_capacity``).
        keeps_states: keep the teacher's states of the rows, too.
    """

    def __init__(self, capacity: int, *, keeps_states: bool = True) -> None:
        self.capacity, self.keeps_states = capacity, keeps_states
        self._rows: dict[int, ReplayRow] = {}  # by their numbers, which rise
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> ReplayRow:
        return self._rows[number]

    @property
    def is_full(self) -> bool:
        """A new row would drive an old one out."""
        return len(self) >= self.capacity

    @property
    def nbytes(self) -> int:
        """What its rows take in memory."""
        return sum(row.nbytes for row in self._rows.values())

    def clear(self) -> None:
        """Forget everything, as at the start of a run."""
        self._rows, self._next = {}, 0

    def add(self, row: ReplayRow) -> int | None:
        """Take a row in and return its number; None: it has no label, so it teaches nothing and is not kept."""
        if not row.label_count:
            return None
        number = self._next
        self._rows[number] = row
        self._next += 1
        if len(self) > self.capacity:
            del self._rows[next(iter(self._rows))]
        return number

    def draw(self, count: int, *, seed: int, step: int, rank: int = 0) -> list[int]:
        """The numbers of ``count`` rows, a function of what is kept and of (seed, step, rank).

        No row comes twice before all have come once.

        Args:
            count: how many.
            seed: of the run's text.
            step: number of the optimizer step, from 0.
            rank: of this process.

        Raises:
            ValueError: there is nothing to draw from.
        """
        if not self._rows:
            raise ValueError("the replay buffer is empty")
        order = sorted(self._rows, key=lambda number: _place(seed, step, rank, number))
        return [order[place % len(order)] for place in range(count)]

    def keep_states(self, numbers: Sequence[int], shares: Sequence[Share], counts: Sequence[int]) -> None:
        """Keep what the teachers have said of a batch of rows that were generated in this step.

        Args:
            numbers: of the rows of the batch, in its order (``add``); those of rows that are not kept are no matter.
            shares: what each teacher says of the N labels of the batch, in reading order (``teachers.several.Share``).
            counts: labels of each row, adding up to N.

        Raises:
            ValueError: there are other numbers of labels than those of the rows.
        """
        if not self.keeps_states:
            return
        if len(counts) != len(numbers):
            raise ValueError(f"{len(counts)} rows with labels for {len(numbers)} rows of the replay buffer")
        parts: list[dict[str, Tensor]] = [{} for _ in numbers]
        for share in shares:
            assert isinstance(share.states, Tensor)  # else keeps_states is False
            states, bounds = share.states.detach().cpu(), torch.tensor([0, *counts]).cumsum(0)
            if share.rows is not None:  # a teacher of some rows: its states are those of its labels alone
                bounds = torch.searchsorted(share.rows.cpu().contiguous(), bounds)
            if len(states) != int(bounds[-1]):
                raise ValueError(f"{len(states)} states for {int(bounds[-1])} labels of the replay buffer")
            for place, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                if end > first:
                    # A copy of its own: a view would hold the states of the whole batch as long as one row is kept
                    parts[place][share.teacher or ONLY] = states[first:end].clone()
        for number, kept in zip(numbers, parts, strict=True):
            if number in self._rows:  # else newer rows of this very step have driven it out
                self._rows[number] = replace(self._rows[number], states=kept)

    def shares(self, numbers: Sequence[int], blank: Sequence[Share], device: torch.device) -> list[Share]:
        """What ``teachers.several.shares_of`` would say of these rows, without asking.

        Args:
            numbers: of the rows of a batch, in its order, with states.
            blank: of each teacher its head, weight and name (``teachers.several.blank_shares``).
            device: where the states go.
        """
        rows = [self._rows[number] for number in numbers]
        starts = torch.tensor([0, *(row.label_count for row in rows)]).cumsum(0).tolist()
        found = []
        for share in blank:
            name, head = share.teacher or ONLY, share.head
            assert head is not None
            own = [place for place, row in enumerate(rows) if name in row.states]
            none = torch.zeros((0, head.weight.shape[1]), dtype=head.weight.dtype)
            states = torch.cat([rows[place].states[name] for place in own]) if own else none
            places = [torch.arange(starts[place], starts[place + 1]) for place in own]
            labels = torch.cat([torch.zeros(0, dtype=torch.int64), *places])
            found.append(
                replace(share, states=states.to(device), rows=None if share.rows is None else labels.to(device))
            )
        return found

    # ------------------------------------------------------------------------------------------------ in a checkpoint

    def save(self, folder: Path, rank: int) -> None:
        """Write ``replay_RANK.safetensors`` and, after it, ``replay_RANK.json`` into the checkpoint ``folder``."""
        rows = self._rows.values()
        none = torch.zeros(0, dtype=torch.int32)
        tensors = {name: torch.cat([none, *(getattr(row, name) for row in rows)]) for name in ("input_ids", "labels")}
        tensors["sides"] = torch.cat([none.expand(2, 0), *(row.side for row in rows if row.side is not None)], 1)
        names = sorted({name for row in rows for name in row.states})
        for place, name in enumerate(names):
            tensors[f"states.{place}"] = torch.cat([row.states[name] for row in rows if name in row.states])
        described = [
            {
                "number": number, "tokens": len(row.input_ids), "row_id": row.row_id, "teacher": row.teacher,
                "states": {name: len(states) for name, states in row.states.items()},
                "side": None if row.side is None else row.side.shape[1],
            }
            for number, row in self._rows.items()
        ]  # fmt: skip
        tensors_path, json_path = _paths(folder, rank)
        save_file(tensors, tensors_path)
        write_json_atomic(json_path, {"format": FORMAT, "next": self._next, "teachers": names, "rows": described})

    def load(self, folder: Path, rank: int) -> None:
        """Become what ``save`` wrote, bit for bit.

        Raises:
            UserError: the checkpoint has no such buffer, or not one that can be read.
        """
        tensors_path, json_path = _paths(folder, rank)
        if not json_path.is_file() or not tensors_path.is_file():
            raise UserError(
                f"{folder}: holds no replay buffer of process {rank} ({json_path.name}), so what this run would replay is "
                "not known; expected a checkpoint of a run with data.on_policy.adaptive"
            )
        told = read_json(json_path)
        if told.get("format") != FORMAT:
            raise UserError(f"{json_path}: format {told.get('format')!r}, expected {FORMAT}")
        try:
            rows = _rows_of(told, load_file(tensors_path))
        except (SafetensorError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{json_path}: cannot be read: {type(error).__name__}: {error}") from error
        if len(rows) > self.capacity:
            raise UserError(
                f"{json_path}: holds {len(rows):,} rows, and this process keeps {self.capacity:,} "
                "(data.on_policy.adaptive.capacity); set it back to what it was"
            )
        self._rows, self._next = rows, int(told["next"])


def share_of_capacity(capacity: int, world: int) -> int:
    """How many of ``capacity`` rows each of ``world`` processes keeps, at least one."""
    return -(-capacity // world)


def most_bytes(capacity: int, tokens: int, labels: int, bytes_of_label: int) -> int:
    """The bound of the module's first lines, of all processes together.

    Args:
        capacity: rows.
        tokens: of the longest row, and of it as its teacher reads it where that is kept.
        labels: of the longest answer.
        bytes_of_label: of the teachers' states of one label, H times the bytes of a number; 0: they are not kept.
    """
    return capacity * (8 * tokens + labels * bytes_of_label)


def _place(seed: int, step: int, rank: int, number: int) -> bytes:
    return hashlib.blake2b(f"replay\x1f{seed}\x1f{step}\x1f{rank}\x1f{number}".encode(), digest_size=16).digest()


def _paths(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / f"replay_{rank}.safetensors", folder / f"replay_{rank}.json"


def _rows_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, ReplayRow]:
    """The rows that ``ReplayBuffer.save`` described, each with tensors of its own."""
    stored = {name: tensors[f"states.{place}"] for place, name in enumerate(told["teachers"])}
    rows: dict[int, ReplayRow] = {}
    token, read, label = 0, 0, dict.fromkeys(stored, 0)
    for one in told["rows"]:
        end, states = token + int(one["tokens"]), {}
        for name, count in one["states"].items():
            states[name] = stored[name][label[name] : label[name] + count].clone()
            label[name] += count
        ids, labels = (tensors[name][token:end].clone() for name in ("input_ids", "labels"))
        side = None if one["side"] is None else tensors["sides"][:, read : read + one["side"]].clone()
        rows[int(one["number"])] = ReplayRow(ids, labels, one["row_id"], one["teacher"], states, side)
        token, read = end, read + (one["side"] or 0)
    return rows
