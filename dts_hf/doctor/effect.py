"""The effect test: does the temperature change the gradient, and how much of the gradient is CE and how much KD?

Everything goes through ``DistillationLoss`` on the final states of a real batch, in fp32. Gradients are those with
respect to the student's final states ``[N, H]``: all that teacher and labels teach passes through them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dts_hf.doctor.diagnosis import Check, Skipped
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature.base import Reads, RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.constant import Constant
from dts_hf.temperature.parts.token_selection import TokenSelection

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
    """A real batch on its way into the loss: states ``[N, H]``, heads, targets ``[N]``, sequence numbers ``[N]``.

    Where the teacher has another tokenizer its rows are the labels that are the same for both, over the common ids, and
    ``common_mass`` is how much of the probability of student and teacher is on these ids.
    """

    student_states: Tensor
    student_head: Head
    teacher_states: Tensor | None
    teacher_head: Head | None
    targets: Tensor
    sequences: Tensor
    common_mass: tuple[float, float] | None = None

    def first(self, rows: int) -> Sample:
        """The first ``rows`` rows, so that a test on a large vocabulary stays cheap."""
        teacher = None if self.teacher_states is None else self.teacher_states[:rows]
        student, targets, sequences = (part[:rows] for part in (self.student_states, self.targets, self.sequences))
        return replace(self, student_states=student, teacher_states=teacher, targets=targets, sequences=sequences)

    def through(self, loss: DistillationLoss, states: Tensor | None = None) -> Any:
        """``loss`` over all rows; ``states`` ``[N, H]`` take the place of the student's where a gradient is wanted."""
        student = self.student_states if states is None else states
        teacher, targets = (self.teacher_states, self.teacher_head), self.targets
        return loss(student, self.student_head, *teacher, targets, max(len(targets), 1), self.sequences)

    def means(self, loss: DistillationLoss) -> dict[str, Any]:
        """What ``loss`` sums up, as means over the rows; the extremes of the temperature as they are.

        ``teacher_support`` is the teacher's effective support, exp(mean entropy), at its temperature.
        """
        with torch.no_grad():
            sums = self.through(loss).sums
        rows, whole = max(float(sums["rows"]), 1.0), ("temperature_min", "temperature_max", "rows")
        means = {name: (value if name in whole else value / rows).tolist() for name, value in sums.items()}
        return {**means, "teacher_support": math.exp(means["teacher_entropy_at_t"])}


class Nudged(TemperaturePolicy):
    """``policy`` with every temperature multiplied by ``NUDGE``."""

    name = "nudged"

    def __init__(self, policy: TemperaturePolicy) -> None:
        super().__init__()
        self.policy = policy
        self.raises, self.without_kernels = policy.raises, policy.without_kernels

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        return self.policy.reads

    @property
    def kd_ratio(self) -> float | None:
        return self.policy.kd_ratio

    @property
    def companions(self) -> tuple[tuple[float, float], ...]:
        return tuple((temperature * NUDGE, weight) for temperature, weight in self.policy.companions)

    @property
    def needs_sequence_gap(self) -> bool:
        return self.policy.needs_sequence_gap

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        given: Temperatures = self.policy(student_logits, teacher_logits, rows)
        scale = None if given.scale is None else given.scale * NUDGE**2
        raised = None if given.raised is None else given.raised / NUDGE
        return given._replace(student=given.student * NUDGE, teacher=given.teacher * NUDGE, scale=scale, raised=raised)


def gradient(loss: DistillationLoss, sample: Sample) -> Tensor:
    """Gradient ``[N, H]`` of the mean loss with respect to the student's states ``[N, H]``."""
    states = sample.student_states.detach().clone().requires_grad_()
    return torch.autograd.grad(sample.through(loss, states).loss, states)[0]


def with_policy(loss: DistillationLoss, policy: TemperaturePolicy, kd_ratio: float | None = None) -> DistillationLoss:
    """A copy of ``loss`` with another policy, and ``kd_ratio``."""
    other = copy.deepcopy(loss)
    other.temperature = policy
    other.kd_ratio = loss.kd_ratio if kd_ratio is None else kd_ratio
    return other


def check_effect(check: Check, loss: DistillationLoss, sample: Sample, teacher_is_for: str | None = None) -> None:
    """Nudge the temperature and compare gradients, split the gradient into its parts.

    Args:
        check: takes what is found.
        loss: the trainer's own.
        sample: a real batch.
        teacher_is_for: what the recipe needs its teacher for beside the loss, a sentence; None: for nothing else.

    Raises:
        Skipped: there is no teacher, or it has other work than the loss.
    """
    if sample.teacher_states is None:
        raise Skipped("there is no teacher: labels alone")
    loss = copy.deepcopy(loss)
    loss.temperature.begin_run()
    parts = _parts(loss, sample, 0.0)
    if parts["kd_norm"] <= NOTHING * parts["pull"]:  # a schedule of kd_ratio may bring the teacher in later
        parts = _parts(loss, sample, 0.5)
    ce, kd = parts["ce_norm"], parts["kd_norm"]
    share = kd / max(ce + kd, 1e-30)
    check.values = {**parts, "kd_share": share}
    if parts["kd_ratio"] == 0:
        if teacher_is_for is not None:
            raise Skipped(f"kd_ratio is 0: {teacher_is_for}")
        text = "kd_ratio is 0, so the teacher is run on every batch for nothing"
        check.warn("teacher-without-effect", text, "Raise loss.kd_ratio, or leave the teacher out")
        return
    if not math.isfinite(ce + kd):
        check.error("gradient-not-finite", "the gradient of the loss is not finite on a real batch", "")
        return
    check.summary = (
        f"labels (CE) give {1 - share:.0%} of the gradient and the teacher (KD) {share:.0%}, cosine "
        f"{parts['cosine']:+.2f}; T {parts['temperature']:.2f} x {NUDGE} changes KD's by {parts['change']:.0%}"
    )
    if kd <= NOTHING * max(ce, parts["pull"]):
        text = f"the teacher adds nothing to the gradient (KL between the two: {parts['kl']:.2g} nats per label)"
        check.error("kd-gradient-zero", text, "Is the student the teacher itself? Or choose another loss.divergence")
        return
    # The change is seen beside the labels' part, whose rounding is in both gradients
    if parts["change"] < NOTHING * max(1.0, ce / kd):
        check.error(
            "temperature-without-effect",
            f"the gradient is the same at T {parts['temperature']:.3g} and at {NUDGE} times that: with loss.divergence "
            f"'{loss.divergence.name}' and temperature_scaling '{loss.temperature_scaling}' the temperature does nothing",
            "Choose another loss.divergence, or a temperature nearer to 1",
        )
    ratio = parts["kd_ratio"]
    if share < SMALL_SHARE and ratio >= 0.1:
        text = f"the teacher has {share:.2%} of the gradient, although kd_ratio is {ratio:g}"
        check.warn("kd-hardly-counts", text, "temperature_scaling: squared, or a higher loss.kd_ratio")
    if 1 - share < SMALL_SHARE and ratio <= 0.9:
        text = f"the labels have {1 - share:.2%} of the gradient, although kd_ratio is {ratio:g}"
        check.warn("labels-hardly-count", text, "A lower loss.kd_ratio, or a lower temperature")


def _parts(loss: DistillationLoss, sample: Sample, place: float) -> dict[str, float]:
    """Norms of the parts of the gradient at ``place`` of the run, and what a nudge of T does to the KD gradient."""
    policy = loss.temperature
    policy.begin_step(place)
    kd_ratio = loss.kd_ratio if policy.kd_ratio is None else policy.kd_ratio
    means = sample.means(loss)
    whole = gradient(loss, sample)  # the very loss that is trained with
    labels = gradient(with_policy(loss, Constant(1.0), kd_ratio=0.0), sample)
    kd = whole - (1 - kd_ratio) * labels
    nudged = gradient(with_policy(loss, Nudged(policy)), sample)
    pull, kd_norm = float(labels.norm()), float(kd.norm())
    return {
        "kd_ratio": kd_ratio, "ce_norm": (1 - kd_ratio) * pull, "kd_norm": kd_norm, "pull": pull,
        "cosine": float((labels * kd).sum()) / max(pull * kd_norm, 1e-30), "temperature": means["temperature"],
        "change": float((nudged - whole).norm()) / max(kd_norm, 1e-30), "kl": means["kl"],
    }  # fmt: skip


def check_schedule(check: Check, loss: DistillationLoss, sample: Sample, steps: int, classes: str = "tokens") -> None:
    """Follow the temperature through a whole run whose gap stays what it is on the sample.

    Args:
        check: takes what is found.
        loss: the trainer's own.
        sample: a real batch.
        steps: optimizer steps of the run.
        classes: what the loss chooses among, in words.

    Raises:
        Skipped: no temperature acts on anything.
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
    curve = [now["temperature"] for now in followed]
    check.values = {"policy": name, "places": list(PLACES), "temperature": curve}
    low, high = min(now["temperature_min"] for now in followed), max(now["temperature_max"] for now in followed)
    path = " → ".join(f"{value:.2f}" for value in curve)
    check.summary = f"constant: T {curve[0]:.2f}" if name == "constant" else f"{name}: T {path} through the run"
    if name == "constant" and followed[0]["teacher_temperature"] != curve[0]:
        check.summary += f" (student), {followed[0]['teacher_temperature']:.2f} (teacher)"
    if any(now["temperature_max"] - now["temperature_min"] > 1e-6 for now in followed):
        check.summary += f"; between {low:.2f} and {high:.2f} by row"
    if not all(math.isfinite(value) and value > 0 for value in (low, high)):
        check.error("temperature-not-finite", f"policy '{name}' gives T {path}", "")
        return
    offered = {now["teacher_temperature"]: now["teacher_support"] for now in followed[::4]}
    if len(ends) > 1:
        offered = {t: sample.means(with_policy(loss, Constant(t)))["teacher_support"] for t in ends}
    vocabulary = sample.student_head.vocab_size
    check.values["support"] = [{"temperature": t, "support": n, "of": vocabulary} for t, n in offered.items()]
    check.summary += "; the teacher offers " + ", ".join(
        f"about {_rounded(support)} of {vocabulary:,} {classes} at T = {t:.3g} ({100 * support / vocabulary:.2g} %)"
        for t, support in offered.items()
    )
    # Policies that leave the student at T = 1 move the teacher, which shows in the soft loss
    soft = [now["kd"] for now in followed]
    still = name == "constant" or loss.temperature.raises is not None  # of one token it is another T, if a fixed one
    # What chooses tokens has its work there, even if nothing moves here: its share follows a loss that falls
    still |= any(isinstance(mechanism, TokenSelection) for mechanism in loss.temperature.mechanisms)
    if not still and high - low <= 1e-6 * high and max(soft) - min(soft) <= 1e-6:
        check.warn(
            "temperature-never-moves",
            f"policy '{name}' gives T {curve[0]:.3g} from the first step to the last, for every row",
            "Check the range of its options (t_init, t_min, t_max), or say temperature: {name: constant, value: T}",
        )
        return
    # The gap of a row is no matter of the schedule, and that of another run none of this one
    measured = loss.temperature.describe().get("gap_source") == "measured" or loss.temperature.probe is not None
    if name == "dts" and measured and getattr(loss.temperature, "granularity", "") == "batch":
        plain = [now["temperature"] for now in _follow(loss, sample, steps, gap=0.0)[0]]
        check.values["temperature_without_gap"] = plain
        check.summary += f"; T ends at {plain[-1]:.2f} if the gap closes"
        if max(abs(a - b) for a, b in zip(curve, plain, strict=True)) < 1e-3:
            rule = loss.temperature.describe().get("rule")
            check.warn(
                "gap-without-effect",
                f"the gap does not move the temperature: rule '{rule}' gives the plain cosine here",
                "rule: gap follows the gap while the student is the worse one; rule: paper acts only below a gap of -1",
            )


def _follow(
    loss: DistillationLoss, sample: Sample, steps: int, gap: float
) -> tuple[list[dict[str, Any]], tuple[float, ...]]:
    """Means at ``PLACES``, and the ends of the policy's range; ``gap`` 0 makes the teacher as bad as the student."""
    loss = copy.deepcopy(loss)
    policy = loss.temperature
    steps = min(max(steps, 2), SIMULATED_STEPS)
    mean = sample.means(loss)
    observed = {"temperature_grad": mean.get("temperature_grad", 0.0), "observed": tuple(mean.get("observed", ()))}
    teacher_ce = mean["ce"] + gap * (mean["teacher_ce"] - mean["ce"])
    stats = StepStats(student_ce=mean["ce"], teacher_ce=teacher_ce, kd=mean["kd"], num_items=mean["rows"], **observed)
    followed, done = [], 0
    for place in PLACES:
        while done < round(place * (steps - 1)):
            policy.begin_step(done / steps)
            policy.end_step(stats)
            policy.take_held_out(stats)
            done += 1
        policy.begin_step(done / steps)
        followed.append(sample.means(loss))
    return followed, policy.ends


def _rounded(count: float) -> str:
    """Two digits: a sample knows no more."""
    return f"{count:.2g}" if count < 100 else f"{float(f'{count:.2g}'):,.0f}"
