"""A quantised teacher: what each kind needs, how it is loaded, and how far its answers are from the full teacher's.

``fp8`` and ``int8`` are torchao's, through transformers' ``TorchAoConfig``; ``8bit`` and ``4bit`` are bitsandbytes'. All of
them leave embeddings and output layer as they are: the loss multiplies with the head's own weight.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_torchao_available

from dts_hf.errors import UserError
from dts_hf.models.head import Head
from dts_hf.recipe.schema import QUANTIZED_BY

#: From this compute capability on (Ada, Hopper) a GPU multiplies fp8 matrices.
FP8_CAPABILITY = (8, 9)
#: A teacher of whose layers torchao can quantise less than this share is refused: it would be called what it is not.
LEAST_SHARE = 0.5


def check_quantization(kind: str, device: torch.device) -> None:
    """Refuse, before anything is loaded, what cannot run.

    Args:
        kind: as ``teacher.quantization`` has it.
        device: that the teacher is for.

    Raises:
        UserError: the package of ``kind`` is missing, or ``device`` cannot multiply fp8 matrices.
    """
    package = QUANTIZED_BY.get(kind)
    if package is None:
        return
    # transformers' own question where it has one, as it also asks for the version
    found = is_torchao_available() if package == "torchao" else importlib.util.find_spec(package) is not None
    if not found:
        raise UserError(
            f"teacher.quantization: '{kind}' needs the package {package}: pip install 'dts-hf[quantization]'"
        )
    if kind != "fp8":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < FP8_CAPABILITY:
        what = (
            device.type.upper() if capability is None else f"GPU of compute capability {'{}.{}'.format(*capability)}"
        )
        raise UserError(
            f"teacher.quantization: 'fp8' needs a GPU of compute capability {'{}.{}'.format(*FP8_CAPABILITY)} or more (Ada, "
            f"Hopper), and this is a {what}; expected 'int8', which runs everywhere, or 'none'"
        )


def quantized_options(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told to quantise while it loads; nothing for ``none``.

    Raises:
        UserError: see ``check_quantization``.
    """
    if kind == "none":
        return {}
    cuda = torch.cuda.is_available()
    check_quantization(kind, torch.device("cuda" if cuda else "cpu"))
    if QUANTIZED_BY[kind] == "bitsandbytes":  # it chooses the device itself
        return {"quantization_config": _bitsandbytes_config(kind, dtype)}
    # Tensor by tensor on the GPU, where quantising is quick and the full model never stands
    placed = {"device_map": {"": torch.cuda.current_device()}} if cuda else {}
    return {"quantization_config": _torchao_config(kind), **placed}


def _bitsandbytes_config(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")


def _torchao_config(kind: str) -> Any:
    """One scale for each row of a weight, and under ``fp8`` one for each token of what it is multiplied with.

    ``int8`` keeps activations as they are: its matmuls are those of the teacher's dtype, on any device, and without
    ``torch.compile`` the passes that would quantise activations cost more than int8 matmuls save.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow
    from transformers import TorchAoConfig

    # set_inductor_config would change torch.compile for the whole process, the student included
    if kind == "fp8":
        quantized = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    else:
        quantized = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    return TorchAoConfig(quantized)


def stored(weight: Tensor) -> Tensor:
    """What a weight is kept as: of torchao's the numbers of its scales, which tell of any that is not finite."""
    scale = getattr(weight, "scale", None)
    return scale if isinstance(scale, Tensor) else weight


def stored_parts(weight: Tensor) -> list[Tensor]:
    """All plain tensors that a weight is kept as: of torchao's integers, scales and zero points."""
    if stored(weight) is weight:
        return [weight]
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(weight, name) for name in names]


def check_quantized(model: Any, kind: str, key: str) -> None:
    """Refuse a model that torchao has left as it was: it quantises ``nn.Linear`` alone, and says nothing.

    Args:
        model: as loaded with ``quantized_options``.
        kind: asked for.
        key: the recipe's key, for errors.

    Raises:
        UserError: less than half of the weights of its layers are quantised, as in GPT-2 and in stacked experts.
    """
    if QUANTIZED_BY.get(kind) != "torchao":
        return
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    matrices = [weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in ends]
    whole = sum(weight.numel() for weight in matrices)
    share = sum(weight.numel() for weight in matrices if stored(weight) is not weight) / max(whole, 1)
    if share < LEAST_SHARE:
        sides = " with sides that are multiples of 16" if kind == "fp8" else ""
        raise UserError(
            f"{key}: quantization '{kind}' is made for nn.Linear{sides}, which holds {share:.0%} of the weights in the "
            f"layers of {type(model).__name__}; expected 'none', or one of bitsandbytes ('8bit', '4bit')"
        )


@torch.no_grad()
def compare_heads(
    states: Tensor, head: Head, other_states: Tensor, other_head: Head, rows: int = 256
) -> dict[str, float]:
    """How far one model's next-token distributions are from another's, as the loss would read them.

    Args:
        states: ``[N, H]`` of the model that is right.
        head: of that model, weight ``[V, H]``.
        other_states: ``[N, H']`` of the same rows.
        other_head: weight ``[V, H']``.
        rows: so many at a time.

    Returns:
        ``kl``: the mean of KL(model || other) at T = 1, in nats; ``kl_99``: its 99th percentile; ``agreement``: the share of
        rows with the same first choice.
    """
    divergences, same = [], []
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        right = head(states[part].to(head.weight.dtype)).float().log_softmax(-1)  # [C, V]
        other = other_head(other_states[part].to(other_head.weight.dtype)).float().log_softmax(-1)  # [C, V]
        divergences.append(nn.functional.kl_div(other, right, reduction="none", log_target=True).sum(-1))  # [C]
        same.append(right.argmax(-1) == other.argmax(-1))
    kl = torch.cat(divergences)
    return {
        "kl": float(kl.mean()), "kl_99": float(kl.quantile(0.99)), "agreement": float(torch.cat(same).float().mean()),
    }  # fmt: skip
