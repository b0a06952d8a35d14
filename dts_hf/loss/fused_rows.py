"""The rows of a chunk by Triton kernels (``kernels``): each reads both logits once and keeps nothing of their size.

How often the logits are read, beside the one read and one write of the gradient:

- once, where the temperatures are known before the chunk (``TemperaturePolicy.reads`` is "nothing");
- twice, where the policy has to see the rows first;
- once more for a divergence that needs both normalisers (all but the KLs and DKD), or a policy that learns or is
  scale-free;
- once more for each companion term.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary; ``_s`` is the student, ``_t`` the teacher; r is ``kd_ratio``. Tables are
``[K, C]`` fp32, a row of them for each number of the statistics.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from dts_hf.divergences import DIVERGENCES, JSD, Divergence, ForwardKL, ReverseKL
from dts_hf.divergences.alpha_beta import AlphaBeta
from dts_hf.divergences.csd import CSD
from dts_hf.divergences.dkd import DKD
from dts_hf.divergences.eopd import EOPD
from dts_hf.divergences.kl import SymmetricKL
from dts_hf.divergences.logit_mse import LogitMSE
from dts_hf.divergences.skew import SkewKL, SkewReverseKL
from dts_hf.divergences.todi import ToDi
from dts_hf.divergences.tvd import TVD
from dts_hf.loss import kernels
from dts_hf.loss import statistics as stats
from dts_hf.loss.row_loss import RowLoss, TeacherLogits, as_rows
from dts_hf.temperature.base import RowStats, Temperatures
from dts_hf.temperature.parts.logit_statistics import LogitSummary

#: Threads of a program, as warps; and tiles of a program of the gradient.
_WARPS, _TILES = 4, 4
_THREADS = 32 * _WARPS
#: What the first rows of the table at T = 1 are.
_SUMMED = (
    stats.CE, stats.TEACHER_CE, stats.KL, stats.TOP1_AGREEMENT, stats.STUDENT_ENTROPY, stats.TEACHER_ENTROPY
)  # fmt: skip
#: What a policy that reads the logits themselves is shown at a time, in bytes of fp32.
_SHOWN_BYTES = 1 << 28


class Formula(NamedTuple):
    """A divergence as the kernels know it.

    Attributes:
        terms: the function of single entries, see ``kernels``.
        a, b: its options.
        linear: D = w KL(p || q) + (1 - w) KL(q || p) is a sum that the statistics have: w; None: it is not.
        reported: ``terms`` with nothing held constant, where that is another function.
        split: the label is left out of both distributions (DKD).
        centred: the mean difference of logits is taken off (logit MSE).
        k: what the terms are told of each row beside that: a KL at T (CSD), or whether the teacher's entropy at T = 1 is
            above ``threshold`` (EOPD).
        threshold: in nats.
    """

    terms: Any
    a: float = 0.0
    b: float = 0.0
    linear: float | None = None
    reported: Any = None
    split: bool = False
    centred: bool = False
    k: Literal["forward", "-reverse", "unsure"] | None = None
    threshold: float = 0.0


def formula_of(divergence: Divergence, vocab: int) -> Formula | None:
    """The kernels' form of ``divergence`` over so many entries; None: it has none, and PyTorch does it."""
    if type(divergence) is not DIVERGENCES.get(divergence.name):  # a subclass may compute what it likes
        return None
    match divergence:
        case ForwardKL() | SkewKL(alpha=0.0):  # at alpha 0 the mixture is q, which may underflow where p does not
            return Formula(kernels.forward_kl, linear=1.0)
        case ReverseKL() | SkewReverseKL(alpha=0.0):
            return Formula(kernels.reverse_kl, linear=0.0)
        case SymmetricKL(weight=weight):
            return Formula(kernels.symmetric_kl, weight, linear=1.0 - weight)
        case JSD(beta=beta):
            return Formula(kernels.jsd, beta)
        case SkewKL(alpha=alpha):
            return Formula(kernels.skew_kl, alpha)
        case SkewReverseKL(alpha=alpha):
            return Formula(kernels.skew_reverse_kl, alpha)
        case TVD():
            return Formula(kernels.tvd)
        case ToDi():
            return Formula(kernels.todi, reported=kernels.todi_as_reported)
        case CSD(weights="teacher"):
            return Formula(kernels.csd_by_teacher, k="forward")
        case CSD():
            return Formula(kernels.csd_by_student, reported=kernels.csd_by_student_as_reported, k="-reverse")
        case EOPD(entropy=threshold, weight=weight, mode=mode):
            return Formula(kernels.eopd, weight, float(mode == "switch"), k="unsure", threshold=threshold)
        case LogitMSE():
            return Formula(kernels.logit_mse, 1.0 / vocab, centred=True)
        case DKD(alpha=alpha, beta=beta) if vocab > 1:
            return Formula(kernels.dkd, alpha, beta, split=True)
        case AlphaBeta(alpha=alpha, beta=beta):
            at_zero = {(True, True): kernels.alpha_beta_at_zero, (True, False): kernels.alpha_beta_at_alpha_zero}
            at_zero |= {(False, True): kernels.alpha_beta_at_beta_zero, (False, False): kernels.alpha_beta}
            return Formula(at_zero[alpha == 0.0, beta == 0.0], alpha, beta)
    return None


class One(NamedTuple):
    """The table at T = 1, ``[20, C]``, as ``statistics_kernel`` fills it, and its rows, each ``[C]``."""

    table: Tensor
    ce_s: Tensor
    ce_t: Tensor
    kl: Tensor
    agreement: Tensor  # 1 where the student's first choice is the teacher's
    entropy_s: Tensor
    entropy_t: Tensor
    lse_s: Tensor
    lse_t: Tensor
    top_s: Tensor
    top_t: Tensor
    mean_s: Tensor  # of logits minus that of the label; these four with moments alone
    mean_t: Tensor
    square_s: Tensor  # sum of squares about the mean
    square_t: Tensor
    peak_s: Tensor  # the largest but for the label, where it is left out
    peak_t: Tensor
    label_s: Tensor  # the label's logit
    label_t: Tensor
    rest_s: Tensor  # log-sum-exp of logits minus the largest
    rest_t: Tensor


class AtT(NamedTuple):
    """The rows of the table at T_s and T_t, ``[10, C]``; each ``[C]``, without the label where it is left out."""

    norm_s: Tensor  # log-sum-exp of u = z_s / T_s, z_s minus that of the label
    norm_t: Tensor
    entropy_s: Tensor
    entropy_t: Tensor
    forward: Tensor  # E_p[u_t - u], both here of logits minus the largest
    reverse: Tensor  # E_q[u - u_t]
    peak_s: Tensor  # the largest logit
    peak_t: Tensor
    rest_s: Tensor  # log-sum-exp of (z - the largest) / T
    rest_t: Tensor


class _Chunk(NamedTuple):
    """The logits of a chunk and what every kernel is told of them."""

    student: Tensor  # [C, V]
    teacher: Tensor  # [C, V]
    targets: Tensor  # [C]


class _Term(NamedTuple):
    """A soft term: what the gradient kernel needs, and what it adds to the value."""

    value: Tensor  # [C]
    numbers: Tensor  # [9, C], see gradient_kernel
    slope_s: Tensor | None  # [C] sum e (u - E_q u), where it was asked for
    slope_t: Tensor | None


class FusedRows(RowLoss):
    """The rows of a chunk by kernels.

    Raises:
        ValueError: the divergence has none (``road.why_not_fused`` asks before).
    """

    def __init__(self, settings: Any, **options: Any) -> None:
        super().__init__(settings, **options)
        formula = formula_of(settings.divergence, self.head.vocab_size)
        if formula is None:
            raise ValueError(f"the divergence '{settings.divergence.name}' has no kernel")
        self.formula = formula
        policy = settings.temperature
        self.slopes = policy.learns
        self.moments = policy.reads in ("summary", "logits") or formula.centred
        self.floats = {
            name: value
            for model, head in (("s", self.head), ("t", self.teacher_head))
            for name, value in ((f"scale_{model}", head.logit_scale), (f"cap_{model}", head.softcap or 1.0))
        }
        self.capped = {"CAPPED_S": self.head.softcap is not None, "CAPPED_T": self.teacher_head.softcap is not None}

    # ------------------------------------------------------------------------------------------------------ the chunk

    def run(
        self,
        raw_student: Tensor,
        raw_teacher: TeacherLogits,
        targets: Tensor,
        sequence_gap: Tensor | None,
        grad: Tensor,
    ) -> None:
        # Triton launches on the device in force, which need not be that of the tensors: a model may be on any card
        with torch.cuda.device_of(raw_student):
            self._run(_Chunk(raw_student, cast(Tensor, raw_teacher), targets), sequence_gap, grad)

    def _run(self, chunk: _Chunk, sequence_gap: Tensor | None, grad: Tensor) -> None:
        rows, answer = len(chunk.targets), None
        if self.settings.temperature.reads == "nothing":
            answer = self.answer_to_nothing(chunk.student.device)
            self.check(answer, rows)
        one, at_t = self._launch_statistics(chunk, None, answer, moments=self.moments)
        self._add_up(one)
        if answer is None or at_t is None:
            answer = self._answer(chunk, one, sequence_gap)
            self.check(answer, rows)  # before a kernel reads behind its end
            at_t = self._at(chunk, one, answer)
        self.log(answer, one.ce_s)
        if self.settings.held_out:
            self._add_held_out(one, at_t)
        terms, along = self._soft_loss(chunk, one, at_t, answer)
        if self.with_grad:
            self._gradient(chunk, one, answer, terms, along, grad)

    def gaps(self, raw_student: Tensor, raw_teacher: TeacherLogits, targets: Tensor) -> Tensor:
        chunk = _Chunk(raw_student, cast(Tensor, raw_teacher), targets)
        with torch.cuda.device_of(raw_student):  # as in ``run``
            one = self._launch_statistics(chunk, None, None, moments=False)[0]
        return one.ce_s - one.ce_t

    # ----------------------------------------------------------------------------------------------------- statistics

    def _at(self, chunk: _Chunk, one: One, answer: Temperatures) -> AtT:
        """At the temperatures of ``answer``, from the maxima that are known by now."""
        known = one if answer.teacher_share is None else None  # the maxima of a mixture are not
        return cast(AtT, self._launch_statistics(chunk, known, answer, moments=False)[1])

    def _launch_statistics(
        self, chunk: _Chunk, known: One | None, answer: Temperatures | None, moments: bool
    ) -> tuple[One, AtT | None]:
        """Run the kernel: at T = 1 unless that is ``known``, and at the temperatures of ``answer`` if there are any."""
        rows, device = len(chunk.targets), chunk.student.device
        one = torch.zeros(20, rows, device=device) if known is None else known.table
        at_t = None if answer is None else torch.empty(10, rows, device=device)
        kernels.statistics_kernel[(rows,)](
            chunk.student, chunk.teacher, chunk.targets, *self._temperatures(answer), one, one if at_t is None else at_t,
            V=chunk.student.shape[1], C=rows, stride_s=chunk.student.stride(0), stride_t=chunk.teacher.stride(0),
            stride_t_s=_stride(answer and answer.student), stride_t_t=_stride(answer and answer.teacher),
            AT_ONE=known is None, AT_T=answer is not None, MOMENTS=moments, WITHOUT_TARGET=self.formula.split,
            MIXED=answer is not None and answer.teacher_share is not None, **self.floats, **self._meta(chunk),
        )  # fmt: skip
        return One(one, *one.unbind(0)) if known is None else known, None if at_t is None else AtT(*at_t.unbind(0))

    def _temperatures(self, answer: Temperatures | None) -> tuple[Tensor, Tensor, Tensor]:
        """T_s, T_t and the teacher's share as kernels read them: fp32, one after the other."""
        if answer is None:
            any_tensor = self.sums[stats.KD.sum]
            return any_tensor, any_tensor, any_tensor
        share = answer.student if answer.teacher_share is None else answer.teacher_share
        return _plain(answer.student), _plain(answer.teacher), _plain(share)

    def _meta(self, chunk: _Chunk) -> dict[str, Any]:
        """What is fixed when a kernel is compiled: capped or not, and the shape of a tile, 16 bytes a thread."""
        inner = 16 // max(chunk.student.itemsize, chunk.teacher.itemsize)
        return {**self.capped, "THREADS": _THREADS, "INNER": inner, "num_warps": _WARPS}

    def _add_up(self, one: One) -> None:
        """Add the statistics at T = 1 to the sums: one reduction for all of them."""
        for statistic, total in zip(_SUMMED, one.table[: len(_SUMMED)].sum(1), strict=True):
            self.sums[statistic.sum] += total

    def _add_held_out(self, one: One, at_t: AtT) -> None:
        """Add what is measured of held-out rows alone; ``at_t`` is at T = 1."""
        reverse = at_t.reverse + (at_t.rest_t - at_t.rest_s)
        if self.formula.split:  # over the entries without the label: the label's part, and that of the rest
            (label_p, rest_p), (label_q, rest_q) = _label_and_rest(at_t.norm_t), _label_and_rest(at_t.norm_s)
            reverse = label_q.exp() * (label_q - label_p) + rest_q.exp() * (rest_q - rest_p + reverse)
        self.add(stats.REVERSE_KL, reverse)
        self.add_calibration(stats.CALIBRATION_ERROR, one.rest_s.neg().exp(), one.label_s == one.top_s)
        self.add_calibration(stats.TEACHER_CALIBRATION_ERROR, one.rest_t.neg().exp(), one.label_t == one.top_t)

    # ---------------------------------------------------------------------------------------------------- temperature

    def _answer(self, chunk: _Chunk, one: One, sequence_gap: Tensor | None) -> Temperatures:
        """The answer of a policy that looks at rows, summaries or logits: no more of it than it says."""
        policy = self.settings.temperature
        rows = RowStats(one.ce_s, one.ce_t, one.lse_s, one.lse_t, sequence_gap)
        if policy.reads == "logits":
            return self._answer_to_logits(chunk, rows)
        z_s = z_t = torch.empty(0, chunk.student.shape[1], device=chunk.student.device)
        if policy.reads == "summary":
            z_s = cast(Tensor, _Summary(self, chunk, one, "student"))
            z_t = cast(Tensor, _Summary(self, chunk, one, "teacher"))
        return cast(Temperatures, policy(z_s, z_t, rows))

    def _answer_to_logits(self, chunk: _Chunk, rows: RowStats) -> Temperatures:
        """Show the policy the logits in fp32, a few rows at a time: they have no room at once."""
        size = max(1, _SHOWN_BYTES // (4 * chunk.student.shape[1]))
        answers = []
        for first in range(0, len(chunk.targets), size):
            part = slice(first, first + size)
            z_s = self.head.activate(chunk.student[part].float())
            z_t = self.teacher_head.activate(chunk.teacher[part].float())
            of_part = RowStats(*(None if values is None else values[part] for values in rows))  # type: ignore[arg-type]
            answers.append(self.settings.temperature(z_s, z_t, of_part))
        return Temperatures(*(_joined(values) for values in zip(*answers, strict=True)))  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------------ soft loss

    def _soft_loss(
        self, chunk: _Chunk, one: One, at_t: AtT, answer: Temperatures
    ) -> tuple[list[_Term], Tensor | None]:
        """All soft terms, and how much of z_s - mean z_s leaves the gradient ``[C]`` (scale-free policies)."""
        r, scale_free, scale = self.settings.kd_ratio, answer.scale_free, as_rows(self.scale_of(answer))
        entropies = self._whole_entropies(at_t)
        self.add(stats.STUDENT_ENTROPY_AT_T, entropies[0])
        self.add(stats.TEACHER_ENTROPY_AT_T, entropies[1])
        main = self._term(chunk, one, at_t, answer, r * scale, slopes=self.slopes or scale_free is not None)
        self.add(stats.KD, main.value * scale)
        if self.slopes:
            self._add_slope(main, answer, scale)
        along = None
        if scale_free is not None:
            # g . c / c . c with c = z - mean z, where g = r scale / T_s (e - q sum e) and z = T_s u: T_s leaves
            share = r * scale * cast(Tensor, main.slope_s) / one.square_s
            along = torch.where(as_rows(scale_free), share, 0.0)
        terms = [main]
        for temperature, factor in self.companions():
            fixed = torch.full((), temperature, device=chunk.student.device)
            of_companion = Temperatures(fixed, fixed)
            at_fixed = self._at(chunk, one, of_companion)
            terms.append(self._term(chunk, one, at_fixed, of_companion, torch.full_like(fixed, r * factor)))
            self.add(stats.KD, terms[-1].value * factor)
        return terms, along

    def _term(
        self, chunk: _Chunk, one: One, at_t: AtT, answer: Temperatures, weight: Tensor, slopes: bool = False
    ) -> _Term:
        """One soft term, of weight ``[]`` or ``[C]``, the factor of its gradient with respect to u."""
        # In fp32 whatever somebody's policy answers in: 1 / T is rounded to its dtype
        formula, t_s, t_t = self.formula, as_rows(answer.student).float(), as_rows(answer.teacher).float()
        value, total, k = torch.zeros_like(one.ce_s), torch.zeros_like(one.ce_s), torch.zeros_like(one.ce_s)
        if formula.centred:  # log q - log p + k = u - u_t - mean(u - u_t)
            mean_t = one.mean_t
            if answer.teacher_share is not None:
                mean_t = torch.lerp(one.mean_s, mean_t, answer.teacher_share.to(mean_t.dtype))
            k = at_t.norm_s - at_t.norm_t - (one.mean_s / t_s - mean_t / t_t)
        elif formula.k is not None:
            k = self._told(one, at_t)
        elif formula.split:
            value, k = self._decoupled(at_t)
        elif formula.linear is not None:
            # Each only where it counts: a logit of minus infinity makes one of them NaN, and so 0 times it
            if formula.linear > 0.0:
                value = formula.linear * (at_t.forward + (at_t.rest_s - at_t.rest_t))
            if formula.linear < 1.0:
                total = (1.0 - formula.linear) * (at_t.reverse + (at_t.rest_t - at_t.rest_s))
                value = value + total
        slope_s = slope_t = None
        if slopes or (formula.linear is None and not formula.split):
            sums = self._divergence(chunk, at_t, answer, k, slopes)
            slope_s, slope_t = (sums[2], sums[3]) if slopes else (None, None)
            if not formula.split:
                value = sums[0]
                total = total if formula.centred else self._held_total(chunk, at_t, answer, k, sums[1], slopes)
        numbers = (
            1.0 / t_s, 1.0 / t_t, at_t.peak_s, at_t.peak_t, at_t.rest_s, at_t.rest_t, weight / t_s, total, k
        )  # fmt: skip
        return _Term(value, torch.stack([number.expand_as(value) for number in numbers]), slope_s, slope_t)

    def _told(self, one: One, at_t: AtT) -> Tensor:
        """What ``Formula.k`` says, ``[C]``."""
        if self.formula.k == "forward":
            return at_t.forward + (at_t.rest_s - at_t.rest_t)
        if self.formula.k == "-reverse":
            return -(at_t.reverse + (at_t.rest_t - at_t.rest_s))
        return (one.entropy_t > self.formula.threshold).to(one.entropy_t.dtype)

    def _held_total(
        self, chunk: _Chunk, at_t: AtT, answer: Temperatures, k: Tensor, total: Tensor, slopes: bool
    ) -> Tensor:
        """The sum of e of the gradient, where the slopes were those of another function (ToDi that learns)."""
        if not (slopes and self.slopes and self.formula.reported is not None):
            return total
        return self._divergence(chunk, at_t, answer, k, False)[1]

    def _divergence(self, chunk: _Chunk, at_t: AtT, answer: Temperatures, k: Tensor, slopes: bool) -> Tensor:
        """The sums of ``divergence_kernel``, ``[4, C]``."""
        formula = self.formula
        terms = formula.reported if slopes and self.slopes and formula.reported is not None else formula.terms
        numbers = (at_t.peak_s, at_t.peak_t, at_t.rest_s, at_t.rest_t)
        centres = (at_t.rest_s - at_t.entropy_s, at_t.rest_t - at_t.entropy_t)  # E_q u, E_p u_t
        return self._launch_divergence(chunk, answer, torch.stack([*numbers, *centres, k]), terms, slopes)

    def _launch_divergence(
        self, chunk: _Chunk, answer: Temperatures, table: Tensor, terms: Any, slopes: bool
    ) -> Tensor:
        rows = len(chunk.targets)
        sums = torch.zeros(4, rows, device=table.device)
        kernels.divergence_kernel[(rows,)](
            chunk.student, chunk.teacher, chunk.targets, *self._temperatures(answer), table, sums,
            V=chunk.student.shape[1], C=rows, stride_s=chunk.student.stride(0), stride_t=chunk.teacher.stride(0),
            stride_t_s=_stride(answer.student), stride_t_t=_stride(answer.teacher), a=self.formula.a, b=self.formula.b,
            TERMS=terms, SLOPES=slopes, MIXED=answer.teacher_share is not None, **self.floats, **self._meta(chunk),
        )  # fmt: skip
        return sums

    def overlap(self, chunk: _Chunk, one: One) -> Tensor:
        """The Bhattacharyya coefficient of both models at T = 1, ``[C]``."""
        unit = torch.ones((), device=one.ce_s.device)
        table = torch.stack([one.top_s, one.top_t, one.rest_s, one.rest_t, *[one.rest_s] * 3])
        return self._launch_divergence(chunk, Temperatures(unit, unit), table, kernels.overlap, False)[0]

    def _decoupled(self, at_t: AtT) -> tuple[Tensor, Tensor]:
        """DKD's value, and its k = beta - alpha (q_y - p_y), ``[C]`` each, from norms without the label."""
        (label_p, rest_p), (label_q, rest_q) = _label_and_rest(at_t.norm_t), _label_and_rest(at_t.norm_s)
        binary = label_p.exp() * (label_p - label_q) + rest_p.exp() * (rest_p - rest_q)
        others = at_t.forward + (at_t.rest_s - at_t.rest_t)
        # From the smaller of p_y and 1 - p_y: the other difference would cancel
        rise = torch.where(label_p < rest_p, label_q.exp() - label_p.exp(), rest_p.exp() - rest_q.exp())
        return self.formula.a * binary + self.formula.b * others, self.formula.b - self.formula.a * rise

    def _whole_entropies(self, at_t: AtT) -> tuple[Tensor, Tensor]:
        """The entropies at T, ``[C]`` each, of all entries where the label was left out."""
        if not self.formula.split:
            return at_t.entropy_s, at_t.entropy_t
        whole = []
        for norm, entropy in ((at_t.norm_s, at_t.entropy_s), (at_t.norm_t, at_t.entropy_t)):
            label, rest = _label_and_rest(norm)
            whole.append(rest.exp() * (entropy - rest) - label.exp() * label)
        return whole[0], whole[1]

    def _add_slope(self, main: _Term, answer: Temperatures, scale: Tensor) -> None:
        """Add d kd / d T for T_s = T_t = T: d u / d T = -u / T on both sides, then the product rule for T^2 D."""
        t = answer.student
        slope = -(cast(Tensor, main.slope_s) + cast(Tensor, main.slope_t)) / t
        by_temperature = slope * scale + (2.0 * t * main.value if self.settings.scaled else 0.0)
        self.sums[stats.TEMPERATURE_GRAD] += by_temperature.sum()

    # ------------------------------------------------------------------------------------------------------- gradient

    def _gradient(
        self, chunk: _Chunk, one: One, answer: Temperatures, terms: list[_Term], along: Tensor | None, grad: Tensor
    ) -> None:
        """Write g ``[C, V]``; ``along`` ``[C]``: how much of z_s - mean z_s leaves it."""
        rows, vocab = chunk.student.shape
        meta = self._meta(chunk)
        r = self.settings.kd_ratio
        soft = terms if r > 0.0 else []
        nothing = torch.zeros_like(one.ce_s)
        numbers = torch.stack(
            [one.top_s, one.rest_s, nothing if along is None else along, one.label_s, one.mean_s, one.label_t]
        )
        of_terms = torch.stack([term.numbers for term in soft]) if soft else numbers
        grid = (rows, -(-vocab // (_TILES * _THREADS * meta["INNER"])))
        kernels.gradient_kernel[grid](
            chunk.student, chunk.teacher, grad, chunk.targets, self._temperatures(answer)[2], numbers, of_terms,
            V=vocab, C=rows, stride_s=chunk.student.stride(0), stride_t=chunk.teacher.stride(0), stride_g=grad.stride(0),
            a=self.formula.a, b=self.formula.b, ce_weight=1.0 - r,
            TERMS=self.formula.terms, COUNT=len(soft), WITH_CE=r < 1.0, SCALE_FREE=along is not None and r > 0.0,
            MIXED=answer.teacher_share is not None, TILES=_TILES, **self.floats, **meta,
        )  # fmt: skip


class _Summary(LogitSummary):
    """What the kernels have measured of one model's logits, for a policy."""

    def __init__(self, rows: FusedRows, chunk: _Chunk, one: One, model: str) -> None:
        super().__init__(chunk.student.shape, one.ce_s)
        self._rows, self._chunk, self._one = rows, chunk, one
        of_student = (one.top_s - one.label_s, one.mean_s, one.square_s)
        of_model = of_student if model == "student" else (one.top_t - one.label_t, one.mean_t, one.square_t)
        self._top, self._mean, self._square = (values.unsqueeze(-1) for values in of_model)  # [C, 1]

    def standard_deviation(self) -> Tensor:
        return torch.sqrt(self._square / max(self.shape[-1] - 1, 1))

    def sharpness(self) -> Tensor:
        return self._top - self._mean

    def overlap(self) -> Tensor:
        return self._rows.overlap(self._chunk, self._one)


def _label_and_rest(norm: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the label's probability and of the rest's, ``[C]`` each, from the log norm of the entries without the label.

    The label's u is 0, so that its probability is 1 / (1 + exp(norm)): exact at both ends.
    """
    return -torch.nn.functional.softplus(norm), -torch.nn.functional.softplus(-norm)


def _plain(temperature: Tensor) -> Tensor:
    """A temperature as a kernel reads it: fp32, and ``[C, 1]`` without gaps."""
    return temperature.float().contiguous()


def _stride(temperature: Tensor | None) -> int:
    """From one row's temperature to the next one's: 0 where all share it."""
    return 0 if temperature is None or temperature.dim() == 0 else 1


def _joined(values: tuple[Tensor | None, ...]) -> Tensor | None:
    """The answers to parts of a chunk as one: ``[C, ...]`` put together, ``[]`` the same for all of them."""
    first = values[0]
    return first if first is None or first.dim() == 0 else torch.cat(cast("list[Tensor]", list(values)))
