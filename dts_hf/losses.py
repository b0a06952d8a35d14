"""``DistillationLoss``: cross-entropy and divergence from hidden states, with gradients formed in the forward pass.

One labelled row costs four vocabulary-sized matmuls (student logits, teacher logits, dH, dW; three when the head is
frozen) and nothing is recomputed in the backward pass. Memory is a fixed budget, whatever the batch.

Shapes: ``N`` labelled rows, ``C`` rows of a chunk, ``H`` hidden, ``V`` vocabulary. All logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.divergences import Distribution, Distributions, Divergence, build_divergence
from dts_hf.errors import UserError
from dts_hf.head import Head
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures

#: Sums over rows; divide by ``rows`` for means. All at T = 1 except ``kd`` (with its T^2 factor) and the ``_at_t`` pair.
SUM_NAMES = (
    "rows",
    "ce",
    "teacher_ce",
    "kd",
    "kl",
    "student_entropy",
    "teacher_entropy",
    "student_entropy_at_t",
    "teacher_entropy_at_t",
    "top1_agreement",
    "temperature",
)

#: On a CPU, rows are processed in blocks of about this many bytes of logits: the elementwise work stays in its cache.
_CPU_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class LossOutput:
    """``loss`` ``[]`` carries the graph; ``sums`` are detached 0-d tensors named in ``SUM_NAMES``, plus the extremes
    ``temperature_min`` and ``temperature_max`` (which reduce by min and max, not by addition)."""

    loss: Tensor
    sums: dict[str, Tensor]


class DistillationLoss(nn.Module):
    """(1 - kd_ratio) CE + kd_ratio T_s T_t D(p_T, q_T), summed over rows and divided by ``normalizer``.

    Args:
        divergence: a name, or ``{"name": "jsd", "beta": 0.5}``.
        temperature: the policy asked once per chunk.
        kd_ratio: weight of the soft part, 0 (cross-entropy alone) to 1 (divergence alone).
        temperature_scaling: ``squared`` multiplies D by T_s T_t, so that its gradient keeps its size when T moves
            (Hinton et al. 2015, section 2); ``none`` leaves it out, as TRL, DSKD and Liger do.
        logits_budget_mb: bytes, in MiB, that the logits of one chunk may take; sets C.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        divergence: str | Mapping[str, Any] | Divergence = "forward_kl",
        *,
        temperature: TemperaturePolicy,
        kd_ratio: float = 0.5,
        temperature_scaling: str = "squared",
        logits_budget_mb: float = 256,
    ) -> None:
        super().__init__()
        if isinstance(kd_ratio, bool) or not isinstance(kd_ratio, int | float) or not 0.0 <= kd_ratio <= 1.0:
            raise UserError(f"loss.kd_ratio: got {kd_ratio!r}, expected a number between 0 and 1")
        if temperature_scaling not in ("squared", "none"):
            raise UserError(f"loss.temperature_scaling: got {temperature_scaling!r}, expected 'squared' or 'none'")
        if not logits_budget_mb > 0:
            raise UserError(f"loss.logits_budget_mb: got {logits_budget_mb!r}, expected a number above 0 (MiB)")
        self.divergence = build_divergence(divergence)
        self.temperature = temperature
        self.kd_ratio = float(kd_ratio)
        self.temperature_scaling = temperature_scaling
        self.logits_budget_mb = logits_budget_mb

    def chunk_rows(self, vocab_size: int, itemsize: int = 4) -> int:
        """C: how many rows of student and teacher logits fit into the budget; at least one."""
        return max(1, int(self.logits_budget_mb * 2**20) // (2 * itemsize * max(vocab_size, 1)))

    def forward(
        self,
        student_states: Tensor,
        student_head: Head,
        teacher_states: Tensor,
        teacher_head: Head,
        targets: Tensor,
        normalizer: float | Tensor,
    ) -> LossOutput:
        """
        Args:
            student_states: ``[N, H_s]``, only rows that carry a label.
            teacher_states: ``[N, H_t]``, the same rows; no gradient flows into them.
            targets: ``[N]`` int64, all in [0, V).
            normalizer: labels of the whole optimizer step divided by the number of ranks (section 1 of the architecture).

        Raises:
            ValueError: rows or vocabularies do not match.
        """
        if not student_states.shape[0] == teacher_states.shape[0] == targets.shape[0]:
            raise ValueError(
                f"rows differ: student {student_states.shape[0]}, teacher {teacher_states.shape[0]}, "
                f"targets {targets.shape[0]}"
            )
        if student_head.vocab_size != teacher_head.vocab_size:
            raise ValueError(
                f"vocabularies differ: student {student_head.vocab_size}, teacher {teacher_head.vocab_size}; "
                "align them first (dts_hf.models.align_vocabularies)"
            )
        sums: dict[str, Tensor] = {}
        loss = _FusedLoss.apply(
            student_states,
            student_head.weight,
            student_head.bias,
            self,
            student_head,
            teacher_states.detach(),
            teacher_head,
            targets,
            normalizer,
            torch.is_grad_enabled(),
            sums,
        )
        return LossOutput(loss, sums)

    def extra_repr(self) -> str:
        return (
            f"divergence={self.divergence.describe()}, kd_ratio={self.kd_ratio}, "
            f"temperature_scaling={self.temperature_scaling}, logits_budget_mb={self.logits_budget_mb}"
        )


class _FusedLoss(torch.autograd.Function):
    """Walks the chunks once; keeps dH, dW and db of the summed loss for the backward pass, and no logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: DistillationLoss,
        head: Head,
        teacher_states: Tensor,
        teacher_head: Head,
        targets: Tensor,
        normalizer: float | Tensor,
        with_grad: bool,
        sums: dict[str, Tensor],
    ) -> Tensor:
        need = [with_grad and flag for flag in ctx.needs_input_grad[:3]]
        walk = _ChunkWalk(module, head, teacher_head, states, normalizer, need)
        with torch.autocast(states.device.type, enabled=False):
            loss = walk.run(teacher_states, targets)
        sums.update(walk.sums)
        ctx.grads, ctx.inverse = (walk.d_states, walk.d_weight, walk.d_bias), walk.inverse
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (states, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("DistillationLoss: backward was called twice; its gradients are handed over once")
        # Normalised here and not before the matmuls: divided by thousands of labels, gradients of the logits would
        # underflow in fp16, and a loss scaler, which arrives as grad_loss, would come too late. The buffers are ours.
        factor = grad_loss * ctx.inverse
        grads = [
            None if grad is None else grad.mul_(factor.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*grads, *(None,) * 8)


class _ChunkWalk:
    """One pass over the rows: logits, statistics, temperature, divergence, gradient."""

    def __init__(
        self,
        module: DistillationLoss,
        head: Head,
        teacher_head: Head,
        states: Tensor,
        normalizer: float | Tensor,
        need: list[bool],
    ) -> None:
        device_type = states.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.module, self.head, self.teacher_head, self.states = module, head, teacher_head, states
        #: dtype of the student's matmuls; the softmax is always fp32 (fp64 for fp64 inputs).
        self.matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else head.weight.dtype
        self.math_dtype = torch.float64 if self.matmul_dtype == torch.float64 else torch.float32
        self.weight = head.weight.detach().to(self.matmul_dtype)
        self.inverse = 1.0 / torch.as_tensor(normalizer, dtype=self.math_dtype) if len(states) else 0.0
        self.need_states, self.need_weight, self.need_bias = need
        self.need_any = any(need)
        rows, width = states.shape
        empty: dict[str, Any] = {"device": states.device}
        self.d_states = torch.empty(rows, width, dtype=states.dtype, **empty) if self.need_states else None
        self.d_weight = torch.zeros(head.weight.shape, dtype=self.math_dtype, **empty) if self.need_weight else None
        self.d_bias = torch.zeros(head.vocab_size, dtype=self.math_dtype, **empty) if self.need_bias else None
        self.sums = {name: torch.zeros((), dtype=self.math_dtype, **empty) for name in SUM_NAMES}
        self.sums["rows"] += rows
        self.sums["temperature_min"] = torch.full((), float("inf"), dtype=self.math_dtype, **empty)
        self.sums["temperature_max"] = torch.full((), float("-inf"), dtype=self.math_dtype, **empty)

    def run(self, teacher_states: Tensor, targets: Tensor) -> Tensor:
        """Walk every chunk and return the loss ``[]``."""
        rows, vocab = self.states.shape[0], self.head.vocab_size
        chunk = min(self.module.chunk_rows(vocab, self.math_dtype.itemsize), max(rows, 1))
        block = chunk
        if self.states.device.type == "cpu":
            block = max(1, min(chunk, _CPU_BLOCK_BYTES // (self.math_dtype.itemsize * vocab)))
        buffers = [self.states.new_empty(chunk, vocab, dtype=self.math_dtype) for _ in range(2)]
        for start in range(0, rows, chunk):
            span = slice(start, min(start + chunk, rows))
            hidden = self.states[span].detach().to(self.matmul_dtype)
            student = _raw_logits(hidden, self.weight, self.head.bias, buffers[0])
            teacher_weight = self.teacher_head.weight.detach()
            teacher_hidden = teacher_states[span].to(teacher_weight.dtype)
            teacher = _raw_logits(teacher_hidden, teacher_weight, self.teacher_head.bias, buffers[1])
            for first in range(0, student.shape[0], block):
                part = slice(first, first + block)
                # The gradient replaces the raw logits in place: no third [C, V] buffer.
                self._block(student[part], teacher[part], targets[span][part])
            if self.need_any:
                self._accumulate(student, hidden, span)
        kd_ratio = self.module.kd_ratio
        total = (1.0 - kd_ratio) * self.sums["ce"] + kd_ratio * self.sums["kd"]
        return total * self.inverse if rows else total  # N = 0: a zero that keeps the graph whole

    def _block(self, raw_student: Tensor, raw_teacher: Tensor, targets: Tensor) -> None:
        """Statistics of one block of rows; overwrites ``raw_student`` with the gradient of the summed loss."""
        z_s, z_t = self.head.activate(raw_student), self.teacher_head.activate(raw_teacher)
        picked = targets.unsqueeze(-1)
        top_s, top_t = z_s.max(-1, keepdim=True), z_t.amax(-1, keepdim=True)
        shifted_s, shifted_t = z_s - top_s.values, z_t - top_t
        at_one = Distributions(p=Distribution.of(shifted_t), q=Distribution.of(shifted_s))
        lse_s = (top_s.values + at_one.q.log_norm).squeeze(-1)
        lse_t = (top_t + at_one.p.log_norm).squeeze(-1)
        student_ce = lse_s - z_s.gather(-1, picked).squeeze(-1)
        teacher_ce = lse_t - z_t.gather(-1, picked).squeeze(-1)
        temperatures = self.module.temperature(z_s, z_t, RowStats(student_ce, teacher_ce, lse_s, lse_t))

        self._add("ce", student_ce)
        self._add("teacher_ce", teacher_ce)
        self._add("kl", at_one.forward_kl())
        student_entropy, teacher_entropy = at_one.q.entropy(), at_one.p.entropy()
        self._add("student_entropy", student_entropy)
        self._add("teacher_entropy", teacher_entropy)
        # They agree where the teacher's logit at the student's first choice is the teacher's largest.
        self._add("top1_agreement", (z_t.gather(-1, top_s.indices) == top_t).to(self.math_dtype))

        t_s, t_t = temperatures.student, temperatures.teacher
        if _is_one(temperatures):  # T = 1 needs no second softmax; q is still needed for the gradient of CE
            at_t = at_one._replace(q=at_one.q._replace(prob=at_one.q.prob.clone())) if self.need_any else at_one
        else:  # a row's maximum stays 0 when it is divided by T > 0
            at_t = Distributions(p=Distribution.of(shifted_t / t_t), q=Distribution.of(shifted_s / t_s))
            student_entropy, teacher_entropy = at_t.q.entropy(), at_t.p.entropy()
        self._add("student_entropy_at_t", student_entropy)
        self._add("teacher_entropy_at_t", teacher_entropy)
        mean_t = torch.broadcast_to(t_s.squeeze(-1) if t_s.dim() else t_s, student_ce.shape)
        self._add("temperature", mean_t)
        self.sums["temperature_min"] = torch.minimum(self.sums["temperature_min"], mean_t.min())
        self.sums["temperature_max"] = torch.maximum(self.sums["temperature_max"], mean_t.max())

        scale = t_s * t_t if self.module.temperature_scaling == "squared" else torch.ones_like(t_s)
        value, d_tempered = self.module.divergence.value_and_grad(at_t)
        self._add("kd", value * (scale.squeeze(-1) if scale.dim() else scale))
        if not self.need_any:
            return
        kd_ratio = self.module.kd_ratio
        grad = d_tempered.mul_(scale / t_s * kd_ratio)
        if kd_ratio < 1.0:
            ce_weight = 1.0 - kd_ratio
            grad.add_(at_one.q.prob.mul_(ce_weight))
            grad.scatter_add_(-1, picked, grad.new_full(picked.shape, -ce_weight))
        raw_student.copy_(self.head.activate_backward_(grad, z_s))

    def _accumulate(self, grad_logits: Tensor, hidden: Tensor, span: slice) -> None:
        grad = grad_logits.to(self.matmul_dtype)
        if self.d_states is not None:
            self.d_states[span] = grad @ self.weight
        if self.d_weight is not None:
            if self.matmul_dtype == self.math_dtype:
                self.d_weight.addmm_(grad.t(), hidden)
            else:  # a low-precision matmul, but the sum over chunks in fp32
                self.d_weight += grad.t() @ hidden
        if self.d_bias is not None:
            self.d_bias += grad_logits.sum(0)

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] += values.sum()


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """hidden ``[C, H]`` x weight ``[V, H]`` into the first C rows of ``buffer`` (fp32 or fp64), bias added there."""
    logits = buffer[: hidden.shape[0]]
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    return logits if bias is None else logits.add_(bias.detach())


def _is_one(temperatures: Temperatures) -> bool:
    """Whether T = 1 for all rows, asked only where the answer costs no device synchronisation."""
    return all(t.device.type == "cpu" and t.numel() == 1 and t.item() == 1.0 for t in temperatures)
