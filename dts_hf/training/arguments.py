"""Arguments that ``transformers.Trainer`` takes and a distillation cannot honour: refused, with what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from dts_hf.errors import UserError


def check_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the Trainer would take and this loss would ignore without a word, and say what to give instead.

    Args:
        args: of the trainer.
        kwargs: everything else that goes to ``transformers.Trainer`` as it is.

    Raises:
        UserError: names the argument.
    """
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
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"args.hub_strategy: got '{HubStrategy(args.hub_strategy).value}', expected 'end': a checkpoint lies among logs "
            "and held-out answers and is not uploaded; the finished student is, once"
        )
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
