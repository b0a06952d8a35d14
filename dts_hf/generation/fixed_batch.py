"""Decoding in shapes that never change, so that a GPU records one token's step once and repeats it.

A step of a small model is hundreds of kernels of a few microseconds, and Python needs longer to launch them than the GPU to
run them. Recorded as a CUDA graph, all of them are one launch. For that every tensor stays where it is and keeps its size:
keys and values lie in buffers for the longest prompt and answer, the mask says which columns are in use, and the choice of
the token, its noise and the rule against repetition are part of the step. The host looks at the tokens every
``TOKENS_PER_LOOK`` steps, not at each; what an ended row goes on to say is thrown away.

Shapes: ``B`` slots, ``C`` columns (longest prompt and answer), ``V`` vocabulary, ``S`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dts_hf.generation.sampling import NOTHING, gumbel_of_keys, nucleus, repeated_ngrams

TOKENS_PER_LOOK = 16
_WARM_UP = 3  # steps before the recording: libraries choose their kernels and take their workspaces
_LEAST_COLUMNS = 8  # room for the warm-up

#: Takes ids, mask, positions and the cache; returns the logits [B, V] of the next token.
Forward = Callable[[Tensor, Tensor, Tensor, DynamicCache], Tensor]


class FixedLayer(DynamicLayer):
    """Key-value cache of one layer: ``keys`` and ``values`` [B, heads, C, width], all of it whatever is in use.

    Args:
        like: keys or values [any, heads, any, width] of the layer.
        rows: B.
        columns: C.
        column: [1] int64, where the next token is written; shared by all layers.
    """

    def __init__(self, like: tuple[Tensor, Tensor], rows: int, columns: int, column: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Zeros, not empty memory: a masked column still meets the weight 0 in the attention, and 0 * NaN is NaN
        self.keys, self.values = (
            states.new_zeros((rows, states.shape[1], columns, states.shape[3])) for states in like
        )
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.column = column

    # The signature is that of transformers
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [B, heads, 1, width] of one token and return all columns."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


class FixedBatch:
    """``B`` answers that grow by one token a step.

    Args:
        forward: the model.
        like: a cache of it that has read something, for the shapes of its layers.
        rows: B.
        columns: C.
        additive: the attention adds its mask to the scores; else it is given which columns may be seen.
        ngram: no n-gram of this length twice; 0: no such rule.
        temperature: of sampling; None: the largest logit.
        top_p: of sampling, see ``sampling.nucleus``.

    Attributes:
        logits: [B, V] of the last step.
    """

    def __init__(
        self,
        forward: Forward,
        like: DynamicCache,
        rows: int,
        columns: int,
        *,
        additive: bool,
        ngram: int = 0,
        temperature: float | None = None,
        top_p: float = 1.0,
    ) -> None:
        self.forward, self.additive, self.ngram, self.temperature = forward, additive, ngram, temperature
        self.top_p = top_p
        self.rows, self.columns = rows, max(columns, _LEAST_COLUMNS)
        layers: list[Any] = like.layers
        self.dtype, device = layers[0].keys.dtype, layers[0].keys.device
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.cache = DynamicCache()
        self.cache.layers = [
            FixedLayer((layer.keys, layer.values), rows, self.columns, self.column) for layer in layers
        ]
        self.ids = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.seen = torch.zeros((rows, 1, 1, self.columns), dtype=torch.bool, device=device)
        self.seen[..., 0] = True
        self.history = torch.full((rows, self.columns), NOTHING, dtype=torch.long, device=device)
        self.noise_keys = torch.zeros((self.columns, rows, 2), dtype=torch.int32, device=device)
        self.draw = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.empty(0, device=device)
        self._width = 0  # columns of ``history`` in use, as the host knows it
        self._graph: Any = None

    def record(self) -> None:
        """Record a step as a CUDA graph, which ``advance`` then repeats; on a CPU it does nothing. ``load`` afterwards."""
        device = self.ids.device
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Of this thread alone: those of a data loader may pin memory meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._step()

    def load(self, cache: DynamicCache, history: Tensor, noise_keys: Tensor | None, draw: int) -> None:
        """Take over rows that have read their prompts; slots without a row of their own repeat the first ones.

        Args:
            cache: of the first L columns.
            history: [rows, L + 1] token ids, ``NOTHING`` on the left of short prompts; the newest token is in it alone.
            noise_keys: [S, rows, 2], ``sampling.noise_keys`` of each step; None: nothing is drawn.
            draw: the step that is next.
        """
        slots = torch.arange(self.rows, device=self.ids.device).remainder(len(history))
        self._width = history.shape[1]
        layers: list[tuple[Any, Any]] = list(zip(self.cache.layers, cache.layers, strict=True))
        for fixed, grown in layers:
            for mine, theirs in ((fixed.keys, grown.keys), (fixed.values, grown.values)):
                mine.zero_()
                mine[:, :, : self._width - 1] = theirs.index_select(0, slots)
        self.history.fill_(NOTHING)
        self.history[:, : self._width] = history.index_select(0, slots)
        self.seen.copy_((self.history != NOTHING).view_as(self.seen))
        self.ids.copy_(self.history[:, self._width - 1 : self._width])
        self.positions.copy_((self.history != NOTHING).sum(-1, keepdim=True) - 1)
        self.column.fill_(self._width - 1)
        if noise_keys is not None:
            self.noise_keys[: len(noise_keys)] = noise_keys.index_select(1, slots)
        self.draw.fill_(draw)

    def advance(self, steps: int) -> list[list[int]]:
        """Make ``steps`` tokens of every row, and wait for them once: [steps][B] ids."""
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        self._width += steps
        made: list[list[int]] = self.history[:, self._width - steps : self._width].t().tolist()
        return made

    def _step(self) -> None:
        """Read the newest token of each row and choose the next one. No tensor is made that outlives it, but ``logits``."""
        mask = self.seen
        if self.additive:
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
        self.logits = self.forward(self.ids, mask, self.positions, self.cache)
        scores = self.logits.float()
        if self.ngram:
            banned = repeated_ngrams(self.history, self.column + 1, self.ngram, scores.shape[-1])
            scores = scores.masked_fill(banned, float("-inf"))
        if self.temperature is not None:
            keys = self.noise_keys.index_select(0, self.draw)[0]
            scores = gumbel_of_keys(keys, scores.shape[-1]).add_(nucleus(scores / self.temperature, self.top_p))
        chosen = scores.argmax(-1, keepdim=True)
        for counter in (self.column, self.positions, self.draw):
            counter.add_(1)
        self.history.index_copy_(1, self.column, chosen)
        self.seen.index_fill_(3, self.column, True)
        self.ids.copy_(chosen)


def decode(
    batch: FixedBatch, rows: Sequence[int], left: int, add: Callable[[int, int], None], ended: Sequence[bool]
) -> None:
    """Decode until every row has ended or has all its tokens.

    Args:
        batch: loaded.
        rows: the row of each slot; further slots are nobody's.
        left: tokens that an answer may still take, the same for all rows.
        add: takes a row and its next token.
        ended: by row, kept up to date by ``add``.
    """
    while left > 0 and not all(ended[row] for row in rows):
        steps = min(TOKENS_PER_LOOK, left)
        for tokens in batch.advance(steps):
            for row, token in zip(rows, tokens):
                if not ended[row]:
                    add(row, token)
        left -= steps
