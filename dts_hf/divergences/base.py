"""What every divergence is: a pure function of two distributions over the vocabulary, with its closed-form gradients.

``p`` is the teacher, ``q`` the student, both already at their temperature: q = softmax(u) with u = z_s / T_s, p =
softmax(u_t) with u_t = z_t / T_t. Gradients are with respect to ``u`` (and ``u_t``); the loss applies the chain rule
through T and the T^2 factor. For any f(q), with e_j = d f / d log q_j, the gradient is d f / d u_j = e_j - q_j sum_k e_k.

Underflow: the logarithm of a probability is logits - log norm, which is exact where the probability itself is 0 in
floating point. A logarithm of a mixture is taken only where its weights are probabilities that underflow with it.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.registry import range_of


class Distribution(NamedTuple):
    """softmax(u) of logits u ``[C, V]`` whose largest entry per row is 0, with ``log_norm`` ``[C, 1]`` = log sum exp u.

    Probabilities come out of the one exponential that the normaliser needs anyway: an ``exp`` over the vocabulary costs
    more than any other elementwise operation.

    ``moves`` ``[C, V]`` is d u / d log b, b = 1 / T, where it is not u itself: a teacher of whom not every logit is known.
    """

    prob: Tensor
    logits: Tensor
    log_norm: Tensor
    moves: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor) -> Distribution:
        """From logits ``[C, V]`` that are already shifted so that each row's maximum is 0."""
        exponentials = logits.exp()
        total = exponentials.sum(-1, keepdim=True)
        return cls(exponentials.mul_(total.reciprocal()), logits, total.log())

    def log_prob_slope(self) -> Tensor:
        """Return d log prob / d log T, ``[C, V]``, in a fresh buffer.

        With z = T u: d u / d log T = -u and d log norm / d log T = -sum p u, so it is sum p u - u.
        """
        moves = self.by_sharpness
        return dot(self.prob, moves).unsqueeze(-1) - moves

    @property
    def by_sharpness(self) -> Tensor:
        """The derivative d u / d log b, ``[C, V]``, b = 1 / T: of logits that are divided by T it is u itself."""
        return self.logits if self.moves is None else self.moves

    def entropy(self) -> Tensor:
        """H = log norm - sum p u, ``[C]``, nats."""
        return self.log_norm.squeeze(-1) - dot(self.prob, self.logits)


class Distributions(NamedTuple):
    """Teacher ``p`` and student ``q``; what is not known is None.

    ``targets`` ``[C]`` int64 are the tokens of the text, ``teacher_entropy`` ``[C]`` is the teacher's at T = 1, nats.
    """

    p: Distribution
    q: Distribution
    targets: Tensor | None = None
    teacher_entropy: Tensor | None = None

    def log_ratio(self) -> Tensor:
        """Return log p - log q, ``[C, V]``, in a fresh buffer."""
        return (self.p.logits - self.q.logits).add_(self.q.log_norm - self.p.log_norm)

    def mixture(self, teacher_share: float) -> Tensor:
        """teacher_share p + (1 - teacher_share) q, ``[C, V]``, in a fresh buffer, fit for a logarithm and a division.

        Where p and q both underflow the mixture is the smallest normal number: whatever is made of it there has to be
        weighted with p or q, that is with 0.
        """
        return torch.lerp(self.q.prob, self.p.prob, teacher_share).add_(torch.finfo(self.q.prob.dtype).tiny)

    def forward_kl(self) -> Tensor:
        """KL(p || q), ``[C]``; the normalisers leave the sum because p adds up to 1."""
        ratio = dot(self.p.prob, self.p.logits - self.q.logits)
        return ratio + (self.q.log_norm - self.p.log_norm).squeeze(-1)

    def reverse_kl(self) -> Tensor:
        """KL(q || p), ``[C]``."""
        ratio = dot(self.q.prob, self.q.logits - self.p.logits)
        return ratio + (self.p.log_norm - self.q.log_norm).squeeze(-1)

    def mirrored(self) -> Distributions:
        """Teacher and student exchanged; the new student's probabilities are a copy, free to be overwritten."""
        return Distributions(self.q, self.p._replace(prob=self.p.prob.clone()), self.targets)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product ``[C, V] x [C, V] -> [C]`` (in cache, a product and a sum beat a batched matmul 20 times)."""
    return (a * b).sum(-1)


def centred_(e: Tensor, prob: Tensor) -> Tensor:
    """Return e - q sum_k e_k, ``[C, V]``, in place of ``e``: from the derivative by log q_j to the gradient by the logits.

    The chain rule through log q_k = u_k - log sum exp u, whose derivative by u_j is [j = k] - q_j.
    """
    return e.addcmul_(prob, e.sum(-1, keepdim=True), value=-1.0)


class Divergence:
    """Base of all divergences. A divergence is a class in a file of this folder, found by its ``name``.

    ``formula``, ``gradient`` and ``use`` are the words of ``docs/divergences.md``. The parameters of ``__init__`` are the
    recipe keys, and are kept as attributes of the same name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    gradient: ClassVar[str]
    use: ClassVar[str]
    #: What ``value_and_grad`` holds constant in its gradient, which force that drops, and why; None: nothing. One that holds
    #: something under some options alone sets it to None under the others.
    held: str | None = None

    #: Whether ``Distributions.targets`` are read: another token in their place is then another loss.
    reads_targets: ClassVar[bool] = False

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """The divergence ``[C]`` (nats, where it is one) and its gradient ``[C, V]`` with respect to u.

        ``d.q.prob`` may be overwritten, and may come back as the gradient; everything else of ``d`` stays as it is.

        Args:
            d: both distributions over V tokens for C rows, each of its own temperature.
        """
        raise NotImplementedError

    def teacher_grad(self, d: Distributions) -> Tensor:
        """The gradient ``[C, V]`` with respect to the teacher's u_t; leaves every buffer of ``d`` as it is."""
        raise NotImplementedError

    def held_slope(self, d: Distributions) -> Tensor:
        """What the gradients leave out of d value / d log T, ``[C]``: the way through what they hold constant.

        A temperature that learns follows the value as it is reported. T is that of both models. Leaves every buffer of
        ``d`` as it is.
        """
        return torch.zeros_like(d.q.log_norm.squeeze(-1))

    def describe(self) -> dict[str, Any]:
        """The name and options that build this divergence again."""
        options = inspect.signature(type(self)).parameters
        return {"name": self.name, **{option: getattr(self, option) for option in options}}


def check_option(divergence: Divergence, option: str, value: object, *, hint: str = "") -> float:
    """Return ``value`` as a float within the range that the annotation of ``option`` says.

    Args:
        divergence: the option is a parameter of its ``__init__``.
        option: the option's name.
        value: what the recipe has.
        hint: the end of the message.

    Raises:
        UserError: not a finite number, or out of range.
    """
    limits = range_of(type(divergence), option)
    if value in limits:
        return float(value)  # type: ignore[arg-type]
    if math.isinf(limits.high):
        expected = f"a number from {limits.low:g} on"
    else:
        low, high = f"{limits.low:g}", f"{limits.high:g}"
        without = {"both": "", "low": f", {high} excluded", "high": f", {low} excluded", "none": ", ends excluded"}
        expected = f"a number between {low} and {high}{without[limits.ends]}"
    raise UserError(
        f"loss.divergence.{option}: got {value!r} for '{divergence.name}', expected {expected}"
        f"{f' ({hint})' if hint else ''}"
    )
