"""A training run that never happened, the same for every policy: what the figures of docs/temperature.md draw.

The gap falls from 2.5 to 0.2 nats while the student's logits move from noise to the teacher's. Random numbers come from
Python's generator with a fixed seed and all arithmetic is float64, so every machine draws the same curves.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from dts_hf.temperature import RowStats, StepStats, TemperaturePolicy

STEPS, EVERY = 300, 3
ROWS, VOCAB = 24, 200


class Curves(NamedTuple):
    """Temperatures at every so many steps, ``[K, rows]`` (one column where all rows share it); shares ``[K]``."""

    student: Tensor
    teacher: Tensor
    shares: list[float] | None


def _gaussian(rng: random.Random, deviations: list[float]) -> Tensor:
    rows = [[rng.gauss(0.0, deviation) for _ in range(VOCAB)] for deviation in deviations]
    return torch.tensor(rows, dtype=torch.float64)


def simulate(policy: TemperaturePolicy, every: int = EVERY) -> Curves:
    """Take the policy through the run; what it sees is a function of progress and of its own temperatures."""
    rng = random.Random(0)
    teacher_logits = _gaussian(rng, [1.5 + 2.0 * row / (ROWS - 1) for row in range(ROWS)])
    noise = _gaussian(rng, [2.0] * ROWS)
    seen: list[tuple[Tensor, Tensor]] = []
    shares: list[float] = []
    for step in range(STEPS + 1):
        progress = step / STEPS
        ignorance = 0.1 + 0.7 * (1.0 - progress) ** 2
        student_logits = (1.0 - ignorance) * teacher_logits + ignorance * noise
        policy.begin_step(progress)
        gap = 0.2 + 2.3 * (1.0 - progress) ** 2
        lse_s, lse_t = student_logits.logsumexp(-1), teacher_logits.logsumexp(-1)
        row_gaps = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64) * gap
        rows = RowStats(row_gaps + 2.0, torch.full_like(row_gaps, 2.0), lse_s, lse_t, row_gaps)
        answer = policy(student_logits, teacher_logits, rows)
        if step % every == 0:
            seen.append((answer.student.reshape(-1), answer.teacher.reshape(-1)))
            if answer.teacher_share is not None:
                shares.append(answer.teacher_share.item())
        kd, slope = _distillation(answer.student, student_logits, teacher_logits)
        observed = () if answer.observed is None else tuple(answer.observed.mean(0).tolist())
        policy.end_step(StepStats(2.0 + gap, 2.0, kd, ROWS, slope, observed))
    width = max(student.numel() for student, _ in seen)  # a per-row policy may have one T for all in its first step
    student, teacher = (torch.stack([t.expand(width) for t in column]) for column in zip(*seen))
    return Curves(student, teacher, shares or None)


def _distillation(temperature: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> tuple[float, float]:
    """Mean T^2 KL(p_T || q_T) and its derivative to a T that all rows share."""
    t = temperature.detach().mean().requires_grad_()
    log_p, log_q = (teacher_logits / t).log_softmax(-1), (student_logits / t).log_softmax(-1)
    kd = (t**2 * (log_p.exp() * (log_p - log_q)).sum(-1)).mean()
    (slope,) = torch.autograd.grad(kd, t)
    return kd.item(), slope.item()
