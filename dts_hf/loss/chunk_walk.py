"""One walk over the rows in chunks: logits, statistics, temperature, divergence, gradient.

Shapes: ``N`` labelled rows, ``C`` rows of a chunk (on a CPU: of a block of it), ``H`` hidden, ``V`` vocabulary. ``_s`` is
the student, ``_t`` the teacher (each has its own H); r is ``kd_ratio``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dts_hf.divergences import Distribution, Distributions, Divergence, dot
from dts_hf.loss import statistics as stats
from dts_hf.loss.sequence_gap import row_gaps, sequence_means, whole_sequences
from dts_hf.models.head import Head
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures

#: On a CPU, rows are processed in blocks of about this many bytes of logits: the elementwise work stays in its cache.
_CPU_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class LossSettings:
    """What a walk needs to know of the loss.

    Attributes:
        divergence: D of the soft loss.
        temperature: the policy, asked once for each block of rows.
        kd_ratio: r, the weight of the soft loss now in force.
        scaled: multiply D by T_s T_t, or by the policy's own factor.
        logits_budget_mb: MiB that the logits of one chunk may take; sets C.
    """

    divergence: Divergence
    temperature: TemperaturePolicy
    kd_ratio: float
    scaled: bool
    logits_budget_mb: float


class _Block(NamedTuple):
    """What step 3 finds out about a block of rows, before any temperature."""

    z_s: Tensor  # [C, V] logits; the raw ones themselves where the head neither scales nor caps
    z_t: Tensor  # [C, V]
    at_one: Distributions  # [C, V] softmax of both at T = 1, with the targets [C]
    rows: RowStats  # [C] each
    student_entropy: Tensor  # [C] at T = 1
    teacher_entropy: Tensor  # [C]


class _SoftLoss(NamedTuple):
    """What step 5 hands to the gradient."""

    grad: Tensor  # [C, V] d D / d u with u = z_s / T_s; ours to overwrite
    scale: Tensor  # [] or [C, 1] factor of D
    companions: Tensor | None  # [C, V] gradient of the companion terms with respect to z_s


class ChunkWalk:
    """Loss, sums and gradients of N rows in one pass, C rows at a time; the gradients are formed in the forward pass.

    The flow:

    1. ``_chunks``: cut the N rows into chunks of C; whole sequences, where the policy needs the gap of a sequence.
    2. ``_logits``: raw logits h_s W_s^T and h_t W_t^T ``[C, V]``, each into one buffer that all chunks share.
    3. ``_statistics``: z_s, z_t ``[C, V]`` after scale and soft-cap; at T = 1 the softmax of both ``[C, V]``, their
       cross-entropies, log-sum-exps and entropies ``[C]``.
    4. ``_temperature``: the policy answers T_s, T_t, ``[]`` or ``[C, 1]``; p and q ``[C, V]`` at them.
    5. ``_soft_loss``: D(p, q) ``[C]`` and its gradient ``[C, V]`` with respect to u = z_s / T_s.
    6. ``_gradient_``: the gradient g ``[C, V]`` of (1 - r) CE + r scale D with respect to the student's raw logits, written
       over those.
    7. ``_accumulate``: dH = g W_s ``[C, H]``, dW += g^T h_s ``[V, H]``, db += g^T 1 ``[V]``.

    ``run`` does it and returns the loss ``[]``, divided by the normaliser; ``sums`` and ``gradients`` are there afterwards.
    On a CPU steps 3 to 6 run in blocks of a chunk that fit into its cache; chunks stay large for the matmuls.

    **Cost.** Four matmuls with the vocabulary for each row: two logits, dH, dW (three where the head is frozen or there is
    no teacher). Nothing is computed again in the backward pass.

    **Memory.** Two ``[C, V]`` buffers and what the softmaxes and the divergence need beside them, whatever N: C comes from
    ``logits_budget_mb``. g takes the place of the student's raw logits, so it needs no third buffer.

    **Precision.** Matmuls run in the student's dtype (that of autocast, where it is on; the teacher's in that of its head),
    everything between them in fp32, the sum of dW over chunks too; all of it in fp64 where the student is fp64. The
    gradients are those of the *summed* loss: over thousands of labels the gradient of a mean would underflow in fp16 before
    the matmuls, so ``_FusedLoss`` divides them afterwards.

    **Sharded heads and wrappers.** The walk sees plain tensors: it runs inside the model's forward (``loss_in_head``),
    where DDP, ZeRO-3 and FSDP2 have gathered the student's head, and ``gather_head`` has gathered the teacher's; once for
    all chunks. What the wrappers do with gradients happens outside, in autograd's backward pass.

    Args:
        settings: of the loss.
        states: ``[N, H_s]``, the student's; N may be 0.
        head: the student's, weight ``[V, H_s]``.
        teacher_states: ``[N, H_t]``; None: no teacher, and the student's logits stand for the teacher's (r must be 0).
        teacher_head: weight ``[V, H_t]``.
        targets: ``[N]`` int64.
        sequences: ``[N]`` int64, never falling; for policies with ``needs_sequence_gap``.
        normalizer: the loss is divided by it.
        needs: whether a gradient of (states, weight, bias) is needed.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        states: Tensor,
        head: Head,
        teacher_states: Tensor | None,
        teacher_head: Head,
        targets: Tensor,
        sequences: Tensor | None,
        normalizer: float | Tensor,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.settings, self.targets = settings, targets
        self.states, self.head = states, head
        self.teacher_states, self.teacher_head = teacher_states, teacher_head
        self.sequences = sequences if settings.temperature.needs_sequence_gap else None
        self.need_states, self.need_weight, self.need_bias = needs
        (rows, width), vocab, device = states.shape, head.vocab_size, states.device

        # Read here and not in ``run``, which switches autocast off
        autocast = torch.is_autocast_enabled(device.type)
        self.matmul_dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
        self.math_dtype = torch.float64 if self.matmul_dtype == torch.float64 else torch.float32
        self.weight = head.weight.detach().to(self.matmul_dtype)  # [V, H_s] cast once, and not for every chunk

        self.chunk = min(rows_in_budget(settings.logits_budget_mb, vocab, self.math_dtype.itemsize), max(rows, 1))
        self.block = self.chunk
        if device.type == "cpu":
            self.block = max(1, min(self.chunk, _CPU_BLOCK_BYTES // (self.math_dtype.itemsize * vocab)))
        # All chunks write into these: taken anew for each chunk, the last and the next one would be there together
        models = 1 if teacher_states is None else 2
        self.buffers = [states.new_empty(self.chunk, vocab, dtype=self.math_dtype) for _ in range(models)]  # [C, V]

        # Gradients of the summed loss. The first chunk makes dW; without a chunk it is zeros, and not None, so that every
        # rank has a gradient to reduce.
        self.d_states = torch.empty(rows, width, dtype=states.dtype, device=device) if self.need_states else None
        self.d_weight = torch.zeros_like(head.weight) if self.need_weight and not rows else None
        self.d_bias = torch.zeros(vocab, dtype=self.math_dtype, device=device) if self.need_bias else None
        self.inverse = 1.0 / torch.as_tensor(normalizer, dtype=self.math_dtype) if rows else 0.0

        #: 0-d tensors of ``math_dtype``, but for ``observed`` ``[K]``, which is there when the policy observes.
        self.sums: dict[str, Tensor] = {stats.ROWS: torch.full((), float(rows), dtype=self.math_dtype, device=device)}
        for name, reduction in stats.SUMS_OF_LOSS.items():
            self.sums[name] = torch.full((), stats.START[reduction], dtype=self.math_dtype, device=device)
        if settings.temperature.learns:
            self.sums[stats.TEMPERATURE_GRAD] = torch.zeros((), dtype=self.math_dtype, device=device)

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the summed loss, with respect to states ``[N, H_s]``, weight ``[V, H_s]`` and bias ``[V]``."""
        return self.d_states, self.d_weight, self.d_bias

    @property
    def _needs_gradient(self) -> bool:
        return self.need_states or self.need_weight or self.need_bias

    def run(self) -> Tensor:
        """Walk all chunks, once and without autograd; returns the loss ``[]``."""
        # The dtype of every operation was chosen in __init__; autocast must not choose again
        with torch.autocast(self.states.device.type, enabled=False):
            if len(self.states) == 0:
                self._observe_nothing()
            for parts in self._chunks():
                # Of a sequence longer than a chunk the gap comes first; its logits are then computed a second time
                whole_gap = self._gap_of(parts) if len(parts) > 1 else None
                for span in parts:
                    self._process(span, whole_gap)
        r = self.settings.kd_ratio
        total = (1.0 - r) * self.sums[stats.CE.sum] + r * self.sums[stats.KD.sum]
        # Without a row the normaliser may be 0 too. The zero still hangs in the graph: a rank without labels must take
        # part in the backward pass, or the others wait for its gradients for ever.
        return total * self.inverse if len(self.states) else total

    def _process(self, span: slice, whole_gap: Tensor | None) -> None:
        """Steps 2 to 7 for one chunk. ``whole_gap`` ``[]``: the chunk is part of one sequence, of that gap."""
        student, teacher, hidden = self._logits(span)  # [C, V], [C, V], [C, H_s]
        gaps = self._gaps(span, student, teacher, whole_gap)  # [C], where the policy needs them
        for part in self._blocks(len(student)):
            gap = None if gaps is None else gaps[part]
            self._block(student[part], teacher[part], self.targets[span][part], gap)
        if self._needs_gradient:
            self._accumulate(student, hidden, span)  # ``student`` holds g by now

    def _block(self, raw_student: Tensor, raw_teacher: Tensor, targets: Tensor, gap: Tensor | None) -> None:
        """Steps 3 to 6 for one block: raw logits ``[C, V]``, ``targets`` ``[C]``, the gap ``[C]`` of each row's sequence.

        Overwrites ``raw_student`` with g. All other ``[C, V]`` tensors of the block end with this call, before the next
        block, or the matmuls of step 7, need room.
        """
        block = self._statistics(raw_student, raw_teacher, targets, gap)
        temperatures, at_t = self._temperature(block)
        soft = self._soft_loss(block, temperatures, at_t)
        if self._needs_gradient:
            raw_student.copy_(self._gradient_(block, temperatures, soft))

    # ------------------------------------------------------------------------------------------- 1 and 2: chunks, logits

    def _chunks(self) -> Iterator[list[slice]]:
        """Step 1: the rows of each chunk; several slices are the parts of one sequence (see ``whole_sequences``)."""
        if self.sequences is not None:
            yield from whole_sequences(self.sequences, self.chunk)
            return
        rows = len(self.states)
        for start in range(0, rows, self.chunk):
            yield [slice(start, min(start + self.chunk, rows))]

    def _blocks(self, rows: int) -> Iterator[slice]:
        """The blocks of a chunk of so many rows: what fits into a CPU's cache, elsewhere all of it."""
        for first in range(0, rows, self.block):
            yield slice(first, min(first + self.block, rows))

    def _logits(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Step 2: raw logits ``[C, V]`` of student and teacher, and the student's states ``[C, H]`` as the matmul read them.

        They stand in the shared buffers, so the next call overwrites them.
        """
        hidden = self.states[span].detach().to(self.matmul_dtype)
        student = _raw_logits(hidden, self.weight, self.head.bias, self.buffers[0])
        if self.teacher_states is None:
            return student, student, hidden
        teacher_weight = self.teacher_head.weight.detach()
        teacher_hidden = self.teacher_states[span].to(teacher_weight.dtype)
        teacher = _raw_logits(teacher_hidden, teacher_weight, self.teacher_head.bias, self.buffers[1])
        return student, teacher, hidden

    def _gaps(self, span: slice, student: Tensor, teacher: Tensor, whole_gap: Tensor | None) -> Tensor | None:
        """The gap ``[C]`` of each row's sequence, from raw logits ``[C, V]``; None for policies that do not need it."""
        if self.sequences is None:
            return None
        if whole_gap is not None:
            return whole_gap.repeat(len(student))
        return sequence_means(self._row_gaps(span, student, teacher), self.sequences[span])

    def _gap_of(self, parts: list[slice]) -> Tensor:
        """The gap ``[]`` of one sequence that is cut into ``parts``."""
        return torch.cat([self._row_gaps(part, *self._logits(part)[:2]) for part in parts]).mean()

    def _row_gaps(self, span: slice, student: Tensor, teacher: Tensor) -> Tensor:
        """Student CE - teacher CE at T = 1 of each row, ``[C]``, from raw logits ``[C, V]``."""
        targets = self.targets[span]
        return torch.cat(
            [
                row_gaps(self.head.activate(student[part]), self.teacher_head.activate(teacher[part]), targets[part])
                for part in self._blocks(len(student))
            ]
        )

    # -------------------------------------------------------------------------------------------------- 3: statistics

    def _statistics(
        self, raw_student: Tensor, raw_teacher: Tensor, targets: Tensor, sequence_gap: Tensor | None
    ) -> _Block:
        """Step 3: what does not depend on a temperature, from raw logits ``[C, V]``, ``targets`` and gaps ``[C]``.

        These numbers are at T = 1 whatever the policy does, so that runs of different policies can be compared by them.
        """
        z_s, z_t = self.head.activate(raw_student), self.teacher_head.activate(raw_teacher)  # [C, V]
        picked = targets.unsqueeze(-1)  # [C, 1]
        top_s, top_t = z_s.max(-1, keepdim=True), z_t.amax(-1, keepdim=True)  # [C, 1]
        # The row maximum is taken off once: no exp can overflow, and it is still 0 after a division by any T > 0
        shifted_s, shifted_t = z_s - top_s.values, z_t - top_t  # [C, V]
        at_one = Distributions(p=Distribution.of(shifted_t), q=Distribution.of(shifted_s), targets=targets)
        lse_s = (top_s.values + at_one.q.log_norm).squeeze(-1)  # [C]
        lse_t = (top_t + at_one.p.log_norm).squeeze(-1)  # [C]
        student_ce = lse_s - z_s.gather(-1, picked).squeeze(-1)  # [C]
        teacher_ce = lse_t - z_t.gather(-1, picked).squeeze(-1)  # [C]
        student_entropy, teacher_entropy = at_one.q.entropy(), at_one.p.entropy()  # [C]

        self._add(stats.CE, student_ce)
        self._add(stats.TEACHER_CE, teacher_ce)
        self._add(stats.KL, at_one.forward_kl())
        # They agree where the teacher's logit at the student's first choice is the teacher's largest: no second argmax
        self._add(stats.TOP1_AGREEMENT, (z_t.gather(-1, top_s.indices) == top_t).to(self.math_dtype))
        self._add(stats.STUDENT_ENTROPY, student_entropy)
        self._add(stats.TEACHER_ENTROPY, teacher_entropy)
        rows = RowStats(student_ce, teacher_ce, lse_s, lse_t, sequence_gap)
        return _Block(z_s, z_t, at_one, rows, student_entropy, teacher_entropy)

    # ------------------------------------------------------------------------------------------------- 4: temperature

    def _temperature(self, block: _Block) -> tuple[Temperatures, Distributions]:
        """Step 4: ask the policy, and bring both softmaxes ``[C, V]`` to what it answers.

        Of the answer (``Temperatures``) this step uses ``student`` and ``teacher``, ``teacher_share`` (a mixed target, in
        ``_tempered``) and ``observed`` (features of the rows, summed up for ``end_step``). ``scale`` and the policy's
        ``companions`` and ``learns`` belong to step 5, ``scale_free`` to step 6.

        Raises:
            ValueError: the answer breaks the contract of what the policy declares.
        """
        policy = self.settings.temperature
        temperatures = policy(block.z_s, block.z_t, block.rows)
        t_s, t_t = temperatures.student, temperatures.teacher  # [] or [C, 1]
        if policy.learns and (t_s.dim() or temperatures.scale is not None):
            raise ValueError(f"the policy '{policy.name}' learns, so it must give one temperature [] and no scale")
        if temperatures.scale_free is not None and temperatures.scale is None:
            raise ValueError(f"the policy '{policy.name}' is scale-free, so it must give a scale, free of z_s")
        at_t = self._tempered(temperatures, block.at_one)

        # An entropy costs a pass over [C, V]: where T = 1 left the logits as they are, it is the one of step 3
        same_q, same_p = at_t.q.logits is block.at_one.q.logits, at_t.p.logits is block.at_one.p.logits
        self._add(stats.STUDENT_ENTROPY_AT_T, block.student_entropy if same_q else at_t.q.entropy())
        self._add(stats.TEACHER_ENTROPY_AT_T, block.teacher_entropy if same_p else at_t.p.entropy())
        of_rows = block.rows.student_ce.shape
        mean_t = torch.broadcast_to(_rows(t_s), of_rows)  # [C]
        self._add(stats.TEMPERATURE, mean_t)
        self._add(stats.TEACHER_TEMPERATURE, mean_t if t_t is t_s else torch.broadcast_to(_rows(t_t), of_rows))
        low, high = stats.TEMPERATURE_MIN.sum, stats.TEMPERATURE_MAX.sum
        self.sums[low] = torch.minimum(self.sums[low], mean_t.min())
        self.sums[high] = torch.maximum(self.sums[high], mean_t.max())
        if temperatures.observed is not None:
            self._observe(temperatures.observed)
        return temperatures, at_t

    def _tempered(self, temperatures: Temperatures, at_one: Distributions) -> Distributions:
        """Bring p and q ``[C, V]`` to their temperature; shares what T = 1 leaves as it is."""
        t_s, t_t, share = temperatures.student, temperatures.teacher, temperatures.teacher_share
        if _is_one(t_s):
            # No second softmax. But a divergence may overwrite q.prob, and the gradient of the cross-entropy still needs it
            q = at_one.q._replace(prob=at_one.q.prob.clone()) if self._needs_gradient else at_one.q
        else:
            q = Distribution.of(at_one.q.logits / t_s)
        if share is not None:
            # An intermediate teacher between the student as it is (held constant) and the teacher; its maximum is not 0
            mixed = torch.lerp(at_one.q.logits, at_one.p.logits, share.to(self.math_dtype))
            p = Distribution.of((mixed - mixed.amax(-1, keepdim=True)).div_(t_t))
        else:  # nothing overwrites p, so it needs no clone
            p = at_one.p if _is_one(t_t) else Distribution.of(at_one.p.logits / t_t)
        return at_one._replace(p=p, q=q)

    def _observe(self, features: Tensor) -> None:
        """Add up the policy's features ``[C, K]`` of the rows."""
        summed = features.to(self.math_dtype).sum(0)
        self.sums[stats.OBSERVED] = self.sums[stats.OBSERVED] + summed if stats.OBSERVED in self.sums else summed

    def _observe_nothing(self) -> None:
        """Without a row, zeros as wide as the policy's features: every rank must reduce sums of equal shape."""
        z = self.states.new_empty(0, self.head.vocab_size, dtype=self.math_dtype)
        none = z.new_empty(0)
        observed = self.settings.temperature(z, z, RowStats(none, none, none, none, none)).observed
        if observed is not None:
            self._observe(observed)

    # --------------------------------------------------------------------------------------------------- 5: soft loss

    def _soft_loss(self, block: _Block, temperatures: Temperatures, at_t: Distributions) -> _SoftLoss:
        """Step 5: the divergence ``[C]`` and its gradient ``[C, V]`` with respect to u = z_s / T_s; adds scale D to ``kd``.

        Of the policy this step uses ``scale`` (the factor of D where it is not T_s T_t), ``companions`` (further terms at
        fixed temperatures) and ``learns`` (it wants d kd / d T). The order of the lines matters: ``value_and_grad`` may
        overwrite q.prob, and with it what the others read.
        """
        policy, divergence = self.settings.temperature, self.settings.divergence
        t_s, t_t = temperatures.student, temperatures.teacher  # [] or [C, 1]
        # First, because at_t.q is at_one.q itself where T_s = 1 and no gradient is needed
        companions = self._companions(block.at_one)  # [C, V]
        factor = t_s * t_t if temperatures.scale is None else temperatures.scale  # [] or [C, 1]
        scale = factor if self.settings.scaled else torch.ones_like(factor)
        if policy.learns:
            # d D / d log T [C] by way of p, and of what D holds constant: d u / d log T = -u on both sides
            slope = divergence.held_slope(at_t) - dot(divergence.teacher_grad(at_t), at_t.p.logits)
        value, grad = divergence.value_and_grad(at_t)  # [C], [C, V]; q.prob is used up from here on
        self._add(stats.KD, value * _rows(scale))
        if policy.learns:
            # ... and by way of q; then the product rule for scale D, with scale = T^2
            slope = (slope - dot(grad, at_t.q.logits)) / t_s
            by_temperature = slope * scale + (2.0 * t_s * value if self.settings.scaled else 0.0)  # [C]
            self.sums[stats.TEMPERATURE_GRAD] += by_temperature.sum()
        return _SoftLoss(grad, scale, companions)

    def _companions(self, at_one: Distributions) -> Tensor | None:
        """The policy's further terms weight T^2 D at fixed temperatures: adds their values to ``kd``.

        Returns:
            the sum of their gradients ``[C, V]`` with respect to z_s; None: there are none.
        """
        total = None
        for temperature, weight in self.settings.temperature.companions:
            at_t = at_one._replace(
                p=Distribution.of(at_one.p.logits / temperature), q=Distribution.of(at_one.q.logits / temperature)
            )
            value, grad = self.settings.divergence.value_and_grad(at_t)
            factor = weight * (temperature**2 if self.settings.scaled else 1.0)
            self._add(stats.KD, value * factor)
            grad.mul_(factor / temperature)  # by u = z_s / T -> by z_s
            total = grad if total is None else total.add_(grad)
        return total

    # ------------------------------------------------------------------------------------------ 6 and 7: gradient, matmuls

    def _gradient_(self, block: _Block, temperatures: Temperatures, soft: _SoftLoss) -> Tensor:
        """Step 6: the gradient ``[C, V]`` of (1 - r) CE + r kd with respect to the student's raw logits, in ``soft.grad``.

        The chain rule from u = z_s / T_s back to the raw logits, in place. Of the policy's answer this step uses
        ``scale_free``: rows whose T_s is made of z_s, so that the way through T_s counts too.
        """
        r = self.settings.kd_ratio
        grad = soft.grad.mul_(soft.scale / temperatures.student * r)  # d u / d z_s = 1 / T_s, T_s held constant
        if temperatures.scale_free is not None:
            _through_deviation_(grad, block.z_s, temperatures.scale_free)
        if soft.companions is not None:
            grad.add_(soft.companions, alpha=r)
        if r < 1.0:  # d CE / d z_s = softmax(z_s) - one_hot(target), at T = 1
            ce_weight, picked = 1.0 - r, block.at_one.targets.unsqueeze(-1)  # type: ignore[union-attr]
            grad.add_(block.at_one.q.prob.mul_(ce_weight))  # its last reader, so it may be overwritten
            grad.scatter_add_(-1, picked, grad.new_full(picked.shape, -ce_weight))
        return self.head.activate_backward_(grad, block.z_s)

    def _accumulate(self, grad_logits: Tensor, hidden: Tensor, span: slice) -> None:
        """Step 7: from g ``[C, V]`` and states ``[C, H]`` of one chunk to dH ``[C, H]``, dW ``[V, H]`` and db ``[V]``."""
        grad = grad_logits.to(self.matmul_dtype)
        if self.d_states is not None:
            self.d_states[span] = grad @ self.weight
        if self.need_weight:
            if self.d_weight is None:  # of a single chunk nothing is added up: it stays in the matmul's dtype
                self.d_weight = grad.t() @ hidden
            elif self.matmul_dtype == self.math_dtype:
                self.d_weight.addmm_(grad.t(), hidden)
            else:  # a low-precision matmul, but the sum over chunks in fp32
                self.d_weight = self.d_weight.to(self.math_dtype).add_(grad.t() @ hidden)
        if self.d_bias is not None:
            self.d_bias += grad_logits.sum(0)

    def _add(self, statistic: stats.Statistic, values: Tensor) -> None:
        """Add values of the rows, ``[C]`` or ``[C, 1]``, to the sum of ``statistic``."""
        self.sums[statistic.sum] += values.sum()


def rows_in_budget(logits_budget_mb: float, vocab_size: int, itemsize: int) -> int:
    """C: how many rows of student and teacher logits fit into the budget (MiB); at least one."""
    return max(1, int(logits_budget_mb * 2**20) // (2 * itemsize * max(vocab_size, 1)))


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Write hidden ``[C, H]`` x weight ``[V, H]`` into the first C rows of ``buffer`` (fp32 or fp64), bias added there."""
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
    # Not a mask times share: a row of equal logits has 0 / 0 there, and NaN times 0 is NaN
    grad.addcmul_(centred, torch.where(rows, share, 0.0), value=-1.0)


def _is_one(temperature: Tensor) -> bool:
    """Whether T = 1 for all rows, asked only where the answer costs no device synchronisation."""
    return temperature.device.type == "cpu" and temperature.numel() == 1 and temperature.item() == 1.0
