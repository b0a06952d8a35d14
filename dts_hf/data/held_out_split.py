"""Held-out rows out of the training rows, for people with one file: the same rows each time, and no prompt on both sides."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from dts_hf.data.mapped_rows import ids_of, picked
from dts_hf.data.rows import Row
from dts_hf.errors import UserError


def split_off(rows: Sequence[Row], share: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(rows to train on, held-out rows), each in the order of ``rows``.

    A row is held out for the hash of its prompt, so the choice depends neither on the order of the file nor on a seed.
    Rows with one prompt stay together, and so do those of one conversation, which may be there once for each of its turns.
    Those that would be too many are trained on. Of a row that a weight repeats the first copy alone is held out.

    Args:
        rows: all of them.
        share: of them that is held out, between 0 and 1; at least one row is.

    Raises:
        UserError: nothing would be left to train on.
    """
    digests = _digests(rows)
    ids = ids_of(rows)
    of_ids = dict(zip(ids, digests, strict=True))
    # As ``weighted`` names them
    is_copy = [of_ids.get(row_id.rpartition("#")[0]) == digest for row_id, digest in zip(ids, digests, strict=True)]
    sizes = Counter(digest for digest, copy in zip(digests, is_copy, strict=True) if not copy)
    left = max(1, round(share * sizes.total()))
    chosen = set()
    for digest in sorted(sizes):
        if sizes[digest] <= left:
            chosen.add(digest)
            left -= sizes[digest]
    if not chosen:  # every prompt has more rows than that
        chosen.add(min(sizes, key=lambda digest: (sizes[digest], digest)))
    train = [place for place, digest in enumerate(digests) if digest not in chosen]
    if not train:
        raise UserError(
            f"data.validation: {share:g} of {len(rows)} rows leaves none to train on (rows with one prompt stay together); "
            "expected more rows, or a file of held-out rows"
        )
    held_out = [place for place, digest in enumerate(digests) if digest in chosen and not is_copy[place]]
    return picked(rows, train), picked(rows, held_out)


def _digests(rows: Sequence[Row]) -> list[str]:
    """What rows share that stay together: the opening of their conversation, up to its first question.

    What most of the rows begin with is an example or a greeting, and no conversation: their whole prompt counts.
    """
    openings = [_digest(_opening(row)) for row in rows]
    sizes = Counter(openings)
    common = {opening for opening, size in sizes.items() if 2 * size > len(rows)}
    for place, opening in enumerate(openings):
        if opening in common and (row := rows[place]).messages:
            openings[place] = _digest([row.instruction, row.input, row.messages])
    return openings


def _opening(row: Row) -> list[object]:
    if row.kind == "text":
        return [row.response]
    messages = row.messages or ()
    asked = next((place for place, message in enumerate(messages, 1) if message["role"] == "user"), None)
    return [row.instruction, row.input, row.messages] if asked is None else list(messages[:asked])


def _digest(content: list[object]) -> str:
    text = json.dumps(content, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
