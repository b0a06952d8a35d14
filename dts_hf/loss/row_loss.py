"""What is done with the logits of a chunk, between the matmuls that make them and those that use their gradient.

``RowLoss`` is the frame: two roads fill it. ``plain_rows`` is PyTorch, the reference, and runs anywhere. ``fused_rows`` does
the same with Triton kernels on a GPU.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary; ``_s`` is the student, ``_t`` the teacher; r is ``kd_ratio``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dts_hf.divergences import Divergence
from dts_hf.loss import statistics as stats
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.models.head import Head
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures

#: Raw logits ``[C, V]`` as the matmul gave them, or what a compact teacher kept of its own.
TeacherLogits = Tensor | CompactRows
#: Kernels read 16 bytes at once where every row of logits begins at a multiple of so many entries: V of GPT-2 is odd.
_PITCH = 64


@dataclass(frozen=True)
class LossSettings:
    """What a walk needs to know of the loss.

    Attributes:
        divergence: D of the soft loss.
        temperature: the policy, asked once for each block of rows.
        kd_ratio: r, the weight of the soft loss now in force.
        scaled: multiply D by T_s T_t, or by the policy's own factor.
        logits_budget_mb: MiB that the logits of one chunk may take; sets C.
        fused: whether the kernels do it.
        pseudo_labels: whether the teacher's first choice stands for each target: its cross-entropies and gaps are logged,
            and told the policy. r must be 1.
        fp32_logits: whether a low-precision matmul writes its logits in fp32 (kernels alone; the plain road does not).
        held_out: whether to measure ``statistics.OF_HELD_OUT`` too. The temperature must be 1.
    """

    divergence: Divergence
    temperature: TemperaturePolicy
    kd_ratio: float
    scaled: bool
    logits_budget_mb: float
    fused: bool = False
    pseudo_labels: bool = False
    fp32_logits: bool = False
    held_out: bool = False


class RowLoss:
    """Statistics, temperature, divergence and gradient of the rows of a chunk, from raw logits.

    Args:
        settings: of the loss.
        head: the student's, for its scale and soft-cap.
        teacher_head: likewise.
        has_teacher: whether there is one. Without, the student's logits stand for the teacher's, and r is 0.
        with_grad: whether a gradient is needed.
        math_dtype: of the sums.
        device: of the logits.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        head: Head,
        teacher_head: Head,
        has_teacher: bool,
        with_grad: bool,
        math_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.settings, self.head, self.teacher_head = settings, head, teacher_head
        self.has_teacher, self.with_grad, self.math_dtype = has_teacher, with_grad, math_dtype
        #: 0-d tensors of ``math_dtype``, but for ``observed`` ``[K]``, which is there when the policy observes, and bins.
        self.sums: dict[str, Tensor] = {
            name: torch.full((), stats.START[reduction], dtype=math_dtype, device=device)
            for name, reduction in stats.SUMS_OF_LOSS.items()
        }
        if settings.held_out:
            for statistic in stats.OF_HELD_OUT:
                shape = (stats.CONFIDENCE_BINS,) if statistic.sum in stats.IN_BINS else ()
                self.sums[statistic.sum] = torch.zeros(shape, dtype=math_dtype, device=device)
        if settings.temperature.learns:
            self.sums[stats.TEMPERATURE_GRAD] = torch.zeros((), dtype=math_dtype, device=device)

    def run(
        self,
        raw_student: Tensor,
        raw_teacher: TeacherLogits,
        targets: Tensor,
        sequence_gap: Tensor | None,
        grad: Tensor,
    ) -> None:
        """Add the rows of one chunk to ``sums``, and write the gradient of (1 - r) CE + r kd.

        Args:
            raw_student: ``[C, V]`` logits as the matmul gave them; may be overwritten.
            raw_teacher: ``[C, V]`` or C compact rows; ``raw_student`` itself without a teacher.
            targets: ``[C]`` int64.
            sequence_gap: ``[C]`` the gap of each row's sequence, for policies that need it.
            grad: ``[C, V]`` for the gradient with respect to ``raw_student``, which it may be itself. Untouched where no
                gradient is needed.
        """
        raise NotImplementedError

    def gaps(self, raw_student: Tensor, raw_teacher: TeacherLogits, targets: Tensor) -> Tensor:
        """Student CE - teacher CE at T = 1 of each row, ``[C]``, from raw logits ``[C, V]``, which stay as they are."""
        raise NotImplementedError

    def observe_nothing(self, device: torch.device) -> None:
        """Without a row, zeros as wide as the policy's features: every rank must reduce sums of equal shape."""
        observed = self.answer_to_nothing(device).observed
        if observed is not None:
            self.observe(observed)

    def answer_to_nothing(self, device: torch.device) -> Temperatures:
        """What the policy answers to no rows at all."""
        z = torch.empty(0, self.head.vocab_size, dtype=self.math_dtype, device=device)
        none = z.new_empty(0)
        return cast(Temperatures, self.settings.temperature(z, z, RowStats(none, none, none, none, none)))

    def check(self, temperatures: Temperatures, rows: int) -> None:
        """Hold the policy's answer to what it declares, for a chunk of so many rows.

        Raises:
            ValueError: it breaks the contract.
        """
        policy = self.settings.temperature
        for name in ("student", "teacher", "scale", "scale_free", "raised", "weight", "peaked"):
            value = getattr(temperatures, name)
            if value is not None and value.dim() and value.shape != (rows, 1):
                raise ValueError(
                    f"the policy '{policy.name}' gave {name} {list(value.shape)} for {rows} rows, expected [] or "
                    f"[{rows}, 1]; it declares reads = '{policy.reads}': does its forward look at more than that?"
                )
        share = temperatures.teacher_share
        if share is not None and share.dim():
            raise ValueError(
                f"the policy '{policy.name}' gave teacher_share {list(share.shape)}, expected []: one for all"
            )
        more = (temperatures.scale, temperatures.raised, temperatures.weight, temperatures.peaked)
        if policy.learns and (temperatures.student.dim() or any(part is not None for part in more)):
            raise ValueError(
                f"the policy '{policy.name}' learns, so it must give one temperature [] and nothing that is each row's"
            )
        if temperatures.raised is not None and policy.raises is None:
            raise ValueError(f"the policy '{policy.name}' gave raised, so it must say by `raises` which token is")
        if temperatures.scale_free is not None and temperatures.scale is None:
            raise ValueError(f"the policy '{policy.name}' is scale-free, so it must give a scale, free of z_s")

    def log(self, temperatures: Temperatures, rows: Tensor) -> None:
        """Add T_s, T_t and the observed features to the sums; ``rows`` is any ``[C]``."""
        t_s, t_t = temperatures.student, temperatures.teacher  # [] or [C, 1]
        mean_t = torch.broadcast_to(as_rows(t_s), rows.shape)  # [C]
        self.add(stats.TEMPERATURE, mean_t)
        self.add(stats.TEACHER_TEMPERATURE, mean_t if t_t is t_s else torch.broadcast_to(as_rows(t_t), rows.shape))
        low, high = stats.TEMPERATURE_MIN.sum, stats.TEMPERATURE_MAX.sum
        self.sums[low] = torch.minimum(self.sums[low], mean_t.min())
        self.sums[high] = torch.maximum(self.sums[high], mean_t.max())
        if temperatures.observed is not None:
            self.observe(temperatures.observed)

    def scale_of(self, temperatures: Temperatures) -> Tensor:
        """The factor of D, ``[]`` or ``[C, 1]``: T_s T_t or the policy's own, 1 where not scaled; times the row's weight."""
        factor = temperatures.scale
        if factor is None:
            factor = temperatures.student * temperatures.teacher
        factor = factor if self.settings.scaled else torch.ones_like(factor)
        return factor if temperatures.weight is None else factor * temperatures.weight

    def companions(self) -> Iterator[tuple[float, float]]:
        """The policy's further terms at fixed temperatures: T, and the factor of D at it."""
        for temperature, weight in self.settings.temperature.companions:
            yield temperature, weight * (temperature**2 if self.settings.scaled else 1.0)

    def observe(self, features: Tensor) -> None:
        """Add up the policy's features ``[C, K]`` of the rows."""
        summed = features.to(self.math_dtype).sum(0)
        self.sums[stats.OBSERVED] = self.sums[stats.OBSERVED] + summed if stats.OBSERVED in self.sums else summed

    def add_calibration(self, statistic: stats.Statistic, confidence: Tensor, right: Tensor) -> None:
        """Add confidence minus rightness of the rows, ``[C]``, in ``confidence_bins``.

        Args:
            statistic: whose sum it is.
            confidence: probability of the first choice, ``[C]``.
            right: whether no token is likelier than the label, ``[C]`` bool: of two that are, both would be.
        """
        off = (confidence - right.to(confidence.dtype)).to(self.math_dtype)
        self.sums[statistic.sum].index_add_(0, confidence_bins(confidence), off)

    def add(self, statistic: stats.Statistic, values: Tensor) -> None:
        """Add values of the rows, ``[C]`` or ``[C, 1]``, to the sum of ``statistic``."""
        self.sums[statistic.sum] += values.sum()


def confidence_bins(confidence: Tensor) -> Tensor:
    """The number of each probability's bin, int64; bin k is (k / 15, (k + 1) / 15].

    As in Guo et al. 2017, arXiv 1706.04599, section 2.

    Args:
        confidence: probability of a first choice, ``[C]``.
    """
    return torch.ceil(confidence * stats.CONFIDENCE_BINS).long().clamp(1, stats.CONFIDENCE_BINS) - 1


def room_for_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, *, fused: bool) -> Tensor:
    """An empty ``[rows, V]``; where kernels read it, every row begins where they can read 16 bytes at once.

    Args:
        rows: how many.
        vocab: V.
        dtype: of the logits.
        device: of the logits.
        fused: whether kernels read them.
    """
    pitch = -(-vocab // _PITCH) * _PITCH if fused else vocab
    return torch.empty(rows, pitch, dtype=dtype, device=device)[:, :vocab]


def as_rows(value: Tensor) -> Tensor:
    """``[C, 1]`` as ``[C]``; a single number stays one."""
    return value.squeeze(-1) if value.dim() else value
