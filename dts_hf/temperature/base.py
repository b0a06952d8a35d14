"""What every temperature policy is: a function of progress, of the last step's statistics and of one chunk of logits.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary entries.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dts_hf.errors import UserError, nearest
from dts_hf.registry import Between, range_of

#: What an answer of a policy is made of, each with all before it: nothing of the chunk, so that it is the same for all
#: chunks of a step; the statistics of the rows; ``LogitSummary``, which is less than the logits; the logits.
Reads = Literal["nothing", "rows", "summary", "logits"]


class Temperatures(NamedTuple):
    """What a policy answers for one chunk: two temperatures, each ``[]`` or ``[C, 1]``, finite and above zero.

    Attributes:
        student, teacher: the logits are divided by these.
        scale: ``[]`` or ``[C, 1]``, the factor of the divergence under ``temperature_scaling: squared``; None means
            T_s T_t. Policies that fold another quantity into T (a standard deviation, say) give the factor of their paper.
        teacher_share: ``[]`` in [0, 1], the weight of the teacher's logits in the target softmax((1 - share) z_s +
            share z_t), z_s held constant (TAID, arXiv 2501.16937); None means 1: the teacher alone.
        raised: ``[C, 1]``, added to the teacher's logit, after the division by T_t, of the one token that the policy's
            ``raises`` names. None: to none.
        weight: ``[C, 1]``, a factor of each row's soft loss under any ``temperature_scaling``; 1 on average over the rows of
            a step, or the soft loss changes its weight beside the cross-entropy. None means 1.
        peaked: ``[C, 1]`` bool, the rows whose T_s is a constant multiple of max z_s - mean z_s. The loss adds the
            derivative through T_s: that of the softmax, and that of the factor where it is T_s T_t. A ``scale`` that is
            given must not depend on z_s.
        scale_free: ``[C, 1]`` bool, the rows whose T_s is a constant multiple of the standard deviation of z_s over the
            vocabulary. What they train on then does not depend on the scale of z_s, and the loss takes the part of the
            gradient along z_s - mean z_s out: the derivative through T_s. ``scale`` must be given with it, and must not
            depend on z_s. None means that T_s is a number to the loss.
        observed: ``[C, K]``, detached features of each row. Their means over the optimizer step, all micro-batches and
            ranks, come back in ``StepStats.observed``: the one road from rows to state that no chunking can change.
    """

    student: Tensor
    teacher: Tensor
    scale: Tensor | None = None
    teacher_share: Tensor | None = None
    observed: Tensor | None = None
    scale_free: Tensor | None = None
    raised: Tensor | None = None
    weight: Tensor | None = None
    peaked: Tensor | None = None


class RowStats(NamedTuple):
    """Per-row statistics at T = 1, each ``[C]``, computed once per chunk and shared by policy and loss (nats).

    ``sequence_gap`` is the mean of student CE - teacher CE over all labels of the row's sequence; it is there when the
    policy sets ``needs_sequence_gap``.
    """

    student_ce: Tensor
    teacher_ce: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    sequence_gap: Tensor | None = None


@dataclass(frozen=True)
class StepStats:
    """Means over ONE optimizer step: every micro-batch of every rank, weighted by labels (nats per label).

    Attributes:
        temperature_grad: d kd / d T for T_s = T_t = T, scale included and no weight held; only for policies with
            ``learns``.
        observed: the means of ``Temperatures.observed``, K numbers.
        by_teacher: the same of the rows of each teacher that had some, where there are several.
    """

    student_ce: float
    teacher_ce: float
    kd: float
    num_items: float
    temperature_grad: float = 0.0
    observed: tuple[float, ...] = ()
    by_teacher: Mapping[str, StepStats] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Student CE minus teacher CE, nats per label; positive while the student is the worse one."""
        return self.student_ce - self.teacher_ce


class Probe(NamedTuple):
    """What a policy wants measured on held-out rows, the same ones each time (``take_held_out``).

    Attributes:
        every: before the first optimizer step and after every so many.
        rows: how many of the held-out rows, spread evenly over them; all where there are fewer.
    """

    every: int
    rows: int


class Mechanism:
    """A part with options and state of its own, for any policy that lists it in ``self.mechanisms``.

    Its options are parameters of the policy, and kept here under the same names; the numbers in ``state_fields`` join the
    policy's state. The policy calls it where it needs it; what is below it is told by the policy's base.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()
    #: As ``TemperaturePolicy.probe``, which looks for it.
    probe: Probe | None = None

    def check_classes(self, classes: int) -> None:
        """As ``TemperaturePolicy.check_classes``, which calls it."""

    def begin_run(self, steps: int | None) -> None:
        """As ``TemperaturePolicy.begin_run``, which calls it."""

    def end_step(self, stats: StepStats) -> None:
        """As ``TemperaturePolicy.end_step``, which calls it."""

    def take_held_out(self, stats: StepStats) -> None:
        """As ``TemperaturePolicy.take_held_out``, which calls it."""

    def log_values(self) -> dict[str, float]:
        """As ``TemperaturePolicy.log_values``, which calls it."""
        return {}

    def counters(self) -> dict[str, int]:
        """As ``TemperaturePolicy.counters``, which calls it."""
        return {}


class TemperaturePolicy(nn.Module):
    """Base of all policies. A policy is one file in this folder, found by its ``name``.

    A training loop calls ``begin_run`` once, ``begin_step`` once before an optimizer step, ``forward`` once per chunk of
    logits, and ``end_step`` once after it. State is plain numbers (``state_fields``), so it fits into a JSON file.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    state_fields: ClassVar[tuple[str, ...]] = ()
    #: The policy wants ``StepStats.temperature_grad``; it gives one ``[]`` temperature for student and teacher.
    learns: ClassVar[bool] = False
    #: How much of a chunk ``forward`` looks at. What is not asked for costs nothing on a GPU; "logits" costs most. A policy
    #: whose options decide makes it a property, and must never look at more than it says.
    reads: Reads = "logits"
    #: The token whose logit ``Temperatures.raised`` moves: the row's label, or the teacher's first choice. None: no such.
    raises: Literal["label", "first_choice"] | None = None
    #: What of its answer the kernels of the loss do not know, as a message says it: PyTorch then does its rows on a GPU too.
    without_kernels: str | None = None
    #: Whether what it is told of a step, and reads of a row, has one meaning whoever wrote the text. The gap has not: on
    #: text of the student's own its mean is -KL(student || teacher). A policy without it is not told of such steps where
    #: their labels are the text itself (``holding``).
    any_text: bool = False
    #: Whether a row's temperature can be another one in another step, or in another row; False: each model has one number
    #: for the whole run (at one token of a row a second one, where the policy ``raises``).
    moves: bool = True
    #: The labels of this step say nothing to the policy. The loop sets it before ``begin_step`` and leaves out ``end_step``.
    #: What follows progress goes on; what was measured stays; rows that would have a temperature of their own, by their
    #: labels, all run at ``temperature``.
    holding: bool = False
    #: What ``forward`` makes of the student's logits and holds constant, which force that drops, and why, as the page shows
    #: it. None: nothing, the gradient is the derivative of the reported loss. A policy that holds something under some
    #: options alone sets it to None under the others.
    held: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.progress = 0.0
        self.mechanisms: tuple[Mechanism, ...] = ()

    @property
    def temperature(self) -> float:
        """The temperature now in force; for a policy per row one number that stands for it (its docstring says which)."""
        raise NotImplementedError

    @property
    def cosine(self) -> float | None:
        """The plain cosine this policy is compared with, where it has one (logged beside the temperature)."""
        return None

    @property
    def kd_ratio(self) -> float | None:
        """The weight of the soft loss in force, where the policy schedules it too; None leaves it to the loss."""
        return None

    def of_teacher(self, teacher: str | None) -> TemperaturePolicy:
        """The policy for the rows of one of several teachers: this one, unless each has its own; None: of all rows."""
        return self

    def log_values(self) -> dict[str, float]:
        """What the log should show beside the temperature, as it is in force now; the log has means over steps."""
        values = {} if self.kd_ratio is None else {"kd_ratio": self.kd_ratio}
        return values | {
            name: value for mechanism in self.mechanisms for name, value in mechanism.log_values().items()
        }

    def counters(self) -> dict[str, int]:
        """What the log should count, from the start of the run on; only what is above zero is shown."""
        return {name: count for mechanism in self.mechanisms for name, count in mechanism.counters().items()}

    @property
    def companions(self) -> tuple[tuple[float, float], ...]:
        """Further terms of the soft loss as (temperature, weight): weight T^2 D(p_T, q_T), T the same for all rows."""
        return ()

    @property
    def needs_sequence_gap(self) -> bool:
        """Whether ``forward`` reads ``rows.sequence_gap`` (the loss then looks at every row of a sequence first)."""
        return False

    @property
    def ends(self) -> tuple[float, ...]:
        """t_init and t_min, or what they are called, of a policy that has a range; else the temperature in force."""
        return (self.temperature,)

    @property
    def highest(self) -> float | None:
        """The highest T that a row of either model may have; None: no option tells it before training.

        Here that of ``ends`` and ``companions``. A policy that makes T of the rows has a bound if it overrides this.
        """
        if self.reads != "nothing":
            return None
        return max([*self.ends, *(t for t, _ in self.companions)])

    def check_classes(self, classes: int) -> None:
        """Refuse, before training, options that cannot work over so many classes: the vocabulary, or a task's labels.

        Raises:
            UserError: a mechanism of the policy needs more of them.
        """
        for mechanism in self.mechanisms:
            mechanism.check_classes(classes)

    def begin_run(self, steps: int | None = None) -> None:
        """Before the first step, and after a resume has loaded the state: read what the options name outside this run.

        Args:
            steps: optimizer steps of the whole run; None where they are not known yet.

        Raises:
            UserError: it cannot be read, or does not fit a run of this length.
        """
        for mechanism in self.mechanisms:
            mechanism.begin_run(steps)

    def begin_step(self, progress: float) -> None:
        """Tell the policy where training is: ``progress`` in [0, 1], once per optimizer step."""
        self.progress = min(max(float(progress), 0.0), 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give the temperatures of one chunk. Pure: neither chunks nor their order can change a result.

        Args:
            student_logits: ``[C, V]``; what a policy makes of them it makes of ``student_logits.detach()``. Where ``reads``
                is "summary" it may be a ``LogitSummary`` of them, and a tensor without rows where it is less.
            teacher_logits: ``[C, V]``, likewise.
            rows: statistics of the same rows at T = 1, ``[C]`` each; without rows where ``reads`` is "nothing".

        Returns:
            Temperatures in the dtype of the logits: here one for all rows and both models, ``[]``.
        """
        value = torch.full((), self.temperature, dtype=student_logits.dtype, device=student_logits.device)
        return Temperatures(value, value)

    def end_step(self, stats: StepStats) -> None:
        """Take the reduced statistics of the optimizer step that just ended.

        Raises:
            UserError: a mechanism cannot do with them what its options ask for.
        """
        for mechanism in self.mechanisms:
            mechanism.end_step(stats)

    @property
    def probe(self) -> Probe | None:
        """What has to be measured on held-out rows, and how often; None: nothing."""
        return next((mechanism.probe for mechanism in self.mechanisms if mechanism.probe is not None), None)

    def take_held_out(self, stats: StepStats) -> None:
        """Take the means over the held-out rows of ``probe``, at T = 1, of the student as it is between two steps."""
        for mechanism in self.mechanisms:
            mechanism.take_held_out(stats)

    def describe(self) -> dict[str, Any]:
        """The options that build this policy again, those of its mechanisms too; without those that are None."""
        holders = (self, *self.mechanisms)
        options = inspect.signature(type(self)).parameters
        values = ((option, getattr(holder, option, None)) for option in options for holder in holders)
        return {option: value for option, value in values if value is not None}

    def checked(self, option: str, value: object) -> float:
        """``value`` as a float within the range that the annotation of ``option`` in ``__init__`` says.

        Raises:
            UserError: not a finite number, or out of range.
        """
        return check_between(self.name, option, value, range_of(type(self), option))

    def checked_whole(self, option: str, value: object) -> int:
        """``value`` where it is a whole number in the range that the annotation of ``option`` says, which has a lower end.

        Raises:
            UserError: it is none.
        """
        low = range_of(type(self), option).low
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UserError(
                f"temperature.{option}: got {value!r} for policy '{self.name}', expected a whole number from {low:g}"
            )
        return value

    def state(self) -> dict[str, Any]:
        """Everything that must survive a checkpoint, as JSON-ready numbers."""
        return {field: copy.deepcopy(getattr(holder, field)) for field, holder in self._state_holders().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned.

        Raises:
            UserError: a field is missing, or was written by another policy.
        """
        holders = self._state_holders()
        if set(state) != set(holders):
            raise UserError(
                f"temperature state of '{self.name}': got the fields {sorted(state)}, expected {sorted(holders)}; "
                "was the checkpoint written with another policy?"
            )
        for name, value in state.items():
            setattr(holders[name], name, copy.deepcopy(value))

    def _state_holders(self) -> dict[str, TemperaturePolicy | Mechanism]:
        """Who has which field of the state."""
        holders: tuple[TemperaturePolicy | Mechanism, ...] = (self, *self.mechanisms)
        return {field: holder for holder in holders for field in holder.state_fields}

    # nn.Module.state_dict carries the same numbers, so torch users need nothing special.
    def get_extra_state(self) -> dict[str, Any]:
        """``state``, for ``state_dict``."""
        return self.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """``load_state``, for ``load_state_dict``."""
        self.load_state(state)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"name={self.name}, temperature={self.temperature:g}"


def check_number(policy: str, option: str, value: object, *, low: float, high: float, low_open: bool = False) -> float:
    """Return ``value`` as a float in [low, high], or in (low, high].

    Args:
        policy: its name, for the message.
        option: the option's name, for the message.
        value: what the recipe has.
        low: the lower bound.
        high: the upper bound, which belongs to the range; may be infinite.
        low_open: whether ``low`` itself is outside.

    Raises:
        UserError: ``value`` is not a finite number, or out of range.
    """
    return check_between(policy, option, value, Between(low, high, "high" if low_open else "both"))


def check_between(policy: str, option: str, value: object, limits: Between) -> float:
    """Return ``value`` as a float within ``limits``.

    Args:
        policy: its name, for the message.
        option: the option's name, for the message.
        value: what the recipe has.
        limits: the range.

    Raises:
        UserError: not a finite number, or out of range.
    """
    if value not in limits:
        bound = f"{'from' if limits.ends in ('both', 'low') else 'above'} {limits.low:g}"
        if math.isfinite(limits.high):
            bound += f" to {'' if limits.ends in ('both', 'high') else 'below '}{limits.high:g}"
        raise UserError(f"temperature.{option}: got {value!r} for policy '{policy}', expected a number {bound}")
    return float(value)  # type: ignore[arg-type]


def check_temperature(policy: str, option: str, value: object) -> float:
    """Return ``value`` as a temperature, a finite float above 0; else a ``UserError`` names the option."""
    return check_number(policy, option, value, low=0.0, high=math.inf, low_open=True)


def check_range(policy: str, t_init: object, t_min: object, t_max: object) -> tuple[float, float, float]:
    """Return (t_init, t_min, t_max) with 0 < t_min <= t_init <= t_max.

    Args:
        policy: its name, for the message.
        t_init: temperature of the first step.
        t_min: floor; 0 would divide the logits by zero.
        t_max: ceiling.

    Raises:
        UserError: one of them is not a finite number, or out of order.
    """
    low = check_temperature(policy, "t_min", t_min)
    high = check_number(policy, "t_max", t_max, low=low, high=math.inf)
    return check_number(policy, "t_init", t_init, low=low, high=high), low, high


def check_whole(option: str, value: object, low: int, expected: str) -> int | None:
    """Return ``value`` where it is a whole number from ``low``, or None.

    Args:
        option: the option's name, for the message.
        value: what the recipe has.
        low: the lower bound.
        expected: the end of the message.

    Raises:
        UserError: it is neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= low):
        return value
    raise UserError(f"temperature.{option}: got {value!r}, expected {expected}")


def check_flag(option: str, value: object) -> bool:
    """Return ``value`` where it is true or false.

    Raises:
        UserError: it is neither; the option is named.
    """
    if not isinstance(value, bool):
        raise UserError(f"temperature.{option}: got {value!r}, expected true or false")
    return value


def check_choice(option: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` where it is one of ``choices``.

    Raises:
        UserError: it is not; the option and the nearest choice are named.
    """
    if value not in choices:
        raise UserError(
            f"temperature.{option}: got {value!r}, expected one of {', '.join(choices)}.{nearest(str(value), choices)}"
        )
    return str(value)


def half_cosine(progress: float) -> float:
    """S(p) = (1 + cos(pi p)) / 2, from 1 at p = 0 to 0 at p = 1 (DTS, arXiv 2511.13767, Eq. 4)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), by way of tanh, which cannot overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))
