"""Curriculum Temperature KD (CTKD, arXiv 2211.16231), global form: a learnt temperature that works against the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from dts_hf.errors import UserError
from dts_hf.registry import Between, PositiveFloat, Share
from dts_hf.temperature.base import StepStats, TemperaturePolicy, check_temperature, half_cosine, sigmoid


class CTKD(TemperaturePolicy):
    """T = t_start + t_end sigmoid(theta); theta climbs the distillation loss, by lambda(p) times an Adam step.

    lambda grows along a cosine from 0 to 1 over the first ``ramp`` share of the run and stays there: the task gets
    harder, never easier. The paper writes this as a gradient reversal with a factor from 0 to -1 (10 of 240 epochs).
    Two published ports turn it round: TAID's goes from +1 to 0 (theta descends), AdaKD's fades the adversary out.

    Differences from the paper: theta has its own Adam (the paper's joins the student's SGD), with lambda on the step and
    not on the gradient, because Adam divides a factor of the gradient out again. The slope is d kd / d T of the kd_loss
    that is reported, also for ``todi`` and ``adaptive_kl``, whose gradient by the logits holds their weights constant. The
    instance-wise form (a network on the logits) is not part of this.

    Args:
        t_start: lower end of T; 1 in the paper.
        t_end: width of the range, T < t_start + t_end. The paper's 20 is for 100 classes; over a vocabulary of
            50k little signal is left above about 4.
        theta: where theta starts; 1 in the paper (T = 15.6), 0 here (the middle: T = 2.5).
        learning_rate: size of Adam's step in theta.
        betas: Adam's decay rates.
        ramp: share of the run in which lambda grows from 0 to 1; 0.04 in the paper.

    Raises:
        UserError: an option is out of range.
    """

    name = "ctkd"
    reads = "nothing"
    any_text = True
    paper = "arXiv 2211.16231"
    formula = "T = t_start + t_end sigmoid(theta), theta += lambda(p) Adam(d kd / d theta) (ascent)"
    use = (
        "You want T found during the run instead of by a sweep. Watch T: at an end of its range it tells you that the "
        "loss only knows one direction. Compare with `constant` at the T where it stays."
    )
    cost = "the teacher-side gradient of the divergence: a few elementwise passes"
    learns = True
    state_fields = ("theta", "first_moment", "second_moment", "steps", "ignored_gradients")

    def __init__(
        self,
        t_start: PositiveFloat = 1.0,
        t_end: PositiveFloat = 3.0,
        theta: Annotated[float, Between(-20.0, 20.0)] = 0.0,
        learning_rate: Share = 0.01,
        betas: Sequence[Annotated[float, Between(0.0, 1.0, "low")]] = (0.9, 0.999),
        ramp: Share = 0.1,
    ) -> None:
        super().__init__()
        self.t_start = check_temperature(self.name, "t_start", t_start)
        self.t_end = check_temperature(self.name, "t_end", t_end)
        self.theta = self.checked("theta", theta)
        self.learning_rate = self.checked("learning_rate", learning_rate)
        self.betas = self._checked_betas(betas)
        self.ramp = self.checked("ramp", ramp)
        self.first_moment = self.second_moment = 0.0
        self.steps = self.ignored_gradients = 0

    def _checked_betas(self, betas: object) -> tuple[float, float]:
        """Two decay rates from 0 to below 1; at 1 the correction of the start would divide by 0."""
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise UserError(
                f"temperature.betas: got {betas!r} for policy '{self.name}', expected two numbers from 0 to 1"
            )
        first, second = (self.checked("betas", beta) for beta in betas)
        return first, second

    @property
    def temperature(self) -> float:
        """T of the present theta, between t_start and t_start + t_end."""
        return self.t_start + self.t_end * sigmoid(self.theta)

    @property
    def ends(self) -> tuple[float, ...]:
        """What T is between, t_start and t_start + t_end."""
        return self.t_start, self.t_start + self.t_end

    @property
    def adversary(self) -> float:
        """The factor lambda(p) in [0, 1]: 0 at the start of the run, 1 from ``ramp`` on."""
        return 1.0 - half_cosine(self.progress / self.ramp) if self.progress < self.ramp else 1.0

    def log_values(self) -> dict[str, float]:
        """``theta``, beside the temperature that it stands for."""
        return {"theta": self.theta}

    def counters(self) -> dict[str, int]:
        """How many slopes were non-finite, and so moved nothing."""
        return {"ignored_gradients": self.ignored_gradients}

    def end_step(self, stats: StepStats) -> None:
        """Move theta up the loss: Adam's step (Kingma and Ba 2015, Algorithm 1), times lambda(p), with a plus."""
        slope = sigmoid(self.theta)
        gradient = stats.temperature_grad * self.t_end * slope * (1.0 - slope)  # d kd / d theta
        if not math.isfinite(gradient):
            self.ignored_gradients += 1
            return
        first, second = self.betas
        self.steps += 1
        self.first_moment = first * self.first_moment + (1.0 - first) * gradient
        self.second_moment = second * self.second_moment + (1.0 - second) * gradient * gradient
        # Both moments start at 0; dividing by 1 - beta^k takes that out of the first steps.
        mean = self.first_moment / (1.0 - first**self.steps)
        size = math.sqrt(self.second_moment / (1.0 - second**self.steps))
        self.theta += self.adversary * self.learning_rate * mean / (size + 1e-8)  # plus: ascent
