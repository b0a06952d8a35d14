"""What a gap is averaged over, and with it where the momentum of a schedule acts.

============  =====================================  ==============================================================
granularity   gap                                    temperature
============  =====================================  ==============================================================
``batch``     all labels of the last optimizer step  T <- m T + (1 - m) clip(target(S, gap))                (Eq. 8)
``sequence``  the labels of the row's sequence       T_i = clip(target(S_m, gap_i)), S_m <- m S_m + (1 - m) S
``token``     the row itself                         the same
============  =====================================  ==============================================================

With ``batch``, the gap that drives step k is that of step k - 1, and the first step runs at t_init. A row has no temperature
of the step before, so per row the schedule carries the momentum m and the gap acts at once: there m only delays the cosine,
by m / (1 - m) steps (9 at 0.9); a row whose gap is non-finite gets the cosine. In ``batch`` m delays T as well, by at most
0.037 over 1000 steps of [3, 1], and smooths a noisy gap: at 20 % noise T scatters by 0.016 instead of 0.062. ``sequence``
costs one more log-sum-exp of both models, and for a sequence longer than a chunk its logits a second time.

With m = 0 and one gap for all rows the three granularities are the same function of (S, gap). Gaps that differ give other
levels, too: alpha bends at 0, below which a gap counts as 0, and is concave above. In a toy run with a mean gap of 0.39
nats (standard deviation 1.05 over tokens, a third of them below 0) mean alpha is 0.209 per token and 0.283 per batch.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from dts_hf.temperature.base import RowStats, check_choice

Granularity = Literal["batch", "sequence", "token"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


def check_granularity(granularity: object) -> str:
    """Return ``granularity`` where it is one of ``GRANULARITIES``; else a ``UserError`` names the nearest."""
    return check_choice("granularity", granularity, GRANULARITIES)


def row_gaps(granularity: str, rows: RowStats) -> Tensor:
    """The gap of each row, student CE - teacher CE in nats, ``[C]``, detached, for ``sequence`` or ``token``.

    Raises:
        ValueError: ``sequence``, and the loss gave no ``rows.sequence_gap``.
    """
    gap = rows.sequence_gap if granularity == "sequence" else rows.student_ce - rows.teacher_ce
    if gap is None:
        raise ValueError("dts, granularity 'sequence': the loss gave no rows.sequence_gap")
    return gap.detach()
