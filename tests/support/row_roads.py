"""One chunk of rows by either road of the loss, PyTorch or kernels, for tests that compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dts_hf.divergences import build_divergence
from dts_hf.loss.plain_rows import PlainRows
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import TemperaturePolicy

#: Every form of every divergence that has a kernel: options that choose another formula count as another.
FORMS: dict[str, str | dict[str, Any]] = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "symmetric_kl": {"name": "symmetric_kl", "weight": 0.3},
    "jsd": {"name": "jsd", "beta": 0.3},
    "skew_kl": {"name": "skew_kl", "alpha": 0.2},
    "skew_kl_at_zero": {"name": "skew_kl", "alpha": 0.0},
    "skew_reverse_kl": {"name": "skew_reverse_kl", "alpha": 0.2},
    "skew_reverse_kl_at_zero": {"name": "skew_reverse_kl", "alpha": 0.0},
    "tvd": "tvd",
    "alpha_beta": {"name": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    "alpha_beta_at_alpha_zero": {"name": "alpha_beta", "alpha": 0.0, "beta": 0.7},
    "alpha_beta_at_beta_zero": {"name": "alpha_beta", "alpha": 0.6, "beta": 0.0},
    "alpha_beta_at_zero": {"name": "alpha_beta", "alpha": 0.0, "beta": 0.0},
    "todi": "todi",
    "logit_mse": "logit_mse",
    "dkd": {"name": "dkd", "alpha": 1.5, "beta": 4.0},
    "csd_by_teacher": "csd",
    "csd_by_student": {"name": "csd", "weights": "student"},
    "eopd": {"name": "eopd", "entropy": 1.5, "weight": 0.7},
    "eopd_switch": {"name": "eopd", "entropy": 1.5, "mode": "switch"},
}


@dataclass(frozen=True)
class Chunk:
    """Logits ``[C, V]`` of both models, ``targets`` and the gaps of the rows' sequences ``[C]``."""

    student: Tensor
    teacher: Tensor
    targets: Tensor
    gaps: Tensor


def chunk_of(
    rows: int = 2, vocab: int = 70, dtype: torch.dtype = torch.float32, *, seed: int = 1, spread: float = 3.0,
    device: str = "cpu",
) -> Chunk:  # fmt: skip
    """Random rows; both models' logits lie away from 0, and the labels of the first two are both ends of the vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (
        (spread * torch.randn(rows, vocab, generator=draw) + offset).to(device, dtype) for offset in (-5.0, 2.0)
    )
    targets = torch.randint(0, vocab, (rows,), generator=draw)
    targets[:2] = torch.tensor([0, vocab - 1])[:rows]
    return Chunk(student, teacher, targets.to(device), torch.randn(rows, generator=draw).to(device))


def by_plain(chunk: Chunk, divergence: Any, policy: TemperaturePolicy, dtype: torch.dtype, **options: Any) -> Any:
    """The sums, and the gradient ``[C, V]`` in ``dtype``, of the PyTorch road that computes in ``dtype``."""
    return _by(PlainRows, chunk, divergence, policy, dtype, dtype, **options)


def by_kernels(chunk: Chunk, divergence: Any, policy: TemperaturePolicy, **options: Any) -> Any:
    """The sums, and the gradient ``[C, V]`` in the dtype of the student's logits, of the kernels."""
    from dts_hf.loss.fused_rows import FusedRows

    return _by(FusedRows, chunk, divergence, policy, torch.float32, None, **options)


def _by(
    road: Any, chunk: Chunk, divergence: Any, policy: TemperaturePolicy, math_dtype: torch.dtype,
    logits_dtype: torch.dtype | None, *, heads: tuple[tuple[float, float | None], ...] = ((1.0, None), (1.0, None)),
    kd_ratio: float = 0.6, squared: bool = True, with_grad: bool = True, has_teacher: bool = True, in_place: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    vocab, device = chunk.student.shape[1], chunk.student.device
    settings = LossSettings(build_divergence(divergence), policy, kd_ratio, squared, 256.0, fused=logits_dtype is None)
    student, teacher = (Head(torch.empty(vocab, 1, device=device), None, *head) for head in heads)
    rows = road(settings, head=student, teacher_head=teacher, has_teacher=has_teacher, with_grad=with_grad,
                math_dtype=math_dtype, device=device)  # fmt: skip
    # Clones that keep the strides: either road may write over them
    z_s, z_t = (
        z.clone() if logits_dtype is None else z.to(logits_dtype, copy=True) for z in (chunk.student, chunk.teacher)
    )
    if not has_teacher:
        z_t = z_s
    grad = z_s if in_place else torch.full(z_s.shape, 7.0, dtype=z_s.dtype, device=device)
    rows.run(z_s, z_t, chunk.targets, chunk.gaps.to(math_dtype), grad)
    return rows.sums, grad


def apart(found: Tensor, expected: Tensor, least: float = 1e-3) -> float:
    """The largest difference, relative to the largest of ``expected`` (or to ``least``); NaN counts as far apart."""
    assert found.shape == expected.shape
    if torch.equal(found.double(), expected.double()):  # nothing at all, or both of them infinite
        return 0.0
    difference = (found.double() - expected.double()).abs().max() / (expected.double().abs().max() + least)
    return float(difference.nan_to_num(nan=float("inf")))
