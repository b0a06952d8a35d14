"""What makes a run a distillation, for trackers (W&B, MLflow, TensorBoard, trackio, ...) and for callbacks.

Trackers read ``args.to_dict()`` when training begins. They are given arguments that name policy, divergence and teacher,
too; what is saved, and what the Trainer goes by, is as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.registry import options_of

TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def loss_facts(loss: DistillationLoss) -> dict[str, Any]:
    """Policy, divergence and their options as flat words, such as ``temperature_rule``."""
    facts: dict[str, Any] = {"kd_ratio": loss.kd_ratio, "temperature_scaling": loss.temperature_scaling}
    divergence = {name: getattr(loss.divergence, name, None) for name in options_of(type(loss.divergence))}
    for role, name, options in (
        ("temperature", loss.temperature.name, loss.temperature.describe()),
        ("divergence", loss.divergence.name, divergence),
    ):
        facts[role] = name
        plain = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))}
        facts |= {f"{role}_{key}": value for key, value in plain.items()}
    return facts


def objective_of(loss: DistillationLoss) -> dict[str, Any]:
    """Everything that decides what a fresh ``loss`` is, as JSON: policy and divergence with all their options.

    What no JSON can hold of an object of the user's own is left out; so is what is the policy's state and moves.
    """
    policy, divergence = loss.temperature, loss.divergence
    moving, described = policy.state(), policy.describe()
    chosen = {name: described.get(name) for name in options_of(type(policy)) if name not in moving}
    return {
        "kd_ratio": loss.kd_ratio,
        "temperature_scaling": loss.temperature_scaling,
        "kernels": loss.kernels,
        "logits_dtype": loss.logits_dtype,
        "temperature": {"name": policy.name, "options": _plain(chosen)},
        "divergence": {
            "name": divergence.name,
            "options": _plain({name: getattr(divergence, name, None) for name in options_of(type(divergence))}),
        },
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, value in options.items():
        with suppress(TypeError, ValueError):  # an object
            plain[name] = json.loads(json.dumps(value))
    return plain


def model_facts(role: str, model: nn.Module | None) -> dict[str, Any]:
    """The name of a model and how many parameters it has, under ``role`` and ``role_parameters``; ``none`` of none."""
    if model is None:
        return {role: "none"}
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    count = getattr(model, "num_parameters", None)  # knows of packed weights
    parameters = count() if callable(count) else sum(weight.numel() for weight in model.parameters())
    return {role: str(name), f"{role}_parameters": parameters}


def tracked(args: TrainingArguments, facts: Mapping[str, Any]) -> TrainingArguments:
    """A copy of ``args`` whose ``to_dict``, and so its JSON, has ``facts`` besides."""
    kind = type(args)

    def to_dict(self: TrainingArguments) -> dict[str, Any]:
        return {**kind.to_dict(self), **facts}

    view = copy.copy(args)
    view.__class__ = type(kind.__name__, (kind,), {"to_dict": to_dict})
    return view


@contextmanager
def facts_for_trackers(callbacks: Iterable[TrainerCallback], facts: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Within it the trackers among ``callbacks`` are given arguments with ``facts()`` when training begins."""
    trackers: list[Any] = [callback for callback in callbacks if isinstance(callback, TRACKERS)]

    def announced(begin: Callable[..., Any]) -> Callable[..., Any]:
        return lambda args, *rest, **kwargs: begin(tracked(args, facts()), *rest, **kwargs)

    for tracker in trackers:
        tracker.on_train_begin = announced(type(tracker).on_train_begin.__get__(tracker))
    try:
        yield
    finally:
        for tracker in trackers:
            vars(tracker).pop("on_train_begin", None)
