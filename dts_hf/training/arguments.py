"""Arguments that ``transformers.Trainer`` takes and a distillation cannot honour: refused, with what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from dts_hf.distributed.launch import check_launch
from dts_hf.errors import UserError, nearest


def checked_arguments(args: TrainingArguments | None, kwargs: Mapping[str, Any]) -> TrainingArguments:
    """Refuse what the Trainer would take and this loss would ignore without a word, and say what to give instead.

    Args:
        args: of the trainer; None: those of a run in ``runs/distillation``.
        kwargs: everything else that goes to ``transformers.Trainer`` as it is.

    Returns:
        The arguments, which are those of a launch that is what it claims to be.

    Raises:
        UserError: names the argument, or see ``check_launch``.
    """
    args = args or TrainingArguments(output_dir="runs/distillation")
    check_launch(args)
    if kwargs.get("model_init") is not None:
        raise UserError(
            "model_init: teacher and student are compared before training, so it is not supported; expected the student as "
            "model. For a search over hyperparameters make one trainer for each setting"
        )
    if "peft_config" in kwargs:
        raise UserError(
            "peft_config: expected the student with its adapter: model = peft.get_peft_model(model, peft_config); in a "
            "recipe, student.lora"
        )
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name}: the loss needs no logits, so it would never be called; expected None")
    if args.label_smoothing_factor:
        raise UserError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: it is not used here"
        )
    check_compilation(args)
    # Our dummy rows make the batches of an epoch even; with these, accelerate counts steps and shares rows out otherwise.
    for name, expected in (("split_batches", False), ("even_batches", True)):
        value = getattr(args.accelerator_config, name)
        if value != expected:
            raise UserError(
                f"args.accelerator_config: got {name}: {value}, expected {name}: {expected}; "
                "per_device_train_batch_size is the batch of each process"
            )
    foreign = [name for name in ("lmbda", "beta", "packing", "max_length", "temperature") if hasattr(args, name)]
    if foreign:
        raise UserError(
            f"args: {type(args).__name__} has {', '.join(foreign)}, which would have no effect; expected "
            "transformers.TrainingArguments, and such options as arguments of the trainer"
        )
    return args


def check_compilation(args: TrainingArguments) -> None:
    """Refuse a backend or a mode that ``torch.compile`` does not have; it would say so where the layers are compiled.

    Raises:
        UserError: names the argument and the nearest right word.
    """
    if not args.torch_compile:
        return
    known = {backend.value.lower() for backend in DynamoBackend}  # accelerate has another list, and reads it, too
    choices = {"torch_compile_backend": sorted(known & {*torch.compiler.list_backends(exclude_tags=())})}
    if args.torch_compile_backend == "inductor":
        choices["torch_compile_mode"] = [*torch._inductor.list_mode_options()]
    for name, words in choices.items():
        value = getattr(args, name)
        if value is not None and value not in words:
            raise UserError(
                f"training.{name}: got '{value}', expected one of {', '.join(words)}.{nearest(value, words)}"
            )
