"""dts_hf: knowledge distillation for Hugging Face Transformers, with the temperature as a policy.

The public names are loaded on first use, so that ``import dts_hf`` and ``dts-hf --help`` stay fast.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ClassificationDistillationTrainer": "classification.trainer",
    "DTSDistillationTrainer": "training.trainer",
    "DistillationLoss": "loss.distillation_loss",
    "DistillationTrainer": "training.trainer",
    "Head": "models.head",
    "Recipe": "recipe.schema",
    "RunDirectory": "runs.directory",
    "TemperaturePolicy": "temperature",
    "UserError": "errors",
    "build_temperature": "temperature",
    "distill": "distill",
    "load_recipe": "recipe.loading",
}
__all__ = [
    "ClassificationDistillationTrainer",
    "DTSDistillationTrainer",
    "DistillationLoss",
    "DistillationTrainer",
    "Head",
    "Recipe",
    "RunDirectory",
    "TemperaturePolicy",
    "UserError",
    "build_temperature",
    "distill",
    "load_recipe",
]

if TYPE_CHECKING:
    from dts_hf.classification.trainer import ClassificationDistillationTrainer
    from dts_hf.distill import distill
    from dts_hf.errors import UserError
    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.models.head import Head
    from dts_hf.recipe.loading import load_recipe
    from dts_hf.recipe.schema import Recipe
    from dts_hf.runs.directory import RunDirectory
    from dts_hf.temperature import TemperaturePolicy, build_temperature
    from dts_hf.training.trainer import DistillationTrainer, DTSDistillationTrainer


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


class _Package(ModuleType):
    """``dts_hf.distill`` is the function, also once its module of the same name is loaded, which Python binds here."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.distill if name == "distill" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
