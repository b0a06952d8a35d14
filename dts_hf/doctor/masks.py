"""The label mask: real batches looked at token by token, and rows of each kind shown in colour."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.rows import Row
from dts_hf.data.teacher_context import split_batch
from dts_hf.doctor.diagnosis import Check, PicturedRow, Segment
from dts_hf.doctor.tokens import spaced
from dts_hf.loss.selection import IGNORE_INDEX

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
#: Rows whose labels are looked at.
LABELLED_ROWS = 64


def check_labels(check: Check, data: EncodedDataset, collator: Collate, ends: Collection[int]) -> None:
    """Build real batches and look: the answers are learned, nothing else is, and the end tokens are.

    Args:
        check: takes what is found.
        data: tokenised rows.
        collator: the trainer's own.
        ends: ids of the tokens that end an answer.
    """
    rows, targets = spaced(range(len(data)), LABELLED_ROWS), data.target_counts
    learned = expected = extra = turns = learned_ends = 0
    for start in range(0, len(rows), 8):
        chosen = rows[start : start + 8]
        for index, (_, labels, _) in zip(chosen, _split(collator([data[i] for i in chosen])), strict=True):
            learns = labels != IGNORE_INDEX
            spans = data.spans(index)
            learned += int(learns.sum())
            expected += targets[index]
            extra += int(learns.sum()) - sum(int(learns[first:last].sum()) for first, last in spans)
            final = [last - 1 for _, last in spans if data.ids[index][last - 1] in ends]
            turns += len(final)
            learned_ends += int(learns[final].sum())
    counts = {"learned": learned, "expected": expected, "ends": turns, "learned_ends": learned_ends}
    check.values = {"rows": len(rows), **counts}
    mean = learned / max(len(rows), 1)
    check.summary = f"{mean:.0f} tokens a row are learned, the end token in {learned_ends} of {turns} answers"
    if learned_ends < turns:
        check.error(
            "end-token-masked",
            f"the end token has no label in {turns - learned_ends} of {turns} answers: the student would never learn to "
            "stop",
            "Mask padding by length, not by token id (the end token is often the padding token, too)",
        )
    missing = expected - turns - (learned - extra - learned_ends)
    if missing > 0:
        check.error("answer-masked", f"{missing} tokens of answers have no label", "")
    if extra:
        check.error("prompt-learned", f"{extra} tokens of prompts or padding have a label", "")


def _split(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows of a padded or packed batch, each as (ids, labels, whether it is a token and no padding)."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        return list(zip(ids, labels, batch["attention_mask"].bool(), strict=True))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    real = torch.ones_like(ids[0], dtype=torch.bool)
    return [(ids[0, a:b], labels[0, a:b], real[a:b]) for a, b in zip(starts, ends, strict=True)]


def picture(
    data: EncodedDataset,
    collator: Collate,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    rows: Sequence[Row] = (),
) -> list[PicturedRow]:
    """Rows of one batch as the loss sees them: a short and a long one, and one of each other kind that the data have.

    Args:
        data: tokenised rows.
        collator: the trainer's own.
        tokenizer: of the student.
        ends: ids of the tokens that end an answer.
        rows: what ``data`` were made of, as far as it is known.
    """
    by_length = sorted(range(len(data)), key=data.lengths.__getitem__)
    chosen = [by_length[len(data) // 4], by_length[3 * len(data) // 4]][: len(data)]
    kinds = {row.id: (row.kind, bool(row.tools), row.given is None) for row in rows}
    seen = {kinds.get(data.row_ids[index]) for index in chosen}
    for index, name in enumerate(data.row_ids):
        if kinds.get(name) not in seen:
            seen.add(kinds.get(name))
            chosen.append(index)
    batch = collator([data[i] for i in chosen])
    # Also a batch for a teacher with another tokenizer has labels of its own, and is none of these
    read = None if data.for_teacher is None else split_batch(batch)
    of_teacher = [] if read is None else _split({**read[0], "labels": read[1]})
    pictured = []
    for place, (index, row) in enumerate(zip(chosen, _split(batch), strict=True)):
        stops = [stop for _, stop in data.spans(index)]
        same = () if data.aligned is None else data.aligned[index].student.tolist()
        pictured.append(PicturedRow(data.row_ids[index], _segments(*row, stops, tokenizer, ends, same)))
        if of_teacher:
            stops = [stop for _, stop in data.teacher_spans(index)]
            segments = _segments(*of_teacher[place], stops, tokenizer, ends)
            pictured.append(PicturedRow(f"{data.row_ids[index]}, for the teacher", segments))
    return pictured


def _segments(
    ids: torch.Tensor,
    labels: torch.Tensor,
    real: torch.Tensor,
    stops: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    same: Sequence[int] = (),
) -> list[Segment]:
    """One row ``[T]`` as the loss sees it.

    ``stops`` are the places behind what is learned, ``same`` the numbers of the labels that are the same for a teacher with
    another tokenizer.
    """
    kinds_of = [
        "padding" if not is_real else "masked" if label == IGNORE_INDEX else "learned"
        for label, is_real in zip(labels.tolist(), real.tolist(), strict=True)
    ]
    learned = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    for number in same:
        kinds_of[learned[number]] = "aligned"
    for stop in stops:
        if kinds_of[stop - 1] in ("learned", "aligned") and int(ids[stop - 1]) in ends:
            kinds_of[stop - 1] = "end"
    segments = []
    for kind, places in groupby(range(len(kinds_of)), key=kinds_of.__getitem__):
        tokens = ids[list(places)].tolist()
        text = "" if kind == "padding" else str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        segments.append(Segment(kind, len(tokens), text))  # type: ignore[arg-type]
    return segments
