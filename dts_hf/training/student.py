"""The student as a trainer trains it: made by ``model_init`` where not given, with an adapter, or rounding its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import enable_full_determinism

from dts_hf.errors import UserError
from dts_hf.models.fake_quantization import (
    ADAPTERS,
    fake_quantized_layers,
    note_quantization,
    prepare_for_quantization,
)
from dts_hf.models.head import output_module, without_adapters

if TYPE_CHECKING:
    from peft import PeftConfig


def first_student(
    model: nn.Module | str | None, model_init: Callable[..., Any] | None, args: TrainingArguments, **kwargs: Any
) -> nn.Module | str | None:
    """The student that a trainer begins with: ``model``, or what ``model_init`` makes under ``args.seed``.

    Args:
        model: as the trainer got it.
        model_init: the same; takes nothing, or the trial of a search, which is None here.
        args: of the trainer.
        kwargs: what else it got: ``optimizers`` does not go with ``model_init``.

    Raises:
        UserError: both are given, or see ``made_by``.
    """
    if model_init is None:
        return model
    if model is not None:
        raise UserError("model_init: got a model, too; give one of them, as in model=None, model_init=make_student")
    if any(part is not None for part in kwargs.get("optimizers") or ()):
        raise UserError(
            "optimizers: each call of model_init makes other weights than those that they know; expected "
            "optimizer_cls_and_kwargs, or args.optim"
        )
    # As the Trainer does before each call of its own: the student of the first run is the same either way.
    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    return made_by(model_init, None)


def made_by(model_init: Callable[..., Any], trial: Any) -> nn.Module:
    """What ``model_init`` makes, for ``trial`` where it asks for it.

    Raises:
        UserError: it takes more than the trial, or makes no model.
    """
    if not callable(model_init):
        raise UserError(f"model_init: got {type(model_init).__name__}, expected a function that makes the student")
    takes = len(inspect.signature(model_init).parameters)
    if takes > 1:
        raise UserError(f"model_init: takes {takes} arguments, expected none, or the trial")
    model = model_init(trial) if takes else model_init()
    if not isinstance(model, nn.Module):
        raise UserError(f"model_init: returned {type(model).__name__}, expected the student, a model")
    return model


def ready_student(
    student: nn.Module, peft_config: PeftConfig | None, quantize: Mapping[str, Any] | None = None
) -> nn.Module:
    """``student`` with the adapter of ``peft_config`` on it, or with layers that round their weights as ``quantize`` says.

    Raises:
        UserError: see ``with_adapter`` and ``prepare_for_quantization``; or both are asked for, or there already.
    """
    if quantize is not None:
        if peft_config is not None:
            raise UserError(f"quantize: got it beside peft_config: {ADAPTERS}")
        prepare_for_quantization(student, quantize)
    student = with_adapter(student, peft_config)
    if without_adapters(student) is not student and fake_quantized_layers(student):
        raise UserError(f"model: its layers round their weights, and {ADAPTERS}")
    note_quantization(student)
    return student


def with_adapter(student: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """``student`` with the adapter of ``peft_config`` on it; None: as it is.

    Raises:
        UserError: it is no configuration of peft's, the student has an adapter already, or this one cannot be distilled:
            it puts virtual tokens before the rows, sits on the output layer, or is for another task.
    """
    if peft_config is None:
        return student
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise UserError(
            f"peft_config: got {type(peft_config).__name__}, expected one of peft's, as in peft.LoraConfig(r=16, "
            "target_modules='all-linear', task_type='CAUSAL_LM')"
        )
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    if isinstance(student, PeftModel):
        raise UserError(
            f"peft_config: got {kind}, but the model has an adapter already; leave it out, or give the model without one "
            "(model.merge_and_unload())"
        )
    if peft_config.is_prompt_learning:
        raise UserError(
            f"peft_config: got {kind}, which puts virtual tokens before every row, so that its states and the labels would "
            "not be in step; expected an adapter of weights, such as LoraConfig"
        )
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"peft_config: task_type is {task!r}, expected 'CAUSAL_LM'")
    try:
        adapted: nn.Module = get_peft_model(student, peft_config)
    except ValueError as error:  # no module has such a name
        raise UserError(f"peft_config: {kind} does not fit the model: {error}") from error
    try:
        output_module(adapted)
    except UserError as error:
        raise UserError(
            f"peft_config: {kind} sits on the output layer of {type(student).__name__}, which the fused loss would skip; "
            "leave lm_head out of target_modules and modules_to_save ('all-linear' does so by itself)"
        ) from error
    return adapted
