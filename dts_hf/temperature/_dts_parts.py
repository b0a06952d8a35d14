"""What ``dts`` needs and has no state: its three rules, sharpness, temperatures for a support, checks of options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dts_hf.errors import UserError, nearest
from dts_hf.temperature.base import check_number, check_range
from dts_hf.temperature.spread import sharpness

RULES = ("paper", "code", "gap")
_EPS = {"paper": 1e-8, "code": 1e-4, "gap": 0.0}
_CODE_CAP, _CODE_CAPPED_ALPHA = 2.0, 1.35

#: The ratio of the sharpnesses stays in [1/4, 4], so T_s and T_t stay within a factor of two of T.
MAX_LOG_RATIO = math.log(4.0)
#: Logits flatter than this (in logit units) count as this flat: 0 / 0 has no ratio, and rounding would invent one.
_MIN_SHARPNESS = 1e-3

#: Where ``range: auto`` looks at the teacher's entropy: three temperatures an octave, from 1/4 to 16.
SUPPORT_GRID = tuple(0.25 * 2.0 ** (k / 3) for k in range(19))


def one_of(option: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` where it is one of ``choices``; else a UserError names the option and the nearest one."""
    if value not in choices:
        raise UserError(
            f"temperature.{option}: got {value!r}, expected one of {', '.join(choices)}.{nearest(str(value), choices)}"
        )
    return str(value)


def targets(rule: str, t_init: float, schedule: float, gap: Tensor) -> Tensor:
    """Target temperatures before clipping, for ``schedule`` = S(p) in [0, 1] and finite gaps in nats; any shape."""
    if rule == "gap":
        excess = gap.clamp(min=0.0)
        return t_init * (schedule + (1.0 - schedule) * (excess / (excess + 1.0)))
    signed_gap = gap if rule == "paper" else -gap
    # Exactly on the pole, where the signed gap is near -1, alpha is -inf: the rule does not fire.
    alpha = signed_gap / (signed_gap + 1.0 + _EPS[rule])
    multiplier = torch.where(alpha > 1.0, alpha, 1.0)
    if rule == "code":
        multiplier = torch.where(multiplier > _CODE_CAP, _CODE_CAPPED_ALPHA, multiplier)
    return t_init * schedule * multiplier


def log_sharpness_ratio(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """log(k_s / k_t) of each row, ``[C]``, in [-log 4, log 4]; k(z) = max z - mean z, blind to a shift of the logits.

    DTKD (arXiv 2404.12711) uses max z in its code; on the logits of language models that has any sign, so it is
    centred here.
    """
    log_s, log_t = (
        sharpness(z).squeeze(-1).clamp(min=_MIN_SHARPNESS).log()
        for z in (student_logits.detach(), teacher_logits.detach())
    )
    # Infinite logits give inf - inf: no ratio, so T_s = T_t.
    return (log_s - log_t).nan_to_num(nan=0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def grid_entropies(teacher_logits: Tensor) -> Tensor:
    """Entropy (nats) of softmax(z_t / T) for each T of ``SUPPORT_GRID``, ``[C, 19]``; it rises with T in every row."""
    z = teacher_logits.detach()
    columns = [torch.special.entr(torch.softmax(z / t, -1)).sum(-1) for t in SUPPORT_GRID]
    return torch.stack(columns, -1)


def temperature_for(support: float, entropies: Sequence[float]) -> float:
    """The T at which exp(mean entropy) is ``support``, which must lie within what the grid has.

    A monotone cubic through the points (log T, H): harmonic means of neighbouring slopes (Fritsch and Butland 1984).
    ``entropies`` are the means over rows at the temperatures of the grid.
    """
    wanted = math.log(support)
    # H rises with T; the first point above the wanted entropy ends the piece that holds it.
    upper = next((k for k, entropy in enumerate(entropies) if entropy > wanted), len(entropies) - 1)
    low, high = entropies[upper - 1], entropies[upper]
    rises = [max(after - before, 0.0) for before, after in pairwise(entropies)]
    left, right = (_slope(rises, point) for point in (upper - 1, upper))
    first, last = 0.0, 1.0
    for _ in range(60):
        x = 0.5 * (first + last)
        cubic = low + x * (left + x * (3 * (high - low) - 2 * left - right + x * (left + right - 2 * (high - low))))
        first, last = (x, last) if cubic < wanted else (first, x)
    return SUPPORT_GRID[upper - 1] * (SUPPORT_GRID[upper] / SUPPORT_GRID[upper - 1]) ** last


def _slope(rises: Sequence[float], point: int) -> float:
    """dH per grid step at a point; at the ends that of the one neighbour."""
    before, after = rises[max(point - 1, 0)], rises[min(point, len(rises) - 1)]
    return 2.0 * before * after / (before + after) if before > 0.0 and after > 0.0 else 0.0


def solve_range(support_max: float, support_min: float, entropies: Sequence[float]) -> list[float]:
    """[t_max, t_min] of ``range: auto``.

    Raises:
        UserError: the teacher does not offer so many, or so few, tokens at any temperature of the grid.
    """
    least, most = math.exp(entropies[0]), math.exp(entropies[-1])
    for option, support in (("support_max", support_max), ("support_min", support_min)):
        if not entropies[0] <= math.log(support) <= entropies[-1]:
            raise UserError(
                f"temperature.{option}: got {support:g}, but in the first step this teacher offers from {least:.4g} tokens "
                f"(T = {SUPPORT_GRID[0]:g}) to {most:.4g} (T = {SUPPORT_GRID[-1]:g}); expected a number between the two, "
                "or range: manual with t_init and t_min",
                everywhere=True,  # the statistics of a step are the same on all processes
            )
    return [temperature_for(support, entropies) for support in (support_max, support_min)]


def check_classes(support_max: float, support_min: float, classes: int) -> None:
    """Refuse supports of ``range: auto`` that so many classes cannot give.

    Raises:
        UserError: there are two classes, or a support is not below their number.
    """
    if classes <= 2:
        raise UserError(
            f"temperature.range: got 'auto' over {classes} classes, where the effective support is between 1 and 2 at any "
            "T; expected range: manual with t_init and t_min"
        )
    for option, support in (("support_max", support_max), ("support_min", support_min)):
        if support >= classes:
            raise UserError(
                f"temperature.{option}: got {support:g}, but teacher and student share {classes:,} classes, and the "
                f"effective support stays below their number; expected less than {classes:,}"
            )


def check_limits(
    kind: str, t_init: object, t_min: object, t_max: object
) -> tuple[float, float, float] | tuple[None, None, None]:
    """(t_init, t_min, t_max) of ``range: manual`` with its defaults 3, 1, max(3, t_init); ``auto`` takes none of them."""
    if kind == "manual":
        start = check_number("dts", "t_init", 3.0 if t_init is None else t_init, low=0.0, high=math.inf, low_open=True)
        return check_range("dts", start, 1.0 if t_min is None else t_min, max(3.0, start) if t_max is None else t_max)
    for option, value in (("t_init", t_init), ("t_min", t_min), ("t_max", t_max)):
        if value is not None:
            raise UserError(
                f"temperature.{option}: got {value!r} with range 'auto', expected it left out: support_max and "
                "support_min set the range"
            )
    return None, None, None


def check_supports(kind: str, high: object, low: object) -> tuple[float, float] | tuple[None, None]:
    """(support_max, support_min) of ``range: auto`` with its defaults 50, 10; ``manual`` takes neither."""
    if kind == "auto":
        checked = check_number("dts", "support_min", 10.0 if low is None else low, low=1.0, high=math.inf)
        above = 50.0 if high is None else high
        return check_number("dts", "support_max", above, low=checked, high=math.inf, low_open=True), checked
    for option, value in (("support_max", high), ("support_min", low)):
        if value is not None:
            raise UserError(
                f"temperature.{option}: got {value!r} with range 'manual', expected it left out, or range 'auto'"
            )
    return None, None


def mix(momentum: float, old: float, new: float) -> float:
    """momentum old + (1 - momentum) new."""
    mixed = momentum * old + (1.0 - momentum) * new
    # A mean lies between its ends; rounding may put it one ulp outside (0.9 * 3 + 0.1 * 3 > 3).
    return min(max(mixed, min(old, new)), max(old, new))
