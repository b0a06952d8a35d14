"""The share of the training rows that a seed draws (``data.train_share``)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction


def drawn(ids: Sequence[str], share: float, seed: int) -> list[int]:
    """Places of the rows that ``seed`` draws, rising; at least one.

    A student that is cut out of its teacher has no random start: without dropout its seed is the order of its rows, and the
    spread between seeds is too small for what another study of the same size would give. Rows that the seed draws are a
    second source of it (Bouthillier et al. 2021, arXiv 2103.03098). Which rows depends on seed and ids alone, so all kinds
    of runs with the same seed have the same ones, and differences between them are paired.

    Args:
        ids: of the rows.
        share: how many of them, above 0 and at most 1; a half counts as one.
        seed: of training.
    """
    count = max(1, math.floor(Fraction(str(share)) * len(ids) + Fraction(1, 2)))
    ranks = sorted(range(len(ids)), key=lambda place: hashlib.sha256(f"{seed}\x1f{ids[place]}".encode()).digest())
    return sorted(ranks[:count])
