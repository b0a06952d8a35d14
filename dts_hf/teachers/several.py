"""Several teachers: each row has one of them, or all of them have every row and count by fixed weights.

Shapes: ``B`` batch, ``T`` time, ``N`` labelled rows, ``H`` hidden; ``N_k`` those of teacher k.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from dts_hf.data.routes import TEACHER, Routing, names_problem, weights_problem
from dts_hf.data.teacher_context import split_batch
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError, nearest
from dts_hf.loss import statistics as stats
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.distillation_loss import DistillationLoss, LossOutput
from dts_hf.loss.overlap import Aligned, overlap_loss
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.head import Head, gather_head
from dts_hf.models.packed_attention import cu_seqlens_mask
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.live import LiveTeacher

#: What a collator asks for what else a batch has of its rows.
OfRows = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Share:
    """What one teacher says of the labelled rows of a batch.

    Attributes:
        states: ``[N_k, H_t]``, or N_k compact rows; None without a teacher.
        head: makes logits of them; its weights may be shares until ``gathered`` has them.
        rows: which of the N labelled rows they are, ``[N_k]`` int64; None: all.
        weight: of its loss; the weights of all shares that a row is in add up to 1.
        teacher: its name where there are several.
        aligned: where it has another tokenizer: its own labels, and which of them are the student's.
    """

    states: Tensor | CompactRows | None
    head: Head | None
    rows: Tensor | None = None
    weight: float = 1.0
    teacher: str | None = None
    aligned: Aligned | None = None


class SeveralTeachers:
    """Teachers by name; the same object under two names is asked once a batch.

    Args:
        teachers: anything with the ``Teacher`` interface.
        weights: by name, adding up to 1: every teacher has every row. None: each row has one teacher (``shares``'s
            ``numbers``).
    """

    head = None  # each has its own
    takes_cu_seqlens = True  # a row's boundaries go on to those that know them, and are hidden from none

    def __init__(self, teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None = None) -> None:
        self.by_name = dict(teachers)
        self.weights = None if weights is None else dict(weights)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the recipe; a row names its teacher by the place in it."""
        return tuple(self.by_name)

    @property
    def distinct(self) -> list[tuple[Teacher, list[str]]]:
        """Each teacher once, with all its names."""
        found: dict[int, tuple[Teacher, list[str]]] = {}
        for name, teacher in self.by_name.items():
            found.setdefault(id(teacher), (teacher, []))[1].append(name)
        return list(found.values())

    def places(self, names: Sequence[str]) -> frozenset[int] | None:
        """By which numbers rows name the teacher that has these names; None: it has every row."""
        return None if self.weights is not None else frozenset(self.names.index(name) for name in names)

    def of_rows(self, asked: Sequence[Teacher]) -> OfRowsOfSeveral:
        """What a collator asks for the states of its rows.

        Args:
            asked: those of the teachers that have an ``of_rows`` of their own, as ``CachedTeacher`` has.
        """
        found = [(one, names) for one, names in self.distinct if any(one is other for other in asked)]
        return OfRowsOfSeveral([(names[0], self.places(names), one.of_rows) for one, names in found])  # type: ignore[attr-defined]

    def to(self, device: torch.device) -> SeveralTeachers:
        """Move all of them to the student's device."""
        for teacher, _ in self.distinct:
            teacher.to(device)
        return self

    def states(self, batch: dict[str, Any], labels: Tensor) -> None:
        """There is no one answer of several teachers: see ``shares``.

        Raises:
            TypeError: always.
        """
        raise TypeError("several teachers have no states in common: ask shares()")

    def shares(self, batch: dict[str, Any], labels: Tensor, positions: Tensor, numbers: Tensor | None) -> list[Share]:
        """What each of them says of its rows, in the order of ``names``.

        A teacher that is sharded runs once, whatever rows there are: its weights are gathered by all processes together.

        Args:
            batch: what the student sees, and what ``of_rows`` has put there.
            labels: ``[B, T]`` unshifted.
            positions: ``[N]``, ``selection.response_positions(labels)``.
            numbers: the place in ``names`` of each row's teacher, one for each row of the batch, packed or not; None with
                weights.

        Raises:
            UserError: there are numbers for other rows than those of the batch.
            ValueError: a teacher gives another number of states than it has rows.
        """
        if self.weights is not None:
            whole = {
                id(one): one.states(_batch_of(batch, names[0]), labels, *_known(one, positions))
                for one, names in self.distinct
            }
            return [
                Share(whole[id(one)], one.head, None, self.weights[name], name) for name, one in self.by_name.items()
            ]
        of_token = teacher_of_token(labels, batch.get("position_ids"), numbers)
        of_row = of_token.reshape(-1).index_select(0, positions + 1)  # [N], by the label that a row predicts
        shares: dict[str, Share] = {}
        for teacher, names in self.distinct:
            places = torch.tensor([self.names.index(name) for name in names], device=of_token.device)
            own = torch.isin(of_row, places).nonzero().squeeze(-1)  # [N of this teacher]
            states = _states_of(teacher, names[0], batch, labels, torch.isin(of_token, places), len(own))
            if states is not None and len(states) != len(own):
                raise ValueError(f"teacher {names[0]!r}: {len(states)} states for {len(own)} labelled rows")
            for name in names:
                inner = (of_row[own] == self.names.index(name)).nonzero().squeeze(-1)
                part = states if states is None or len(names) == 1 else states[inner]
                shares[name] = Share(part, teacher.head, own[inner], 1.0, name)
        return [shares[name] for name in self.names]


@dataclass
class OfRowsOfSeveral:
    """Adds to a batch what several teachers have of its rows, each of its own; workers of a data loader run it.

    Args:
        parts: of each teacher its first name, the numbers of its rows (None: it has every row), and its ``of_rows``.

    Returns (of a call):
        what they give, each key with ``/NAME`` behind it.
    """

    parts: Sequence[tuple[str, frozenset[int] | None, OfRows]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name, places, of_rows in self.parts:
            own = [one for one in examples if places is None or one.get(TEACHER) in places]
            with naming_teacher(name):
                batch |= {f"{key}{stats.OF_TEACHER}{name}": value for key, value in of_rows(own).items()}
        return batch


def _batch_of(batch: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """What the models see of a batch, and what ``OfRowsOfSeveral`` has put there for one teacher; None: for none."""
    found = {key: value for key, value in batch.items() if stats.OF_TEACHER not in key}
    of_one = ((key.partition(stats.OF_TEACHER), value) for key, value in batch.items() if stats.OF_TEACHER in key)
    return found | {key: value for (key, _, whose), value in of_one if whose == name}


@contextmanager
def naming_teacher(name: str) -> Iterator[None]:
    """Within it an error says which of several teachers it is about; without a name there is but one.

    Raises:
        UserError: the one that came up within it, with ``teachers.NAME`` in the place of ``teacher``.
    """
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(_of_teacher(str(error), f"teachers.{name}"), everywhere=error.everywhere) from error


def _of_teacher(message: str, key: str) -> str:
    """``message`` about ``teacher`` as one about ``key``; the keys of its section are renamed wherever they stand."""
    said = re.sub(r"(?<![\w./'-])teacher(?=\.[a-z_]+\b(?!\.))", key, re.sub(r"^teacher(?=:)", key, message))
    return said if said.startswith(key) else f"{key}: {said}"


def shares_of(
    teacher: Teacher, batch: dict[str, Any], labels: Tensor, positions: Tensor, numbers: Tensor | None
) -> list[Share]:
    """What a teacher, or each of several, says of the labelled rows of a batch; see ``SeveralTeachers.shares``.

    Args:
        teacher: one, several, or none.
        batch: what the student sees, and under ``TEACHER_BATCH`` what the teacher alone sees.
        labels: ``[B, T]`` unshifted.
        positions: ``[N]``, ``selection.response_positions(labels)``.
        numbers: of the rows' teachers, ``[rows]``, where each row has one of several.

    Raises:
        UserError: see ``SeveralTeachers.shares``.
        ValueError: a teacher that reads more than the student gives another number of states than there are labels.
    """
    if isinstance(teacher, SeveralTeachers):
        return teacher.shares(batch, labels, positions, numbers)
    if read := split_batch(batch):  # it reads more than the student, and predicts the same labels in the same order
        states = teacher.states(*read)
        if states is None or len(states) != len(positions):
            raise ValueError(
                f"{0 if states is None else len(states)} states of the teacher for {len(positions)} labels"
            )
        return [Share(states, teacher.head)]
    return [Share(teacher.states(batch, labels, *_known(teacher, positions)), teacher.head)]


def blank_shares(teacher: Teacher) -> list[Share]:
    """The shares of ``shares_of`` without states and rows: each teacher's head, weight and name."""
    if not isinstance(teacher, SeveralTeachers):
        return [Share(None, teacher.head)]
    weights = teacher.weights
    rows = torch.zeros(0, dtype=torch.int64) if weights is None else None
    return [
        Share(None, one.head, rows, 1.0 if weights is None else weights[name], name)
        for name, one in teacher.by_name.items()
    ]


def teacher_of_token(labels: Tensor, position_ids: Tensor | None, numbers: Tensor | None) -> Tensor:
    """The number of the teacher of each token, ``[B, T]`` int64.

    Args:
        labels: ``[B, T]``.
        position_ids: ``[1, T]`` of packed rows, 0 at the start of each.
        numbers: one for each row.

    Raises:
        UserError: they are missing, or not one for each row.
    """
    if numbers is None:
        raise UserError("teachers: this batch does not say which teacher its rows have; expected rows with a teacher")
    if len(numbers) == len(labels):
        return numbers.unsqueeze(1).expand_as(labels)
    starts = None if position_ids is None or len(labels) > 1 else position_ids.expand_as(labels) == 0
    if starts is None or int(starts.sum()) != len(numbers):
        raise UserError(
            f"teachers: a batch of {len(numbers)} rows came as {len(labels)} lines of tokens, so it cannot be told which "
            "token has which teacher; expected one line a row, or rows end to end with position_ids that begin at 0"
        )
    return numbers[starts.cumsum(1) - 1]


def _known(teacher: Teacher, positions: Tensor) -> tuple[Any, ...]:
    """Where the labels are, for a teacher that can use it; others have the interface alone."""
    return (positions,) if isinstance(teacher, LiveTeacher) else ()


def _states_of(
    teacher: Teacher, name: str, batch: dict[str, Any], labels: Tensor, mine: Tensor, count: int
) -> Tensor | CompactRows | None:
    """The states ``[N_k, H_t]`` of the ``count`` labels that stand where ``mine`` ``[B, T]`` does."""
    own_labels = labels.masked_fill(~mine, IGNORE_INDEX)
    if not isinstance(teacher, LiveTeacher):
        given = _batch_of(batch, name)
        if not hasattr(teacher, "of_rows") or not count:  # one of the user's may know rows by their place in the batch
            return teacher.states(given, own_labels)
        part, part_labels = own_rows(_batch_of(batch, None), own_labels, mine)
        return teacher.states({**given, **part}, part_labels)
    batch = _batch_of(batch, None)
    if not count and not is_sharded(teacher.model):
        weight = teacher.head.weight
        return weight.new_zeros((0, weight.shape[1]), device=labels.device)
    if not count:  # it takes part all the same, with any row: its weights are gathered by all processes together
        mine = torch.zeros_like(mine)
        mine[0] = True
    part, part_labels = own_rows(batch, own_labels, mine)
    return teacher.states(part, part_labels)


def own_rows(batch: dict[str, Any], labels: Tensor, mine: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Those rows of a batch that one teacher has to read, and their labels; the whole batch where they cannot be told apart.

    Args:
        batch: padded, or packed (``[1, T]``).
        labels: ``[B, T]``, ``IGNORE_INDEX`` on rows of others.
        mine: ``[B, T]`` bool, equal for all tokens of a row.
    """
    if len(labels) > 1:
        lines = mine[:, 0].nonzero().squeeze(-1)
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim()}
        # A line for all of them (positions that are the same everywhere) stays
        cut = {key: value[lines] for key, value in tensors.items() if len(value) == len(labels)}
        return {**batch, **cut}, labels[lines]
    tokens = mine[0].nonzero().squeeze(-1)
    if len(tokens) == labels.shape[1]:
        return batch, labels
    by_token = {"input_ids", "position_ids"}
    mask = batch.get("attention_mask")
    if not by_token <= batch.keys() <= {*by_token, "attention_mask"} or (mask is not None and mask.dim() != 4):
        return batch, labels
    part = {key: batch[key][:, tokens] for key in by_token}
    if mask is not None:
        starts = (part["position_ids"][0] == 0).nonzero().squeeze(-1).tolist()
        ends = [*starts[1:], len(tokens)]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        part["attention_mask"] = cu_seqlens_mask(lengths).to(labels.device)
    return part, labels[:, tokens]


def routing_of(
    teacher: object,
    teachers: Mapping[str, object] | None,
    column: str | None,
    default: str | None,
    weights: Mapping[str, float] | None,
) -> Routing | None:
    """How rows name one of ``teachers``; None: there are not several, or all of them have every row.

    Args:
        teacher: the one that there may be in their place.
        teachers: by name.
        column: of the rows.
        default: the teacher of rows that name none.
        weights: of the teachers' losses.

    Raises:
        UserError: these do not fit together.
    """
    options = {"teacher_column": column, "default_teacher": default, "teacher_weights": weights}
    if teachers is None:
        if given := [name for name, value in options.items() if value is not None]:
            raise UserError(f"{given[0]}: got {options[given[0]]!r} without teachers; it is for several of them")
        return None
    if teacher is not None:
        raise UserError("teachers: given beside teacher; expected one of the two")
    if problem := names_problem(teachers) or weights_problem(teachers, column, weights):
        raise UserError(problem)
    if default is not None and (column is None or default not in teachers):
        raise UserError(
            f"default_teacher: got {default!r}, expected one of {', '.join(teachers)}, beside teacher_column."
            f"{nearest(default, teachers)}"
        )
    return None if column is None else Routing(column, tuple(teachers), default)


@contextmanager
def gathered(shares: Sequence[Share], vocab_size: int) -> Iterator[list[Share]]:
    """Within it the shares with whole heads, each gathered once, cut to the ids that student and teachers share."""
    with ExitStack() as stack:
        heads: dict[int, Head | None] = {}
        found = []
        for share in shares:
            key = id(None if share.head is None else share.head.weight)
            if key not in heads:
                head = stack.enter_context(gather_head(share.head))
                heads[key] = head if head is None or share.aligned is not None else head.cut(vocab_size)
            found.append(replace(share, head=heads[key]))
        yield found


def loss_of_shares(
    loss: DistillationLoss,
    shares: Sequence[Share],
    states: Tensor,
    head: Head,
    targets: Tensor,
    normalizer: float | Tensor,
    sequences: Tensor | None,
    kd_ratio: float | None = None,
    pseudo_labels: bool = False,
) -> LossOutput:
    """The loss of N rows, each by its teacher or by all: the weighted sum of the shares' losses, over one normaliser.

    The sums are those of all rows and, where there are several teachers, of each one's rows as ``NAME/TEACHER``. A share
    without a row fills its sums, too: every process must reduce the same ones.

    Args:
        loss: of training, or of held-out rows.
        shares: with whole heads; every row is in as many of them as make a weight of 1.
        states: ``[N, H_s]``, the student's.
        head: the student's, whole.
        targets: ``[N]``.
        normalizer: labels of the whole optimizer step over the number of processes, the same for all shares.
        sequences: ``[N]``, see ``DistillationLoss.forward``.
        kd_ratio: see there.
        pseudo_labels: see there.
    """
    if (aligned := shares[0].aligned) is not None:  # the only teacher
        their_states, their_head = cast(Tensor, shares[0].states), cast(Head, shares[0].head)
        return overlap_loss(loss, states, head, their_states, their_head, aligned, targets, normalizer, sequences)
    if len(shares) == 1 and shares[0].rows is None and shares[0].teacher is None:
        (one,) = shares
        output = loss(
            states, head, one.states, one.head, targets, normalizer, sequences, kd_ratio=kd_ratio,
            pseudo_labels=pseudo_labels,
        )  # fmt: skip
        return cast(LossOutput, output)
    sums: dict[str, Tensor] = {}
    total: Tensor | None = None
    # One without a row would make a gradient of zeros as large as the head. One of all must stay in the graph.
    busy = [share for share in shares if share.rows is None or len(share.rows)] or [shares[0]]
    frozen = head.detached()
    for share in shares:
        own_states, own_targets, own_sequences = states, targets, sequences
        if share.rows is not None:
            own_states, own_targets = states.index_select(0, share.rows), targets.index_select(0, share.rows)
            own_sequences = None if sequences is None else sequences.index_select(0, share.rows)
        output = loss(
            own_states, head if share in busy else frozen, share.states, share.head, own_targets,
            normalizer / share.weight, own_sequences, share.teacher, kd_ratio, pseudo_labels,
        )  # fmt: skip
        total = output.loss if total is None else total + output.loss
        _add(sums, output.sums, share)
    assert total is not None
    sums[stats.ROWS] = torch.full_like(sums[stats.ROWS], float(len(targets)))  # exact, whatever the weights
    return LossOutput(total, sums)


def _add(sums: dict[str, Tensor], of_share: Mapping[str, Tensor], share: Share) -> None:
    for name, value in of_share.items():
        if stats.reduction_of(name) == "sum":
            weighted = value * share.weight
            sums[name] = weighted if name not in sums else sums[name] + weighted
        else:
            pick = torch.minimum if stats.reduction_of(name) == "min" else torch.maximum
            sums[name] = value if name not in sums else pick(sums[name], value)
        if name in stats.SUMS_BY_TEACHER:
            sums[f"{name}{stats.OF_TEACHER}{share.teacher}"] = value
