"""Attention of packed rows by the kernel that fits: which one takes a layer, and how it is called.

``rows`` is one call of ``scaled_dot_product_attention`` for each row: the reference, and all there is on a CPU. On a GPU
``varlen`` is torch's own flash-attention, ``flash`` the package (or its build of the ``kernels`` package), ``flex``
compiled FlexAttention. None of them makes a mask of (sum of T)^2 entries, and only ``rows`` waits for the device: what the
host must know of the rows is in the shape of ``cu_seqlens_mask``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

#: What ``varlen_attn`` can be told, which grew from release to release.
VARLEN_OPTIONS = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)

Kernel = Literal["rows", "varlen", "flash", "flex"]
#: Tokens: FlexAttention's blocks, and what ``cu_seqlens_mask`` rounds the longest row up to.
BLOCK = 128
#: Compute capabilities on which flash-attention's backward pass of heads wider than 192 finds too little shared memory.
SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))


class Ask(NamedTuple):
    """What a layer asks of its attention.

    Attributes:
        device: its type.
        dtype: of the states, or what autocast makes of them.
        heads, key_heads: how many.
        width, value_width: of a head.
        scaling: of scores; None: one over the root of the width.
        dropout: of attention weights.
        softcap: of scores; None: there is none.
        window: a token sees itself and the ``window`` - 1 before it; None: all of its row.
        gradient: a backward pass may follow.
    """

    device: str
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int
    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    gradient: bool = True


class Gpu(NamedTuple):
    """What decides between kernels besides: the card's compute capability, and whether torch has flash-attention."""

    capability: tuple[int, int]
    varlen: bool


def choose(ask: Ask, gpu: Gpu | None, has_flash: Callable[[], bool]) -> Kernel:
    """The fastest kernel that computes what is asked to the letter: nothing of it is ever left out.

    Args:
        ask: of a layer.
        gpu: None: it is not on one.
        has_flash: whether there is ``flash``; asked only where it would be taken, for it may have to be fetched.
    """
    if gpu is None:
        return "rows"
    half = ask.dtype in (torch.bfloat16, torch.float16) and gpu.capability >= (8, 0)
    fits = ask.width == ask.value_width and ask.width % 8 == 0 and ask.width <= 256
    fits = fits and not (ask.gradient and ask.width > 192 and gpu.capability in SMALL)
    if half and fits and gpu.varlen and ask.softcap is None:
        return "varlen"
    if half and fits and has_flash():
        return "flash"
    # No dropout there; narrower heads are refused.
    return "flex" if not ask.dropout and min(ask.width, ask.value_width) >= 16 else "rows"


def attend(kernel: Kernel, ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Causal attention of packed rows by ``kernel``.

    Args:
        kernel: that ``choose`` has chosen.
        ask: what it was chosen for.
        query: ``[1, heads, sum of T, width]``.
        key: ``[1, key heads, sum of T, width]``.
        value: ``[1, key heads, sum of T, value width]``.
        mask: ``packed_attention.cu_seqlens_mask``.

    Returns:
        ``[1, sum of T, heads, value width]``.
    """
    if kernel == "rows":
        return _rows(ask, query, key, value, mask)
    # Rotary embeddings in fp32 leave fp32 queries beside bf16 values under autocast; SDPA is on its list, these are not.
    query, key, value = query.to(ask.dtype), key.to(ask.dtype), value.to(ask.dtype)
    if kernel == "flex":
        return _flex(ask, query, key, value, mask)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return (_varlen if kernel == "varlen" else _flash)(ask, q, k, v, mask)[None]


# ------------------------------------------------------------------------------------------------------ the machine

_GPUS: dict[int, Gpu] = {}
_FLASH: list[Callable[..., Tensor] | None] = []


def gpu_of(device: torch.device) -> Gpu | None:
    """What is known of ``device``; None: it is no CUDA device."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _GPUS[index] if index in _GPUS else _learn(index)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _learn(index: int) -> Gpu:
    _GPUS[index] = Gpu(torch.cuda.get_device_capability(index), torch.backends.cuda.is_flash_attention_available())
    return _GPUS[index]


def flash_varlen() -> Callable[..., Tensor] | None:
    """``flash_attn_varlen_func`` of flash-attention or of the ``kernels`` package; None: neither can be used."""
    if not _FLASH:
        function = None
        if is_flash_attn_2_available(kernels_fallback_ok=True):
            try:
                function = lazy_import_flash_attention("flash_attention_2")[0][1]
            except Exception:  # whatever a build for another torch, or a download that is not possible, raises
                function = None
        # Without it (flash-attn < 2.6) the other kernels do
        knows = function is not None and "softcap" in inspect.signature(function).parameters
        _FLASH.append(function if knows else None)
    return _FLASH[0]


def has_flash() -> bool:
    """Whether ``flash`` can be called."""
    return flash_varlen() is not None


# ------------------------------------------------------------------------------------------------------ the kernels


def _rows(ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    lengths = _lengths(mask)
    groups = ask.heads // ask.key_heads
    if groups > 1:  # faster on a CPU than enable_gqa
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    # split and cat: their backward passes copy once, where slices would add up full-size tensors.
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        length, window = q.shape[2], ask.window
        near = _near(length, window, q.device) if window is not None and length > window else None
        if ask.softcap is not None:
            rows.append(_capped(ask, q, k, v, _near(length, length, q.device) if near is None else near))
            continue
        rows.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=near, dropout_p=ask.dropout, scale=ask.scaling, is_causal=near is None
            )
        )
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous()


def _near(length: int, window: int, device: torch.device) -> Tensor:
    """A token sees itself and the ``window`` - 1 before it: bool ``[T, T]``."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < window)


def _capped(ask: Ask, query: Tensor, key: Tensor, value: Tensor, near: Tensor) -> Tensor:
    """One row with a soft-cap, as transformers' eager attention computes it."""
    scores = query @ key.transpose(2, 3) * (ask.width**-0.5 if ask.scaling is None else ask.scaling)
    assert ask.softcap is not None
    scores = ask.softcap * torch.tanh(scores / ask.softcap)
    weights = scores.masked_fill(~near, -torch.inf).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.dropout(weights.to(value.dtype), ask.dropout, train=ask.dropout > 0) @ value


def _varlen(ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Torch's flash-attention: states ``[sum of T, heads, width]``; the left end of its window does not count the token."""
    cu_seqlens, longest = mask[0, 0, 0], mask.shape[2] * BLOCK
    left = -1 if ask.window is None else ask.window - 1
    takes = VARLEN_OPTIONS
    if ask.dropout == 0 and "window_size" in takes and (ask.heads == ask.key_heads or "enable_gqa" in takes):
        grouped: dict[str, Any] = {} if ask.heads == ask.key_heads else {"enable_gqa": True}
        return varlen_attn(  # type: ignore[return-value]
            query, key, value, cu_seqlens, cu_seqlens, longest, longest,
            scale=ask.scaling, window_size=(left, 0), **grouped,
        )  # fmt: skip
    # The same kernel without the door: varlen_attn has no dropout, before torch 2.12 no grouped heads, before 2.11 no scale.
    return torch.ops.aten._flash_attention_forward(  # type: ignore[no-any-return]
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, ask.dropout, True, False,
        scale=ask.scaling, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip


def _flash(ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The package: states and window as for ``_varlen``."""
    function = flash_varlen()
    assert function is not None  # or it had not been chosen
    cu_seqlens, longest = mask[0, 0, 0], mask.shape[2] * BLOCK
    return function(
        query, key, value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
        dropout_p=ask.dropout, softmax_scale=ask.scaling, causal=True,
        window_size=(-1 if ask.window is None else ask.window - 1, 0), softcap=ask.softcap or 0.0,
    )  # fmt: skip


_COMPILED: list[Callable[..., Any]] = []


def _flex(ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    groups = ask.heads // ask.key_heads
    if groups & (groups - 1):  # its kernel for few tokens shares keys among 1, 2, 4, ... heads
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1

    # Numbers that differ from model to model are tensors: of a float, the compiler makes a symbol that flex does not take.
    scale = _number(mask, ask.width**-0.5 if ask.scaling is None else ask.scaling)
    cap = None if ask.softcap is None else _number(mask, ask.softcap)

    def scaled(score: Tensor, *_place: Tensor) -> Tensor:
        score = score * scale
        return score if cap is None else cap * torch.tanh(score / cap)

    run: Callable[..., Any] = flex_attention
    if query.device.type == "cuda":
        if not _COMPILED:
            _COMPILED.append(torch.compile(flex_attention))
        run = _COMPILED[0]
    table = _block_mask(mask, query.shape[2], ask.window)
    attended: Tensor = run(query, key, value, score_mod=scaled, block_mask=table, scale=1.0, enable_gqa=groups > 1)
    return attended.transpose(1, 2).contiguous()


# -------------------------------------------------------------------------------- what is made once for each batch

#: By the batch's ``cu_seqlens_mask``, which all layers of student and teacher get, also when they run again for the
#: backward pass. Nothing in the values may hold the mask, or it would live for ever.
_OF_BATCH = WeakIdKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _of_batch(mask: Tensor, what: Any, make: Callable[[], Any]) -> Any:
    made = _OF_BATCH.setdefault(mask, {})
    if what not in made:
        made[what] = make()
    return made[what]


def _lengths(mask: Tensor) -> list[int]:
    """Tokens of each row, on the host: on a GPU the one wait for the device, which ``rows`` cannot do without."""
    made: list[int] = _of_batch(
        mask, "lengths", lambda: [last - first for first, last in pairwise(mask[0, 0, 0].tolist())]
    )
    return made


def _number(mask: Tensor, number: float) -> Tensor:
    made: Tensor = _of_batch(mask, number, lambda: torch.full((), number, device=mask.device))
    return made


def _block_mask(mask: Tensor, tokens: int, window: int | None) -> Any:
    return _of_batch(mask, (tokens, window), lambda: block_mask(mask[0, 0, 0], tokens, window))


def block_mask(cu_seqlens: Tensor, tokens: int, window: int | None) -> Any:
    """FlexAttention's ``BlockMask`` of packed rows from their boundaries, without a tensor of (sum of T)^2 or a wait.

    A token sees one unbroken stretch, from ``first`` to itself, and ``first`` never falls from token to token. So a block of
    queries sees the blocks from that of its first token's ``first`` to its own, and one of them wholly if its last token
    does.

    Args:
        cu_seqlens: int32 ``[rows + 1]``.
        tokens: of all rows.
        window: see ``Ask``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    first = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    if window is not None:
        first = torch.maximum(first, token - window + 1)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    block = token[: -(-tokens // BLOCK)]
    queries, keys = block[:, None], block
    seen = (keys >= first[block * BLOCK].div(BLOCK, rounding_mode="floor")[:, None]) & (keys <= queries)
    last = (block * BLOCK + BLOCK - 1).clamp(max=tokens - 1)
    whole = seen & (keys < queries) & (first[last][:, None] <= keys * BLOCK)
    whole &= (queries + 1) * BLOCK <= tokens  # a block that the last token cuts short is none

    def table(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    counts, places = table(seen & ~whole)
    return BlockMask.from_kv_blocks(
        counts, places, *table(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )
