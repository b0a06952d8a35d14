"""A key-value cache that grows in place, and whose rows can leave and join while the batch runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CACHE_BLOCK = 32  # columns by which a key-value buffer grows


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration; layers of another kind than full attention stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether rows can be added: sliding windows and states of another form are started with their batch alone."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def keep_rows(cache: DynamicCache, index: Any) -> None:
    """Drop all rows but those at ``index`` [rows that stay], int64, in this order."""
    for layer in cache.layers:
        layer.reorder_cache(index)  # every kind of layer has it, and fewer rows than before are allowed


def join_rows(old: DynamicCache, new: DynamicCache, unused: int) -> None:
    """Append the rows of ``new`` to ``old``, right-aligned, and drop the first ``unused`` columns of ``old``."""
    for old_layer, new_layer in zip(old.layers, new.layers, strict=True):
        assert isinstance(old_layer, GrowingLayer) and isinstance(new_layer, GrowingLayer)
        old_layer.join(new_layer, unused)


class GrowingLayer(DynamicLayer):
    """Key-value cache of one layer in buffers with free columns on the right: a token is written, nothing is copied.

    ``keys`` and ``values`` are the views [B, heads, L, width] of the columns in use.
    """

    _length = 0
    _buffers: tuple[Tensor, ...] = ()

    # The signature is that of transformers, which hands other kinds of layers more than the states
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [B, heads, new, width] behind those in use and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = tuple(states[:, :, :0] for states in (key_states, value_states))
        end = self._length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = tuple(
                _resized(buffer[:, :, : self._length], len(buffer), end + CACHE_BLOCK) for buffer in self._buffers
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        return self._set_length(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at ``beam_idx`` [rows that stay], int64, in this order."""
        self._buffers = tuple(buffer.index_select(0, beam_idx) for buffer in self._buffers)
        self._set_length(self._length)

    def join(self, other: GrowingLayer, unused: int) -> None:
        """Append the rows of ``other``, right-aligned, and drop the first ``unused`` columns."""
        length = self._length - unused
        joined = []
        for old, new in zip(self._buffers, other._buffers, strict=True):
            buffer = _resized(old[:, :, unused : self._length], len(old) + len(new), length + CACHE_BLOCK)
            buffer[len(old) :, :, length - other._length : length] = new[:, :, : other._length]
            joined.append(buffer)
        self._buffers = tuple(joined)
        self._set_length(length)

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        """Make ``keys`` and ``values`` views of the first ``length`` columns: what ``DynamicLayer``'s callers read."""
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values


def _resized(states: Tensor, rows: int, columns: int) -> Tensor:
    """A buffer [rows, heads, columns, width] that begins with ``states`` [fewer rows, heads, fewer columns, width]."""
    # Zeros, not empty memory: a masked column still meets the weight 0 in the attention, and 0 * NaN is NaN
    buffer = states.new_zeros((rows, states.shape[1], columns, states.shape[3]))
    buffer[: len(states), :, : states.shape[2]] = states
    return buffer
