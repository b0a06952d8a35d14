"""LoRA adapters on a student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from dts_hf.errors import UserError
from dts_hf.models.head import backbone_of, output_module

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Lora


def add_lora(model: nn.Module, lora: Lora, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Freeze ``model`` and put LoRA adapters on it (arXiv 2106.09685), through ``peft``.

    With the task type ``SEQ_CLS`` the classification head is trained as a whole and saved with the adapter.

    Raises:
        UserError: no layer has such a name, or the adapter would sit on the output layer.
    """
    from peft import LoraConfig, get_peft_model

    target = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type=task_type, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # no module has such a name
        inside = backbone_of(model).named_modules()
        linear = sorted({name.rsplit(".", 1)[-1] for name, module in inside if isinstance(module, nn.Linear)})
        raise UserError(
            f"student.lora.target_modules: got {target!r}, expected 'all-linear' or names among {', '.join(linear)}"
        ) from error
    if task_type == "CAUSAL_LM":
        output_module(adapted)  # refuses an adapter on the output layer
    return adapted


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within it ``model``, whose layers have adapters of peft's, answers without them; then each is as it was.

    Not peft's own ``disable_adapter``: it freezes the adapters, and then trains all of the active one, whatever was
    frozen of it; and it counts all weights first, at each call.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
