"""Dense ground truth, written from the papers' equations in float64 with autograd, and sharing no code with the package.

One row = one labelled position. Everything is at full size [N, V]; nothing here is meant to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    z = torch.einsum("nh,vh->nv", states, weight)
    if bias is not None:
        z = z + bias
    z = z * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * torch.log(p / q)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (q * torch.log(q / p)).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def distillation_loss(
    z_s: Tensor,
    z_t: Tensor,
    targets: Tensor,
    divergence: str,
    options: dict[str, float],
    temperature_student: Tensor | float,
    temperature_teacher: Tensor | float,
    kd_ratio: float,
    squared: bool,
    normalizer: float,
) -> Tensor:
    """sum over rows of (1 - r) CE + r T_s T_t D(softmax(z_t / T_t), softmax(z_s / T_s)), over the normalizer."""
    ce = -torch.log(softmax(z_s)[torch.arange(len(targets)), targets])
    t_s, t_t = (
        torch.as_tensor(temperature_student, dtype=z_s.dtype),
        torch.as_tensor(temperature_teacher, dtype=z_s.dtype),
    )
    d = DIVERGENCES[divergence](softmax(z_t / t_t), softmax(z_s / t_s), **options)
    factor = (t_s * t_t).reshape(-1) if squared else torch.ones((), dtype=z_s.dtype)
    return ((1 - kd_ratio) * ce + kd_ratio * factor * d).sum() / normalizer


def dts_trajectory(
    rule: str, progresses: list[float], gaps: list[float], t_init: float, t_min: float, t_max: float, momentum: float
) -> list[float]:
    """Temperatures in force at each step (DTS Eq. 4-8); ``gaps[k]`` is measured during step k and acts at step k + 1."""
    out = [t_init]
    for k in range(1, len(progresses)):
        s = (1 + math.cos(math.pi * progresses[k])) / 2
        gap = gaps[k - 1]
        if rule == "gap":
            a = gap / (1 + gap) if gap > 0 else 0.0
            target = t_init * (s + (1 - s) * a)
        elif rule == "paper":
            a = gap / (gap + 1 + 1e-8)
            target = t_init * s * (a if a > 1 else 1.0)
        else:
            a = -gap / (-gap + 1 + 1e-4)
            a = 1.35 if a > 2 else a
            target = t_init * s * (a if a > 1 else 1.0)
        target = t_max if target > t_max else t_min if target < t_min else target
        out.append(momentum * out[-1] + (1 - momentum) * target)
    return out
