"""The student's weights as an engine elsewhere takes them: whole, as ``save_pretrained`` writes them, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from dts_hf.distributed.sharding import gathered_tensor, is_sharded
from dts_hf.errors import UserError
from dts_hf.models.head import is_fake_quantized, without_adapters

#: What wrappers put into the names of weights: activation checkpointing, ``torch.compile`` of a whole model.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
#: Options of LoRA with which it is more than two matrices beside a layer's weight.
_MORE_THAN_LORA = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
#: Weights of a LoRA adapter itself, which are in the merged ones.
_OF_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


def check_has_whole_weights(model: nn.Module, *, sharded: bool) -> None:
    """Refuse a student whose weights alone do not answer as it does, or cannot be merged with those of its adapters.

    Args:
        model: with adapters or without.
        sharded: its weights are, or will be, shares of several processes.

    Raises:
        UserError: it rounds its weights as it goes; adapters of another kind than LoRA, LoRA with more than two matrices, or
            sharded.
    """
    if any(map(is_fake_quantized, model.modules())):
        raise UserError(
            "on_policy.backend: vllm would answer with the weights as they are before student.quantize rounds them, which "
            "are another student's; expected backend: own"
        )
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        more = [name for name in _MORE_THAN_LORA if getattr(config, name, False)]
        if kind != "LORA" or more:
            what = kind if kind != "LORA" else f"LoRA with {more[0]}"
            raise UserError(
                f"on_policy.backend: vllm takes merged weights, and an adapter of the kind {what} is not merged here; "
                "expected plain LoRA, or backend: own"
            )
    if configs and sharded:
        raise UserError(
            "on_policy.backend: vllm takes merged weights, and an adapter on sharded weights (ZeRO-3, FSDP2) is not merged "
            "here; expected DDP or ZeRO-2, or backend: own"
        )


@torch.no_grad()
def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The name and the value of each weight of the student, tied ones once; one at a time, so no device holds all twice.

    Names and shapes are those of a checkpoint, which engines read, and not those in memory: transformers keeps the experts
    of a layer in one weight there, and has renamed layers of older families. Buffers that are saved are among them.

    Adapters are added to copies: merged in place and taken off again, as peft's ``merge_adapter`` does, the weights that
    are trained on would come back with other last digits. Every process iterates: sharded weights are gathered by all.

    Args:
        model: without the wrapper of DDP or DeepSpeed.

    Raises:
        UserError: see ``check_has_whole_weights``.
    """
    check_has_whole_weights(model, sharded=is_sharded(model))
    base = without_adapters(model)
    for name, parameter in base.named_parameters():
        if any(part in name for part in _OF_LORA) or ".original_module." in name:
            continue
        with gathered_tensor(parameter) as whole:
            value = whole.detach()
            if name.endswith(".base_layer.weight"):
                layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter).to(value.dtype)
            yield from revert_weight_conversion(base, {_plain_name(model, name): value}).items()
    for name, buffer in _saved_buffers(base):
        yield from revert_weight_conversion(base, {_plain_name(model, name): buffer}).items()


def _saved_buffers(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a checkpoint holds, such as what balances the experts of DeepSeek-V3; they are never sharded."""
    for prefix, module in base.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _plain_name(model: nn.Module, name: str) -> str:
    """The name that a weight has in a model of the same class without wrappers and adapters."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for adapter in getattr(model, "peft_config", {}):
        name = name.replace(f".modules_to_save.{adapter}.", ".")
    return name.replace(".base_layer.", ".")
