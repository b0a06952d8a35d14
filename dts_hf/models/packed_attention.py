"""Attention over packed rows without a dense mask: each row attends within its own boundaries, and nothing else is computed.

Transformers answers packed rows with a mask of (sum of T)^2 entries, most of which say no, wherever flash-attention is
not installed. Here the boundaries themselves travel where the mask would: ``cu_seqlens_mask`` is a four-dimensional tensor
of whole numbers, which every model hands to its attention layers untouched. An attention function that does not know it
fails on its type, so rows can never be joined in silence; and because it is an ordinary argument of the layer, gradient
checkpointing sees the same boundaries when it runs the layer again. ``packed_kernels`` computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from dts_hf.models import packed_kernels
from dts_hf.models.packed_kernels import BLOCK, Ask

#: In the place of ``sdpa``, and of ``eager`` in the families that cannot have ``sdpa`` (a soft-cap of scores).
NAME, EAGER_NAME = "dts_hf_packed", "dts_hf_packed_eager"


def cu_seqlens_mask(lengths: Sequence[int]) -> Tensor:
    """The rows' boundaries as an attention mask: int32 ``[1, 1, blocks, rows + 1]``, 0 first and the number of tokens last.

    All ``blocks`` lines are the same. How many there are tells the host how long the longest row is, in blocks of 128
    tokens: a shape is known without waiting for the device, and stays with the tensor wherever it is moved or kept.
    """
    blocks = -(-max(lengths) // BLOCK)
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).repeat(1, 1, blocks, 1)


def is_cu_seqlens(mask: Tensor | None) -> bool:
    """Whether ``mask`` is a ``cu_seqlens_mask`` and not a mask of the usual kinds."""
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int32


def ask_of(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, told: dict[str, Any]) -> Ask:
    """What a layer asks of its attention.

    Args:
        module: the attention layer.
        query: ``[1, heads, sum of T, width]``.
        key: ``[1, key heads, sum of T, width]``.
        value: as ``key``.
        told: what else the layer tells its attention: ``dropout``, ``scaling``, and more in some families.

    Raises:
        ValueError: the layer limits or changes its scores in a way that no kernel here knows.
    """
    for name in ("s_aux", "position_bias"):
        if told.get(name) is not None:
            raise ValueError(f"packed attention does not know the layers' {name}")
    config = getattr(module, "config", None)
    for limit in ("sliding_window", "attention_chunk_size"):
        # Some families apply it through the mask alone (Qwen2-MoE, PhiMoE, Llama 4): with boundaries it would be lost.
        if limit not in told and getattr(config, limit, None) is not None:
            raise ValueError(f"packed attention does not see the model's {limit}")
    kind, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return Ask(
        kind, dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3],
        told["scaling"], told["dropout"], told.get("softcap"), told.get("sliding_window"), query.requires_grad,
    )  # fmt: skip


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Causal attention of packed rows, one after the other; anything else goes to transformers' ``sdpa``.

    Args:
        module: the attention layer.
        query: ``[1, heads, sum of T, width]``.
        key: ``[1, key heads, sum of T, width]``, of as many heads or a fraction of them.
        value: as ``key``.
        attention_mask: ``cu_seqlens_mask``, or a mask for ``sdpa``.
        dropout: of attention weights.
        scaling: of scores; None: one over the root of the width.
        **kwargs: what else a layer tells its attention, such as ``sliding_window``.

    Returns:
        ``[1, sum of T, heads, width]`` and None, as transformers expects.

    Raises:
        ValueError: see ``ask_of``.
    """
    if not is_cu_seqlens(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    ask = ask_of(module, query, key, value, {**kwargs, "dropout": dropout, "scaling": scaling})
    kernel = packed_kernels.choose(ask, packed_kernels.gpu_of(query.device), packed_kernels.has_flash)
    return packed_kernels.attend(kernel, ask, query, key, value, attention_mask), None  # type: ignore[arg-type]


def packed_attention_or_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """``packed_attention`` for a family without ``sdpa``: anything else goes to the ``eager`` attention of its own module.

    Args:
        module: see ``packed_attention``.
        query: ``[1, heads, sum of T, width]``.
        key: ``[1, key heads, sum of T, width]``.
        value: as ``key``.
        attention_mask: ``cu_seqlens_mask``, or a mask for ``eager``.
        dropout: of attention weights.
        scaling: see ``packed_attention``.
        **kwargs: see ``packed_attention``.
    """
    if is_cu_seqlens(attention_mask):
        return packed_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attended: tuple[Tensor, Any] = eager(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return attended


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(EAGER_NAME, packed_attention_or_eager)
AttentionMaskInterface.register(EAGER_NAME, eager_mask)
