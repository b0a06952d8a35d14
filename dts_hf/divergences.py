"""Divergences between teacher and student, each with its closed-form gradient.

Everything here is a pure function of two distributions over the vocabulary, row by row. ``p`` is the teacher, ``q`` the
student, both already at their temperature: q = softmax(u) with u = z_s / T_s. The gradient is with respect to ``u``; the
loss applies the chain rule through T and the T^2 factor. For any f(q), d f / d u_j = q_j (a_j - sum_k q_k a_k) with
a = d f / d q.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dts_hf.errors import UserError, nearest


class Distributions(NamedTuple):
    """Teacher ``p`` and student ``q`` with their logs, each ``[C, V]``, computed once and shared."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product ``[C, V] x [C, V] -> [C]`` without a ``[C, V]`` temporary."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


class Divergence:
    """Base: ``value_and_grad`` returns the divergence ``[C]`` (nats) and its gradient ``[C, V]`` with respect to u.

    The gradient may live in a buffer of ``Distributions`` that the divergence no longer needs.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The name and options that build this divergence again."""
        return {"name": self.name}


class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q); gradient q - p (Hinton et al. 2015, arXiv 1503.02531)."""

    name = "forward_kl"
    paper = "arXiv 1503.02531"

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        value = dot(d.p, d.log_p - d.log_q)
        return value, d.q.sub_(d.p)


class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p); gradient q_j (log q_j - log p_j - KL) (as used by MiniLLM, arXiv 2306.08543)."""

    name = "reverse_kl"
    paper = "arXiv 2306.08543"

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        log_ratio = d.log_q - d.log_p
        value = dot(d.q, log_ratio)
        return value, log_ratio.sub_(value.unsqueeze(-1)).mul_(d.q)


class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    Gradient (1 - beta) q_j (log(q_j / m_j) - KL(q || m)). It tends to 0 at both ends of beta, so the ends are refused
    rather than redefined as a KL: ask for ``forward_kl`` or ``reverse_kl`` by name. beta = 0.5 is the symmetric JSD.
    """

    name = "jsd"
    paper = "arXiv 2306.13649"

    def __init__(self, beta: float = 0.5) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0.0 < beta < 1.0:
            raise UserError(
                f"loss.divergence.beta: got {beta!r}, expected a number between 0 and 1, ends excluded "
                "(the divergence is 0 there; for the KL limits use 'forward_kl' or 'reverse_kl')"
            )
        self.beta = float(beta)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        # log(beta p + (1 - beta) q) in log space: no underflow where both are tiny.
        log_m = torch.logaddexp(d.log_p + math.log(self.beta), d.log_q + math.log1p(-self.beta))
        student_log_ratio = d.log_q - log_m
        student_kl = dot(d.q, student_log_ratio)
        teacher_kl = dot(d.p, log_m.neg_().add_(d.log_p))
        value = self.beta * teacher_kl + (1.0 - self.beta) * student_kl
        grad = student_log_ratio.sub_(student_kl.unsqueeze(-1)).mul_(d.q).mul_(1.0 - self.beta)
        return value, grad

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "beta": self.beta}


DIVERGENCES: dict[str, type[Divergence]] = {kind.name: kind for kind in (ForwardKL, ReverseKL, JSD)}


def build_divergence(spec: str | Mapping[str, Any] | Divergence) -> Divergence:
    """Build a divergence from a name or ``{"name": "jsd", "beta": 0.5}``.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    if isinstance(spec, Divergence):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in DIVERGENCES:
        raise UserError(
            f"loss.divergence: got {name!r}, expected one of {', '.join(DIVERGENCES)}.{nearest(str(name), DIVERGENCES)}"
        )
    kind = DIVERGENCES[name]
    known = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it takes no options"
            raise UserError(
                f"loss.divergence.{option}: unknown option of '{name}', {expected}.{nearest(str(option), known)}"
            )
    return kind(**options)
