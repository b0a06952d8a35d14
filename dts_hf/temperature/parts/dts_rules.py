"""The three rules of DTS: how far a gap lifts the target above the cosine.

There are three, because the paper's equation, the authors' released code and the paper's prose are three different
things. With d the argument of alpha, alpha = d / (d + 1 + eps) and S(p) = (1 + cos(pi p)) / 2:

=========  ==================  ======  ==========================================================================
rule       d                   eps     target temperature
=========  ==================  ======  ==========================================================================
``paper``  gap                 1e-8    T_init S alpha if alpha > 1 else T_init S                       (Eq. 5-7)
``code``   -gap                1e-4    the same, and an alpha above 2 becomes 1.35      (the released LM scripts)
``gap``    max(gap, 0)         0       T_init (S + (1 - S) alpha)                       (what the prose promises)
=========  ==================  ======  ==========================================================================

gap = student CE - teacher CE. The paper's rule needs gap < -1 to fire (a student one nat BETTER than its teacher), so in
an ordinary run ``batch`` is the plain cosine. Per token it is not: the tokens on which the student BEATS the teacher by
more than a nat fire (2 to 6 % of them in toy runs) and jump to t_max near -1, so the extra T goes where the student needs
it least; mean T is 1.53 to 1.57 where the cosine has 1.50. The code's rule fires for gap > 1, most just above gap = 2. Only
``gap`` rises smoothly with the gap: it equals the cosine at gap <= 0 and never passes T_init.

``epochs`` makes p a staircase, as published: ``paper`` and ``gap`` count epochs from 0, ``code`` from 1, so that its last
epoch has S = 0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.registry import Between
from dts_hf.temperature.base import check_between, check_choice, check_whole

Rule = Literal["paper", "code", "gap"]
RULES: tuple[Rule, ...] = get_args(Rule)
EPOCHS, MOMENTUM = Between(low=1), Between(0.0, 1.0, "low")
#: eps in the denominator of alpha. It does not remove the pole at d = -1, it only moves it.
_EPS = {"paper": 1e-8, "code": 1e-4}
#: The released scripts replace a multiplier above 2 by 1.35, so the boost jumps down as the gap passes the pole.
_CODE_CAP, _CODE_CAPPED_ALPHA = 2.0, 1.35


def check_rule(rule: object) -> str:
    """Return ``rule`` where it is one of ``RULES``; else a ``UserError`` names the nearest one."""
    return check_choice("rule", rule, RULES)


def check_epochs(epochs: object) -> int | None:
    """Return ``epochs`` where it is a whole number from 1 or None; else a ``UserError`` says why not."""
    return check_whole("epochs", epochs, int(EPOCHS.low), "a whole number from 1, or null for every step")


def check_momentum(momentum: object) -> float:
    """Return ``momentum`` as a float in [0, 1).

    Raises:
        UserError: it is not one.
    """
    if momentum == MOMENTUM.high:
        raise UserError("temperature.momentum: got 1, expected a number from 0 to below 1; at 1 T would never move")
    return check_between("dts", "momentum", momentum, MOMENTUM)


def target(rule: str, t_init: float, schedule: float, gap: Tensor) -> Tensor:
    """The target of each gap, before it is clipped.

    Args:
        rule: one of ``RULES``.
        t_init: the temperature at S = 1.
        schedule: S(p), in [0, 1].
        gap: in nats, any shape; one that is non-finite says nothing and gets the cosine.

    Returns:
        Temperatures of the shape of ``gap``.
    """
    if rule == "gap":
        excess = gap.clamp(min=0.0)
        lifted = t_init * (schedule + (1.0 - schedule) * (excess / (excess + 1.0)))
    else:
        d = gap if rule == "paper" else -gap
        # Exactly on the pole, where d is near -1, alpha is -inf: the rule does not fire.
        alpha = d / (d + 1.0 + _EPS[rule])
        multiplier = torch.where(alpha > 1.0, alpha, 1.0)
        if rule == "code":
            multiplier = torch.where(multiplier > _CODE_CAP, _CODE_CAPPED_ALPHA, multiplier)
        lifted = t_init * schedule * multiplier
    return torch.where(gap.isfinite(), lifted, t_init * schedule)


def moving_average(momentum: float, old: float, new: float) -> float:
    """Return momentum old + (1 - momentum) new (Eq. 8)."""
    mixed = momentum * old + (1.0 - momentum) * new
    # A mean lies between its ends; rounding may put it one ulp outside (0.9 * 3 + 0.1 * 3 > 3).
    return min(max(mixed, min(old, new)), max(old, new))


def staircase(progress: float, epochs: int | None, rule: str) -> float:
    """Progress in whole epochs, as published; None for ``epochs`` lets it move with every step.

    The released code counts epochs from 1, so that its last one has S = 0; the other rules count from 0.
    """
    if epochs is None:
        return progress
    epoch = min(math.floor(progress * epochs + 1e-9), epochs - 1)  # 3 / 10 * 10 may be an ulp below 3
    return (epoch + (1 if rule == "code" else 0)) / epochs
