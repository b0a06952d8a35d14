"""``DistillationLoss``: cross-entropy and divergence from hidden states, with gradients formed in the forward pass.

It checks its input and starts again where memory runs out; ``ChunkWalk`` computes; ``_FusedLoss`` makes autograd's node of
it.

Shapes: ``N`` labelled rows, ``C`` rows of a chunk, ``H`` hidden, ``V`` vocabulary. All logarithms are natural.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from dts_hf.divergences import Divergence, build_divergence
from dts_hf.errors import UserError, is_out_of_memory, nearest
from dts_hf.loss.chunk_walk import ChunkWalk, matmul_dtype_of, rows_in_budget
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.compact_served import check_served
from dts_hf.loss.road import (
    PLAIN_BUDGET_MB,
    Kernels,
    LogitsDtype,
    default_budget_mb,
    free_bytes,
    why_not_fused,
    why_not_trusted,
)
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import TemperaturePolicy, build_policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossOutput:
    """What one call of the loss gives.

    Attributes:
        loss: ``[]``, with the graph.
        sums: over the rows, detached: ``rows``, the 0-d tensors of ``loss/statistics.py`` (which says how each is reduced
            further), and what the policy asked for: ``temperature_grad`` ``[]`` and ``observed`` ``[K]``.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class DistillationLoss(nn.Module):
    """(1 - kd_ratio) CE + kd_ratio T_s T_t D(p_T, q_T), summed over rows and divided by ``normalizer``.

    Args:
        divergence: a name, or ``{"name": "jsd", "beta": 0.5}``.
        temperature: the policy asked once per chunk; anything that ``build_policy`` takes, such as a number (constant).
        kd_ratio: weight of the soft part, 0 (cross-entropy alone) to 1 (divergence alone).
        temperature_scaling: ``squared`` multiplies D by T_s T_t, so that its gradient keeps its size when T moves
            (Hinton et al. 2015, section 2); ``none`` leaves it out, as TRL, DSKD and Liger do.
        logits_budget_mb: bytes, in MiB, that the logits of one chunk may take; sets C. None: what the first call finds
            right, and keeps here (``road.default_budget_mb``). Halved where memory runs out.
        kernels: ``auto``: Triton kernels on a GPU where they are to be had and agree with PyTorch; ``triton``: those, or an
            error; ``torch``: PyTorch, on a GPU several times slower.
        logits_dtype: ``auto``: a low-precision matmul rounds its logits to its own dtype, as models do; ``float32``: it
            leaves them in fp32, for twice the memory. Kernels alone; PyTorch rounds them.
        held_out: for held-out rows, at T = 1: also measure ``statistics.OF_HELD_OUT``.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        divergence: str | Mapping[str, Any] | Divergence = "forward_kl",
        *,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float,
        kd_ratio: float = 0.5,
        temperature_scaling: str = "squared",
        logits_budget_mb: float | None = None,
        kernels: Kernels = "auto",
        logits_dtype: LogitsDtype = "auto",
        held_out: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(kd_ratio, bool) or not isinstance(kd_ratio, int | float) or not 0.0 <= kd_ratio <= 1.0:
            raise UserError(f"loss.kd_ratio: got {kd_ratio!r}, expected a number between 0 and 1")
        if temperature_scaling not in ("squared", "none"):
            raise UserError(f"loss.temperature_scaling: got {temperature_scaling!r}, expected 'squared' or 'none'")
        if logits_budget_mb is not None and not logits_budget_mb > 0:
            raise UserError(f"loss.logits_budget_mb: got {logits_budget_mb!r}, expected a number above 0 (MiB)")
        for option, value, choices in (
            ("kernels", kernels, get_args(Kernels)),
            ("logits_dtype", logits_dtype, get_args(LogitsDtype)),
        ):
            if value not in choices:
                expected = f"expected one of {', '.join(choices)}.{nearest(str(value), choices)}"
                raise UserError(f"loss.{option}: got {value!r}, {expected}")
        self.divergence = build_divergence(divergence)
        self.temperature = build_policy(temperature)
        self.kd_ratio = float(kd_ratio)
        self.temperature_scaling = temperature_scaling
        self.logits_budget_mb, self._chooses_budget = logits_budget_mb, logits_budget_mb is None
        self.kernels, self.logits_dtype, self.held_out = kernels, logits_dtype, held_out
        self._warned: set[str] = set()

    def chunk_rows(self, vocab_size: int, itemsize: int = 4) -> int:
        """C: how many rows of student and teacher logits fit into the budget; at least one."""
        return rows_in_budget(self.logits_budget_mb or PLAIN_BUDGET_MB, vocab_size, itemsize)

    def ratio_of(self, policy: TemperaturePolicy) -> float:
        """The weight of the soft part in force: the policy's where it schedules one, else the loss's own."""
        return self.kd_ratio if policy.kd_ratio is None else policy.kd_ratio

    def forward(
        self,
        student_states: Tensor,
        student_head: Head,
        teacher_states: Tensor | CompactRows | None,
        teacher_head: Head | None,
        targets: Tensor,
        normalizer: float | Tensor,
        sequences: Tensor | None = None,
        teacher: str | None = None,
        kd_ratio: float | None = None,
        pseudo_labels: bool = False,
    ) -> LossOutput:
        """Return the loss of N rows over the normaliser, and the sums over these rows that are logged.

        Where memory runs out, it halves ``logits_budget_mb`` and starts again, down to one row at a time.

        Args:
            student_states: ``[N, H_s]``, only rows that carry a label; N may be 0.
            student_head: weight ``[V, H_s]``, whole on this process.
            teacher_states: ``[N, H_t]``, the same rows; no gradient flows into them. Or N compact rows, what a teacher has
                kept of its logits. None, with ``kd_ratio`` 0: the cross-entropy alone, one matmul less; the teacher's
                statistics are then the student's own.
            teacher_head: weight ``[V, H_t]``, of compact rows ``[V, 0]``; None without a teacher.
            targets: ``[N]`` int64, all in [0, V).
            normalizer: labels of the whole optimizer step divided by the number of ranks (docs/architecture.md, section 3).
            sequences: ``[N]`` int64, never falling: rows of equal number belong to one sequence. Needed by policies
                with ``needs_sequence_gap``.
            teacher: whose rows they are, where each of several teachers has a temperature of its own.
            kd_ratio: of this call, in the place of the loss's and the policy's own; None: theirs.
            pseudo_labels: put the teacher's first choice in the place of each target. It moves the cross-entropies and gaps
                that are logged and told the policy, and not the loss: kd_ratio must be 1.

        Returns:
            the loss ``[]``, whose backward pass can be run once, and detached sums.

        Raises:
            ValueError: rows or vocabularies do not match, or the policy needs ``sequences``; or pseudo-labels would be a
                part of the loss.
            UserError: there is no teacher to distil, or compact rows are not enough (``compact_served``).
        """
        policy = self.temperature.of_teacher(teacher)
        kd_ratio = self.ratio_of(policy) if kd_ratio is None else kd_ratio
        if teacher_states is None or teacher_head is None:
            check_has_teacher(False, kd_ratio)
            teacher_states, teacher_head = None, student_head
        self._check(student_states, student_head, teacher_states, teacher_head, targets, sequences)
        leaves = (student_states, student_head.weight, student_head.bias)
        with_grad = torch.is_grad_enabled()  # asked here: inside of an autograd function it is always off
        need_states, need_weight, need_bias = (
            with_grad and leaf is not None and leaf.requires_grad for leaf in leaves
        )

        compact = isinstance(teacher_states, CompactRows)
        if compact:
            check_served(policy, self.divergence)
        settings = self._settings(policy, kd_ratio, student_head, teacher_head, student_states.device, compact)
        settings = replace(settings, pseudo_labels=pseudo_labels and self._changes_labels_alone(kd_ratio))

        def attempt() -> LossOutput:  # a frame of its own: what a failed walk holds goes with it
            walk = ChunkWalk(
                replace(settings, logits_budget_mb=cast(float, self.logits_budget_mb)),
                states=student_states,
                head=student_head,
                teacher_states=None if teacher_states is None else teacher_states.detach(),
                teacher_head=teacher_head,
                targets=targets,
                sequences=sequences,
                normalizer=normalizer,
                needs=(need_states, need_weight, need_bias),
            )
            loss: Tensor = _FusedLoss.apply(*leaves, walk)  # type: ignore[no-untyped-call]
            return LossOutput(loss, walk.sums)

        while True:
            try:
                return attempt()
            except RuntimeError as error:
                itemsize = matmul_dtype_of(student_head, student_states.device).itemsize
                if not is_out_of_memory(error) or self.chunk_rows(student_head.vocab_size, itemsize) == 1:
                    raise
            # Behind the except clause the error is gone, and with it the frames of the failed walk: only now is its memory
            # free. Nothing of it is kept, so a smaller chunk gives the same loss and gradients.
            self.logits_budget_mb /= 2  # type: ignore[operator]  # _settings has set it
            logger.warning("out of memory in the loss: going on with logits_budget_mb %g", self.logits_budget_mb)
            if student_states.device.type == "cuda":
                torch.cuda.empty_cache()

    def _changes_labels_alone(self, kd_ratio: float) -> bool:
        """True: another token in the place of a target cannot reach the loss; else a ValueError says by what it would."""
        if kd_ratio != 1.0 or self.divergence.reads_targets:
            raise ValueError(
                f"pseudo-labels with kd_ratio {kd_ratio:g} and the divergence '{self.divergence.name}' would be part of the "
                "loss; expected kd_ratio 1 and a divergence that does not read the targets"
            )
        return True

    def _settings(
        self,
        policy: TemperaturePolicy,
        kd_ratio: float,
        student: Head,
        teacher: Head,
        device: torch.device,
        compact: bool,
    ) -> LossSettings:
        """What the walk is told; chooses between kernels and PyTorch, and the budget where nobody did.

        Raises:
            UserError: kernels were asked for, and cannot be had.
        """
        settings = LossSettings(
            self.divergence,
            policy,
            kd_ratio,
            self.temperature_scaling == "squared",
            self.logits_budget_mb or PLAIN_BUDGET_MB,
            fp32_logits=self.logits_dtype == "float32",
            held_out=self.held_out,
        )
        settings = replace(settings, fused=self._is_fused(settings, student, teacher, device, compact))
        if self.logits_budget_mb is None:
            self.logits_budget_mb = default_budget_mb(settings.fused, free_bytes(device))
        if self._chooses_budget and not settings.fused:  # one that kernels chose before, here or in a checkpoint
            self.logits_budget_mb = min(self.logits_budget_mb, PLAIN_BUDGET_MB)
        return replace(settings, logits_budget_mb=self.logits_budget_mb)

    def _is_fused(
        self, settings: LossSettings, student: Head, teacher: Head, device: torch.device, compact: bool = False
    ) -> bool:
        if self.kernels == "torch" or (self.kernels == "auto" and device.type != "cuda"):
            return False  # not to be missed on a CPU; the interpreter, which tests have, is no road to train on
        of_matmul = matmul_dtype_of(student, device)
        dtypes = of_matmul, teacher.weight.dtype
        if settings.fp32_logits and torch.float64 not in dtypes:
            dtypes = torch.float32, torch.float32
        reason = why_not_fused(settings, device, student.vocab_size, set(dtypes))
        if compact:
            reason = "the teacher's cache is compact, and the logits of its tail move with the temperature"
        missing = reason is not None
        if reason is None and device.type == "cuda":  # the interpreter is there to be tested, not to be trusted
            reason = why_not_trusted(settings, device, student, teacher, (*dtypes, of_matmul))
        if reason is None:
            return True
        if self.kernels == "triton":
            raise UserError(f"loss.kernels: got 'triton', but there are no kernels for this loss: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            consequence = "the loss takes the PyTorch road, which is right, and several times slower"
            logger.warning("loss.kernels: %s (%s)", consequence, reason if missing else f"not trusted: {reason}")
        return False

    def _check(
        self,
        student_states: Tensor,
        student_head: Head,
        teacher_states: Tensor | CompactRows | None,
        teacher_head: Head,
        targets: Tensor,
        sequences: Tensor | None,
    ) -> None:
        """Refuse what does not fit together, before anything is computed."""
        parts = {"student": student_states, "teacher": teacher_states, "targets": targets}
        counts = {name: len(rows) for name, rows in parts.items() if rows is not None}
        if len(set(counts.values())) > 1:
            raise ValueError("rows differ: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        if isinstance(teacher_states, CompactRows) and teacher_states.vocab_size != student_head.vocab_size:
            raise ValueError(
                f"vocabularies differ: student {student_head.vocab_size}, compact rows {teacher_states.vocab_size}"
            )
        if student_head.vocab_size != teacher_head.vocab_size:
            raise ValueError(
                f"vocabularies differ: student {student_head.vocab_size}, teacher {teacher_head.vocab_size}; "
                "align them first (dts_hf.models.vocabulary.align_vocabularies)"
            )
        if self.temperature.needs_sequence_gap and sequences is None:
            raise ValueError(
                f"the temperature policy '{self.temperature.name}' needs the sequence of each row: sequences"
            )

    def extra_repr(self) -> str:
        return (
            f"divergence={self.divergence.describe()}, kd_ratio={self.kd_ratio}, "
            f"temperature_scaling={self.temperature_scaling}, logits_budget_mb={self.logits_budget_mb}"
        )


def check_has_teacher(has_teacher: bool, kd_ratio: float) -> None:
    """Refuse a soft loss that has nobody to learn from.

    Raises:
        UserError: there is no teacher, and ``kd_ratio`` is above 0.
    """
    if not has_teacher and kd_ratio > 0:
        raise UserError(f"teacher: got None with kd_ratio {kd_ratio:g}; labels alone need kd_ratio 0")


class _FusedLoss(torch.autograd.Function):
    """Hands the gradients that a ``ChunkWalk`` forms in the forward pass to autograd.

    Keeps dH ``[N, H]``, dW ``[V, H]`` and db ``[V]`` of the summed loss for the backward pass, and no logits.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, walk: ChunkWalk) -> Tensor:
        loss = walk.run()
        # Not the walk itself: it holds the logits' buffers, and the teacher's states
        ctx.grads, ctx.inverse = walk.gradients, walk.inverse
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (states, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("DistillationLoss: backward was called twice; its gradients are handed over once")
        # Normalised here and not before the matmuls: divided by thousands of labels, gradients of the logits would
        # underflow in fp16, and a loss scaler, which arrives as grad_loss, would come too late.
        factor = grad_loss * ctx.inverse
        grads = [
            None if grad is None else _scaled(grad, factor, dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None  # the buffers are ours, and _scaled has written into them: a second call must not get them
        return (*grads, None)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor in ``dtype``, multiplied in the widest of the types; may reuse the buffer of ``grad``."""
    wide = torch.promote_types(torch.promote_types(grad.dtype, dtype), factor.dtype)
    return grad.to(wide).mul_(factor.to(wide)).to(dtype)
