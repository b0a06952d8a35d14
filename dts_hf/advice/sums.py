"""What one batch of logits says of teacher and student, summed row by row; the logits are forgotten at once.

Of a row only sums over its labels are kept, so that a bootstrap over rows needs no second pass. Exponentials and sums over
the vocabulary are float32 (float64 where the logits are), everything behind them is float64.

Shapes: ``C`` labels of a chunk, ``V`` classes, ``K`` temperatures, ``R`` rows of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dts_hf.divergences import Distribution, Distributions, Divergence
from dts_hf.doctor.effect import Sample
from dts_hf.errors import UserError
from dts_hf.loss.row_loss import confidence_bins
from dts_hf.loss.statistics import CONFIDENCE_BINS

#: How many tokens a compact cache might keep.
SIZES = tuple(2**power for power in range(11))
#: Elements of one chunk of logits: few enough to stay near the cores.
CHUNK = 1 << 21


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        grid: temperatures, rising, 1 among them.
        divergence: of the recipe.
        squared: whether the soft loss is multiplied by T^2.
    """

    grid: tuple[float, ...]
    divergence: Divergence
    squared: bool = True


@dataclass(frozen=True)
class RowSums:
    """Sums over the labels of each row.

    Attributes:
        labels: ``[R]``.
        sums: by the name of a quantity ``[R]``, or ``[R, n]`` where it has n values: the names of ``label_values``.
    """

    labels: np.ndarray
    sums: Mapping[str, np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence[RowSums]) -> RowSums:
        """The rows of all ``parts``, of which there is one at least."""
        sums = {name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums}
        return cls(np.concatenate([part.labels for part in parts]), sums)


@torch.no_grad()
def row_sums(sample: Sample, settings: Settings) -> RowSums:
    """Sums of a sample, chunk by chunk.

    Args:
        sample: states and heads of student and teacher; its sequences are the rows.
        settings: what is measured.

    Raises:
        UserError: a number is non-finite.
    """
    assert sample.teacher_states is not None and sample.teacher_head is not None  # advise has looked
    head = sample.teacher_head.in_float32()
    rows = torch.unique_consecutive(sample.sequences, return_inverse=True)[1].cpu()
    labels = torch.bincount(rows).double()
    size = max(1, CHUNK // head.vocab_size)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        student = sample.student_head(sample.student_states[part])
        teacher = head(sample.teacher_states[part].to(head.weight.dtype))
        for name, values in label_values(student, teacher, sample.targets[part], settings).items():
            total = sums.setdefault(name, torch.zeros(len(labels), *values.shape[1:], dtype=torch.float64))
            total.index_add_(0, rows[part], values.double().cpu())
    if broken := [name for name, total in sums.items() if not bool(total.isfinite().all())]:
        raise UserError(
            f"teacher, student: {', '.join(broken)} is non-finite on rows of the recipe; dts-hf doctor says more about "
            "it"
        )
    return RowSums(labels.numpy(), {name: total.numpy() for name, total in sums.items()})


def label_values(student: Tensor, teacher: Tensor, targets: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Every quantity of every label.

    At T = 1: cross-entropies, whether the gap is negative, KL(p || q), whether the first choices agree, the teacher's
    confidence, accuracy and p(y), the difference of the former by bin of confidence, and the squared gradient of the
    cross-entropy.
    With ``_at_t`` at each temperature, ``[C, K]``: see ``entropy_parts`` and ``soft_gradient``; the teacher's cross-entropy,
    and ``mass_at_t`` ``[C, K, sizes]``, the probability of its likeliest tokens.

    Args:
        student: logits ``[C, V]``.
        teacher: logits ``[C, V]``.
        targets: ``[C]``.
        settings: what is measured.

    Returns:
        By name ``[C]`` or ``[C, ...]``.
    """
    z_s, z_t = (logits - logits.amax(-1, keepdim=True) for logits in (student, teacher))
    picked = targets.unsqueeze(-1)
    p, q = Distribution.of(z_t), Distribution.of(z_s)
    student_ce, teacher_ce = (
        one.log_norm.squeeze(-1) - z.gather(-1, picked).squeeze(-1) for one, z in ((q, z_s), (p, z_t))
    )
    confidence = (-p.log_norm).exp().squeeze(-1).double()
    correct = (z_t.gather(-1, picked).squeeze(-1) == 0).double()
    bins = torch.nn.functional.one_hot(confidence_bins(confidence), CONFIDENCE_BINS)
    first = z_s.argmax(-1, keepdim=True)
    found = {
        "student_ce": student_ce, "teacher_ce": teacher_ce, "negative": (student_ce < teacher_ce).double(),
        "kl": Distributions(p, q).forward_kl(), "agreement": (z_t.gather(-1, first).squeeze(-1) == 0).double(),
        "confidence": confidence, "correct": correct, "p_target": (-teacher_ce.double()).exp(),
        "miscalibration": bins * (confidence - correct).unsqueeze(-1),
        "ce_gradient": q.prob.square().sum(-1) - 2 * q.prob.gather(-1, picked).squeeze(-1) + 1,
    }  # fmt: skip
    sizes = [size for size in SIZES if size < z_t.shape[-1]]
    teacher_entropy = p.entropy()  # at T = 1, whatever the temperature: by it a divergence may tell rows apart
    likeliest = z_t.topk(sizes[-1], -1).values
    kept = torch.tensor(sizes, device=z_t.device) - 1
    others = _others(z_t, picked)
    at_t: dict[str, list[Tensor]] = {}
    for t in settings.grid:
        now = entropy_parts(z_t, others, picked, t)
        at = Distribution.of(z_t / t)
        both = Distributions(at, Distribution.of(z_s / t), targets, teacher_entropy)
        now |= soft_gradient(both, q.prob, targets, t, settings)
        now["mass"] = (likeliest / t - at.log_norm).exp().cumsum(-1).index_select(-1, kept)
        for name, values in now.items():
            at_t.setdefault(name, []).append(values)
    return found | {f"{name}_at_t": torch.stack(values, 1) for name, values in at_t.items()}


def _others(z: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[C, V]`` less the largest of all but the labelled class, whose own is 0; and that largest one ``[C, 1]``."""
    others = z.scatter(-1, picked, -torch.inf)
    top = others.amax(-1, keepdim=True)
    return others.sub_(top).scatter_(-1, picked, 0.0), top


def entropy_parts(z: Tensor, others: tuple[Tensor, Tensor], picked: Tensor, t: float) -> dict[str, Tensor]:
    """The chain rule of the entropy at one temperature: H(p) = H_b(p[y]) + (1 - p[y]) H(p given that it is not y).

    The first term says how confident the teacher is of the label, the second how it relates the other classes; "other" is
    the entropy among these alone. Our definitions: mean over labels, in nats. Nothing is subtracted from 1, so a teacher
    that is sure loses no digits.

    Args:
        z: logits ``[C, V]``, their largest taken off.
        others: of ``_others``.
        picked: the labels, ``[C, 1]``.
        t: the temperature.

    Returns:
        ``entropy``, ``binary``, ``relation``, ``other``, ``teacher_ce``, each ``[C]``, float64.
    """
    rest, top = others
    u = rest / t
    e = u.exp()
    total, moment = e.sum(-1).double() - 1.0, (e * u).sum(-1).double()  # the label's place holds exp(0) = 1, and 1 * 0
    log_rest = top.squeeze(-1).double() / t + total.log()
    own = z.gather(-1, picked).squeeze(-1).double() / t
    log_norm = torch.logaddexp(log_rest, own)
    log_own, log_rest = own - log_norm, log_rest - log_norm
    binary = -(log_own.exp() * log_own + log_rest.exp() * log_rest)
    other = total.log() - moment / total
    relation = log_rest.exp() * other
    return {
        "entropy": binary + relation,
        "binary": binary,
        "relation": relation,
        "other": other,
        "teacher_ce": -log_own,
    }


def soft_gradient(
    d: Distributions, q_at_one: Tensor, targets: Tensor, t: float, settings: Settings
) -> dict[str, Tensor]:
    """Size of the soft loss's gradient by the student's logits, and its product with that of the cross-entropy.

    Args:
        d: teacher and student at ``t``; the student's probabilities are overwritten.
        q_at_one: the student's probabilities ``[C, V]`` at T = 1.
        targets: ``[C]``.
        t: the temperature.
        settings: the divergence, and whether T^2 is in the loss.

    Returns:
        ``gradient`` (squared norm) and ``product``, each ``[C]``.
    """
    _, grad = settings.divergence.value_and_grad(d)
    factor = t if settings.squared else 1.0 / t  # T^2 or 1, times d u / d z = 1 / T
    product = (q_at_one * grad).sum(-1) - grad.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return {"gradient": factor**2 * grad.square().sum(-1), "product": factor * product}
