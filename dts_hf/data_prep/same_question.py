"""Whether two rows ask the same question: no held-out row may stand in a training file, in whatever edition."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dts_hf.data_prep.lengths import JsonObject


def plain(text: str) -> str:
    """Letters and digits of ``text`` alone, without what stands in square brackets.

    Editions of a text differ in punctuation and in Wikipedia's marks (``[3]``, ``[a]``, ``[citation needed]``), which stand
    behind letters, full stops, brackets and quotes alike: they go first, before the punctuation around them does.
    """
    bare, count = unicodedata.normalize("NFKC", text), 1  # an accent is a letter's, or a character of its own
    while count:  # once more for a mark within brackets
        bare, count = re.subn(r"\[\s*\w[^\[\]]{0,40}\]", "", bare)
    return re.sub(r"\W+", "", bare).casefold()


def identity(row: JsonObject) -> set[tuple[str, ...]]:
    """What makes two rows the same question: one of these in common.

    The texts that are asked with; of instruction rows also instruction and answer, because an edition may lack the input.
    """
    if "instruction" not in row:
        texts = [value for name, value in row.items() if isinstance(value, str) and name not in ("id", "idx", "label")]
        return {("texts", *map(plain, texts))}
    instruction = plain(row["instruction"])
    answers = [row["output"]] if isinstance(row["output"], str) else row["output"]
    return {("input", instruction, plain(row["input"])), *(("output", instruction, plain(text)) for text in answers)}


def without(rows: Sequence[JsonObject], asked: set[tuple[str, ...]]) -> list[JsonObject]:
    """The rows that share no ``identity`` with ``asked``."""
    return [row for row in rows if not identity(row) & asked]
