"""Rows that the student has said before, kept to be learned from again, with what the teacher said of them.

The teacher is frozen, so its states of a row are the same whenever it is asked: a row that is replayed costs no forward of
the teacher, and its loss at any temperature is exact. The student has moved on meanwhile, so the row is no longer one of
its own distribution: that is what DistiLLM (arXiv 2402.03898, section 3.2) accepts for a third of the time.

Each process keeps the rows that it generated itself. Memory, of all processes together, is bounded by

    capacity x (8 x tokens of a row + labels of a row x H x bytes of a number)

which for 1,000 rows of 128 labels and H = 4,096 in bfloat16 is 1 GiB; without states it is a few MB.

Shapes: ``T`` tokens of a row, ``n`` its labels, ``N`` those of a batch, ``H`` hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.files import read_json, write_json_atomic
from dts_hf.loss.compact_rows import CompactRows, joined
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.several import Share

FORMAT = 1
#: The name under which the states of the only teacher are kept; each of several has its own.
ONLY = ""
#: The tensors of ``CompactRows``, each with a line for each label.
_PARTS = ("ids", "logits", "tail")


@dataclass(frozen=True, eq=False)
class ReplayRow:
    """A prompt and what the student answered.

    Attributes:
        input_ids: ``[T]`` int32, prompt and answer.
        labels: ``[T]`` int32, unshifted, ``IGNORE_INDEX`` on the prompt.
        prompt_length: tokens of the prompt.
        row_id: of the data's row whose prompt it is.
        finished: the answer has come to its end of turn.
        teacher: the number of its teacher, where each row has one of several.
        states: what the teacher said of its n labels, ``[n, H_t]`` in its own type, or n compact rows; by the teacher's
            name, ``ONLY`` where there is one. Empty: it is asked again.
    """

    input_ids: Tensor
    labels: Tensor
    prompt_length: int
    row_id: int
    finished: bool
    teacher: int | None = None
    states: Mapping[str, Tensor | CompactRows] = field(default_factory=dict)

    @property
    def label_count(self) -> int:
        """How many of its labels count: n."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        kept = [part for of_teacher in self.states.values() for part in _tensors(of_teacher).values()]
        return sum(tensor.nbytes for tensor in (self.input_ids, self.labels, *kept))


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

    def add(self, rows: Sequence[ReplayRow]) -> list[int]:
        """Take rows in, and return the number of each; -1 of a row without a label, which teaches nothing."""
        numbers = []
        for row in rows:
            if not row.label_count:
                numbers.append(-1)
                continue
            self._rows[self._next] = row
            numbers.append(self._next)
            self._next += 1
            if len(self._rows) > self.capacity:
                del self._rows[next(iter(self._rows))]
        return numbers

    def draw(self, count: int, *, seed: int, step: int, rank: int = 0) -> list[int]:
        """The numbers of ``count`` rows, a function of what is kept and of (seed, step, rank).

        No row comes twice before all have come once.

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
            numbers: of the rows of the batch, in its order (``add``); -1: not kept.
            shares: what each teacher says of the N labels of the batch, in reading order (``teachers.several.Share``).
            counts: labels of each row, adding up to N.

        Raises:
            ValueError: there are other numbers of labels than those of the rows.
        """
        if not self.keeps_states:
            return
        if len(counts) != len(numbers):
            raise ValueError(f"{len(counts)} rows with labels for {len(numbers)} rows of the replay buffer")
        parts: list[dict[str, Tensor | CompactRows]] = [{} for _ in numbers]
        for share in shares:
            if share.states is None:
                continue
            states = _on_host(share.states)
            bounds = torch.tensor([0, *counts]).cumsum(0)
            if share.rows is not None:  # a teacher of some rows: its states are those of its labels alone
                bounds = torch.searchsorted(share.rows.cpu().contiguous(), bounds)
            elif len(states) != int(bounds[-1]):
                raise ValueError(f"{len(states)} states for {int(bounds[-1])} labels of the replay buffer")
            for place, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                if end > first:
                    # A copy of its own: a view would hold the states of the whole batch as long as one row is kept
                    parts[place][share.teacher or ONLY] = _copied(states[first:end])
        for number, kept in zip(numbers, parts, strict=True):
            if number in self._rows:  # else newer rows of this very step have driven it out
                self._rows[number] = replace(self._rows[number], states=kept)

    def has_states(self, numbers: Sequence[int]) -> bool:
        """Whether the states of all these rows are kept."""
        return all(self._rows[number].states for number in numbers)

    def shares(self, numbers: Sequence[int], live: Sequence[Share], device: torch.device) -> list[Share]:
        """What ``teachers.several.shares_of`` would say of these rows, without asking.

        Args:
            numbers: of the rows of a batch, in its order; ``has_states`` of them.
            live: a share of each teacher, for its head, its weight and its name; their states are not looked at.
            device: where the states go.
        """
        rows = [self._rows[number] for number in numbers]
        counts = [row.label_count for row in rows]
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        found = []
        for share in live:
            name = share.teacher or ONLY
            own = [place for place, row in enumerate(rows) if name in row.states]
            if not own:
                found.append(
                    replace(share, states=_nothing(share), rows=torch.zeros(0, dtype=torch.int64, device=device))
                )
                continue
            states = cast("Tensor | CompactRows", joined([rows[place].states[name] for place in own]))  # type: ignore[arg-type]
            labels = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in own])
            everything = len(own) == len(rows) and share.rows is None
            found.append(replace(share, states=states.to(device), rows=None if everything else labels.to(device)))
        return found

    # ------------------------------------------------------------------------------------------------ in a checkpoint

    def save(self, folder: Path, rank: int) -> None:
        """Write ``replay_RANK.safetensors`` and, after it, ``replay_RANK.json`` into the checkpoint ``folder``."""
        rows = self._rows.values()
        tensors = {
            name: torch.cat([getattr(row, name) for row in rows]) if rows else torch.zeros(0, dtype=torch.int32)
            for name in ("input_ids", "labels")
        }
        names = sorted({name for row in rows for name in row.states})
        vocabulary: dict[str, int] = {}
        for place, name in enumerate(names):
            states: Any = joined([row.states[name] for row in rows if name in row.states])  # type: ignore[arg-type]
            tensors |= {f"states.{place}.{part}": tensor for part, tensor in _tensors(states).items()}
            if isinstance(states, CompactRows):
                vocabulary[name] = states.vocab_size
        described = [
            {
                "number": number, "tokens": len(row.input_ids), "prompt": row.prompt_length, "row_id": row.row_id,
                "finished": row.finished, "teacher": row.teacher,
                "states": {name: len(states) for name, states in row.states.items()},
            }
            for number, row in self._rows.items()
        ]  # fmt: skip
        tensors_path, json_path = _paths(folder, rank)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tensors_path)
        told = {"format": FORMAT, "next": self._next, "teachers": names, "vocabulary": vocabulary, "rows": described}
        write_json_atomic(json_path, told)

    def load(self, folder: Path, rank: int) -> None:
        """Become what ``save`` wrote, bit for bit.

        Raises:
            UserError: the checkpoint has no such buffer, or not one that can be read.
        """
        tensors_path, json_path = _paths(folder, rank)
        if not json_path.is_file() or not tensors_path.is_file():
            raise UserError(
                f"{folder}: holds no replay buffer of process {rank} ({json_path.name}), so what this run would replay is "
                "not known; expected a checkpoint of a run with data.on_policy.adaptive.replay"
            )
        told = read_json(json_path)
        try:
            tensors = load_file(tensors_path)
            if told.get("format") != FORMAT:
                raise UserError(f"{json_path}: format {told.get('format')!r}, expected {FORMAT}")
            rows = _rows_of(told, tensors)
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
        tokens: of the longest row.
        labels: of the longest answer.
        bytes_of_label: of the teachers' states of one label, H times the bytes of a number; 0: they are not kept.
    """
    return capacity * (8 * tokens + labels * bytes_of_label)


def _place(seed: int, step: int, rank: int, number: int) -> bytes:
    return hashlib.blake2b(f"replay\x1f{seed}\x1f{step}\x1f{rank}\x1f{number}".encode(), digest_size=16).digest()


def _tensors(states: Tensor | CompactRows) -> dict[str, Tensor]:
    """The tensors of states, each with a line for each label."""
    if isinstance(states, Tensor):
        return {"states": states}
    return {part: getattr(states, part) for part in _PARTS}


def _on_host(states: Tensor | CompactRows) -> Tensor | CompactRows:
    return states.detach().to(torch.device("cpu"))


def _copied(states: Tensor | CompactRows) -> Tensor | CompactRows:
    if isinstance(states, Tensor):
        return states.clone()
    return replace(states, **{part: tensor.clone() for part, tensor in _tensors(states).items()})


def _nothing(share: Share) -> Tensor | CompactRows | None:
    """States of no label, as a teacher that has no row in a batch gives them."""
    if share.states is not None:
        return share.states[:0]
    if share.head is None:
        return None
    weight = share.head.weight
    return weight.new_zeros((0, weight.shape[1]))


def _paths(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / f"replay_{rank}.safetensors", folder / f"replay_{rank}.json"


def _rows_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, ReplayRow]:
    """The rows that ``ReplayBuffer.save`` described, each with tensors of its own."""
    names: list[str] = told["teachers"]
    stored: dict[str, Tensor | CompactRows] = {}
    for place, name in enumerate(names):
        if name in told["vocabulary"]:
            parts = [tensors[f"states.{place}.{part}"] for part in _PARTS]
            stored[name] = CompactRows(*parts, vocab_size=int(told["vocabulary"][name]))
        else:
            stored[name] = tensors[f"states.{place}.states"]
    rows: dict[int, ReplayRow] = {}
    token, label = 0, dict.fromkeys(names, 0)
    for one in told["rows"]:
        end = token + int(one["tokens"])
        states = {}
        for name, count in one["states"].items():
            states[name] = _copied(stored[name][label[name] : label[name] + count])
            label[name] += count
        rows[int(one["number"])] = ReplayRow(
            tensors["input_ids"][token:end].clone(), tensors["labels"][token:end].clone(), one["prompt"], one["row_id"],
            one["finished"], one["teacher"], states,
        )  # fmt: skip
        token = end
    return rows
