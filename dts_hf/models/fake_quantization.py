"""A student that is trained for its quantised form: what its layers multiply with is rounded in every forward.

torchao's quantisation-aware training (``QATConfig``): each ``nn.Linear`` becomes one that rounds its weight, and under some
schemes its input, as the quantised model will. The weights themselves stay as they are, are trained by the straight-through
estimator (the rounding counts as the identity in the backward pass), and keep their names: checkpoints and the finished
student are ordinary ones. The output layer is never among them: the loss multiplies with its weight itself, and would not
see the rounding. Embeddings stay as they are, too, so a tied pair stays tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.utils import is_torchao_available

from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.models.head import is_fake_quantized, output_module, without_adapters
from dts_hf.models.quantization import LEAST_SHARE
from dts_hf.recipe.problems import schema_problems
from dts_hf.recipe.schema import Quantize

#: In a student's ``config.json``: the scheme that its weights were trained for.
TRAINED_FOR = "quantization_aware_training"
OTHER = "other"  # scheme of a model that somebody else has prepared


def quantize_section(value: Quantize | Mapping[str, Any], key: str = "quantize") -> Quantize:
    """``student.quantize`` as an argument of the trainer takes it.

    Args:
        value: ``{"scheme": "int4_weight_only", "group_size": 32}``.
        key: what errors call it.

    Raises:
        UserError: one message with a line per problem.
    """
    if isinstance(value, Quantize):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: got {value!r}, expected a mapping, as in {{'scheme': 'int4_weight_only'}}")
    try:
        return Quantize.model_validate(dict(value))
    except ValidationError as error:
        problems = schema_problems(error, value, Quantize.model_json_schema())
        raise UserError("\n".join(f"{key}.{name}: {text}" for name, text in problems.items())) from None


def torchao_config(quantize: Quantize) -> Any:
    """What torchao quantises with, of both steps: rounding while training, and conversion after it.

    Raises:
        UserError: torchao is missing.
    """
    if not is_torchao_available():
        raise UserError(f"quantize: '{quantize.scheme}' needs the package torchao: pip install 'dts-hf[quantization]'")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    dtypes: Any = torch  # its stubs do not know int4
    granularity = PerAxis(0) if quantize.group_size is None else PerGroup(quantize.group_size)
    if quantize.scheme == "int8_dynamic_activation_int4_weight":
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtypes.int4, weight_granularity=granularity)
    dtype = dtypes.int4 if quantize.scheme == "int4_weight_only" else torch.int8
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def prepare_for_quantization(model: nn.Module, quantize: Quantize | Mapping[str, Any], key: str = "quantize") -> None:
    """Have every linear layer of ``model`` but the output layer round its weight as ``quantize`` says; in place.

    Before the model is compiled, sharded or given to an optimizer. ``without_fake_quantization`` switches it off.

    Args:
        model: a causal language model with its whole weights.
        quantize: scheme and group size.
        key: what errors call it.

    Raises:
        UserError: torchao is missing; the model has adapters or is prepared already; a layer's inputs are no multiple of the
            group; or less than half of the weights in its layers are in ``nn.Linear``.
    """
    quantize = quantize_section(quantize, key)
    config, head = torchao_config(quantize), output_module(model)
    if without_adapters(model) is not model:
        raise UserError(f"{key}: {ADAPTERS}")
    if fake_quantized_layers(model):
        raise UserError(f"{key}: the layers of {type(model).__name__} round their weights already; leave it out")
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    group = quantize.group_size
    for name, layer in layers.items():
        if group is not None and layer.in_features % group:
            raise UserError(
                f"{key}.group_size: got {group}, but {name} has {layer.in_features} inputs, expected a divisor of them, or "
                "null: one scale for each row"
            )
    _check_share(model, layers, f"{key}.scheme")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    quantize_(model, QATConfig(config, step=QATStep.PREPARE), filter_fn=lambda layer, name: name in layers)


#: Why adapters do not go with it.
ADAPTERS = (
    "the model has adapters, whose update is added beside the rounded weights, so that what is trained is not what the "
    "merged and quantised model computes; expected no adapters: train them, merge them, then quantise the merged student"
)


def _check_share(model: nn.Module, layers: Mapping[str, nn.Linear], key: str) -> None:
    """Refuse a model most of whose weights would stay as they are, as ``quantization.check_quantized`` does a teacher."""
    owner: Any = model
    ends = {id(end.weight) for end in (owner.get_input_embeddings(), owner.get_output_embeddings()) if end is not None}
    whole = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1 and id(weight) not in ends)
    share = sum(layer.weight.numel() for layer in layers.values()) / max(whole, 1)
    if share < LEAST_SHARE:
        raise UserError(
            f"{key}: it is made for nn.Linear, which holds {share:.0%} of the weights in the layers of "
            f"{type(model).__name__}; expected another student, or none of student.quantize"
        )


def fake_quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that round their weights, by name."""
    return {name: layer for name, layer in model.named_modules() if is_fake_quantized(layer)}


def trained_for(model: nn.Module) -> dict[str, Any] | None:
    """Scheme and group size as the layers of ``model`` have them; None: they round nothing.

    A model that somebody else has prepared in another way has the scheme ``other``.
    """
    layers = fake_quantized_layers(model)
    found = [_of_layer(layer) for layer in layers.values()]
    if not found:
        return None
    return found[0] if all(one == found[0] for one in found) else {"scheme": OTHER, "group_size": None}


def _of_layer(layer: Any) -> dict[str, Any]:
    weight: Any = getattr(getattr(layer, "weight_fake_quantizer", None), "config", None)
    activation: Any = getattr(getattr(layer, "activation_fake_quantizer", None), "config", None)
    of_weight, of_input = (
        str(getattr(config, "dtype", None)).removeprefix("torch.") for config in (weight, activation)
    )
    scheme = {
        ("int4", "None"): "int4_weight_only", ("int8", "None"): "int8_weight_only",
        ("int4", "int8"): "int8_dynamic_activation_int4_weight",
    }.get((of_weight, of_input), OTHER)  # fmt: skip
    if scheme == OTHER or not getattr(weight, "is_symmetric", False):
        return {"scheme": OTHER, "group_size": None}
    size = getattr(weight.granularity, "group_size", None)
    return {"scheme": scheme, "group_size": size}


def note_quantization(model: nn.Module) -> None:
    """Have the configuration of ``model`` say what it is trained for now, and nothing of what it was trained for before.

    Whatever saves the model, a checkpoint too, saves that with it; ``dts-hf export`` reads it.
    """
    config: Any = getattr(without_adapters(model), "config", None)
    found = trained_for(model)
    if config is None:  # no language model, which is refused later on
        return
    if found is not None:
        setattr(config, TRAINED_FOR, found)
    elif hasattr(config, TRAINED_FOR):
        delattr(config, TRAINED_FOR)


def stop_rounding(model: nn.Module) -> None:
    """Have the layers of ``model`` round nothing from now on: it is the model whose weights it has."""
    for part in _rounding_parts(model):
        part.enabled = False


def _rounding_parts(model: nn.Module) -> list[Any]:
    return [
        part
        for layer in fake_quantized_layers(model).values()
        for name in ("weight_fake_quantizer", "activation_fake_quantizer")
        if (part := getattr(layer, name, None)) is not None
    ]


@contextmanager
def without_fake_quantization(model: nn.Module) -> Iterator[None]:
    """Within it the layers of ``model`` round nothing: it is the model whose weights it has."""
    parts = _rounding_parts(model)
    before = [part.enabled for part in parts]
    try:
        stop_rounding(model)
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within it the weights of ``model`` are what they are rounded to, so that no forward rounds them again.

    The answers are the same: decoding calls a model for every token, and rounding costs more than multiplying then. Weights
    that are sharded over processes stay as they are.
    """
    kept: list[tuple[Any, Tensor, Any]] = []
    try:
        for layer in {} if is_sharded(model) else fake_quantized_layers(model).values():
            quantizer = getattr(layer, "weight_fake_quantizer", None)
            if quantizer is not None and quantizer.enabled:
                with torch.no_grad():
                    rounded = quantizer(layer.weight)
                kept.append((layer.weight, layer.weight.data, quantizer))
                layer.weight.data, quantizer.enabled = rounded, False
        yield
    finally:
        for weight, data, quantizer in kept:
            weight.data, quantizer.enabled = data, True
