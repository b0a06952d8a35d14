"""The objectives of the peers, from logits or from states, so that every benchmark runs the same code.

Shapes: logits ``[B, T, V]``, states ``[B, T, H]``, heads ``[V, H]``, labels ``[B, T]`` unshifted. Each returns the loss
and KL(teacher || student) at T in nats per label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness import Missing, needs_liger, needs_trl

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100


def dense_loss(student: Tensor, teacher: Tensor, labels: Tensor, t: float, kd_ratio: float) -> tuple[Tensor, Tensor]:
    """As research forks do it: CE + forward KL over every position in fp32, the mask at the very end."""
    import torch
    import torch.nn.functional as F

    vocab = student.shape[-1]
    targets = labels[:, 1:].reshape(-1)
    student, teacher = student[:, :-1].float(), teacher[:, :-1].float()
    with torch.no_grad():
        F.cross_entropy(teacher.reshape(-1, vocab), targets, ignore_index=IGNORE_INDEX)  # for the gap
        teacher_probs = F.softmax(teacher / t, dim=-1)
        teacher_log_probs = F.log_softmax(teacher / t, dim=-1)
    ce = F.cross_entropy(student.reshape(-1, vocab), targets, ignore_index=IGNORE_INDEX)
    student_log_probs = F.log_softmax(student / t, dim=-1)
    per_token = (teacher_probs * (teacher_log_probs - student_log_probs)).sum(-1).reshape(-1)
    mask = (targets != IGNORE_INDEX).float()
    kl = (per_token * mask).sum() / mask.sum()
    return (1 - kd_ratio) * ce + kd_ratio * t * t * kl, kl.detach()


def gkd_loss() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """``trl.experimental.gkd``: its own loss function with beta = 0 (forward KL); no CE, no T^2."""
    with needs_trl():
        from trl.experimental.gkd import GKDTrainer

    def loss_fn(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> tuple[Tensor, Tensor]:
        loss = GKDTrainer.generalized_jsd_loss(
            student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], beta=0.0, temperature=t
        )
        return loss, loss.detach()

    return loss_fn


def chunked_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    """``trl.DistillationTrainer``'s function on the labelled rows (as it runs on a GPU), beta = 0; no CE, no T^2."""
    with needs_trl():
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss_fn(
        student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, t: float
    ) -> tuple[Tensor, Tensor]:
        keep = (labels[:, 1:] != IGNORE_INDEX).reshape(-1)
        rows = student[:, :-1].reshape(-1, student.shape[-1])[keep]
        teacher_rows = teacher[:, :-1].reshape(-1, teacher.shape[-1])[keep]
        per_token, _entropy = ChunkedDivergenceFunction.apply(
            rows, student_head, None, teacher_rows, teacher_head, None, 0.0, t
        )
        loss = per_token.mean()
        return loss, loss.detach()

    return loss_fn


# ------------------------------------------------------------------------------------ from rows: N labelled, no padding

#: (h_s [N, H], W_s [V, H], h_t [N, H], W_t [V, H], targets [N]) -> (loss, CE or None, KL at T or None), means over rows
RowLoss = Callable[..., tuple[Any, Any, Any]]


def cross_entropy_rows(t: float, kd_ratio: float) -> RowLoss:  # noqa: ARG001
    """Transformers' own loss of the student alone: every logit at once, in fp32."""
    import torch.nn.functional as F
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:  # noqa: ARG001
        loss = ForCausalLMLoss(F.linear(h_s, w_s), None, w_s.shape[0], shift_labels=targets)
        return loss, loss.detach(), None

    return loss_fn


def gkd_rows(t: float, kd_ratio: float) -> RowLoss:  # noqa: ARG001
    """``gkd_loss`` on the rows alone: its logits are dense, but no position is padding."""
    import torch
    import torch.nn.functional as F

    with needs_trl():
        from trl.experimental.gkd import GKDTrainer

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:
        with torch.no_grad():
            teacher = F.linear(h_t, w_t)
        loss = GKDTrainer.generalized_jsd_loss(
            F.linear(h_s, w_s)[None], teacher[None], labels=targets[None], beta=0.0, temperature=t
        )
        return loss, None, loss.detach()

    return loss_fn


def chunked_rows(t: float, kd_ratio: float) -> RowLoss:  # noqa: ARG001
    """``chunked_loss`` on the rows alone; Triton on a GPU."""
    with needs_trl():
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:  # noqa: ARG001
        per_token, _entropy = ChunkedDivergenceFunction.apply(h_s, w_s, None, h_t, w_t, None, 0.0, t)
        loss = per_token.mean()
        return loss, None, loss.detach()

    return loss_fn


def liger_chunked_rows(t: float, kd_ratio: float, compiled: bool = True) -> RowLoss:
    """Liger's ``LigerFusedLinearJSDLoss`` with beta = 0: CE + forward KL in chunks of 1,024 rows; no T^2."""
    with needs_liger():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - kd_ratio, weight_soft_loss=kd_ratio, beta=0.0, temperature=t, compiled=compiled,
        return_soft_hard_loss=True,
    )  # fmt: skip

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:
        loss, soft, hard = module(h_s, w_s, h_t, w_t, targets)
        return loss, hard.detach(), soft.detach()

    return loss_fn


def liger_triton_rows(t: float, kd_ratio: float) -> RowLoss:  # noqa: ARG001
    """Liger's ``LigerFusedLinearJSD`` with beta = 0: KL alone, its Triton kernel; a GPU alone runs it."""
    import torch

    if not torch.cuda.is_available():
        raise Missing("Liger's Triton kernel needs a GPU")
    with needs_liger():
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    module = LigerFusedLinearJSD(jsd_beta=0.0, temperature=t)

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:
        loss = module(h_s, w_s, h_t, w_t, targets)
        return loss, None, loss.detach()

    return loss_fn
