"""The effect test: does the temperature change the gradient, and how much of the gradient is CE and how much KD?

Everything goes through ``DistillationLoss`` on the final states of a real batch, in fp32. Gradients are those with
respect to the student's final states ``[N, H]``: all that teacher and labels teach passes through them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dts_hf.doctor.diagnosis import Check, Skipped
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.constant import Constant

#: The temperature is multiplied by this to see whether the gradient follows.
NUDGE = 1.25
#: Below this relative size a gradient, or a change of one, counts as none: ten times the rounding of fp32 sums.
NOTHING = 1e-5
#: A part of the loss with less than this share of the gradient has no say.
SMALL_SHARE = 0.01
#: Steps of the simulated schedule, and the places at which it is looked at.
SIMULATED_STEPS = 200
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sample:
    """A real batch on its way into the loss: states ``[N, H]``, heads, targets ``[N]``, sequence numbers ``[N]``."""

    student_states: Tensor
    student_head: Head
    teacher_states: Tensor | None
    teacher_head: Head | None
    targets: Tensor
    sequences: Tensor

    def first(self, rows: int) -> Sample:
        """The first ``rows`` rows, so that a test on a large vocabulary stays cheap."""
        teacher = None if self.teacher_states is None else self.teacher_states[:rows]
        return replace(
            self,
            student_states=self.student_states[:rows],
            teacher_states=teacher,
            targets=self.targets[:rows],
            sequences=self.sequences[:rows],
        )


class Nudged(TemperaturePolicy):
    """``policy`` with its temperature multiplied by ``factor`` and its ``kd_ratio`` replaced."""

    name = "nudged"

    def __init__(self, policy: TemperaturePolicy, kd_ratio: float, factor: float = 1.0) -> None:
        super().__init__()
        self.policy, self.ratio, self.factor = policy, kd_ratio, factor

    @property
    def temperature(self) -> float:
        return self.policy.temperature * self.factor

    @property
    def kd_ratio(self) -> float | None:
        return self.ratio

    @property
    def companions(self) -> tuple[tuple[float, float], ...]:
        return tuple((temperature * self.factor, weight) for temperature, weight in self.policy.companions)

    @property
    def needs_sequence_gap(self) -> bool:
        return self.policy.needs_sequence_gap

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        found = self.policy(student_logits, teacher_logits, rows)
        scale = None if found.scale is None else found.scale * self.factor**2
        return found._replace(student=found.student * self.factor, teacher=found.teacher * self.factor, scale=scale)


def gradient(loss: DistillationLoss, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the mean loss with respect to the student's states ``[N, H]``, and the sums of the pass."""
    states = sample.student_states.detach().clone().requires_grad_()
    output = loss(
        states,
        sample.student_head,
        sample.teacher_states,
        sample.teacher_head,
        sample.targets,
        max(len(states), 1),
        sample.sequences,
    )
    (found,) = torch.autograd.grad(output.loss, states)
    return found, output.sums


def with_policy(loss: DistillationLoss, policy: TemperaturePolicy) -> DistillationLoss:
    """``loss`` with another policy; the two share nothing that changes."""
    return DistillationLoss(
        loss.divergence,
        temperature=policy,
        kd_ratio=loss.kd_ratio,
        temperature_scaling=loss.temperature_scaling,
        logits_budget_mb=loss.logits_budget_mb,
    )


def check_effect(check: Check, loss: DistillationLoss, sample: Sample, teacher_is_for: str | None = None) -> None:
    """Nudge the temperature and compare gradients, split the gradient into its parts.

    Args:
        loss: the trainer's own.
        sample: a real batch.
        teacher_is_for: what the recipe needs its teacher for beside the loss, a sentence; None: for nothing else.
    """
    if sample.teacher_states is None:
        raise Skipped("there is no teacher: labels alone")
    loss = copy.deepcopy(loss)
    loss.temperature.begin_run()
    found = _parts(loss, sample, 0.0)
    if found["kd_norm"] <= NOTHING * found["pull"]:  # a schedule of kd_ratio may bring the teacher in later
        found = _parts(loss, sample, 0.5)
    ce, kd = found["ce_norm"], found["kd_norm"]
    share = kd / max(ce + kd, 1e-30)
    check.values = {**found, "kd_share": share}
    if found["kd_ratio"] == 0:
        if teacher_is_for is not None:
            raise Skipped(f"kd_ratio is 0: {teacher_is_for}")
        check.warn(
            "teacher-without-effect",
            "kd_ratio is 0, so the teacher is run on every batch for nothing",
            "Raise loss.kd_ratio, or leave the teacher out",
        )
        return
    if not math.isfinite(ce + kd):
        check.error("gradient-not-finite", "the gradient of the loss is not finite on a real batch", "")
        return
    check.summary = (
        f"labels (CE) give {1 - share:.0%} of the gradient and the teacher (KD) {share:.0%}, cosine "
        f"{found['cosine']:+.2f}; T {found['temperature']:.2f} x {NUDGE} changes KD's by {found['change']:.0%}"
    )
    if kd <= NOTHING * max(ce, found["pull"]):
        check.error(
            "kd-gradient-zero",
            f"the teacher adds nothing to the gradient (KL between the two: {found['kl']:.2g} nats per label)",
            "Is the student the teacher itself? Or choose another loss.divergence",
        )
        return
    if found["change"] < NOTHING:
        check.error(
            "temperature-without-effect",
            f"the gradient is the same at T {found['temperature']:.3g} and at {NUDGE} times that: with loss.divergence "
            f"'{loss.divergence.name}' and temperature_scaling '{loss.temperature_scaling}' the temperature does nothing",
            "Choose another loss.divergence, or a temperature nearer to 1",
        )
    if share < SMALL_SHARE and found["kd_ratio"] >= 0.1:
        check.warn(
            "kd-hardly-counts",
            f"the teacher has {share:.2%} of the gradient, although kd_ratio is {found['kd_ratio']:g}",
            "temperature_scaling: squared, or a higher loss.kd_ratio",
        )
    if 1 - share < SMALL_SHARE and found["kd_ratio"] <= 0.9:
        check.warn(
            "labels-hardly-count",
            f"the labels have {1 - share:.2%} of the gradient, although kd_ratio is {found['kd_ratio']:g}",
            "A lower loss.kd_ratio, or a lower temperature",
        )


def _parts(loss: DistillationLoss, sample: Sample, place: float) -> dict[str, float]:
    """Norms of the parts of the gradient at ``place`` of the run, and what a nudge of T does to the KD gradient."""
    policy = loss.temperature
    policy.begin_step(place)
    kd_ratio = loss.kd_ratio if policy.kd_ratio is None else policy.kd_ratio
    whole, sums = gradient(loss, sample)  # the very loss that is trained with
    labels, _ = gradient(with_policy(loss, Nudged(policy, 0.0)), sample)
    ce = (1 - kd_ratio) * labels
    kd = whole - ce
    pull, _ = gradient(with_policy(loss, Nudged(policy, 1.0)), sample)
    nudged, _ = gradient(with_policy(loss, Nudged(policy, 1.0, NUDGE)), sample)
    rows = max(float(sums["rows"]), 1.0)
    ce_norm, kd_norm, pull_norm = (float(part.norm()) for part in (ce, kd, pull))
    return {
        "kd_ratio": kd_ratio,
        "ce_norm": ce_norm,
        "kd_norm": kd_norm,
        "pull": float(labels.norm()),
        "cosine": float((labels * pull).sum()) / max(float(labels.norm()) * pull_norm, 1e-30),
        "temperature": float(sums["temperature"]) / rows,
        "change": float((nudged - pull).norm()) / max(pull_norm, 1e-30),
        "kl": float(sums["kl"]) / rows,
    }


def check_schedule(check: Check, loss: DistillationLoss, sample: Sample, steps: int, classes: str = "tokens") -> None:
    """Follow the temperature through a whole run whose gap stays what it is on the sample.

    Args:
        steps: optimizer steps of the run.
        classes: what the loss chooses among, in words.

    Raises:
        UserError: the policy cannot do on this sample, or in so many steps, what its options ask for.
    """
    if sample.teacher_states is None:
        raise Skipped("there is no teacher: labels alone")
    if loss.kd_ratio == 0 and loss.temperature.kd_ratio is None:
        raise Skipped("kd_ratio is 0: there is nothing for a temperature to act on")
    name = loss.temperature.name
    loss = copy.deepcopy(loss)
    loss.temperature.begin_run(steps)
    followed, ends = _follow(loss, sample, steps, gap=1.0)
    curve = [seen.mean for seen in followed]
    check.values = {"policy": name, "places": list(PLACES), "temperature": curve}
    low, high = min(seen.low for seen in followed), max(seen.high for seen in followed)
    words = " → ".join(f"{value:.2f}" for value in curve)
    by_row = any(seen.high - seen.low > 1e-6 for seen in followed)
    check.summary = f"constant: T {curve[0]:.2f}" if name == "constant" else f"{name}: T {words} through the run"
    if name == "constant" and followed[0].teacher != curve[0]:
        check.summary += f" (student), {followed[0].teacher:.2f} (teacher)"
    if by_row:
        check.summary += f"; between {low:.2f} and {high:.2f} by row"
    if any(not math.isfinite(value) or value <= 0 for value in (low, high)):
        check.error("temperature-not-finite", f"policy '{name}' gives T {words}", "")
        return
    offered = (
        _on_offer(loss, sample, ends) if len(ends) > 1 else {seen.teacher: seen.support for seen in followed[::4]}
    )
    vocabulary = sample.student_head.vocab_size
    check.values["support"] = [{"temperature": t, "support": n, "of": vocabulary} for t, n in offered.items()]
    check.summary += "; the teacher offers " + ", ".join(
        f"about {_rounded(support)} of {vocabulary:,} {classes} at T = {t:.3g} ({100 * support / vocabulary:.2g} %)"
        for t, support in offered.items()
    )
    # Policies that leave the student at T = 1 move the teacher, which shows in the soft loss
    moves = high - low > 1e-6 * high or max(seen.kd for seen in followed) - min(seen.kd for seen in followed) > 1e-6
    if name != "constant" and not moves:
        check.warn(
            "temperature-never-moves",
            f"policy '{name}' gives T {curve[0]:.3g} from the first step to the last, for every row",
            "Check the range of its options (t_init, t_min, t_max), or say temperature: {name: constant, value: T}",
        )
        return
    # The gap of a row is no matter of the schedule, and that of another run none of this one
    measured = loss.temperature.describe().get("gap_source") == "measured"
    if name == "dts" and measured and getattr(loss.temperature, "granularity", "") == "batch":
        plain = [seen.mean for seen in _follow(loss, sample, steps, gap=0.0)[0]]
        check.values["temperature_without_gap"] = plain
        check.summary += f"; T ends at {plain[-1]:.2f} if the gap closes"
        if max(abs(a - b) for a, b in zip(curve, plain, strict=True)) < 1e-3:
            rule = getattr(loss.temperature, "rule", "")
            check.warn(
                "gap-without-effect",
                f"the gap does not move the temperature: rule '{rule}' gives the plain cosine here",
                "rule: gap follows the gap while the student is the worse one; rule: paper acts only below a gap of -1",
            )


class Seen(NamedTuple):
    """Temperature over rows at one place of the run, the mean soft loss there, the teacher's T and effective support."""

    mean: float
    low: float
    high: float
    kd: float
    teacher: float
    support: float


def _follow(loss: DistillationLoss, sample: Sample, steps: int, gap: float) -> tuple[list[Seen], tuple[float, ...]]:
    """What is seen at ``PLACES``, and the ends of the policy's range; ``gap`` 0 makes the teacher as bad as the student."""
    loss = copy.deepcopy(loss)
    policy = loss.temperature
    steps = min(max(steps, 2), SIMULATED_STEPS)
    stats = _statistics(loss, sample, gap)
    found, done = [], 0
    for place in PLACES:
        while done < round(place * (steps - 1)):
            policy.begin_step(done / steps)
            policy.end_step(stats)
            done += 1
        policy.begin_step(done / steps)
        with torch.no_grad():
            sums = _sums(loss, sample)
        rows = max(float(sums["rows"]), 1.0)
        values = (
            sums["temperature"] / rows,
            sums["temperature_min"],
            sums["temperature_max"],
            sums["kd"] / rows,
            sums["teacher_temperature"] / rows,
            (sums["teacher_entropy_at_t"] / rows).exp(),
        )
        found.append(Seen(*map(float, values)))
    return found, policy.ends


def _on_offer(loss: DistillationLoss, sample: Sample, temperatures: Sequence[float]) -> dict[float, float]:
    """The teacher's effective support, exp(mean entropy), at each of the temperatures."""
    found = {}
    for temperature in temperatures:
        sums = _sums(with_policy(loss, Constant(temperature)), sample)
        found[temperature] = math.exp(float(sums["teacher_entropy_at_t"]) / max(float(sums["rows"]), 1.0))
    return found


def _rounded(count: float) -> str:
    """Two digits: a sample knows no more."""
    return f"{count:.2g}" if count < 100 else f"{float(f'{count:.2g}'):,.0f}"


def _statistics(loss: DistillationLoss, sample: Sample, gap: float) -> StepStats:
    sums = _sums(loss, sample)
    rows = max(float(sums["rows"]), 1.0)
    mean = {name: float(value) / rows for name, value in sums.items() if value.dim() == 0}
    observed: Sequence[Any] = (sums["observed"] / rows).tolist() if "observed" in sums else ()
    teacher_ce = mean["ce"] + gap * (mean["teacher_ce"] - mean["ce"])
    grad = mean.get("temperature_grad", 0.0)
    return StepStats(mean["ce"], teacher_ce, mean["kd"], rows, temperature_grad=grad, observed=tuple(observed))


def _sums(loss: DistillationLoss, sample: Sample) -> dict[str, Tensor]:
    with torch.no_grad():
        output = loss(
            sample.student_states,
            sample.student_head,
            sample.teacher_states,
            sample.teacher_head,
            sample.targets,
            max(len(sample.targets), 1),
            sample.sequences,
        )
    return output.sums
