"""Dual-space distillation: teacher and student compared in the student's space and in the teacher's, through learned maps.

DSKD (arXiv 2406.17328) and DSKDv2 (arXiv 2504.11426). ``docs/other_tokenizers.md`` says what is taken from which of the two.

Shapes: ``A`` aligned rows, ``H_s`` and ``H_t`` the widths of student and teacher, ``V_s`` and ``V_t`` their vocabularies,
``C`` common tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dts_hf.loss import statistics as stats
from dts_hf.loss.distillation_loss import DistillationLoss, LossOutput
from dts_hf.models.head import Head

#: Added to the Gram matrix, as a share of the mean of its eigenvalues: it takes the smallest of all maps where fewer than H
#: tokens are common.
RIDGE = 1e-8
#: Rows of a head that are read at once: 16,384 x 8,192 numbers of float64 are 1 GiB.
_BLOCK = 16_384


class Projectors(nn.Module):
    """The maps between the two spaces: ``to_student`` W ``[H_t, H_s]`` and ``to_teacher`` W' ``[H_s, H_t]``, without a bias.

    They are made by ``start_from_heads``, trained with the student, and no part of it: a finished student goes without.

    Args:
        student_width: H_s.
        teacher_width: H_t.
        device: of the weights.
        dtype: the same; float32 at least, for steps of an optimizer are small.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.to_student = nn.Parameter(torch.zeros(teacher_width, student_width, device=device, dtype=dtype))
        self.to_teacher = nn.Parameter(torch.zeros(student_width, teacher_width, device=device, dtype=dtype))

    @torch.no_grad()
    def start_from_heads(
        self, student: Head, teacher: Head, student_ids: Tensor | None = None, teacher_ids: Tensor | None = None
    ) -> None:
        """Start where each model's logits of the common tokens survive the map, as nearly as least squares can have it.

        See ``maps_between``; a bias and a soft-cap are no part of it, a logit scale is.

        Args:
            student: the student's head, whole.
            teacher: the teacher's, whole.
            student_ids: ``[C]`` of the common tokens; None: all ids, which mean the same in both.
            teacher_ids: ``[C]``, the same tokens in the same order.
        """
        rows = student.weight if student_ids is None else student.weight[student_ids.to(student.weight.device)]
        theirs = teacher.weight if teacher_ids is None else teacher.weight[teacher_ids.to(teacher.weight.device)]
        to_student, to_teacher = maps_between(rows, theirs, student.logit_scale, teacher.logit_scale)
        self.to_student.copy_(to_student)
        self.to_teacher.copy_(to_teacher)


@torch.no_grad()
def maps_between(
    student_rows: Tensor, teacher_rows: Tensor, student_scale: float = 1.0, teacher_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """W ``[H_t, H_s]`` and W' ``[H_s, H_t]`` of least squares: E_s W^T = E_t and E_t W'^T = E_s, for all states at once.

    The logits h_t E_t^T of the teacher are then those of h_t W through the student's rows (DSKDv2, "ideal
    initialization", which takes the pseudo-inverse of E_s by an SVD of ``[C, H]``). Here it is the normal equations in
    float64: W = X^T (G_s + r I)^-1, W' = X (G_t + r I)^-1 with G = E^T E ``[H, H]``, X = E_s^T E_t ``[H_s, H_t]`` and r
    ``RIDGE`` times the mean eigenvalue of G, refined once, which squares the error of r. Rows are read in blocks, so
    nothing of ``[C, H]`` is made in float64.

    Args:
        student_rows: E_s ``[C, H_s]``, the rows of the common tokens in the student's head.
        teacher_rows: E_t ``[C, H_t]``, of the same tokens in the same order.
        student_scale: of the student's logits.
        teacher_scale: of the teacher's logits.

    Raises:
        ValueError: they are not as many, or there is none.
    """
    if len(student_rows) != len(teacher_rows) or not len(student_rows):
        raise ValueError(f"common tokens: {len(student_rows)} rows of the student, {len(teacher_rows)} of the teacher")
    device = student_rows.device if student_rows.device.type != "mps" else torch.device("cpu")  # MPS has no float64
    gram_s: Tensor | float = 0.0
    gram_t: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for start in range(0, len(student_rows), _BLOCK):
        own = student_rows[start : start + _BLOCK].to(device, torch.float64) * student_scale
        theirs = teacher_rows[start : start + _BLOCK].to(device, torch.float64) * teacher_scale
        gram_s, gram_t, cross = gram_s + own.T @ own, gram_t + theirs.T @ theirs, cross + own.T @ theirs
    assert isinstance(gram_s, Tensor) and isinstance(gram_t, Tensor) and isinstance(cross, Tensor)
    return _solved(gram_s, cross).T.contiguous(), _solved(gram_t, cross.T).T.contiguous()


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """G^+ B ``[H, K]`` for a Gram matrix ``[H, H]``, singular or not, and a B in its range."""
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    factor, _ = torch.linalg.cholesky_ex(
        gram + RIDGE * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    solution = torch.cholesky_solve(right, factor)
    # Once more with what is left over: of the ridge's error its square remains
    return solution + torch.cholesky_solve(right - gram @ solution, factor)


def dual_space_loss(
    loss: DistillationLoss,
    projectors: Projectors,
    student_states: Tensor,
    student_head: Head,
    targets: Tensor,
    teacher_states: Tensor,
    teacher_head: Head,
    teacher_targets: Tensor,
    normalizer: float | Tensor,
    sequences: Tensor | None = None,
) -> LossOutput:
    """Soft loss of A aligned rows: T_s T_t D(p_st, q) + CE_W + T_s T_t D(p, q_ts), over ``normalizer``.

    Its three parts (DSKD; DSKDv2 over aligned tokens alone), ``sg`` a stopped gradient:

    - the student's space: q = softmax(h_s E_s^T / T_s), the student's own, against p_st = softmax(sg(h_t W E_s^T) / T_t);
    - CE_W: cross-entropy of softmax(h_t W sg(E_s)^T), at T = 1, to the student's labels. It alone trains W;
    - the teacher's space: q_ts = softmax(h_s W' E_t^T / T_s) against p = softmax(h_t E_t^T / T_t), the teacher's own.

    Gradients: of h_s from the first and the third, of E_s from the student's own logits alone, of W from CE_W, of W' from
    the third; h_t and E_t get none. D is the loss's divergence in both spaces, and the temperature's policy is asked in
    each of them about the logits that are compared there.

    Cost: six matmuls with V_s and three with V_t a row (forward and backward), and no more memory than one call of ``loss``
    has: each walks in chunks.

    Args:
        loss: divergence and temperature, of training or of held-out rows.
        projectors: W and W'.
        student_states: ``[A, H_s]``.
        student_head: weight ``[V_s, H_s]``, whole.
        targets: ``[A]``, the student's labels.
        teacher_states: ``[A, H_t]``, of the same rows; no gradient flows into them.
        teacher_head: weight ``[V_t, H_t]``, whole and frozen.
        teacher_targets: ``[A]``, the teacher's labels: the same bytes.
        normalizer: see ``DistillationLoss.forward``.
        sequences: ``[A]``, see there.

    Returns:
        the loss ``[]``, and the sums of the student's space, where ``kd`` is that of both and ``observed`` the mean of both,
        with two more: ``kd_teacher_space`` and ``projector_ce``.
    """
    frozen, teacher_states = student_head.detached(), teacher_states.detach()
    projected = _mapped(teacher_states, projectors.to_student)  # [A, H_s]
    back = _mapped(student_states, projectors.to_teacher)  # [A, H_t]

    here = loss(student_states, student_head, projected.detach(), frozen, targets, normalizer, sequences, kd_ratio=1.0)
    of_map = loss(projected, frozen, None, None, targets, normalizer, sequences, kd_ratio=0.0)
    there = loss(
        back,
        teacher_head.detached(),
        teacher_states,
        teacher_head,
        teacher_targets,
        normalizer,
        sequences,
        kd_ratio=1.0,
    )
    sums = dict(here.sums)
    sums[stats.PROJECTOR_CE.sum] = of_map.sums[stats.CE.sum]
    sums[stats.KD_TEACHER_SPACE.sum] = there.sums[stats.KD.sum]
    for name in (stats.KD.sum, stats.TEMPERATURE_GRAD):
        if name in sums:
            sums[name] = sums[name] + there.sums[name]
    if stats.OBSERVED in sums:
        # What the policy makes of it acts in both spaces: by one space's, the weights of a selection are not 1 on average
        sums[stats.OBSERVED] = (sums[stats.OBSERVED] + there.sums[stats.OBSERVED]) / 2
    return LossOutput(here.loss + of_map.loss + there.loss, sums)


def _mapped(states: Tensor, weight: Tensor) -> Tensor:
    """States ``[A, H]`` x weight ``[H, H']``; under autocast in its dtype, else in the weight's."""
    return states.to(weight.dtype) @ weight
