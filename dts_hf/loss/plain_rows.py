"""The rows of a chunk in PyTorch: the reference, on any device and in any dtype.

Shapes: ``C`` rows of a chunk (on a CPU: of a block of it), ``V`` vocabulary; ``_s`` is the student, ``_t`` the teacher; r is
``kd_ratio``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dts_hf.divergences import Distribution, Distributions, dot
from dts_hf.loss import statistics as stats
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.row_loss import RowLoss, TeacherLogits, as_rows
from dts_hf.loss.sequence_gap import row_gaps
from dts_hf.temperature.base import RowStats, Temperatures

#: On a CPU, rows are processed in blocks of about this many bytes of logits: the elementwise work stays in its cache.
_CPU_BLOCK_BYTES = 1 << 19


class _Block(NamedTuple):
    """What the first step finds out about a block of rows, before any temperature."""

    z_s: Tensor  # [C, V] logits; the raw ones themselves where the head neither scales nor caps
    z_t: Tensor  # [C, V]
    at_one: Distributions  # [C, V] softmax of both at T = 1, with the targets [C]
    rows: RowStats  # [C] each
    student_entropy: Tensor  # [C] at T = 1
    teacher_entropy: Tensor  # [C]
    compact: CompactRows | None  # where not every logit of the teacher is known: then z_t is at T = 1 alone


class _SoftLoss(NamedTuple):
    """What the third step hands to the gradient."""

    value: Tensor  # [C] D
    grad: Tensor  # [C, V] d D / d u with u = z_s / T_s; ours to overwrite
    scale: Tensor  # [] or [C, 1] factor of D
    companions: Tensor | None  # [C, V] gradient of the companion terms with respect to z_s


class PlainRows(RowLoss):
    """The rows of a chunk in four steps, in blocks that fit into a CPU's cache (elsewhere all at once).

    1. ``_statistics``: z_s, z_t ``[C, V]`` after scale and soft-cap; at T = 1 the softmax of both ``[C, V]``, their
       cross-entropies, log-sum-exps and entropies ``[C]``.
    2. ``_temperature``: the policy answers T_s, T_t, ``[]`` or ``[C, 1]``; p and q ``[C, V]`` at them.
    3. ``_soft_loss``: D(p, q) ``[C]`` and its gradient ``[C, V]`` with respect to u = z_s / T_s.
    4. ``_gradient_``: the gradient g ``[C, V]`` of (1 - r) CE + r scale D with respect to the student's raw logits.
    """

    def run(
        self,
        raw_student: Tensor,
        raw_teacher: TeacherLogits,
        targets: Tensor,
        sequence_gap: Tensor | None,
        grad: Tensor,
    ) -> None:
        for part in self._blocks(raw_student):
            gap = None if sequence_gap is None else sequence_gap[part]
            self._block(raw_student[part], raw_teacher[part], targets[part], gap, grad[part])

    def gaps(self, raw_student: Tensor, raw_teacher: TeacherLogits, targets: Tensor) -> Tensor:
        return torch.cat(
            [
                row_gaps(self.head.activate(raw_student[part]), self._logits_at_one(raw_teacher[part]), targets[part])
                for part in self._blocks(raw_student)
            ]
        )

    def _logits_at_one(self, raw_teacher: TeacherLogits) -> Tensor:
        """The teacher's logits ``[C, V]`` at T = 1."""
        if isinstance(raw_teacher, CompactRows):
            return raw_teacher.at(1.0).logits
        return self.teacher_head.activate(raw_teacher)

    def _blocks(self, raw: Tensor) -> Iterator[slice]:
        """The blocks of a chunk of logits ``[C, V]``: what fits into a CPU's cache, elsewhere all of it."""
        rows, vocab = raw.shape
        size = max(rows, 1)
        if raw.device.type == "cpu":
            size = max(1, _CPU_BLOCK_BYTES // (self.math_dtype.itemsize * vocab))
        for first in range(0, rows, size):
            yield slice(first, min(first + size, rows))

    def _block(
        self, raw_student: Tensor, raw_teacher: TeacherLogits, targets: Tensor, gap: Tensor | None, grad: Tensor
    ) -> None:
        """One block: raw logits ``[C, V]``, ``targets`` ``[C]``, the gap ``[C]`` of each row's sequence.

        Writes g to ``grad``. All other ``[C, V]`` tensors of the block end with this call, before the next block, or the
        matmuls behind it, need room.
        """
        block = self._statistics(raw_student, raw_teacher, targets, gap)
        temperatures, at_t = self._temperature(block)
        soft = self._soft_loss(block, temperatures, at_t)
        if self.with_grad:
            grad.copy_(self._gradient_(block, temperatures, soft))

    # -------------------------------------------------------------------------------------------------- 1: statistics

    def _statistics(
        self, raw_student: Tensor, raw_teacher: TeacherLogits, targets: Tensor, sequence_gap: Tensor | None
    ) -> _Block:
        """What does not depend on a temperature, from raw logits ``[C, V]``, ``targets`` and gaps ``[C]``.

        These numbers are at T = 1 whatever the policy does, so that runs of different policies can be compared by them.
        """
        compact = raw_teacher if isinstance(raw_teacher, CompactRows) else None
        z_s, z_t = self.head.activate(raw_student), self._logits_at_one(raw_teacher)  # [C, V]
        picked = targets.unsqueeze(-1)  # [C, 1]
        top_s, top_t = z_s.max(-1, keepdim=True), z_t.amax(-1, keepdim=True)  # [C, 1]
        # The row maximum is taken off once: no exp can overflow, and it is still 0 after a division by any T > 0
        shifted_s, shifted_t = z_s - top_s.values, z_t - top_t  # [C, V]
        at_one = Distributions(p=Distribution.of(shifted_t), q=Distribution.of(shifted_s), targets=targets)
        lse_s = (top_s.values + at_one.q.log_norm).squeeze(-1)  # [C]
        lse_t = (top_t + at_one.p.log_norm).squeeze(-1)  # [C]
        student_ce = lse_s - z_s.gather(-1, picked).squeeze(-1)  # [C]
        teacher_ce = lse_t - z_t.gather(-1, picked).squeeze(-1)  # [C]
        student_entropy = at_one.q.entropy()  # [C]
        teacher_entropy = at_one.p.entropy() if compact is None else compact.entropy(1.0)
        at_one = at_one._replace(teacher_entropy=teacher_entropy)

        self.add(stats.CE, student_ce)
        self.add(stats.TEACHER_CE, teacher_ce)
        self.add(stats.KL, at_one.forward_kl())
        # They agree where the teacher's logit at the student's first choice is the teacher's largest: no second argmax
        self.add(stats.TOP1_AGREEMENT, (z_t.gather(-1, top_s.indices) == top_t).to(self.math_dtype))
        self.add(stats.STUDENT_ENTROPY, student_entropy)
        self.add(stats.TEACHER_ENTROPY, teacher_entropy)
        if self.settings.held_out:
            self.add(stats.REVERSE_KL, at_one.reverse_kl())
            for one, top, z, of_model in (
                (stats.CALIBRATION_ERROR, top_s.values, z_s, at_one.q),
                (stats.TEACHER_CALIBRATION_ERROR, top_t, z_t, at_one.p),
            ):
                # The largest logit has been made 0, so its probability is 1 / norm
                right = (z.gather(-1, picked) == top).squeeze(-1)
                self.add_calibration(one, of_model.log_norm.squeeze(-1).neg().exp(), right)
        rows = RowStats(student_ce, teacher_ce, lse_s, lse_t, sequence_gap)
        return _Block(z_s, z_t, at_one, rows, student_entropy, teacher_entropy, compact)

    # ------------------------------------------------------------------------------------------------- 2: temperature

    def _temperature(self, block: _Block) -> tuple[Temperatures, Distributions]:
        """Ask the policy, and bring both softmaxes ``[C, V]`` to what it answers.

        Of the answer (``Temperatures``) this step uses ``student`` and ``teacher``, ``teacher_share`` (a mixed target) and
        ``raised`` (one token's logit), both in ``_tempered``, and ``observed`` (features of the rows, summed up for
        ``end_step``). ``scale``, ``weight`` and the policy's ``companions`` and ``learns`` belong to step 3, ``scale_free``
        and ``peaked`` to step 4.

        Raises:
            ValueError: the answer breaks the contract of what the policy declares.
        """
        compact = block.compact
        seen = block.z_t if compact is None else compact.summary()
        temperatures = cast(Temperatures, self.settings.temperature(block.z_s, seen, block.rows))
        self.check(temperatures, len(block.z_s))
        at_t = self._tempered(temperatures, block)

        # An entropy costs a pass over [C, V]: where T = 1 left the logits as they are, it is the one of step 1
        same_q, same_p = at_t.q.logits is block.at_one.q.logits, at_t.p.logits is block.at_one.p.logits
        self.add(stats.STUDENT_ENTROPY_AT_T, block.student_entropy if same_q else at_t.q.entropy())
        if compact is not None:
            self.add(stats.TEACHER_ENTROPY_AT_T, compact.entropy(temperatures.teacher))
        else:
            self.add(stats.TEACHER_ENTROPY_AT_T, block.teacher_entropy if same_p else at_t.p.entropy())
        self.log(temperatures, block.rows.student_ce)
        return temperatures, at_t

    def _tempered(self, temperatures: Temperatures, block: _Block) -> Distributions:
        """Bring p and q ``[C, V]`` to their temperature; shares what T = 1 leaves as it is."""
        at_one = block.at_one
        t_s, t_t, share = temperatures.student, temperatures.teacher, temperatures.teacher_share
        if _is_one(t_s):
            # No second softmax. But a divergence may overwrite q.prob, and the gradient of the cross-entropy still needs it
            q = at_one.q._replace(prob=at_one.q.prob.clone()) if self.with_grad else at_one.q
        else:
            q = Distribution.of(at_one.q.logits / t_s)
        if block.compact is not None:
            p = block.compact.at(t_t, moving=self.settings.temperature.learns)
        elif share is not None:
            # An intermediate teacher between the student as it is (held constant) and the teacher; its maximum is not 0
            mixed = torch.lerp(at_one.q.logits, at_one.p.logits, share.to(self.math_dtype))
            p = Distribution.of((mixed - mixed.amax(-1, keepdim=True)).div_(t_t))
        else:  # nothing overwrites p, so it needs no clone
            p = at_one.p if _is_one(t_t) else Distribution.of(at_one.p.logits / t_t)
        if temperatures.raised is not None:
            p = self._raised(p, temperatures.raised, block)
        return at_one._replace(p=p, q=q)

    def _raised(self, p: Distribution, by: Tensor, block: _Block) -> Distribution:
        """``p`` with ``by`` ``[C, 1]`` added to the tempered logit of the token that the policy raises; p stays as it is."""
        token = cast(Tensor, block.at_one.targets)
        if self.settings.temperature.raises == "first_choice":
            token = block.z_t.argmax(-1)
        u = p.logits.scatter_add(-1, token.unsqueeze(-1), by)
        return Distribution.of(u.sub_(u.amax(-1, keepdim=True)))

    # --------------------------------------------------------------------------------------------------- 3: soft loss

    def _soft_loss(self, block: _Block, temperatures: Temperatures, at_t: Distributions) -> _SoftLoss:
        """The divergence ``[C]`` and its gradient ``[C, V]`` with respect to u = z_s / T_s; adds scale D to ``kd``.

        Of the policy this step uses ``scale`` (the factor of D where it is not T_s T_t), ``companions`` (further terms at
        fixed temperatures) and ``learns`` (it wants d kd / d T). The order of the lines matters: ``value_and_grad`` may
        overwrite q.prob, and with it what the others read.
        """
        policy, divergence = self.settings.temperature, self.settings.divergence
        t_s = temperatures.student  # [] or [C, 1]
        # First, because at_t.q is at_one.q itself where T_s = 1 and no gradient is needed
        companions = self._companions(block)  # [C, V]
        scale = self.scale_of(temperatures)  # [] or [C, 1]
        if policy.learns:
            # d D / d log T [C] by way of p, and of what D holds constant: d u / d log T = -u, the tail of a compact teacher
            # aside
            slope = divergence.held_slope(at_t) - dot(divergence.teacher_grad(at_t), at_t.p.by_sharpness)
        value, grad = divergence.value_and_grad(at_t)  # [C], [C, V]; q.prob is used up from here on
        self.add(stats.KD, value * as_rows(scale))
        if policy.learns:
            # ... and by way of q; then the product rule for scale D, with scale = T^2
            slope = (slope - dot(grad, at_t.q.logits)) / t_s
            by_temperature = slope * scale + (2.0 * t_s * value if self.settings.scaled else 0.0)  # [C]
            self.sums[stats.TEMPERATURE_GRAD] += by_temperature.sum()
        return _SoftLoss(value, grad, scale, companions)

    def _companions(self, block: _Block) -> Tensor | None:
        """The policy's further terms weight T^2 D at fixed temperatures: adds their values to ``kd``.

        Returns:
            the sum of their gradients ``[C, V]`` with respect to z_s; None: there are none.
        """
        total, at_one, compact = None, block.at_one, block.compact
        for temperature, factor in self.companions():
            p = Distribution.of(at_one.p.logits / temperature) if compact is None else compact.at(temperature)
            at_t = at_one._replace(p=p, q=Distribution.of(at_one.q.logits / temperature))
            value, grad = self.settings.divergence.value_and_grad(at_t)
            self.add(stats.KD, value * factor)
            grad.mul_(factor / temperature)  # by u = z_s / T -> by z_s
            total = grad if total is None else total.add_(grad)
        return total

    # ---------------------------------------------------------------------------------------------------- 4: gradient

    def _gradient_(self, block: _Block, temperatures: Temperatures, soft: _SoftLoss) -> Tensor:
        """The gradient ``[C, V]`` of (1 - r) CE + r kd with respect to the student's raw logits, in ``soft.grad``.

        The chain rule from u = z_s / T_s back to the raw logits, in place. Of the policy's answer this step uses
        ``scale_free`` and ``peaked``: rows whose T_s is made of z_s, so that the way through T_s counts too.
        """
        r = self.settings.kd_ratio
        grad = soft.grad.mul_(soft.scale / temperatures.student * r)  # d u / d z_s = 1 / T_s, T_s held constant
        if temperatures.scale_free is not None:
            _through_deviation_(grad, block.z_s, temperatures.scale_free)
        if temperatures.peaked is not None:
            moves = self.settings.scaled and temperatures.scale is None  # the factor T_s T_t, with T_s
            value = soft.value * as_rows(soft.scale) * r if moves else None
            _through_peak_(grad, block.z_s, temperatures.peaked, value)
        if soft.companions is not None:
            grad.add_(soft.companions, alpha=r)
        if r < 1.0:  # d CE / d z_s = softmax(z_s) - one_hot(target), at T = 1
            ce_weight, picked = 1.0 - r, block.at_one.targets.unsqueeze(-1)  # type: ignore[union-attr]
            grad.add_(block.at_one.q.prob.mul_(ce_weight))  # its last reader, so it may be overwritten
            grad.scatter_add_(-1, picked, grad.new_full(picked.shape, -ce_weight))
        return self.head.activate_backward_(grad, block.z_s)


def _through_deviation_(grad: Tensor, logits: Tensor, rows: Tensor) -> None:
    """Turn, in place, a gradient by ``logits`` ``[C, V]`` at constant T into the one at T = const std(logits).

    g - c (g . c) / (c . c) with c = z - mean z: the derivative of log T is c / (c . c), and g sums to zero. ``rows`` ``[C,
    1]`` says where T is such a multiple.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    share = (dot(grad, centred) / dot(centred, centred)).unsqueeze(-1)
    # Not a mask times share: a row of equal logits has 0 / 0 there, and NaN times 0 is NaN
    grad.addcmul_(centred, torch.where(rows, share, 0.0), value=-1.0)


def _through_peak_(grad: Tensor, logits: Tensor, rows: Tensor, value: Tensor | None) -> None:
    """Turn, in place, a gradient by ``logits`` ``[C, V]`` at constant T into the one at T = const (max z - mean z).

    The derivative of log T is a = (e_k - 1 / V) / (max z - mean z), k the largest. Through the softmax it adds -(g . z) a,
    and g sums to zero. ``value`` ``[C]`` is the value that g belongs to where its factor is in proportion to T: it adds
    value times a. ``rows`` ``[C, 1]`` says where T is such a multiple.
    """
    top = logits.max(-1, keepdim=True)
    centred = logits - logits.mean(-1, keepdim=True)
    along = -dot(grad, centred).unsqueeze(-1)
    if value is not None:
        along = along + value.unsqueeze(-1)
    share = torch.where(rows, along / centred.gather(-1, top.indices), 0.0)  # not a mask times share, see above
    grad.sub_(share / logits.shape[-1]).scatter_add_(-1, top.indices, share)


def _is_one(temperature: Tensor) -> bool:
    """Whether T = 1 for all rows, asked only where the answer costs no device synchronisation."""
    return temperature.device.type == "cpu" and temperature.numel() == 1 and temperature.item() == 1.0
