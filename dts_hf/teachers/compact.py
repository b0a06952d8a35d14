"""A compact cache: of each label the largest logits and what all others weigh, for those who cannot afford its states.

States are exact at every temperature. What is kept here is exact for the kept tokens, and spreads the rest evenly
(``loss.compact_rows``); so before anything is written it is measured, on rows of the recipe and at the temperatures that its
policy may visit, how much of the teacher's probability is kept and how far the rebuilt distribution is from the whole one.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dts_hf.divergences import Divergence
from dts_hf.divergences.base import Distributions
from dts_hf.errors import UserError
from dts_hf.loss.compact_rows import KNOTS, TAIL_NUMBERS, CompactRows
from dts_hf.loss.compact_served import check_served
from dts_hf.loss.selection import select_response
from dts_hf.models.head import Head
from dts_hf.models.pruning import evenly_spaced
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.self_test import LiveDifference
from dts_hf.temperature.base import RowStats, TemperaturePolicy

logger = logging.getLogger(__name__)

#: Less than this share of the teacher's probability in the kept tokens, at a temperature of the policy, is refused.
LEAST_MASS = 0.95
#: What kept logits may be stored in. They are differences from the largest: bfloat16 would lose 8 times as much as float16.
DTYPES = {"float16": torch.float16, "float32": torch.float32}
#: Tensors of a shard, ``[n, K]``, ``[n, K]`` and ``[n, 21]``.
PARTS = ("ids", "logits", "tail")
#: Where policies are asked for their temperatures, and how much sharper than its teacher a student may be at it.
_PROGRESS, _SHARPNESS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.5, 1.0, 2.0)
#: Labels whose temperatures are asked for, and labels that are measured before anything is written and before training, of
#: so many rows at least.
_ASKED, MEASURED, _FEWEST = 64, 512, 16


@dataclass(frozen=True)
class CompactFormat:
    """What is kept of a label.

    Attributes:
        top_k: K, the kept tokens, its label among them.
        vocab_size: V, the ids that teacher and student share: the distribution is over them.
        dtype: of the kept logits, of ``DTYPES``.
    """

    top_k: int
    vocab_size: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or not 1 <= self.top_k <= self.vocab_size:
            raise UserError(
                f"compact: got {self.top_k!r}, expected a number of tokens from 1 to the vocabulary of {self.vocab_size:,}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: got {self.dtype!r} for a compact cache, expected one of {', '.join(DTYPES)}")

    @property
    def label_bytes(self) -> int:
        """Of a label: ids and tail have 4 bytes a number."""
        return 2 * self.words

    @property
    def words(self) -> int:
        """Of a label, 2 bytes each."""
        return 2 * self.top_k + self.top_k * DTYPES[self.dtype].itemsize // 2 + 2 * TAIL_NUMBERS

    def rows(self, logits: Tensor, targets: Tensor) -> CompactRows:
        """What is kept of logits ``[n, V or more]`` in fp32 with the labels ``targets`` ``[n]``."""
        return CompactRows.of(logits[:, : self.vocab_size], targets, self.top_k, DTYPES[self.dtype])

    @torch.no_grad()
    def answer(self, states: Tensor, head: Head, targets: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
        """What is kept of final states, as ``pack`` lays it, and the label log-probabilities at T = 1, on the CPU.

        Args:
            states: ``[n, H]``.
            head: of the teacher, whole.
            targets: ``[n]``.
            block: rows of logits in memory at a time.
        """
        words, logprobs = [torch.zeros(0, self.words, dtype=torch.int16)], [torch.zeros(0)]
        for at in range(0, len(states), block):
            logits, chosen = logits_of(states[at : at + block], head.cut(self.vocab_size)), targets[at : at + block]
            words.append(self.pack(self.parts(self.rows(logits, chosen))))
            logprobs.append(logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1).float().cpu())
        return torch.cat(words), torch.cat(logprobs)

    def parts(self, rows: CompactRows) -> dict[str, Tensor]:
        """The tensors of a shard, on the CPU."""
        return {name: getattr(rows, name).cpu().contiguous() for name in PARTS}

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One tensor ``[n, words]`` int16 of the tensors of a shard: what a batch carries, and no Trainer casts."""
        return torch.cat([parts[name].view(torch.int16) for name in PARTS], -1)

    def unpack(self, words: Tensor) -> CompactRows:
        """The rows ``[n, words]`` that ``pack`` has laid into one tensor."""
        dtype = DTYPES[self.dtype]
        sizes = [2 * self.top_k, self.top_k * dtype.itemsize // 2, 2 * TAIL_NUMBERS]
        ids, logits, tail = (part.contiguous() for part in words.split(sizes, -1))
        return CompactRows(ids.view(torch.int32), logits.view(dtype), tail.view(torch.float32), self.vocab_size)


def logits_of(states: Tensor, head: Head) -> Tensor:
    """Logits ``[n, V]`` in fp32 of states ``[n, H]``, as the loss computes those of a live teacher."""
    raw = (states.to(head.weight.dtype) @ head.weight.detach().t()).float()
    return head.activate(raw if head.bias is None else raw + head.bias.detach().float())


# ----------------------------------------------------------------------------------------------------------- its error


class ErrorAt(NamedTuple):
    """What is lost at one temperature; means over labels.

    Attributes:
        temperature: T.
        mass: the teacher's probability of the kept tokens together.
        kl: KL(whole || rebuilt), nats.
        total_variation: half the sum of absolute differences.
        labels: how many were measured.
    """

    temperature: float
    mass: float
    kl: float
    total_variation: float
    labels: int

    def __str__(self) -> str:
        return (
            f"T {self.temperature:<6.4g} mass {self.mass:.4f}  KL {self.kl:.2e} nats  total variation "
            f"{self.total_variation:.2e}"
        )


@torch.no_grad()
def errors_of(logits: Tensor, rows: CompactRows, temperatures: Sequence[float], block: int = 64) -> list[ErrorAt]:
    """How far the rebuilt distribution is from the whole one.

    Args:
        logits: ``[n, V]`` in fp32, of the teacher.
        rows: what is kept of them.
        temperatures: to measure at.
        block: rows in memory at a time.
    """
    found, n = [], len(logits)
    for temperature in temperatures:
        sums = torch.zeros(3, dtype=torch.float64)
        for at in range(0, n, block):
            part = rows[at : at + block].to(torch.float32)
            log_p = (logits[at : at + block] / temperature).log_softmax(-1)
            rebuilt = part.at(temperature)
            p, log_q = log_p.exp(), rebuilt.logits - rebuilt.log_norm
            kept = p.gather(-1, part.ids.long()).sum()
            # 0 log 0 of an excluded token is 0
            kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
            sums += torch.stack([kept, kl, (p - rebuilt.prob).abs().sum() / 2]).double().cpu()
        mass, kl_mean, variation = (sums / max(n, 1)).tolist()
        found.append(ErrorAt(temperature, mass, kl_mean, variation, n))
    return found


@torch.no_grad()
def stored_errors(rows: CompactRows, temperatures: Sequence[float]) -> list[ErrorAt]:
    """The same without the teacher, of what is stored; the total variation, which cannot be had so, is NaN.

    The rebuilt log-probability is the same for all of the tail, and that of the kept tokens is the teacher's, so KL(whole ||
    rebuilt) is the entropy of the rebuilt distribution minus the teacher's own, which the slopes of the tail give.
    """
    whole, found = rows.to(torch.float32), []
    for temperature in temperatures:
        # sum over blocks: an entropy of the rebuilt distribution needs all of it
        entropy = torch.cat([whole[at : at + 64].at(temperature).entropy() for at in range(0, len(whole), 64)])
        kl = (entropy - whole.entropy(temperature)).mean()
        found.append(
            ErrorAt(temperature, float(whole.kept_mass(temperature).mean()), float(kl), float("nan"), len(rows))
        )
    return found


@torch.no_grad()
def compare_rows(stored: CompactRows, live: CompactRows, temperatures: Sequence[float]) -> LiveDifference:
    """Compare what is stored with what the live teacher would have kept of the same rows.

    Args:
        stored: n rows.
        live: as many.
        temperatures: 1 and the highest one of the policy.
    """
    kl: dict[float, list[Tensor]] = {temperature: [] for temperature in temperatures}
    for at in range(0, len(stored), 64):
        one, other = (rows[at : at + 64].to(torch.float32) for rows in (live, stored))
        for temperature in temperatures:
            kl[temperature].append(Distributions(one.at(temperature), other.at(temperature)).forward_kl())
    found = {temperature: torch.cat(values) for temperature, values in kl.items()}
    widest = float((stored.logits.float() - live.logits.float()).abs().max())
    means, largest = ({t: float(pick(values)) for t, values in found.items()} for pick in (torch.mean, torch.max))
    return LiveDifference(len(stored), means, largest, widest)


def check_mass(errors: Sequence[ErrorAt], instead: str, forced: bool = False) -> None:
    """Refuse, or warn of, a cache that keeps too little at a temperature of the policy.

    Args:
        errors: at the temperatures that the policy may visit.
        instead: a sentence that says what would do.
        forced: only warn.

    Raises:
        UserError: less than ``LEAST_MASS`` is kept.
    """
    low = [error for error in errors if not error.mass >= LEAST_MASS]
    if not low:
        return
    worst = min(low, key=lambda error: error.mass)
    what = (
        f"compact: the kept tokens have {worst.mass:.3f} of the teacher's probability at T = {worst.temperature:.4g}, "
        f"which the temperature policy may visit, expected {LEAST_MASS:g} at least ({worst.labels:,} labels, KL "
        f"{worst.kl:.2g} nats). {instead}"
    )
    if not forced:
        raise UserError(
            f"{what}. --force writes it all the same, for the temperatures of the recipe that it is written with"
        )
    logger.warning("%s (forced)", what)


@torch.no_grad()
def enough_tokens(logits: Tensor, temperature: float, most: int = 128) -> int:
    """The smallest power of two that, as K, keeps ``LEAST_MASS`` of the first ``most`` rows of logits ``[n, V]`` at T."""
    p = (logits[:most] / temperature).softmax(-1)
    mass = p.sort(-1, descending=True).values.cumsum(-1).mean(0)
    needed = int((mass < LEAST_MASS).sum()) + 1
    return min(1 << (needed - 1).bit_length(), logits.shape[-1])


# ------------------------------------------------------------------------------------------------------ where it is used


@torch.no_grad()
def visited(policy: TemperaturePolicy, rows: CompactRows, targets: Tensor) -> list[float]:
    """Temperatures of the teacher that a policy may visit, as far as they can be known before training, rising.

    The ends of its range, those of its further terms, and what it answers along the run where the student is as sharp as the
    teacher, half and twice as much: of all those answers the smallest and the largest.

    Args:
        policy: is not changed.
        rows: of the teacher; the first of them are looked at.
        targets: ``[n]``.

    Raises:
        UserError: the policy cannot begin.
    """
    rows, targets = rows[:_ASKED].to(torch.float32), targets[:_ASKED]
    policy = copy.deepcopy(policy)
    policy.begin_run()
    options = policy.describe()
    # Without a range the end is the student's temperature, and the teacher may have one of its own
    ends = policy.ends if len(policy.ends) > 1 else ()
    found = {*ends, *(temperature for temperature, _ in policy.companions)}
    found |= {float(options["t_max"])} if isinstance(options.get("t_max"), int | float) else set()
    ce, logits, teacher = -rows.log_probs(targets), rows.at(1.0).logits, rows.summary()
    stats = RowStats(ce, ce, torch.zeros_like(ce), torch.zeros_like(ce), torch.zeros_like(ce))
    answers: list[float] = []
    for progress in _PROGRESS:
        policy.begin_step(progress)
        for sharpness in _SHARPNESS:
            answer = policy(logits * sharpness, teacher, stats).teacher
            answers += [float(answer.min()), float(answer.max())]
    found |= {min(answers), max(answers)}
    return sorted({float(f"{temperature:.4g}") for temperature in found})


def measured_rows(rows: int, labels: int) -> list[int]:
    """Which rows have about 512 labels together, from the first to the last.

    Args:
        rows: how many there are.
        labels: of all of them.
    """
    wanted = max(_FEWEST, math.ceil(MEASURED * rows / max(labels, 1)))
    return evenly_spaced(min(wanted, rows), rows)


def alone(example: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of one encoded row, without padding, and its labels ``[1, T]``."""
    ids, labels = (torch.tensor([example[key]], device=device) for key in ("input_ids", "labels"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@torch.no_grad()
def pilot(
    teacher: Teacher, examples: Iterable[Mapping[str, Any]], form: CompactFormat, policy: TemperaturePolicy,
    divergence: Divergence, forced: bool = False,
) -> list[ErrorAt]:  # fmt: skip
    """Measure, before anything is written, what a cache would lose at the temperatures that the policy may visit.

    Args:
        teacher: whole, on its device.
        examples: encoded rows, see ``measured_rows``; 512 labels of them at most are looked at.
        form: what would be kept.
        policy: of the recipe.
        divergence: of the recipe.
        forced: warn where too little is kept.

    Raises:
        UserError: policy or divergence cannot be served, or too little is kept; the message says what would do.
    """
    check_served(policy, divergence)
    states, targets = [], []
    head = teacher.head
    assert head is not None
    for example in examples:
        inputs, marks = alone(example, head.weight.device)
        found = teacher.states(inputs, marks)
        assert isinstance(found, Tensor)
        states.append(found)
        targets.append(select_response(marks.unsqueeze(-1), marks)[1])
    logits = logits_of(torch.cat(states)[:MEASURED], head.cut(form.vocab_size))
    chosen = torch.cat(targets)[:MEASURED]
    rows = form.rows(logits, chosen)
    errors = errors_of(logits, rows, visited(policy, rows, chosen))
    worst = min(errors, key=lambda error: error.mass)
    check_mass(errors, _instead(enough_tokens(logits, worst.temperature), form, head.weight), forced)
    return errors


def _instead(needed: int, form: CompactFormat, weight: Tensor) -> str:
    """What would do in the place of a cache that keeps too little."""
    states = f"states, exact at every temperature, have {weight.shape[1] * weight.element_size():,} bytes a label"
    larger = CompactFormat(needed, form.vocab_size, form.dtype)
    return f"It would take {needed:,} tokens ({larger.label_bytes:,} bytes a label); {states} (leave --compact out)"


def described(form: CompactFormat, errors: Sequence[ErrorAt], forced: bool) -> dict[str, Any]:
    """What the manifest says of a compact cache.

    Args:
        form: what is kept.
        errors: as they were measured before it was written.
        forced: whether it was made although too little is kept.
    """
    return {
        "top_k": form.top_k, "vocab_size": form.vocab_size, "dtype": form.dtype, "knots": list(KNOTS), "forced": forced,
        "errors": [error._asdict() for error in errors],
    }  # fmt: skip
