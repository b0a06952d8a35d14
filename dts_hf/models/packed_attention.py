"""Attention over packed rows without a dense mask: each row attends within its own boundaries, and nothing else is computed.

Transformers answers packed rows with a mask of (sum of T)^2 entries, most of which say no. Flash Attention knows
better, but needs a GPU. Here the boundaries themselves travel where the mask would: ``cu_seqlens_mask`` is a four-
dimensional tensor of whole numbers, which every model hands to its attention layers untouched. An attention function that
does not know it fails on its type, so rows can never be joined in silence; and because it is an ordinary argument of the
layer, gradient checkpointing sees the same boundaries when it runs the layer again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dts_hf.errors import UserError
from dts_hf.models.head import without_adapters

NAME = "dts_hf_packed"
ROW = 12  # tokens of each of the two rows that ``check_packing`` looks at


def cu_seqlens_mask(lengths: Sequence[int]) -> Tensor:
    """The rows' boundaries as an attention mask: int64 ``[1, 1, 1, rows + 1]``, 0 first and the number of tokens last."""
    return torch.tensor([0, *accumulate(lengths)]).view(1, 1, 1, -1)


def is_cu_seqlens(mask: Tensor | None) -> bool:
    """Whether ``mask`` is a ``cu_seqlens_mask`` and not a mask of the usual kinds."""
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int64


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
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
        ValueError: the layer limits or caps its scores in a way that this function does not know.
    """
    if not is_cu_seqlens(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("packed attention does not know the soft-cap of attention scores")
    config = getattr(module, "config", None)
    for limit in ("sliding_window", "attention_chunk_size"):
        # Some families apply it through the mask alone (Qwen2-MoE, PhiMoE, Llama 4): with boundaries it would be lost.
        if limit not in kwargs and getattr(config, limit, None) is not None:
            raise ValueError(f"packed attention does not see the model's {limit}")
    cu_seqlens: list[int] = attention_mask.flatten().tolist()  # type: ignore[union-attr]
    lengths = [last - first for first, last in pairwise(cu_seqlens)]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # faster on a CPU than enable_gqa
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    window = kwargs.get("sliding_window")
    rows = []
    # split and cat: their backward passes copy once, where slices would add up full-size tensors.
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        rows.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """A token sees itself and the ``window`` - 1 before it: bool ``[T, T]``."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < window)


def check_packing(
    model: nn.Module, name: str = "the model", device: torch.device | None = None, own_mask: bool = True
) -> bool:
    """Prove on 24 tokens that ``model`` keeps packed rows apart; call it once after loading when packing is on.

    Two rows, one behind the other. The gradient of the second one's logits in the embeddings of the first is exactly zero,
    in every number format, where nothing passes from one to the other; a convolution or a recurrent state that runs on
    over the border leaves a gradient, however little it moves the logits. And the second row gives the logits that it
    gives alone, whatever the first one says, but for rounding.

    On a CPU a model that uses ``sdpa`` is switched to ``packed_attention`` where that works too; other calls of the model
    see no change. Bloom, MPT, Falcon, Mamba and others read row boundaries from nowhere (transformers 5.23): each row would
    see the rows before it, and nothing would say so.

    Args:
        model: a causal language model on its device; its mode is restored.
        name: the word for it in the error.
        device: where the model will be trained, where that is not where it is now.
        own_mask: whether the batches may carry ``cu_seqlens_mask``; those of a collator of the user's have positions alone.

    Returns:
        Whether the model reads ``cu_seqlens_mask``; if not, it reads the boundaries from ``position_ids``.

    Raises:
        UserError: the model mixes packed rows.
    """
    owner = without_adapters(model)
    was_training, before = owner.training, owner.config._attn_implementation
    owner.eval()
    try:
        with torch.no_grad():  # by the model's own attention
            alone = owner(input_ids=_probe(owner)[:, ROW:], use_cache=False).logits.float()
        if own_mask and before in ("sdpa", NAME) and (device or owner.device).type == "cpu":
            owner.set_attn_implementation(NAME)
            if _keeps_rows_apart(owner, cu_seqlens_mask([ROW, ROW]), alone):
                return True
            owner.set_attn_implementation(before)
        if _keeps_rows_apart(owner, None, alone):
            return False
    finally:
        owner.train(was_training)
    raise UserError(
        f"data.packing: {name} ({type(owner).__name__}) does not keep packed rows apart: a row would be changed by the rows "
        "before it. Set data.packing: false"
    )


def _probe(model: Any) -> Tensor:
    """Two rows of different tokens, ``[1, 2 * ROW]``."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 2 * ROW * 5, 5, device=model.device).remainder(vocabulary)[None]


def _keeps_rows_apart(model: Any, mask: Tensor | None, alone: Tensor) -> bool:
    """Whether the second of two packed rows sees nothing of the first and gets the logits that it gets alone."""
    ids = _probe(model)
    others = torch.cat([ids[:, :ROW].flip(1), ids[:, ROW:]], dim=1)
    positions = torch.arange(ROW, device=model.device).repeat(2)[None]
    packed: dict[str, Any] = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    embedded: list[Tensor] = []

    def mark(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(mark)
    try:
        with torch.enable_grad():
            behind_one = model(input_ids=ids, **packed).logits[:, ROW:].float()
            weights = torch.linspace(-1, 1, behind_one.numel(), device=behind_one.device).view_as(behind_one)
            gradient = torch.autograd.grad((behind_one * weights).sum(), embedded[0])[0]
        handle.remove()
        with torch.no_grad():
            behind_other = model(input_ids=others, **packed).logits[:, ROW:].float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError):  # no position_ids, or a mask of its own making
        return False
    finally:
        handle.remove()
    if gradient[:, :ROW].any() or not gradient[:, ROW:].any():
        return False
    # What is left to see is no leak but a wrong position, which moves every logit by far more than this.
    bound = _rounding(model) * alone.abs().mean()
    return all(bool((behind - alone).abs().mean() <= bound) for behind in (behind_one.detach(), behind_other))


def _rounding(model: Any) -> float:
    """How far, relative to themselves, logits may move because matrices of other shapes are multiplied."""
    formats = [torch.float32]  # many families go down to it inside
    formats += [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if getattr(model, "is_quantized", False) or torch.get_float32_matmul_precision() != "highest":
        formats.append(torch.bfloat16)  # what the products are made of: TF32 is hardly finer
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    return min(0.1, 64 * layers * max(torch.finfo(of_weight).eps for of_weight in formats))


AttentionInterface.register(NAME, packed_attention)


AttentionMaskInterface.register(NAME, sdpa_mask)
