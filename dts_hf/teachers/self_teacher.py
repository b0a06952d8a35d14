"""A student that is its own teacher: with the weights that it began with, or with a running mean of those it has had.

Where the student is trained through an adapter of peft's, teacher and student are one model in memory: the adapter is off
while it teaches (``base``), or has the running mean of its weights (``ema``). Without one the teacher is a frozen copy.
Sources: base weights and an EMA of rate 0.05 are the choices of SDFT (arXiv 2601.19897) and SDPO in TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dts_hf.distributed.sharding import gathered_tensor
from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response
from dts_hf.models.adapters import adapter_off
from dts_hf.models.fake_quantization import stop_rounding
from dts_hf.models.head import Head, backbone_of, head_of
from dts_hf.models.modes import evaluating
from dts_hf.recipe.schema import EMA_RATE
from dts_hf.teachers.live import LiveTeacher

WEIGHTS = ("base", "ema")
#: What switching an untrained adapter off may change of the states, as a share of the largest one.
ROUNDING = 1e-4


@dataclass(frozen=True)
class SelfTeacher:
    """Says to ``DistillationTrainer`` that the student is to teach itself: ``teacher=SelfTeacher("ema")``.

    Args:
        weights: ``base``: those that the student has when the trainer gets it, its adapter off; ``ema``: a running mean.
        ema_rate: in (0, 1], the weight of the NEW weights, not of what is kept: mean <- mean + ema_rate * (new - mean).
        ema_every: the mean moves after every so many optimizer steps.
        dtype: of the copy; None: the student's, and float32 of a mean. A student with an adapter has no copy.

    Raises:
        UserError: a value out of its range.
    """

    weights: Literal["base", "ema"] = "base"
    ema_rate: float = EMA_RATE
    ema_every: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise UserError(f"SelfTeacher: weights: got {self.weights!r}, expected one of {', '.join(WEIGHTS)}")
        rate: Any = self.ema_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UserError(f"SelfTeacher: ema_rate: got {self.ema_rate!r}, expected a number above 0, up to 1")
        if isinstance(self.ema_every, bool) or not isinstance(self.ema_every, int) or self.ema_every < 1:
            raise UserError(f"SelfTeacher: ema_every: got {self.ema_every!r}, expected a whole number from 1")
        if self.weights == "ema" and self.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"SelfTeacher: dtype: got {self.dtype} with weights 'ema', expected torch.float32: a step of "
                f"{self.ema_rate:g} of a small change is lost in a shorter type"
            )

    def of(self, student: nn.Module) -> TeacherOfItself:
        """The teacher that ``student``, whole, is for itself from now on.

        Raises:
            UserError: its adapter cannot be told from the rest of it.
        """
        if hasattr(student, "disable_adapter"):
            return SharedTeacher(self, student)
        return CopyTeacher(self, student)

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from another, as JSON."""
        ema = {"ema_rate": self.ema_rate, "ema_every": self.ema_every} if self.weights == "ema" else {}
        return {"kind": "self", "weights": self.weights, **ema}


class RunningMean:
    """mean <- mean + rate * (new - mean), weight by weight, in float32 at least.

    After n moves from w_0 it is (1 - r)^n w_0 + sum over k of r (1 - r)^(n - k) w_k.

    Args:
        spec: rate and how often.
        values: the mean, by the names of the weights that it follows.
    """

    def __init__(self, spec: SelfTeacher, values: Mapping[str, Tensor]) -> None:
        self.spec, self.values = spec, dict(values)

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Move towards the weights of ``student``; all processes call it after optimizer step ``step``."""
        if step % self.spec.ema_every == 0:
            self._move(student, self.spec.ema_rate)

    @torch.no_grad()
    def begin(self, student: nn.Module) -> None:
        """Be the weights of ``student``, with which a run begins."""
        self._move(student, 1.0)

    def _move(self, student: nn.Module, rate: float) -> None:
        for name, weight in _trained(student).items():
            mean = self.values[name].data  # of a parameter, too, which may have been moved to another device
            with gathered_tensor(weight) as whole:
                new = whole.detach().to(mean)
                mean.copy_(new) if rate == 1.0 else mean.add_(new - mean, alpha=rate)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {name: value.detach().cpu().contiguous() for name, value in self.values.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Be what a checkpoint has.

        Args:
            tensors: of ``tensors``.
            place: what errors call them.

        Raises:
            UserError: they are of another student.
        """
        if {*tensors} != {*self.values}:
            other = sorted({*tensors} ^ {*self.values})[0]
            raise UserError(f"{place}: written of a student with other trained weights ({other})")
        for name, value in self.values.items():
            value.data.copy_(tensors[name])


class CopyTeacher(LiveTeacher):
    """A frozen copy of the student: its first weights, or their running mean.

    The copy of a student that rounds its weights (``student.quantize``) rounds none: it is the model that the student was.

    Args:
        spec: which.
        student: whole.
    """

    def __init__(self, spec: SelfTeacher, student: nn.Module) -> None:
        model = deepcopy(student)
        stop_rounding(model)
        dtype = spec.dtype
        if dtype is None and spec.weights == "ema" and head_of(student).weight.itemsize < 4:
            dtype = torch.float32
        super().__init__(model if dtype is None else model.to(dtype))
        self.spec = spec
        self.mean: RunningMean | None = None
        if spec.weights == "ema":
            copies = dict(self.model.named_parameters())
            self.mean = RunningMean(spec, {name: copies[name] for name in _trained(student)})


class SharedTeacher:
    """A student with an adapter, which teaches without it, or with a running mean of the adapter's weights.

    There is no second copy of anything else. The student is in evaluation mode while it teaches; each of its modules is
    then as it was.

    Args:
        spec: which.
        student: a ``PeftModel``, whole.

    Raises:
        UserError: something outside of the adapter is trained, or without the adapter the student is another one than that
            which it begins as.
    """

    takes_cu_seqlens = True

    def __init__(self, spec: SelfTeacher, student: nn.Module) -> None:
        self.spec, self.model = spec, student
        self.mean: RunningMean | None = None
        self.backbone = backbone_of(student)
        if spec.dtype not in (None, head_of(student).weight.dtype):
            raise UserError(
                f"SelfTeacher: dtype: got {spec.dtype}, but the student has an adapter, so the teacher's weights are its "
                "own: leave it out"
            )
        _check_adapter(student)
        if spec.weights == "ema":
            values = {
                name: weight.detach().to(_precise(weight), copy=True) for name, weight in _trained(student).items()
            }
            self.mean = RunningMean(spec, values)
        else:
            self._check_untrained()

    @property
    def head(self) -> Head:
        """The student's own, on which there is no adapter."""
        return head_of(self.model)

    def to(self, device: torch.device) -> SharedTeacher:
        """Move the mean; the rest is the student's."""
        if self.mean is not None:
            self.mean.values = {name: value.to(device) for name, value in self.mean.values.items()}
        return self

    @torch.no_grad()
    def states(self, batch: dict[str, Any], labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Final states ``[N, H]`` of the rows that carry a label; see ``LiveTeacher.states``."""
        with self.teaching(), torch.autocast(labels.device.type, enabled=False):
            states = self.backbone(**batch, use_cache=False).last_hidden_state
        return select_response(states, labels, positions)[0]

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Within it the student is the teacher: without dropout, and without its adapter or with the mean of it."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(adapter_off(self.model) if self.mean is None else self._mean_in_place())
            yield

    @contextmanager
    def _mean_in_place(self) -> Iterator[None]:
        own = _trained(self.model)
        assert self.mean is not None
        saved = {name: weight.data for name, weight in own.items()}
        try:
            for (
                name,
                weight,
            ) in own.items():  # no copy, and nothing of autograd's: the optimizer steps on the student's
                weight.data = self.mean.values[name].to(weight.dtype)
            yield
        finally:
            for name, weight in own.items():
                weight.data = saved[name]

    @torch.no_grad()
    def _check_untrained(self) -> None:
        """An adapter that says something already, or whose start changed the base (PiSSA, OLoRA), is no first weight."""
        weight = head_of(self.model).weight
        ids = torch.tensor([[1, 2, 3, 4]], device=weight.device) % weight.shape[0]
        with evaluating(self.model):
            states = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        with self.teaching():
            without = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        if float((states - without).abs().max()) > ROUNDING * float(states.abs().max()):
            raise UserError(
                "teacher: kind self with the weights 'base' switches the student's adapter off, but this one says something "
                "already (it was trained, or begins as PiSSA or OLoRA does), so that would not be the student as it begins. "
                "Merge it first and add a new one, or give the folder of the weights that are to teach (kind: live)"
            )


#: What ``SelfTeacher.of`` gives.
TeacherOfItself: TypeAlias = CopyTeacher | SharedTeacher


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in student.named_parameters() if weight.requires_grad}


def _precise(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.itemsize < 4 else weight.dtype


def _check_adapter(student: nn.Module) -> None:
    """Refuse weights that are trained outside of the adapter: they would be the teacher's, too."""
    prefix = str(getattr(student.base_model, "prefix", "lora_"))
    outside = [name for name in _trained(student) if prefix not in name and "modules_to_save" not in name]
    if outside:
        raise UserError(
            f"teacher: kind self shares the student's weights below its adapter, but {outside[0]} is trained, too: the "
            "teacher would move with it. Freeze it, or train without an adapter"
        )
