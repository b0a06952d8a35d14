"""Which road the rows of the loss take, PyTorch or kernels, and how much of the logits is in memory at a time.

Nothing here imports Triton before it is needed: it comes with torch for CUDA, and a CPU has no use for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

import torch
from torch import Tensor

from dts_hf.loss.plain_rows import PlainRows
from dts_hf.loss.row_loss import LossSettings, RowLoss
from dts_hf.models.head import Head

logger = logging.getLogger(__name__)

#: ``auto``: kernels where they run; ``triton``: kernels, or an error that says why not; ``torch``: PyTorch.
Kernels = Literal["auto", "triton", "torch"]
#: ``auto``: logits in the dtype of the matmul; ``float32``: its sums as they are. For kernels; PyTorch computes in fp32.
LogitsDtype = Literal["auto", "float32"]
#: MiB for the logits of one chunk: of the PyTorch road, which needs a dozen more buffers of that size on a GPU; and of the
#: kernels at most, which need none. A quarter of what is free leaves room for the matmuls and for dW.
PLAIN_BUDGET_MB, FUSED_BUDGET_MB, FREE_SHARE = 256.0, 1024.0, 4
#: What the kernels must give to be trusted on a device, beside PyTorch on the same rows: one that was compiled wrongly is
#: wrong by more than rounding.
_PROBED_ROWS, _PROBED_VOCAB, _RELATIVE, _ABSOLUTE = 3, 2500, 1e-2, 2e-3
_proved: dict[tuple[object, ...], str | None] = {}


def default_budget_mb(fused: bool, free_bytes: int | None = None) -> float:
    """MiB for the logits of one chunk, where nobody said: with kernels 1,024, or a quarter of what is free.

    Rounded down to a power of two, so that a few bytes more or less do not change the chunks, and with them the last bits.

    Args:
        fused: whether kernels do the rows.
        free_bytes: of the device's memory; None: not known.
    """
    if not fused:
        return PLAIN_BUDGET_MB
    budget, share = FUSED_BUDGET_MB, None if free_bytes is None else free_bytes / FREE_SHARE / 2**20
    while share is not None and budget > max(share, 1.0):
        budget /= 2
    return budget


def free_bytes(device: torch.device) -> int | None:
    """What a tensor on ``device`` could take: what the driver has, and what torch keeps for later. None off a GPU."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def why_not_fused(settings: LossSettings, device: torch.device, vocab: int, dtypes: set[torch.dtype]) -> str | None:
    """Why the kernels cannot do the rows; None: they can.

    Args:
        settings: of the loss.
        device: of the logits.
        vocab: V.
        dtypes: of both models' logits.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need a GPU, and the logits are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.float64 in dtypes:
        return "they compute in float32, and the logits are float64"
    from dts_hf.loss.fused_rows import formula_of

    formula, divergence = formula_of(settings.divergence, vocab), settings.divergence.name
    if formula is None:
        return f"the divergence '{divergence}' has none over {vocab:,} classes"
    if formula.split and settings.temperature.learns:
        return f"'{divergence}' has none for a temperature that learns"
    return None


def why_not_trusted(
    settings: LossSettings, device: torch.device, student: Head, teacher: Head, dtypes: tuple[torch.dtype, torch.dtype]
) -> str | None:
    """Why what the kernels compute on ``device`` cannot be trusted; None: it agrees with PyTorch on a few random rows.

    Asked once for each kind of kernel and device: a compiler or a driver may be at fault, or too old. (A few tens of
    milliseconds beside the compilation, which is needed anyway.)

    Args:
        settings: of the loss.
        device: of the logits.
        student: its head, for vocabulary, scale and soft-cap.
        teacher: likewise.
        dtypes: of the student's logits and the teacher's.
    """
    policy, vocab = settings.temperature, min(student.vocab_size, _PROBED_VOCAB)
    heads = tuple((head.logit_scale, head.softcap) for head in (student, teacher))
    key = (str(device), dtypes, repr(settings.divergence.describe()), policy.name, policy.reads, heads, vocab,
           len(policy.companions), settings.kd_ratio > 0.0, settings.kd_ratio < 1.0)  # fmt: skip
    if key not in _proved:
        try:
            _proved[key] = _difference(settings, device, student.cut(vocab), teacher.cut(vocab), dtypes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may raise
            _proved[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return _proved[key]


def _difference(
    settings: LossSettings, device: torch.device, student: Head, teacher: Head, dtypes: tuple[torch.dtype, torch.dtype]
) -> str | None:
    """Where the two roads part on random rows; None: nowhere."""
    from dts_hf.loss.fused_rows import FusedRows

    draw = torch.Generator().manual_seed(0)  # not the generator of the training
    shape = (_PROBED_ROWS, student.vocab_size)
    z_s, z_t = (3.0 * torch.randn(shape, generator=draw).to(device, dtype) for dtype in dtypes)
    targets = torch.randint(0, shape[1], shape[:1], generator=draw).to(device)
    gaps = torch.linspace(-1.0, 2.0, _PROBED_ROWS, device=device)
    results: list[tuple[dict[str, Tensor], Tensor]] = []
    roads: tuple[type[RowLoss], ...] = (PlainRows, FusedRows)
    for road in roads:
        rows = road(settings, head=student, teacher_head=teacher, has_teacher=True, with_grad=True,
                    math_dtype=torch.float32, device=device)  # fmt: skip
        raw = (z_s.float(), z_t.float()) if road is PlainRows else (z_s.clone(), z_t.clone())
        grad = torch.empty(shape, device=device, dtype=torch.float32 if road is PlainRows else dtypes[0])
        rows.run(*raw, targets, gaps, grad)
        results.append((rows.sums, grad.float()))
    (plain, plain_grad), (fused, fused_grad) = results
    plain, fused = {**plain, "gradient": plain_grad}, {**fused, "gradient": fused_grad}
    for name, value in plain.items():
        apart = (fused[name] - value).abs() - _RELATIVE * value.abs()
        if not bool((apart <= _ABSOLUTE * value.abs().max().clamp(min=1e-6 if name == "gradient" else 1.0)).all()):
            return f"'{name}' is not what PyTorch makes of the same rows"
    return None
