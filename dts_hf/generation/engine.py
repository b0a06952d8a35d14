"""Text generation whose output depends on neither batch size, nor row order, nor any global random state.

``model.generate`` samples from the global generator, so the same seed gives other texts for another batch size, and
evaluation in the middle of training moves the training's random state. Here the noise of a token is a function of
(seed, row key, step, token): the largest ``logit + Gumbel noise`` is an exact draw from the softmax (Gumbel 1954; the
"Gumbel-max trick").

The batch is kept full: answers end after very different lengths, so ended rows leave and waiting prompts take their
lines.

Shapes: ``B`` lines of the batch, ``L`` tokens seen (prompt, padding on the left, answer so far), ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dts_hf.distributed.processes import on_any_process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError

NOTHING = -1  # in a token history: no token here. Not the padding id, which is often a real token (pad == eos)
CACHE_BLOCK = 32  # columns by which a key-value buffer grows
NOISE_PIECE = 1 << 18  # elements made at a time on a CPU: a dozen passes over memory become passes over the cache
SECONDS_BEFORE_BAR = 2.0


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Args:
        max_new_tokens: longest answer in tokens, the end-of-sequence token included.
        batch_size: prompts answered at the same time. Changes the speed and the memory; in fp32 not the text.
        do_sample: draw from the softmax; otherwise take the largest logit.
        temperature: divides the logits before sampling (the temperature of evaluation, not of distillation). Unused
            when greedy.
        seed: of the sampling noise. Unused when greedy.
        no_repeat_ngram_size: no n-gram of prompt and answer may occur twice; 0 switches the rule off.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 128
    batch_size: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    seed: int = 10
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: got {getattr(self, name)}, expected a whole number of at least {least}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature: got {self.temperature}, expected a number above 0 (for greedy text: do_sample=False)"
            )


class Generated(NamedTuple):
    """One answer: its tokens without the end-of-sequence token, and whether that token was reached."""

    tokens: list[int]
    finished: bool


def stop_token_ids(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Return every token that ends an answer: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    from_model = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *from_model] if token is not None})


def cache_argument(model: torch.nn.Module) -> str:
    """Return the name under which ``model`` takes its cache: under another one it would answer as if it had seen nothing.

    Raises:
        UserError: it takes none that is known here.
    """
    base = _base(model)
    found = inspect.signature(base.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in found), None)
    if name is None:
        raise UserError(
            f"generation: {type(base).__name__} takes neither past_key_values nor cache_params, so it cannot answer "
            "prompts here. Leave out data.validation, evaluation.sets and data.responses: teacher"
        )
    return name


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    row_keys: Sequence[str] | None = None,
    progress: str | None = None,
    on_finished: Callable[[int, Generated], None] | None = None,
) -> list[Generated]:
    """Answer every prompt; the answers come in the order of the prompts.

    The model is in eval mode meanwhile and then as before; no global random state is read or written. The noise never
    depends on the batch. The logits do in their last bits, because matrix products are rounded differently for other
    shapes: in fp32 an answer is the same for any batch size and order, up to ties closer than about 1e-5; in bf16 and
    fp16 such near-ties are frequent, so equal text needs equal batches there (``evaluate_instruct`` sees to that).

    A model whose weights are sharded over processes (``is_sharded``: ZeRO-3, FSDP2) must be called by all of them at
    the same time, each with its own prompts: they agree before each forward, and one that has ended goes along.

    Args:
        model: causal language model of ``transformers``.
        prompts: token ids of each prompt. An empty one is started with the model's bos token, as ``model.generate``
            does.
        settings: limits and sampling.
        eos_token_ids: tokens that end an answer.
        pad_token_id: fills the left of short prompts; never attended to.
        row_keys: one name per prompt; sampling noise follows it. Default: the prompt's position in ``prompts``.
        progress: title of the progress bar, shown once the work has lasted two seconds; None for no bar.
        on_finished: called with the position in ``prompts`` and the answer as soon as a row has ended.

    Raises:
        UserError: prompt and answer together exceed the model's positions, or the number of keys is not that of the
            prompts.
    """
    if row_keys is not None and len(row_keys) != len(prompts):
        raise UserError(f"row_keys: got {len(row_keys)} keys for {len(prompts)} prompts, expected one for each")
    keys = [str(key) for key in (range(len(prompts)) if row_keys is None else row_keys)]
    inputs = checked_prompts(model, prompts, settings.max_new_tokens, row_keys)
    run = _Run(model, inputs, keys, settings, frozenset(eos_token_ids), pad_token_id, on_finished)
    # Longest first: later prompts always fit under the columns in use, and memory that does not suffice shows at once
    waiting = sorted(range(len(inputs)), key=lambda row: -len(inputs[row]))[::-1]
    # The buffers into which sharded weights are gathered are used by training again: no inference tensors there
    no_gradient = torch.no_grad() if run.together else torch.inference_mode()
    with _evaluating(model), no_gradient, _progress_bar(progress, len(inputs)) as show:
        lines: _Lines | None = None
        while waiting or (lines is not None and lines.live()):
            if lines is not None and not lines.live():
                lines = None
            lines = _refill(run, lines, waiting)
            if lines is not None and lines.live():
                _decode_step(run, lines)
            show(run.rows_done, run.tokens_made)
        while run.together and on_any_process(False, _device(run.model)):
            _call_along(run)
    return [Generated(tokens, finished) for tokens, finished in zip(run.tokens, run.finished, strict=True)]


@dataclass
class _Run:
    """What stays the same for all prompts, and the answers so far."""

    model: torch.nn.Module
    prompts: list[list[int]]
    keys: list[str]
    settings: GenerationSettings
    eos: frozenset[int]
    pad: int
    on_finished: Callable[[int, Generated], None] | None
    rows_done: int = 0
    tokens_made: int = 0
    together: bool = field(init=False)
    tokens: list[list[int]] = field(init=False)
    finished: list[bool] = field(init=False)
    done: list[bool] = field(init=False)
    forward_options: dict[str, Any] = field(init=False)
    cache_argument: str = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        self.tokens, self.finished, self.done = [[] for _ in range(count)], [False] * count, [False] * count
        keeps = "logits_to_keep" in inspect.signature(_base(self.model).forward).parameters
        self.forward_options = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
        self.cache_argument = cache_argument(self.model)
        self.together = is_sharded(self.model)

    def add(self, row: int, token: int) -> None:
        """Take the next token of the answer to ``row``."""
        tokens = self.tokens[row]
        self.finished[row] = token in self.eos
        if not self.finished[row]:
            tokens.append(token)
            self.tokens_made += 1
        if self.finished[row] or len(tokens) >= self.settings.max_new_tokens:
            self.done[row] = True
            self.rows_done += 1
            if self.on_finished is not None:
                self.on_finished(row, Generated(tokens, self.finished[row]))


@dataclass
class _Lines:
    """The running batch: ``history`` [B, L + 1] ends with the newest tokens, ``cache`` holds the L columns before."""

    run: _Run
    rows: list[int]
    history: Tensor
    cache: DynamicCache

    def live(self) -> list[int]:
        return [line for line, row in enumerate(self.rows) if not self.run.done[row]]


def _refill(run: _Run, lines: _Lines | None, waiting: list[int]) -> _Lines | None:
    """Drop ended rows and start waiting prompts, once a quarter of the lines is free (it copies the whole cache)."""
    live = lines.live() if lines is not None else []
    free = run.settings.batch_size - len(live)
    can_join = lines is None or all(isinstance(layer, _GrowingLayer) for layer in lines.cache.layers)
    if waiting and can_join and 4 * free >= run.settings.batch_size:
        fresh = _prefill(run, [waiting.pop() for _ in range(min(free, len(waiting)))])
        if lines is None:
            return fresh
        return _join(_keep(lines, live), _keep(fresh, fresh.live()))
    if lines is not None and 4 * (len(lines.rows) - len(live)) >= len(lines.rows):
        return _keep(lines, live)
    return lines


def _prefill(run: _Run, rows: list[int]) -> _Lines:
    """Read the prompts of ``rows`` and choose the first token of each answer."""
    width = max(len(run.prompts[row]) for row in rows)
    padded = [[NOTHING] * (width - len(run.prompts[row])) + run.prompts[row] for row in rows]
    history = torch.tensor(padded, dtype=torch.long, device=_device(run.model))
    cache = DynamicCache(config=_base(run.model).config)
    # `cat` of the whole cache for every new token is what a plain DynamicLayer does
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    lines = _Lines(run, rows, history, cache)
    mask = history != NOTHING
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    _choose_next(run, lines, _last_logits(run, history.where(mask, run.pad), mask, positions, cache))
    return lines


def _decode_step(run: _Run, lines: _Lines) -> None:
    mask = lines.history != NOTHING
    positions = mask.long().sum(-1, keepdim=True) - 1
    _choose_next(run, lines, _last_logits(run, lines.history[:, -1:], mask, positions, lines.cache))


def _last_logits(run: _Run, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    if run.together:
        on_any_process(True, _device(run.model))  # so that those that have ended come along
    # A state space model hides padding from its states: of one new token there is none
    seen = None if run.cache_argument == "cache_params" and ids.shape != mask.shape else mask.long()
    output = run.model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        **{run.cache_argument: cache},
        **run.forward_options,
    )
    return output.logits[:, -1]


def _call_along(run: _Run) -> None:
    """Call the model for nothing, so that the others can gather the weights that lie here."""
    ids = torch.full((1, 1), run.pad, dtype=torch.long, device=_device(run.model))
    run.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.zeros_like(ids), use_cache=False)


def _choose_next(run: _Run, lines: _Lines, logits: Tensor) -> None:
    """Append one token to the history of every line and to the answer of every live row."""
    settings = run.settings
    if settings.no_repeat_ngram_size > 0:
        logits = ban_repeated_ngrams(logits, lines.history, settings.no_repeat_ngram_size)
    if settings.do_sample:
        draws = [(run.keys[row], len(run.tokens[row])) for row in lines.rows]
        noise = gumbel_noise(settings.seed, draws, logits.shape[-1], logits.device)
        logits = noise.add_(logits.float() / settings.temperature)
    chosen = logits.float().argmax(-1)  # `argmax` of bf16 is slow on a CPU
    lines.history = torch.cat([lines.history, chosen[:, None]], dim=1)
    for row, token in zip(lines.rows, chosen.tolist(), strict=True):
        if not run.done[row]:
            run.add(row, token)


def _keep(lines: _Lines, live: list[int]) -> _Lines:
    """Return the batch with the lines ``live`` alone."""
    if len(live) < len(lines.rows):
        index: Any = torch.tensor(live, dtype=torch.long, device=lines.history.device)
        for layer in lines.cache.layers:
            layer.reorder_cache(index)  # every kind of layer has it, and fewer lines than before are allowed
        lines.history = lines.history[index]
        lines.rows = [lines.rows[line] for line in live]
    return lines


def _join(old: _Lines, new: _Lines) -> _Lines:
    """Put two batches under each other, right-aligned, without the columns on the left that no row uses."""
    if not new.rows:
        return old
    real = (old.history != NOTHING).any(0)
    unused = int(real.long().argmax())
    width = old.history.shape[1] - unused
    gap = width - new.history.shape[1]
    history = torch.nn.functional.pad(new.history, (gap, 0), value=NOTHING)
    for old_layer, new_layer in zip(old.cache.layers, new.cache.layers, strict=True):
        assert isinstance(old_layer, _GrowingLayer) and isinstance(new_layer, _GrowingLayer)
        old_layer.join(new_layer, unused)
    return _Lines(old.run, old.rows + new.rows, torch.cat([old.history[:, unused:], history]), old.cache)


class _GrowingLayer(DynamicLayer):
    """Key-value cache of one layer in buffers with free columns on the right: a token is written, nothing is copied.

    ``keys`` and ``values`` are the views [B, heads, L, width] of the columns in use.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._length = 0
        self._buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._buffers = tuple(buffer.index_select(0, beam_idx) for buffer in self._buffers)
        self._show(self._length)

    def join(self, other: _GrowingLayer, unused: int) -> None:
        """Append the rows of ``other``, right-aligned, and drop the first ``unused`` columns."""
        length = self._length - unused
        joined = []
        for old, new in zip(self._buffers, other._buffers, strict=True):
            buffer = _resized(old[:, :, unused : self._length], len(old) + len(new), length + CACHE_BLOCK)
            buffer[len(old) :, :, length - other._length : length] = new[:, :, : other._length]
            joined.append(buffer)
        self._buffers = tuple(joined)
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values


def _resized(states: Tensor, rows: int, columns: int) -> Tensor:
    # Zeros, not empty memory: a masked column still meets the weight 0 in the attention, and 0 * NaN is NaN
    buffer = states.new_zeros((rows, states.shape[1], columns, states.shape[3]))
    buffer[: len(states), :, : states.shape[2]] = states
    return buffer


def ban_repeated_ngrams(logits: Tensor, history: Tensor, n: int) -> Tensor:
    """Set to minus infinity every token that would complete an n-gram the row already holds.

    The rule of ``no_repeat_ngram_size`` in ``transformers``, applied to each row without its padding.

    Args:
        logits: [B, V]; written in place.
        history: [B, L] token ids of prompt and answer so far; ``NOTHING`` (-1) where there is no token.
        n: length of the n-gram in tokens, at least 1.
    """
    length = history.shape[1]
    if length < n:
        return logits
    windows = history.unfold(1, n, 1)  # [B, L - n + 1, n], a view
    last = windows[..., -1]
    # A suffix that reaches into the padding equals only itself, or windows that end in padding: those ban nothing
    banned = (last >= 0) & (last < logits.shape[-1])
    for offset in range(n - 1):
        banned &= windows[..., offset] == history[:, length - n + 1 + offset, None]
    line, column = banned.nonzero(as_tuple=True)
    logits[line, last[line, column]] = float("-inf")
    return logits


def gumbel_noise(seed: int, draws: Sequence[tuple[str, int]], vocabulary: int, device: torch.device | str) -> Tensor:
    """Return standard Gumbel noise [B, V], fp32, each row a function of (seed, its key, its step) alone.

    A counter-based generator: 64 key bits from BLAKE2b of (seed, key, step), then two rounds of a 32-bit integer hash
    of the token id.

    Args:
        seed: of the run.
        draws: (row key, step) of each row.
        vocabulary: V.
        device: where the noise is made; the integers behind it are the same on all devices.
    """
    piece = max(1, NOISE_PIECE // vocabulary)
    if len(draws) > piece and torch.device(device).type == "cpu":
        pieces = [draws[start : start + piece] for start in range(0, len(draws), piece)]
        return torch.cat([gumbel_noise(seed, some, vocabulary, device) for some in pieces])
    digests = b"".join(
        hashlib.blake2b(f"{seed}\x1f{step}\x1f{key}".encode(), digest_size=8).digest() for key, step in draws
    )
    words = [int.from_bytes(digests[i : i + 4], "little", signed=True) for i in range(0, len(digests), 4)]
    keys = torch.tensor(words, dtype=torch.int32, device=device).view(-1, 2, 1)
    bits = torch.arange(vocabulary, dtype=torch.int32, device=device) * -1640531535 ^ keys[:, 0]
    # int32 wraps around, and `>>` keeps the sign: hence the masks
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 2146121005
    bits += keys[:, 1]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= -2073254261
    bits ^= (bits >> 16) & 0xFFFF
    # 31 bits, finest near 0: u near 0 makes the large noise that lets a token of probability 1e-9 win
    uniform = (bits & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def checked_prompts(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    row_keys: Sequence[str] | None = None,
) -> list[list[int]]:
    """The prompts as ``generate`` takes them: an empty one is started, one that leaves no room is refused by its key."""
    base = _base(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    checked = []
    for number, prompt in enumerate(prompts):
        ids = [int(token) for token in prompt] or [_start(base)]
        if limit is not None and len(ids) + max_new_tokens > limit:
            name = f"prompt {number}" if row_keys is None else f"the prompt of row {row_keys[number]!r}"
            raise UserError(
                f"{name} has {len(ids)} tokens: with max_new_tokens={max_new_tokens} that is more than the {limit} "
                "positions of the model; shorten the prompts or the answers"
            )
        checked.append(ids)
    return checked


def _start(model: Any) -> int:
    """The token that an empty prompt is started with: that of the generation config or of the language model's own."""
    holders = [getattr(model, "generation_config", None), model.config.get_text_config(), model.config]
    for name in ("bos_token_id", "eos_token_id"):
        for holder in holders:
            token = getattr(holder, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, list) else token)
    raise UserError(f"{type(model).__name__} names no token to start an empty prompt with; give every prompt a token")


def _base(model: torch.nn.Module) -> Any:
    """Return the transformers model: a peft wrapper hides the signature of its ``forward``."""
    find = getattr(model, "get_base_model", None)
    return find() if callable(find) else model


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into eval mode and every module back into its own mode afterwards.

    Eval mode also switches gradient checkpointing off, and ``use_cache`` is passed with each call: no flag or config
    is touched.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _progress_bar(title: str | None, total: int) -> Iterator[Any]:
    """Yield ``show(rows done, tokens)``; the bar appears once the work has lasted ``SECONDS_BEFORE_BAR``."""
    if title is None:
        yield lambda rows, tokens: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))  # stdout is for results
    task = bar.add_task(title, total=total, rate="")
    began = time.monotonic()

    def show(rows: int, tokens: int) -> None:
        seconds = time.monotonic() - began
        if seconds >= SECONDS_BEFORE_BAR:
            if not bar.live.is_started:
                bar.start()
            bar.update(task, completed=rows, rate=f"{tokens / seconds:.0f} tokens/s")

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
