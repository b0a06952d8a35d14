"""What every temperature policy is: a function of progress, of the last step's statistics and of one chunk of logits.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary entries.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dts_hf.errors import UserError


class Temperatures(NamedTuple):
    """What a policy answers for one chunk: two temperatures, each ``[]`` or ``[C, 1]``, finite and above zero.

    Attributes:
        student, teacher: the logits are divided by these.
        scale: ``[]`` or ``[C, 1]``, the factor of the divergence under ``temperature_scaling: squared``; None means
            T_s T_t. Policies that fold another quantity into T (a standard deviation, say) give the factor of their paper.
        teacher_share: ``[]`` in [0, 1], the weight of the teacher's logits in the target softmax((1 - share) z_s +
            share z_t), z_s held constant (TAID, arXiv 2501.16937); None means 1: the teacher alone.
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
    """

    student_ce: float
    teacher_ce: float
    kd: float
    num_items: float
    temperature_grad: float = 0.0
    observed: tuple[float, ...] = ()

    @property
    def gap(self) -> float:
        """Student CE minus teacher CE, nats per label; positive while the student is the worse one."""
        return self.student_ce - self.teacher_ce


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
    #: What ``forward`` makes of the student's logits and holds constant, which force that drops, and why, as the page shows
    #: it. None: nothing, the gradient is the derivative of the reported loss. A policy that holds something under some
    #: options alone sets it to None under the others.
    held: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.progress = 0.0

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

    def log_values(self) -> dict[str, float]:
        """What the log should show beside the temperature, as it is in force now; the log has means over steps."""
        return {} if self.kd_ratio is None else {"kd_ratio": self.kd_ratio}

    def counters(self) -> dict[str, int]:
        """What the log should count, from the start of the run on; only what is above zero is shown."""
        return {}

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

    def check_classes(self, classes: int) -> None:
        """Refuse, before training, options that cannot work over so many classes: the vocabulary, or a task's labels."""

    def begin_run(self, steps: int | None = None) -> None:
        """Before the first step, and after a resume has loaded the state: read what the options name outside this run.

        Args:
            steps: optimizer steps of the whole run; None where they are not known yet.

        Raises:
            UserError: it cannot be read, or does not fit a run of this length.
        """

    def begin_step(self, progress: float) -> None:
        """Tell the policy where training is: ``progress`` in [0, 1], once per optimizer step."""
        self.progress = min(max(float(progress), 0.0), 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Temperatures for one chunk of logits ``[C, V]``; pure, so chunking cannot change the result."""
        value = torch.full((), self.temperature, dtype=student_logits.dtype, device=student_logits.device)
        return Temperatures(value, value)

    def end_step(self, stats: StepStats) -> None:
        """Take the reduced statistics of the optimizer step that just ended."""

    def state(self) -> dict[str, Any]:
        """Everything that must survive a checkpoint, as JSON-ready numbers."""
        return {field: copy.deepcopy(getattr(self, field)) for field in self.state_fields}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned.

        Raises:
            UserError: a field is missing, or was written by another policy.
        """
        if set(state) != set(self.state_fields):
            raise UserError(
                f"temperature state of '{self.name}': got the fields {sorted(state)}, expected {sorted(self.state_fields)}; "
                "was the checkpoint written with another policy?"
            )
        for field, value in state.items():
            setattr(self, field, copy.deepcopy(value))

    # nn.Module.state_dict carries the same numbers, so torch users need nothing special.
    def get_extra_state(self) -> dict[str, Any]:
        return self.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.load_state(state)

    def extra_repr(self) -> str:
        return f"name={self.name}, temperature={self.temperature:g}"


def check_number(policy: str, option: str, value: object, *, low: float, high: float, low_open: bool = False) -> float:
    """Return ``value`` as a float in [low, high] ((low, high] when ``low_open``); else a UserError names the option."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or value < low or value > high or (low_open and value == low):  # type: ignore[operator]
        bound = f"{'above' if low_open else 'from'} {low:g}" + (f" to {high:g}" if math.isfinite(high) else "")
        raise UserError(f"temperature.{option}: got {value!r} for policy '{policy}', expected a number {bound}")
    return float(value)  # type: ignore[arg-type]


def check_whole(option: str, value: object, low: int, expected: str) -> None:
    """Refuse what is neither None nor a whole number from ``low``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise UserError(f"temperature.{option}: got {value!r}, expected {expected}")


def check_range(policy: str, t_init: object, t_min: object, t_max: object) -> tuple[float, float, float]:
    """Return (t_init, t_min, t_max) with 0 < t_min <= t_init <= t_max; T_min = 0 would divide the logits by zero."""
    low = check_number(policy, "t_min", t_min, low=0.0, high=math.inf, low_open=True)
    high = check_number(policy, "t_max", t_max, low=low, high=math.inf)
    return check_number(policy, "t_init", t_init, low=low, high=high), low, high


def half_cosine(progress: float) -> float:
    """S(p) = (1 + cos(pi p)) / 2, from 1 at p = 0 to 0 at p = 1 (DTS, arXiv 2511.13767, Eq. 4)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), by way of tanh, which cannot overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))
