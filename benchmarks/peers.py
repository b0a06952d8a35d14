"""The objectives of the peers, from logits or from states, so that every benchmark runs the same code.

Shapes: logits ``[B, T, V]``, states ``[B, T, H]``, heads ``[V, H]``, labels ``[B, T]`` unshifted. Each returns the loss
and KL(teacher || student) at T in nats per label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness import needs_liger, needs_trl

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
