"""A teacher of whom the largest logits are known one by one, and all others only by what they weigh together.

Of each row K tokens are kept: its label and the largest of the others. Everything else is its tail, of V - K tokens, known
by F(b) = log sum exp(b d) over it, d = logit - largest logit, at a few inverse temperatures b = 1 / T (``KNOTS``), by F'(b)
there and by the variance of its logits. That gives at every temperature

    log Z(b) = log(sum over the kept of exp(b d) + exp(F(b))),

so that the kept tokens have the teacher's own probabilities exp(b d) / Z(b), at a knot exactly. The tail's mass is spread
evenly over its tokens: each has the tempered logit F(b) - log(V - K). This is not b times any number, so the dense logits
depend on the temperature by more than a division.

**Between knots** F is a cubic in b with the stored values and slopes at both ends. F is the cumulant generating function of
the tail's logits, convex and smooth, so the error is at most h^4 / 384 of the largest fourth cumulant between two knots that
are h apart. Where the tail, cut at the smallest kept logit, falls off exponentially, that cumulant falls like b^-4 while h
grows like b, so that the same thousandth of a nat or so is left everywhere. Beyond the last knot (T below 1/4) F follows its
tangent, which is too low: there the tail weighs next to nothing.

Shapes: ``C`` rows, ``V`` vocabulary, ``K`` kept tokens, ``M`` knots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from dts_hf.divergences.base import Distribution
from dts_hf.errors import UserError
from dts_hf.temperature.parts.logit_statistics import LogitSummary

#: Inverse temperatures at which the tail is stored: T = 8, 4, 2, 4/3, 1, 2/3, 1/2, 1/3 and 1/4 are exact. At 0 all tokens
#: weigh the same. With half of those above 1/2 the tail of a real teacher was off by up to 3 % between them (T = 0.7).
KNOTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
#: Numbers of a tail: F and F' at each knot, and the variance of its logits.
TAIL_NUMBERS = 2 * len(KNOTS) + 1
#: Further below the largest than any number in fp16: a logit of -inf has no mean.
_LOWEST = -65504.0


@dataclass(frozen=True)
class CompactRows:
    """What is kept of the teacher's logits of C rows; stands where its states ``[C, H_t]`` would.

    Attributes:
        ids: ``[C, K]`` integers, the kept tokens, rising.
        logits: ``[C, K]``, theirs minus the row's largest, so 0 is the largest.
        tail: ``[C, 2 M + 1]``: F at the knots, F' at the knots, the variance; in the same logits. Zeros where K = V.
        vocab_size: V.
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor
    vocab_size: int

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor, targets: Tensor, top_k: int, dtype: torch.dtype = torch.float16) -> CompactRows:
        """Keep the label and the ``top_k`` - 1 largest other logits of each row; of equal ones those of smaller ids.

        Args:
            logits: ``[C, V]`` in fp32 or fp64, after scale and soft-cap, finite but for -inf.
            targets: ``[C]`` int64: the label is always kept, so that the teacher's cross-entropy is exact.
            top_k: K, V at most.
            dtype: of the kept logits. Differences from the largest lose 2^-11 of themselves in fp16, so that what they
                weigh, exp(d), moves by less than 2e-4 of the row; raw logits of 20 would lose 40 times as much.

        Raises:
            UserError: a row has NaN or +inf, or nothing but -inf.
        """
        vocab = logits.shape[-1]
        top = logits.amax(-1, keepdim=True)
        if not bool(torch.isfinite(top).all()):  # NaN is the largest of its row to amax
            raise UserError(
                "teacher: its logits are not finite; expected numbers. Check the model and its dtype (float16 overflows)"
            )
        d = (logits - top).clamp_(min=_LOWEST)
        keep = _kept(d, targets, top_k)  # [C, V]
        ids = keep.nonzero()[:, 1].view(len(d), top_k)
        kept, tail = d.gather(-1, ids), _tail_of(d, keep)
        return cls(ids.int(), kept.to(dtype), tail.float(), vocab)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> CompactRows:
        return replace(self, ids=self.ids[rows], logits=self.logits[rows], tail=self.tail[rows])

    def to(self, target: torch.device | torch.dtype) -> CompactRows:
        """On another device, or with logits and tail in the dtype of the loss."""
        ids = self.ids.to(target) if isinstance(target, torch.device) else self.ids
        return replace(self, ids=ids, logits=self.logits.to(target), tail=self.tail.to(target))

    def detach(self) -> CompactRows:
        """Itself: nothing hangs in a graph."""
        return self

    @property
    def tail_size(self) -> int:
        """V - K: how many tokens share the tail of a row."""
        return self.vocab_size - self.ids.shape[-1]

    @property
    def first_choice(self) -> Tensor:
        """The teacher's likeliest token of each row, ``[C]`` int64: it is always kept."""
        return self.ids.gather(-1, self.logits.argmax(-1, keepdim=True)).squeeze(-1).long()

    # ------------------------------------------------------------------------------------------------ at a temperature

    def at(self, temperature: Tensor | float, *, moving: bool = False) -> Distribution:
        """The distribution at T, ``[C, V]``.

        Args:
            temperature: ``[]`` or ``[C, 1]``.
            moving: also how the tempered logits move with log b (``Distribution.moves``), for a T that learns.
        """
        b, kept, mass, slope, log_norm = self._parts(temperature)
        if not self.tail_size:
            mass = slope = torch.zeros_like(log_norm)
        share = mass - math.log(self.tail_size) if self.tail_size else mass
        u = self._dense(kept, share)
        moves = self._dense(kept, b * slope) if moving else None
        return Distribution((u - log_norm).exp_(), u, log_norm, moves)

    def entropy(self, temperature: Tensor | float) -> Tensor:
        """The teacher's own entropy at T, ``[C]`` nats, and not that of an even tail: H = log Z - b d log Z / d b."""
        b, kept, mass, slope, log_norm = self._parts(temperature)
        moved = ((kept - log_norm).exp() * kept).sum(-1, keepdim=True)
        if self.tail_size:
            moved = moved + (mass - log_norm).exp() * b * slope
        return (log_norm - moved).squeeze(-1)

    def kept_mass(self, temperature: Tensor | float) -> Tensor:
        """The teacher's probability at T of the kept tokens together, ``[C]``."""
        _, kept, _, _, log_norm = self._parts(temperature)
        return (kept.logsumexp(-1, keepdim=True) - log_norm).exp().squeeze(-1)

    def log_probs(self, targets: Tensor) -> Tensor:
        """Log-probabilities of the labels ``targets`` ``[C]`` at T = 1, ``[C]``; in fp32 at least."""
        rows = self.to(torch.promote_types(self.tail.dtype, torch.float32))
        _, kept, mass, _, log_norm = rows._parts(1.0)
        found = rows.ids.long() == targets.unsqueeze(-1)
        rest = mass - math.log(max(self.tail_size, 1))  # of a label that is not kept, as of other rows
        chosen = torch.where(found, kept, 0.0).sum(-1, keepdim=True)
        return (torch.where(found.any(-1, keepdim=True), chosen, rest) - log_norm).squeeze(-1)

    def _parts(self, temperature: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """B ``[C, 1]``, the kept tempered logits ``[C, K]``, F(b), F'(b) and log Z(b), ``[C, 1]`` each."""
        b = torch.as_tensor(temperature, dtype=self.tail.dtype, device=self.tail.device).reciprocal()
        b = b.expand(len(self), 1) if b.dim() == 0 else b
        kept = self.logits.to(self.tail.dtype) * b
        log_norm = kept.logsumexp(-1, keepdim=True)
        mass, slope = _between_knots(self.tail, b)
        if self.tail_size:
            log_norm = torch.logaddexp(log_norm, mass)
        return b, kept, mass, slope, log_norm

    def _dense(self, kept: Tensor, rest: Tensor) -> Tensor:
        """``kept`` ``[C, K]`` in their places, ``rest`` ``[C, 1]`` in all others: ``[C, V]``."""
        return rest.expand(-1, self.vocab_size).clone().scatter_(-1, self.ids.long(), kept)

    # ------------------------------------------------------------------------------------------------------ statistics

    def summary(self) -> CompactSummary:
        """What a policy that reads summaries may ask of the teacher's logits."""
        return CompactSummary(self)


def joined(parts: Sequence[Tensor] | Sequence[CompactRows]) -> Tensor | CompactRows:
    """States, or compact rows, of several batches as those of one.

    Args:
        parts: at least one, ``[C, H]`` each, or compact rows.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(cast(list[Tensor], list(parts)))
    rows = cast("list[CompactRows]", list(parts))
    ids, logits, tail = (torch.cat([getattr(one, name) for one in rows]) for name in ("ids", "logits", "tail"))
    return replace(first, ids=ids, logits=logits, tail=tail)


class CompactSummary(LogitSummary):
    """Mean and deviation of the teacher's V logits, exact: those of the tail are stored."""

    def __init__(self, rows: CompactRows) -> None:
        super().__init__(torch.Size((len(rows), rows.vocab_size)), rows.tail)
        kept, n, vocab = rows.logits.to(rows.tail.dtype), rows.tail_size, rows.vocab_size
        mean, variance = rows.tail[:, len(KNOTS), None], rows.tail[:, -1:]  # of the tail: F'(0), F''(0)
        self.mean = (kept.sum(-1, keepdim=True) + n * mean) / vocab  # [C, 1], below the largest
        squares = (kept - self.mean).square().sum(-1, keepdim=True) + n * (variance + (mean - self.mean).square())
        self.deviation = (squares / max(vocab - 1, 1)).sqrt()  # [C, 1]

    def standard_deviation(self) -> Tensor:
        return self.deviation

    def sharpness(self) -> Tensor:
        return -self.mean

    def overlap(self) -> Tensor:
        raise UserError("teacher: a compact cache does not know the overlap of two whole distributions")


def _kept(d: Tensor, targets: Tensor, top_k: int) -> Tensor:
    """Which tokens of logits ``[C, V]`` are kept, bool: ``top_k`` a row, the label ``targets`` ``[C]`` among them."""
    ranked = d.scatter(-1, targets.unsqueeze(-1), math.inf)
    last = ranked.topk(top_k, -1).values[:, -1:]  # the smallest that is kept
    above, tied = ranked > last, ranked == last
    # topk takes any of those that are equal to the last one, and not the same on every device: take the first
    room = top_k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _tail_of(d: Tensor, keep: Tensor) -> Tensor:
    """F and F' at the knots and the variance, ``[C, 2 M + 1]``, of what ``keep`` leaves out of logits ``[C, V]``."""
    size = d.shape[-1] - int(keep[0].sum()) if len(d) else 0
    if not size:
        return d.new_zeros(len(d), TAIL_NUMBERS)
    top = d.masked_fill(keep, -math.inf).amax(-1, keepdim=True)  # taken off, or exp(4 d) would underflow
    x = d - top
    masses, slopes = [], []
    for b in KNOTS:
        weights = (b * x).exp_().masked_fill_(keep, 0.0)
        total = weights.sum(-1, keepdim=True)
        masses.append(b * top + total.log())
        slopes.append(top + (weights * x).sum(-1, keepdim=True) / total)
    mean = slopes[0] - top  # of x: at b = 0 all tokens weigh the same
    variance = (x - mean).square_().masked_fill_(keep, 0.0).sum(-1, keepdim=True) / size
    return torch.cat([*masses, *slopes, variance], -1)


def _between_knots(tail: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """F and its derivative at b ``[C, 1]``, ``[C, 1]`` each, by the cubic through values and slopes of ``tail``."""
    knots = torch.tensor(KNOTS, dtype=tail.dtype, device=tail.device)
    right = torch.bucketize(b.contiguous(), knots).clamp(1, len(KNOTS) - 1)  # [C, 1]
    b_0, b_1 = knots[right - 1], knots[right]
    f_0, f_1 = tail.gather(-1, right - 1), tail.gather(-1, right)
    s_0, s_1 = tail.gather(-1, right - 1 + len(KNOTS)), tail.gather(-1, right + len(KNOTS))
    h = b_1 - b_0
    x = ((b - b_0) / h).clamp(max=1.0)  # 1: at the last knot, or beyond it
    # Hermite's cubic, written from the right end: exact there, where x is 1
    y, rise = 1.0 - x, (f_1 - f_0) / h
    value = f_1 - h * y * (s_1 + y * (3.0 * rise - s_0 - 2.0 * s_1 + y * (s_0 + s_1 - 2.0 * rise)))
    slope = s_1 + y * (2.0 * (3.0 * rise - s_0 - 2.0 * s_1) + 3.0 * y * (s_0 + s_1 - 2.0 * rise))
    return value + (b - b_1).clamp(min=0.0) * s_1, slope
