"""The effective recipe of a run: every default written out, also those that live outside the recipe's own sections.

It loads again to an equal recipe and an identical run, whatever the defaults of a later version are.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Any

from dts_hf.recipe.schema import NamedOptions, Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: The keys of ``training:`` that the numbers of a run depend on, its log and evaluations included. Not what depends on the
#: machine (``use_cpu``, workers), where results go, or how work is cut up without changing them.
RESULT_KEYS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "train_sampling_strategy", "dataloader_drop_last", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed", "full_determinism",
    "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_strategy",
    "save_steps", "logging_strategy", "logging_steps", "logging_first_step",
)  # fmt: skip


def effective(recipe: Recipe, args: TrainingArguments) -> Recipe:
    """``recipe`` with the options of its policy and divergence, and ``RESULT_KEYS`` of its ``training:``, written out.

    Args:
        recipe: as it was loaded.
        args: made of it; what the recipe does not say is taken from here.
    """
    from dts_hf.divergences import build_divergence
    from dts_hf.temperature import build_temperature

    policy = build_temperature(recipe.temperature.name, **recipe.temperature.options).describe()
    loss = recipe.loss.model_copy(
        update={"divergence": _named(build_divergence(recipe.loss.divergence.model_dump()).describe())}
    )
    training = {
        **recipe.training,
        **{key: _plain(getattr(args, key)) for key in _written(args) if key not in recipe.training},
    }
    temperature = _named({"name": recipe.temperature.name, **policy})
    return recipe.model_copy(update={"temperature": temperature, "loss": loss, "training": training})


def _written(args: TrainingArguments) -> list[str]:
    """``RESULT_KEYS`` without what is unset, and of the two that end a run with the one that counts."""
    silent = {"num_train_epochs" if args.max_steps > 0 else "max_steps"}
    silent |= {key for key in RESULT_KEYS if getattr(args, key, None) is None}
    return [key for key in RESULT_KEYS if key not in silent]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _named(options: dict[str, Any]) -> NamedOptions:
    """As the file will hold them: a tuple is a list there."""
    return NamedOptions.model_validate(json.loads(json.dumps(options)))
