"""Cuts a batch, padded or packed, back into rows: what a teacher elsewhere is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX, count_targets
from dts_hf.models.packed_attention import is_cu_seqlens

Row = tuple[Tensor, Tensor]


def labelled_rows(batch: Mapping[str, Any], labels: Tensor) -> list[Row]:
    """``(ids [T], is a label [T])`` of each row with a label, on the CPU, in the order of ``selection.select_response``.

    Padding, on the left or the right, is what ``attention_mask`` hides; packed rows begin where ``position_ids`` are 0 or
    at the boundaries of a ``cu_seqlens_mask``. A row is asked with positions from 0 on.

    Args:
        batch: ``input_ids`` ``[B, T]``, ``attention_mask`` or ``position_ids``.
        labels: ``[B, T]`` unshifted.

    Raises:
        UserError: the batch is of another kind: its states could not be those of rows by themselves.
    """
    ids, labels = batch["input_ids"].detach().cpu(), labels.detach().cpu()
    rows = []
    for line, (first, end) in _spans(batch, ids):
        marked = labels[line, first:end] != IGNORE_INDEX
        if first == 0:
            marked[0] = False  # the shift drops the label of a line's first token
        if marked.any():
            rows.append((ids[line, first:end], marked))
    found, expected = sum(int(marked.sum()) for _, marked in rows), int(count_targets(labels))
    if found != expected or any(bool(marked[0]) for _, marked in rows):
        raise UserError(
            f"labels: {expected:,} of them count, but {found:,} lie on tokens that attention_mask shows; none may lie on "
            "padding, nor on the first token of a packed or left-padded row, which is predicted from outside of the row"
        )
    return rows


def _spans(batch: Mapping[str, Any], ids: Tensor) -> Iterator[tuple[int, tuple[int, int]]]:
    """``(line, (first, end))`` of each row in reading order."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if is_cu_seqlens(mask):
        if len(ids) != 1:
            raise UserError(
                f"attention_mask: boundaries of packed rows in a batch of {len(ids)} lines, expected one line"
            )
        bounds = mask[0, 0, 0].tolist()  # type: ignore[index]
        yield from ((0, span) for span in pairwise(bounds))
        return
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"attention_mask: got the shape {tuple(mask.shape)}, expected that of input_ids, {tuple(ids.shape)}: a remote "
            "teacher sees rows, and no mask of pairs of tokens"
        )
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() == 1
    hidden = torch.zeros_like(shown) if mask is None else mask.cpu() == 0
    if not (shown | hidden).all():
        raise UserError("attention_mask: got values beside 0 and 1, expected 1 at tokens and 0 at padding")
    at = None if positions is None else positions.detach().cpu().expand_as(ids)
    for line in range(len(ids)):
        places = shown[line].nonzero()[:, 0]
        if not len(places):
            continue
        first, end = int(places[0]), int(places[-1]) + 1
        if end - first != len(places):
            raise UserError("attention_mask: hides tokens in the middle of a row, expected padding at its ends alone")
        for span in [(first, end)] if at is None else _restarts(at[line, first:end], first):
            yield line, span


def _restarts(positions: Tensor, first: int) -> list[tuple[int, int]]:
    """Rows of a line whose tokens have these positions; the line's first token shown is ``first``."""
    starts = (positions == 0).nonzero()[:, 0].tolist()
    bounds = [*starts, len(positions)]
    counted = [torch.arange(end - start) for start, end in pairwise(bounds)]
    if not starts or starts[0] != 0 or not torch.equal(torch.cat(counted), positions.long()):
        raise UserError(
            "position_ids: expected 0, 1, 2 and so on from the first token of each row: a remote teacher counts so"
        )
    return [(first + start, first + end) for start, end in pairwise(bounds)]
