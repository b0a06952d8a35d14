"""One pass over the rows in chunks: logits, statistics, temperature, divergence, gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dts_hf.divergences import Distribution, Distributions, dot
from dts_hf.models.head import Head
from dts_hf.temperature.base import RowStats, Temperatures

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
    "teacher_temperature",
)
#: On a CPU, rows are processed in blocks of about this many bytes of logits: the elementwise work stays in its cache.
_CPU_BLOCK_BYTES = 1 << 19


class _ChunkWalk:
    """One pass over the rows: logits, statistics, temperature, divergence, gradient."""

    def __init__(
        self,
        module: Any,
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
        self.d_weight: Tensor | None = None  # made by the first chunk
        self.d_bias = torch.zeros(head.vocab_size, dtype=self.math_dtype, **empty) if self.need_bias else None
        self.sums = {name: torch.zeros((), dtype=self.math_dtype, **empty) for name in SUM_NAMES}
        self.sums["rows"] += rows
        self.sums["temperature_min"] = torch.full((), float("inf"), dtype=self.math_dtype, **empty)
        self.sums["temperature_max"] = torch.full((), float("-inf"), dtype=self.math_dtype, **empty)
        if module.temperature.learns:
            self.sums["temperature_grad"] = torch.zeros((), dtype=self.math_dtype, **empty)
        own = module.temperature.kd_ratio
        self.kd_ratio = module.kd_ratio if own is None else own
        self.squared = module.temperature_scaling == "squared"

    def run(self, teacher_states: Tensor | None, targets: Tensor, sequences: Tensor | None) -> Tensor:
        """Walk every chunk and return the loss ``[]``."""
        rows, vocab = self.states.shape[0], self.head.vocab_size
        chunk = min(self.module.chunk_rows(vocab, self.math_dtype.itemsize), max(rows, 1))
        self.block = chunk
        if self.states.device.type == "cpu":
            self.block = max(1, min(chunk, _CPU_BLOCK_BYTES // (self.math_dtype.itemsize * vocab)))
        models = 1 if teacher_states is None else 2
        self.buffers = [self.states.new_empty(chunk, vocab, dtype=self.math_dtype) for _ in range(models)]
        self.teacher_states, self.targets = teacher_states, targets
        if rows == 0:
            self._observe_nothing()
            self.d_weight = torch.zeros_like(self.head.weight) if self.need_weight else None
        if self.module.temperature.needs_sequence_gap and rows:
            gaps, spans = self._sequences(sequences, chunk)  # type: ignore[arg-type]
        else:
            gaps, spans = None, [(slice(start, min(start + chunk, rows)), True) for start in range(0, rows, chunk)]
        for span, measured in spans:
            student, teacher, hidden = self._logits(span)
            if gaps is not None and not measured:
                self._fill_gaps(gaps, sequences, span, student, teacher)  # type: ignore[arg-type]
            for part, z_s, z_t in self._blocks(span, student, teacher):
                # The gradient replaces the raw logits in place: no third [C, V] buffer.
                self._block(z_s, z_t, targets[part], None if gaps is None else gaps[part])
            if self.need_any:
                self._accumulate(student, hidden, span)
        total = (1.0 - self.kd_ratio) * self.sums["ce"] + self.kd_ratio * self.sums["kd"]
        return total * self.inverse if rows else total  # N = 0: a zero that keeps the graph whole

    def _logits(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits of student and teacher for the rows of ``span``, and the student's states as the matmul read them."""
        hidden = self.states[span].detach().to(self.matmul_dtype)
        student = _raw_logits(hidden, self.weight, self.head.bias, self.buffers[0])
        if self.teacher_states is None:
            return student, student, hidden
        teacher_weight = self.teacher_head.weight.detach()
        teacher_hidden = self.teacher_states[span].to(teacher_weight.dtype)
        teacher = _raw_logits(teacher_hidden, teacher_weight, self.teacher_head.bias, self.buffers[1])
        return student, teacher, hidden

    def _blocks(self, span: slice, student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The chunk in blocks that fit into a CPU's cache: (rows among all N, student logits, teacher logits)."""
        for first in range(0, student.shape[0], self.block):
            part = slice(first, first + self.block)
            yield (
                slice(span.start + first, min(span.start + first + self.block, span.stop)),
                student[part],
                teacher[part],
            )

    # ----------------------------------------------------------------------------------------- the gap of a sequence

    def _sequences(self, sequences: Tensor, chunk: int) -> tuple[Tensor, list[tuple[slice, bool]]]:
        """Chunks that keep sequences whole, so that a sequence's gap is known before the temperature of its rows.

        A sequence with more rows than a chunk holds is cut, and its gap is measured first: its logits are then computed
        twice. Returns the gaps ``[N]`` and the chunks, each with whether its gaps are measured already.
        """
        lengths = sequences.unique_consecutive(return_counts=True)[1].tolist()
        gaps = self.states.new_empty(len(sequences), dtype=self.math_dtype)
        spans: list[tuple[slice, bool]] = []
        start = stop = 0
        for length in lengths:
            if stop > start and stop + length - start > chunk:
                spans.append((slice(start, stop), False))
                start = stop
            stop += length
            if length > chunk:
                parts = [slice(first, min(first + chunk, stop)) for first in range(start, stop, chunk)]
                row_gaps = [self._row_gaps(part, *self._logits(part)[:2]) for part in parts]
                gaps[start:stop] = torch.cat(row_gaps).mean()
                spans += [(part, True) for part in parts]
                start = stop
        if stop > start:
            spans.append((slice(start, stop), False))
        return gaps, spans

    def _fill_gaps(self, gaps: Tensor, sequences: Tensor, span: slice, student: Tensor, teacher: Tensor) -> None:
        numbers, inverse = sequences[span].unique_consecutive(return_inverse=True)
        sums = gaps.new_zeros(2, len(numbers))
        row_gaps = self._row_gaps(span, student, teacher)
        sums.index_add_(1, inverse, torch.stack([row_gaps, torch.ones_like(row_gaps)]))
        gaps[span] = (sums[0] / sums[1])[inverse]

    def _row_gaps(self, span: slice, student: Tensor, teacher: Tensor) -> Tensor:
        """Student CE - teacher CE at T = 1 of each row, ``[C]``."""
        gaps = student.new_empty(student.shape[0])
        for part, raw_s, raw_t in self._blocks(span, student, teacher):
            z_s, z_t = self.head.activate(raw_s), self.teacher_head.activate(raw_t)
            picked = self.targets[part].unsqueeze(-1)
            here = slice(part.start - span.start, part.stop - span.start)
            chosen = (z_t.gather(-1, picked) - z_s.gather(-1, picked)).squeeze(-1)
            gaps[here] = z_s.logsumexp(-1) - z_t.logsumexp(-1) + chosen
        return gaps

    # --------------------------------------------------------------------------------------------------- one block

    def _block(self, raw_student: Tensor, raw_teacher: Tensor, targets: Tensor, sequence_gap: Tensor | None) -> None:
        """Statistics of one block of rows; overwrites ``raw_student`` with the gradient of the summed loss."""
        z_s, z_t = self.head.activate(raw_student), self.teacher_head.activate(raw_teacher)
        picked = targets.unsqueeze(-1)
        top_s, top_t = z_s.max(-1, keepdim=True), z_t.amax(-1, keepdim=True)
        shifted_s, shifted_t = z_s - top_s.values, z_t - top_t
        at_one = Distributions(p=Distribution.of(shifted_t), q=Distribution.of(shifted_s), targets=targets)
        lse_s = (top_s.values + at_one.q.log_norm).squeeze(-1)
        lse_t = (top_t + at_one.p.log_norm).squeeze(-1)
        student_ce = lse_s - z_s.gather(-1, picked).squeeze(-1)
        teacher_ce = lse_t - z_t.gather(-1, picked).squeeze(-1)
        policy = self.module.temperature
        temperatures = policy(z_s, z_t, RowStats(student_ce, teacher_ce, lse_s, lse_t, sequence_gap))

        self._add("ce", student_ce)
        self._add("teacher_ce", teacher_ce)
        self._add("kl", at_one.forward_kl())
        # They agree where the teacher's logit at the student's first choice is the teacher's largest.
        self._add("top1_agreement", (z_t.gather(-1, top_s.indices) == top_t).to(self.math_dtype))
        at_t = self._tempered(temperatures, at_one)
        for name, distribution, tempered in (("student", at_one.q, at_t.q), ("teacher", at_one.p, at_t.p)):
            entropy = distribution.entropy()
            self._add(f"{name}_entropy", entropy)
            same = tempered.logits is distribution.logits
            self._add(f"{name}_entropy_at_t", entropy if same else tempered.entropy())
        t_s, t_t = temperatures.student, temperatures.teacher
        mean_t = torch.broadcast_to(_rows(t_s), student_ce.shape)
        self._add("temperature", mean_t)
        self._add("teacher_temperature", mean_t if t_t is t_s else torch.broadcast_to(_rows(t_t), student_ce.shape))
        self.sums["temperature_min"] = torch.minimum(self.sums["temperature_min"], mean_t.min())
        self.sums["temperature_max"] = torch.maximum(self.sums["temperature_max"], mean_t.max())
        if temperatures.observed is not None:
            self._observe(temperatures.observed)

        divergence = self.module.divergence
        companions = self._companions(at_one)  # before the main term, which may use up the buffers of T = 1
        factor = t_s * t_t if temperatures.scale is None else temperatures.scale
        scale = factor if self.squared else torch.ones_like(factor)
        if policy.learns and (t_s.dim() or temperatures.scale is not None):
            raise ValueError(f"the policy '{policy.name}' learns, so it must give one temperature [] and no scale")
        if temperatures.scale_free is not None and temperatures.scale is None:
            raise ValueError(f"the policy '{policy.name}' is scale-free, so it must give a scale, free of z_s")
        # Before value_and_grad, which uses buffers up. d u / d log T = -u on both sides.
        slope = (
            divergence.held_slope(at_t) - dot(divergence.teacher_grad(at_t), at_t.p.logits) if policy.learns else 0.0
        )
        value, d_tempered = divergence.value_and_grad(at_t)
        self._add("kd", value * _rows(scale))
        if policy.learns:
            slope = (slope - dot(d_tempered, at_t.q.logits)) / t_s
            self._add("temperature_grad", slope * scale + (2.0 * t_s * value if self.squared else 0.0))
        if not self.need_any:
            return
        grad = d_tempered.mul_(scale / t_s * self.kd_ratio)
        if temperatures.scale_free is not None:
            _through_deviation_(grad, z_s, temperatures.scale_free)
        if companions is not None:
            grad.add_(companions, alpha=self.kd_ratio)
        if self.kd_ratio < 1.0:
            ce_weight = 1.0 - self.kd_ratio
            grad.add_(at_one.q.prob.mul_(ce_weight))
            grad.scatter_add_(-1, picked, grad.new_full(picked.shape, -ce_weight))
        raw_student.copy_(self.head.activate_backward_(grad, z_s))

    def _tempered(self, temperatures: Temperatures, at_one: Distributions) -> Distributions:
        """Teacher and student at their temperature; shares what T = 1 leaves as it is."""
        t_s, t_t, share = temperatures.student, temperatures.teacher, temperatures.teacher_share
        if _is_one(t_s):  # no second softmax, but q is still needed for the gradient of CE
            q = at_one.q._replace(prob=at_one.q.prob.clone()) if self.need_any else at_one.q
        else:  # a row's maximum stays 0 when it is divided by T > 0
            q = Distribution.of(at_one.q.logits / t_s)
        if share is not None:  # an intermediate teacher: between the student as it is and the teacher
            mixed = torch.lerp(at_one.q.logits, at_one.p.logits, share.to(self.math_dtype))
            p = Distribution.of((mixed - mixed.amax(-1, keepdim=True)).div_(t_t))
        else:
            p = at_one.p if _is_one(t_t) else Distribution.of(at_one.p.logits / t_t)
        return at_one._replace(p=p, q=q)

    def _companions(self, at_one: Distributions) -> Tensor | None:
        """The policy's further terms at fixed temperatures: adds their values, returns the sum of their gradients."""
        total = None
        for temperature, weight in self.module.temperature.companions:
            at_t = at_one._replace(
                p=Distribution.of(at_one.p.logits / temperature), q=Distribution.of(at_one.q.logits / temperature)
            )
            value, grad = self.module.divergence.value_and_grad(at_t)
            factor = weight * (temperature**2 if self.squared else 1.0)
            self._add("kd", value * factor)
            grad.mul_(factor / temperature)
            total = grad if total is None else total.add_(grad)
        return total

    def _observe(self, features: Tensor) -> None:
        summed = features.to(self.math_dtype).sum(0)
        self.sums["observed"] = self.sums["observed"] + summed if "observed" in self.sums else summed

    def _observe_nothing(self) -> None:
        """Without a row, zeros as wide as the policy's features: every rank must reduce sums of equal shape."""
        z = self.states.new_empty(0, self.head.vocab_size, dtype=self.math_dtype)
        none = z.new_empty(0)
        observed = self.module.temperature(z, z, RowStats(none, none, none, none, none)).observed
        if observed is not None:
            self._observe(observed)

    def _accumulate(self, grad_logits: Tensor, hidden: Tensor, span: slice) -> None:
        grad = grad_logits.to(self.matmul_dtype)
        if self.d_states is not None:
            self.d_states[span] = grad @ self.weight
        if self.need_weight:
            if self.d_weight is None:
                self.d_weight = grad.t() @ hidden
            elif self.matmul_dtype == self.math_dtype:
                self.d_weight.addmm_(grad.t(), hidden)
            else:  # a low-precision matmul, but the sum over chunks in fp32
                self.d_weight = self.d_weight.to(self.math_dtype).add_(grad.t() @ hidden)
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


def _rows(value: Tensor) -> Tensor:
    """``[C, 1]`` as ``[C]``; a single number stays one."""
    return value.squeeze(-1) if value.dim() else value


def _through_deviation_(grad: Tensor, logits: Tensor, rows: Tensor) -> None:
    """Turn, in place, a gradient by ``logits`` ``[C, V]`` at constant T into the one at T = const std(logits).

    g - c (g . c) / (c . c) with c = z - mean z: the derivative of log T is c / (c . c), and g sums to zero. ``rows`` ``[C,
    1]`` says where T is such a multiple.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    share = (dot(grad, centred) / dot(centred, centred)).unsqueeze(-1)
    grad.addcmul_(centred, torch.where(rows, share, 0.0), value=-1.0)


def _is_one(temperature: Tensor) -> bool:
    """Whether T = 1 for all rows, asked only where the answer costs no device synchronisation."""
    return temperature.device.type == "cpu" and temperature.numel() == 1 and temperature.item() == 1.0
