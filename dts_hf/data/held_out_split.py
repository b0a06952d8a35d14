"""Held-out rows out of the training rows, for people with one file: the same rows each time, and no prompt on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dts_hf.data.rows import Row
from dts_hf.errors import UserError


def split_off(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows), each in the order of ``rows``.

    A row is held out for the hash of its prompt, so the choice depends neither on the order of the file nor on a seed, and
    rows with one prompt stay together.

    Args:
        rows: all of them.
        share: of them that is held out, between 0 and 1; at least one row is.

    Raises:
        UserError: nothing would be left to train on.
    """
    digests = [_digest(row) for row in rows]
    count = max(1, round(share * len(rows)))
    last = sorted(digests)[min(count, len(rows)) - 1]
    held_out = [row for row, digest in zip(rows, digests, strict=True) if digest <= last]
    train = [row for row, digest in zip(rows, digests, strict=True) if digest > last]
    if not train:
        raise UserError(
            f"data.validation: {share:g} of {len(rows)} rows leaves none to train on (rows with one prompt stay together); "
            "expected more rows, or a file of held-out rows"
        )
    return train, held_out


def _digest(row: Row) -> bytes:
    asked = json.dumps([row.instruction, row.input, row.messages], default=str)
    return hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=16).digest()
