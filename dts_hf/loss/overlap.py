"""Distillation from a teacher with another tokenizer, on what both share (``teacher.alignment``).

    loss = ((1 - r) sum over all N labels of CE + r sum over the M aligned ones of T_s T_t D(p_T, q_T)) / labels of the step

CE is over the student's whole vocabulary. p and q are softmaxes over the K common ids alone: a soft loss over all of the
student's ids would push those down that the teacher cannot say. Of other ids CE decides. That is ``overlap``; with
``dual_space`` the soft part is that of ``dual_space.dual_space_loss``, over whole vocabularies.

Shapes: ``N`` labels of the student, ``N_t`` of the teacher, ``M`` pairs of them, ``K`` common ids, ``H`` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dts_hf.loss import statistics as stats
from dts_hf.loss.distillation_loss import DistillationLoss, LossOutput
from dts_hf.loss.dual_space import Projectors, dual_space_loss
from dts_hf.models.head import Head

#: Sums of the soft part that are over the M pairs.
_OF_PAIRS = (
    stats.KD, stats.KL, stats.TEACHER_ENTROPY, stats.STUDENT_ENTROPY_AT_T, stats.TEACHER_ENTROPY_AT_T, stats.TOP1_AGREEMENT,
    stats.TEMPERATURE, stats.TEACHER_TEMPERATURE, stats.TEMPERATURE_MIN, stats.TEMPERATURE_MAX,
)  # fmt: skip
#: Sums that a policy asks for, or held-out rows or dual space have.
_OF_SOME = (
    stats.REVERSE_KL.sum,
    stats.TEMPERATURE_GRAD,
    stats.OBSERVED,
    stats.KD_TEACHER_SPACE.sum,
    stats.PROJECTOR_CE.sum,
)


@dataclass(frozen=True, eq=False)
class Aligned:
    """What is the same of a batch for student and teacher.

    Attributes:
        targets: the teacher's labels, ``[N_t]`` int64.
        student, teacher: the M labels that are the same, by their numbers among the N and the N_t, ``[M]`` int64.
        covered: which of the N labels stand for the bytes that the N_t stand for, ``[N]`` bool.
        length: these bytes, ``[]``.
        student_ids, teacher_ids: the common ids, ``[K]`` int64, in the same order.
        projectors: the maps of dual space, which then takes the place of the overlap.
    """

    targets: Tensor
    student: Tensor
    teacher: Tensor
    covered: Tensor
    length: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    projectors: Projectors | None = None


def overlap_loss(
    loss: DistillationLoss,
    states: Tensor,
    head: Head,
    teacher_states: Tensor,
    teacher_head: Head,
    aligned: Aligned,
    targets: Tensor,
    normalizer: float | Tensor,
    sequences: Tensor | None = None,
) -> LossOutput:
    """The loss of N labels, with one normaliser for both of its parts.

    The temperature policy sees the M aligned rows, over the common ids. Its gap of a step is that of the answers' bytes:
    (sum of the student's CE - sum of the teacher's CE over the same bytes) / N, so it is nats per byte times the bytes of a
    label, and with one tokenizer on both sides the ordinary gap. Labels whose bytes the teacher's do not cover add nothing
    to it: their ``teacher_ce`` is the student's own.

    Args:
        loss: of training, or of held-out rows.
        states: ``[N, H_s]``, the student's.
        head: the student's, whole.
        teacher_states: ``[N_t, H_t]``, of the teacher's labels.
        teacher_head: the teacher's, whole.
        aligned: what is the same.
        targets: ``[N]``, the student's labels.
        normalizer: labels of the whole optimizer step over the number of processes.
        sequences: ``[N]``, see ``DistillationLoss.forward``.

    Returns:
        the loss, and sums of which some are over the M pairs (``Statistic.over``).
    """
    # 1. The soft part, on what is the same.
    soft = _soft_loss(loss, states, head, teacher_states, teacher_head, aligned, targets, normalizer, sequences)
    # 2. The hard part, on all labels; no temperature has a say in it.
    hard_loss = DistillationLoss(
        loss.divergence, temperature=1.0, kd_ratio=0.0, logits_budget_mb=loss.logits_budget_mb, kernels=loss.kernels,
        logits_dtype=loss.logits_dtype, held_out=loss.held_out,
    )  # fmt: skip
    hard_loss._warned = loss._warned
    hard = hard_loss(states, head, None, None, targets, normalizer)
    loss.logits_budget_mb = hard_loss.logits_budget_mb  # halved, where memory has run out
    # 3. What is logged, and what the policy is told.
    ours = row_masses(loss, states.detach(), head, targets, aligned.student_ids)
    theirs = row_masses(loss, teacher_states, teacher_head, aligned.targets, aligned.teacher_ids)
    covered_ce, teacher_ce = torch.where(aligned.covered, ours.ce, 0.0).sum(), theirs.ce.sum()
    sums = {statistic.sum: soft.sums[statistic.sum] for statistic in _OF_PAIRS}
    sums |= {name: soft.sums[name] for name in _OF_SOME if name in soft.sums}
    sums |= {name: hard.sums[name] for name in (stats.ROWS, stats.CE.sum, stats.STUDENT_ENTROPY.sum)}
    if loss.held_out:  # the teacher's is over labels of its own, which are others
        sums[stats.CALIBRATION_ERROR.sum] = hard.sums[stats.CALIBRATION_ERROR.sum]
    sums |= {
        stats.ALIGNED: soft.sums[stats.ROWS],
        stats.TEACHER_CE.sum: teacher_ce + ours.ce.sum() - covered_ce,
        stats.COMMON_MASS.sum: ours.mass.index_select(0, aligned.student).sum(),
        stats.TEACHER_COMMON_MASS.sum: theirs.mass.index_select(0, aligned.teacher).sum(),
        stats.CE_PER_BYTE.sum: covered_ce,
        stats.TEACHER_CE_PER_BYTE.sum: teacher_ce,
        stats.BYTES: aligned.length.to(covered_ce.dtype),
    }
    ratio = loss.ratio_of(loss.temperature)
    return LossOutput((1.0 - ratio) * hard.loss + ratio * soft.loss, sums)


def _soft_loss(
    loss: DistillationLoss,
    states: Tensor,
    head: Head,
    teacher_states: Tensor,
    teacher_head: Head,
    aligned: Aligned,
    targets: Tensor,
    normalizer: float | Tensor,
    sequences: Tensor | None,
) -> LossOutput:
    """The soft loss of the M pairs, over common ids or in both spaces; arguments as those of ``overlap_loss``."""
    own_states, own_targets = (all_rows.index_select(0, aligned.student) for all_rows in (states, targets))
    their_states = teacher_states.index_select(0, aligned.teacher)
    own_sequences = None if sequences is None else sequences.index_select(0, aligned.student)
    if aligned.projectors is not None:
        return dual_space_loss(
            loss, aligned.projectors, own_states, head, own_targets, their_states, teacher_head,
            aligned.targets.index_select(0, aligned.teacher), normalizer, own_sequences,
        )  # fmt: skip
    # Common ids rise, so a label's place among them is found by halving.
    places = torch.searchsorted(aligned.student_ids, own_targets)
    own_head, their_head = head.take(aligned.student_ids), teacher_head.take(aligned.teacher_ids)
    found: LossOutput = loss(
        own_states, own_head, their_states, their_head, places, normalizer, own_sequences, kd_ratio=1.0
    )
    return found


@dataclass(frozen=True)
class RowMasses:
    """Of some rows at T = 1, over the whole vocabulary.

    Attributes:
        ce: cross-entropy of the labels, nats, ``[N]``.
        mass: probability of the common ids, ``[N]``.
    """

    ce: Tensor
    mass: Tensor


@torch.no_grad()
def row_masses(loss: DistillationLoss, states: Tensor, head: Head, targets: Tensor, common: Tensor) -> RowMasses:
    """Cross-entropy of each label, and how much of the probability is on the common ids; in chunks of the loss's budget.

    Args:
        loss: has the budget.
        states: ``[N, H]``.
        head: weight ``[V, H]``.
        targets: ``[N]``.
        common: ids ``[K]``.
    """
    head = head.detached()
    precise = torch.float64 if states.dtype == torch.float64 else torch.float32
    ce, mass = torch.zeros(len(states), dtype=precise, device=states.device), torch.ones_like(targets, dtype=precise)
    with torch.autocast(states.device.type, enabled=False):
        for rows in torch.arange(len(states), device=states.device).split(loss.chunk_rows(head.vocab_size)):
            logits = head(states[rows].to(head.weight.dtype)).to(precise)
            norm = logits.logsumexp(-1)
            ce[rows] = norm - logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            mass[rows] = (logits.index_select(-1, common).logsumexp(-1) - norm).exp()
    return RowMasses(ce, mass)
