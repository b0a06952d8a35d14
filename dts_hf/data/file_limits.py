"""How much a row file may hold: a stranger's file of a few bytes may unpack to more than the memory takes."""

from __future__ import annotations

import os
from pathlib import Path

from dts_hf.errors import UserError

LONGEST_LINE = 64 << 20  # bytes; a row is a prompt and its answers
LONGEST_DOCUMENT = 512 << 20  # bytes of one JSON value, which is read whole and takes several times as much memory
# Text shrinks to a tenth, zeros to a thousandth. Small files may unpack to FREE_BYTES whatever they are.
MOST_EXPANSION, FREE_BYTES = 200, 256 << 20


def most_bytes(file: Path) -> int:
    """How many bytes ``file`` may unpack to."""
    return FREE_BYTES + MOST_EXPANSION * os.path.getsize(file)


def expands(file: Path) -> UserError:
    """The error for a file that unpacks to more."""
    return UserError(
        f"{file}: unpacks to more than {MOST_EXPANSION} times its size, which no text does; unpack it yourself if it is"
        " what you want"
    )
