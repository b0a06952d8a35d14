"""The section ``training`` as ``transformers.TrainingArguments``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.errors import UserError, nearest
from dts_hf.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_arguments(recipe: Recipe, output_dir: str | Path, **more_defaults: Any) -> TrainingArguments:
    """``TrainingArguments`` of the recipe, with our defaults for the keys that it does not give.

    Args:
        recipe: its ``training`` section is passed on as it is.
        output_dir: the run directory; checkpoints go there.
        more_defaults: take the place of ours, never of the recipe's.

    Raises:
        UserError: ``TrainingArguments`` refuses a value or a combination.
    """
    import torch
    from transformers import TrainingArguments

    from dts_hf.distributed.launch import limit_joining, watch_collectives

    defaults: dict[str, Any] = {
        # Said where it is so, or transformers refuses bf16 on a CPU. Apple's GPU has no float64: it must be asked for
        "use_cpu": not torch.accelerator.is_available() or torch.backends.mps.is_available(),
        "report_to": "none",
        "remove_unused_columns": False,  # the collator needs row_id, which no model's forward has
        "train_sampling_strategy": "random" if recipe.data.packing else "group_by_length",
        "eval_strategy": "epoch" if recipe.data.validation else "no",
        "logging_steps": 10,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **worker_defaults(recipe.training, torch.cuda.is_available()),
    }
    asked = recipe.training.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if asked and importlib.util.find_spec("deepspeed") is None:  # transformers would speak of object.__init__
        raise UserError("training: DeepSpeed is asked for and not installed: pip install 'dts-hf[deepspeed]'")
    _trackers(recipe)
    watch_collectives(output_dir)
    limit_joining(recipe.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout while it is imported
            return TrainingArguments(output_dir=str(output_dir), **(defaults | more_defaults | recipe.training))
    except Exception as error:  # its checks raise ValueError, TypeError, ImportError and OSError, as they come
        if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
            raise  # it joins the processes, too, and one of them is gone: nobody's input is wrong
        raise UserError(f"training: TrainingArguments refuses this: {error}") from error


def _trackers(recipe: Recipe) -> list[str]:
    """The names in ``training.report_to``; one that is none of a tracker is refused on every machine."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    asked: str | Sequence[str] | None = recipe.training.get("report_to")
    names = [name for name in ([asked] if isinstance(asked, str) else asked or ()) if name not in ("none", "all")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"training.report_to: got {name!r}, expected one of {', '.join(INTEGRATION_TO_CALLBACK)}, none or all."
                f"{nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
    return names


def check_trackers(recipe: Recipe) -> None:
    """Refuse now what ``transformers.Trainer`` would refuse when it is made, after rows and models were loaded.

    It is asked where a trainer will be made alone: who plans runs for other machines needs no tracker.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations

    for name in _trackers(recipe):
        # Of the others a package has another name, or transformers does not say whether it is there
        packaged = name in ("mlflow", "tensorboard", "trackio", "wandb")
        if packaged and name not in get_available_reporting_integrations():
            raise UserError(f"training.report_to: {name!r} needs the package {name}: pip install {name}")


def worker_defaults(training: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """For a GPU, a process that makes the next batches meanwhile: a batch costs the host milliseconds that a GPU would wait.

    The batches are the same, in the same order, with and without it. Where processes are not forked (Windows), it would take
    seconds to start and is left out.

    Args:
        training: the recipe's section, whose ``dataloader_num_workers`` counts where it is given.
        on_gpu: whether the models run on a CUDA device.
    """
    workers = training.get("dataloader_num_workers", 1)
    if not on_gpu or training.get("use_cpu") or workers == 0 or sys.platform != "linux":
        return {}
    return {"dataloader_num_workers": workers, "dataloader_persistent_workers": True}
