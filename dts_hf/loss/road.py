"""Which road the rows of the loss take, PyTorch or kernels, and how much of the logits is in memory at a time.

Nothing here imports Triton before it is needed: it comes with torch for CUDA, and a CPU has no use for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dts_hf.loss.plain_rows import PlainRows
from dts_hf.loss.row_loss import LossSettings, RowLoss, room_for_logits
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
_PROBED_ROWS, _RELATIVE, _ABSOLUTE = 3, 1e-2, 2e-3
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
    try:
        from dts_hf.loss.fused_rows import formula_of
    except Exception as error:  # whatever a Triton raises that does not fit the rest of the machine
        return f"Triton cannot be imported: {_one_line(error)}"

    formula, divergence = formula_of(settings.divergence, vocab), settings.divergence.name
    if formula is None:
        return f"the divergence '{divergence}' has none over {vocab:,} classes"
    unknown = settings.temperature.without_kernels
    if unknown is not None:
        return f"the policy '{settings.temperature.name}' {unknown}, which they do not know"
    if formula.split and settings.temperature.learns:
        return f"'{divergence}' has none for a temperature that learns"
    return None


def why_not_trusted(
    settings: LossSettings, device: torch.device, student: Head, teacher: Head, dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """Why what the kernels compute on ``device`` cannot be trusted; None: it agrees with PyTorch on a few random rows.

    Asked once for each kind of kernel and device: a compiler or a driver may be at fault, or too old. The rows are as wide,
    and lie in memory, as those of the training, so that what is compiled for them is what the training then uses.

    Args:
        settings: of the loss.
        device: of the logits.
        student: its head, for vocabulary, scale and soft-cap.
        teacher: likewise.
        dtypes: of the student's logits, of the teacher's, and of the gradient.
    """
    settings = replace(
        settings, held_out=False
    )  # made of numbers that are looked at here; rounding may move one's bin
    policy, vocab = settings.temperature, student.vocab_size
    heads = tuple((head.logit_scale, head.softcap) for head in (student, teacher))
    key = (str(device), dtypes, repr(settings.divergence.describe()), type(policy), policy.reads, heads, vocab,
           len(policy.companions), settings.kd_ratio > 0.0, settings.kd_ratio < 1.0)  # fmt: skip
    if key not in _proved:
        try:
            plain = _of_random_rows(False, settings, device, student, teacher, dtypes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a policy that is not ready yet, say: no word about the kernels, so it is not kept
            return f"PyTorch, their judge, fails: {_one_line(error)}"
        try:
            fused = _of_random_rows(True, settings, device, student, teacher, dtypes)
            _proved[key] = _difference(plain, fused)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may raise
            _proved[key] = _one_line(error)
    return _proved[key]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@torch.no_grad()  # as in the walk: the parameters of somebody's policy may need one
def _of_random_rows(
    fused: bool, settings: LossSettings, device: torch.device, student: Head, teacher: Head,
    dtypes: tuple[torch.dtype, ...],
) -> dict[str, Tensor]:  # fmt: skip
    """The sums and the gradient that one of the roads makes of the same random rows."""
    from dts_hf.loss.fused_rows import FusedRows

    draw = torch.Generator().manual_seed(0)  # not the generator of the training
    shape = (_PROBED_ROWS, student.vocab_size)
    z_s, z_t, grad = (room_for_logits(*shape, dtype, device, fused=True) for dtype in dtypes)
    for z in (z_s, z_t):
        z.copy_(3.0 * torch.randn(shape, generator=draw))
    if not fused:  # the numbers that the kernels read, in its own dtype
        z_s, z_t, grad = z_s.float(), z_t.float(), grad.float()
    elif grad.dtype == z_s.dtype:  # written over the logits, as in the walk
        grad = z_s
    targets = torch.randint(0, shape[1], shape[:1], generator=draw).to(device)
    gaps = torch.linspace(-1.0, 2.0, _PROBED_ROWS, device=device)
    road: type[RowLoss] = FusedRows if fused else PlainRows
    rows = road(settings, head=student, teacher_head=teacher, has_teacher=True, with_grad=True,
                math_dtype=torch.float32, device=device)  # fmt: skip
    with torch.autocast(device.type, enabled=False):  # off in the walk too
        rows.run(z_s, z_t, targets, gaps, grad)
    return {**rows.sums, "gradient": grad.float()}


def _difference(plain: dict[str, Tensor], fused: dict[str, Tensor]) -> str | None:
    """Where the two roads part; None: nowhere."""
    for name, value in plain.items():
        apart = (fused[name] - value).abs() - _RELATIVE * value.abs()
        if not bool((apart <= _ABSOLUTE * value.abs().max().clamp(min=1e-6 if name == "gradient" else 1.0)).all()):
            return f"'{name}' is not what PyTorch makes of the same rows"
    return None
