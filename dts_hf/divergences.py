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


class Distribution(NamedTuple):
    """softmax(u) of logits u ``[C, V]`` whose largest entry per row is 0, with ``log_norm`` ``[C, 1]`` = log sum exp u.

    Probabilities come out of the one exponential that the normaliser needs anyway: an ``exp`` over the vocabulary costs
    more than any other elementwise operation.
    """

    prob: Tensor
    logits: Tensor
    log_norm: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Distribution:
        """From logits ``[C, V]`` that are already shifted so that each row's maximum is 0."""
        exponentials = logits.exp()
        total = exponentials.sum(-1, keepdim=True)
        return cls(exponentials.mul_(total.reciprocal()), logits, total.log())

    @property
    def log_prob(self) -> Tensor:
        return self.logits - self.log_norm

    def entropy(self) -> Tensor:
        """H = log norm - sum p u, ``[C]``, nats."""
        return self.log_norm.squeeze(-1) - dot(self.prob, self.logits)


class Distributions(NamedTuple):
    """Teacher ``p`` and student ``q``."""

    p: Distribution
    q: Distribution

    def log_ratio(self) -> Tensor:
        """log p - log q, ``[C, V]``, in a fresh buffer."""
        return (self.p.logits - self.q.logits).add_(self.q.log_norm - self.p.log_norm)

    def forward_kl(self) -> Tensor:
        """KL(p || q), ``[C]``; the normalisers leave the sum because p adds up to 1."""
        ratio = dot(self.p.prob, self.p.logits - self.q.logits)
        return ratio + (self.q.log_norm - self.p.log_norm).squeeze(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product ``[C, V] x [C, V] -> [C]`` (in cache, a product and a sum beat a batched matmul 20 times)."""
    return (a * b).sum(-1)


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
        return d.forward_kl(), d.q.prob.sub_(d.p.prob)


class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p); gradient q_j (log q_j - log p_j - KL) (as used by MiniLLM, arXiv 2306.08543)."""

    name = "reverse_kl"
    paper = "arXiv 2306.08543"

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        log_ratio = d.log_ratio().neg_()
        value = dot(d.q.prob, log_ratio)
        return value, log_ratio.sub_(value.unsqueeze(-1)).mul_(d.q.prob)


class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    As in GKD (arXiv 2306.13649).

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
        log_p, log_q = d.p.log_prob, d.q.log_prob
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        student_log_ratio = log_q.sub_(log_m)
        student_kl = dot(d.q.prob, student_log_ratio)
        teacher_kl = dot(d.p.prob, log_p.sub_(log_m))
        value = self.beta * teacher_kl + (1.0 - self.beta) * student_kl
        grad = student_log_ratio.sub_(student_kl.unsqueeze(-1)).mul_(d.q.prob).mul_(1.0 - self.beta)
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
