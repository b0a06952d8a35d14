"""Our own generation loop, so that a row's text depends on neither batch, order, processes nor global random state.

That is what makes a score comparable and an evaluation resumable after a kill, answer by answer. ``model.generate``
samples from the global generator: the same seed gives other texts for another batch size, and evaluating in the middle
of training moves the training's random state. Here the noise of a token is a function of (seed, row key, step, token),
see ``sampling.py``.

The price: a Python loop and no paged attention, so on a GPU a server such as vLLM answers faster (``vllm_backend.py``, with
other samples; not measured here). There the loop would wait for the launches of its kernels, so a token's step is recorded
once and repeated, a whole batch at a time (``fixed_batch.py``). On a CPU the loop costs nothing beside
``model.generate``: about 1.2 times its tokens per second on a core (SmolLM2-135M, fp32;
``benchmarks/generation.py --prompts 16 --batch-size 8 --max-new-tokens 48 --threads 1 --rounds 2 --dtype float32``).

Continuous batching, where shapes may change: answers end after very different lengths, so ended rows leave the batch and
waiting prompts take their slots.

Shapes: ``B`` slots of the batch, ``L`` tokens seen (prompt, padding on the left, answer so far), ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from dts_hf.distributed.processes import on_any_process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.generation.cache import can_join, growing_cache, join_rows, keep_rows
from dts_hf.generation.fixed_batch import FixedBatch, decode
from dts_hf.generation.progress import progress_bar
from dts_hf.generation.prompts import checked_prompts
from dts_hf.generation.sampling import NOTHING, ban_repeated_ngrams, gumbel_noise, noise_keys, nucleus
from dts_hf.models.compilation import without_compiled_layers
from dts_hf.models.fake_quantization import rounded_once
from dts_hf.models.head import without_adapters
from dts_hf.models.modes import evaluating
from dts_hf.models.router import collects_router_logits

logger = logging.getLogger(__name__)
#: How far the logits of ``FixedBatch`` may be from those of a growing cache, relative to the largest: rounding (in fp32 that
#: of TF32, else that of bf16) moves them by less, a mask or a position that is wrong by far more.
FIXED_TOLERANCE, FIXED_TOLERANCE_LOW = 1e-2, 5e-2


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
        top_p: draw from the likeliest tokens that together have this probability (``sampling.nucleus``); 1: from all.
            Unused when greedy.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 128
    batch_size: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    seed: int = 10
    no_repeat_ngram_size: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: got {getattr(self, name)}, expected a whole number of at least {least}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature: got {self.temperature}, expected a number above 0 (for greedy text: do_sample=False)"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: got {self.top_p}, expected a number above 0, at most 1")


class Generated(NamedTuple):
    """One answer.

    Attributes:
        tokens: without the token that ended it.
        finished: such a token was reached.
        end: which of several it was; None: none, or whoever answered does not say.
    """

    tokens: list[int]
    finished: bool
    end: int | None = None


def stop_token_ids(model: torch.nn.Module, tokenizer: Any, turn_ends: Sequence[int] = ()) -> list[int]:
    """Return every token that ends an answer.

    Args:
        model: its generation config may name some.
        tokenizer: its end-of-sequence token is one.
        turn_ends: those of the prompt template (``chat_templates.end_of_turn_ids``).
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    from_model = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *turn_ends, *from_model] if token is not None})


def cache_argument(model: torch.nn.Module) -> str:
    """Return the name under which ``model`` takes its cache: under another one it would answer as if it had seen nothing.

    Raises:
        UserError: it takes none that is known here.
    """
    base = without_adapters(model)
    parameters = inspect.signature(base.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in parameters), None)
    if name is None:
        raise UserError(
            f"generation: {type(base).__name__} takes neither past_key_values nor cache_params, so it cannot answer "
            "prompts here. Leave out data.validation, evaluation.sets and data.responses: teacher"
        )
    return name


@contextlib.contextmanager
def calmed(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model answers as it will be used: in eval mode, its weights rounded once, no layer compiled anew."""
    with rounded_once(model), evaluating(model), without_compiled_layers(model):
        yield


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
    on_token: Callable[[int, int], None] | None = None,
    fixed_shapes: bool | None = None,
    vocab_size: int | None = None,
) -> list[Generated]:
    """Answer every prompt; the answers come in the order of the prompts.

    The model is in eval mode meanwhile and then as before; no global random state is read or written. The noise never
    depends on the batch. The logits do in their last bits, because matrix products are rounded differently for other
    shapes: in fp32 an answer is the same for any batch size and order, up to ties closer than about 1e-5; in bf16 and
    fp16 such near-ties are frequent, so equal text needs equal batches there (``shares.py`` sees to that).

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
        on_token: called with the position in ``prompts`` and each token of its answer.
        fixed_shapes: decode whole batches in shapes that never change, which a GPU records as a CUDA graph; a model that
            this does not suit goes on in the other way, with a warning. None: on a GPU alone. See ``fixed_batch``.
        vocab_size: only ids below it are chosen: a head may have rows behind the vocabulary. None: all that it has.

    Raises:
        UserError: prompt and answer together exceed the model's positions, or the number of keys is not that of the
            prompts.
    """
    if row_keys is not None and len(row_keys) != len(prompts):
        raise UserError(f"row_keys: got {len(row_keys)} keys for {len(prompts)} prompts, expected one for each")
    keys = [str(key) for key in (range(len(prompts)) if row_keys is None else row_keys)]
    inputs = checked_prompts(model, prompts, settings.max_new_tokens, row_keys)
    job = _Job(
        model, inputs, keys, settings, frozenset(eos_token_ids), pad_token_id, on_finished, on_token, vocab_size
    )
    # Longest first (taken from the end): later prompts always fit into the columns in use, and memory that does not
    # suffice shows at once
    waiting = sorted(range(len(inputs)), key=lambda row: -len(inputs[row]))[::-1]
    # The buffers into which sharded weights are gathered are used by training again: no inference tensors there
    no_gradient = torch.no_grad() if job.together else torch.inference_mode()
    with calmed(model), no_gradient, progress_bar(progress, len(inputs)) as show:
        batch: _Batch | None = None
        if (_device(model).type == "cuda" if fixed_shapes is None else fixed_shapes) and not job.together:
            batch = _answer_in_fixed_shapes(job, waiting, show)
        while waiting or (batch is not None and batch.live()):
            if batch is not None and not batch.live():
                batch = None
            batch = _refill(job, batch, waiting)
            if batch is not None and batch.live():
                _decode_step(job, batch)
            show(job.rows_done, job.tokens_made)
        while job.together and on_any_process(False, _device(job.model)):
            _call_along(job)
    return [job.answer(row) for row in range(len(inputs))]


@dataclass
class _Job:
    """What stays the same for all prompts, and the answers so far."""

    model: torch.nn.Module
    prompts: list[list[int]]
    keys: list[str]
    settings: GenerationSettings
    eos: frozenset[int]
    pad: int
    on_finished: Callable[[int, Generated], None] | None
    on_token: Callable[[int, int], None] | None = None
    vocab_size: int | None = None
    rows_done: int = 0
    tokens_made: int = 0
    together: bool = field(init=False)
    tokens: list[list[int]] = field(init=False)
    ends: list[int | None] = field(init=False)
    done: list[bool] = field(init=False)
    forward_options: dict[str, Any] = field(init=False)
    cache_argument: str = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        self.tokens, self.ends, self.done = [[] for _ in range(count)], [None] * count, [False] * count
        keeps = "logits_to_keep" in inspect.signature(without_adapters(self.model).forward).parameters
        self.forward_options = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
        # The router's loss takes a mask of the new tokens alone, and knows no cache
        if collects_router_logits(self.model):
            self.forward_options["output_router_logits"] = False
        self.cache_argument = cache_argument(self.model)
        self.together = is_sharded(self.model)

    def add(self, row: int, token: int) -> None:
        """Take the next token of the answer to ``row``."""
        tokens = self.tokens[row]
        ended = token in self.eos
        if ended:
            self.ends[row] = token
        else:
            tokens.append(token)
            self.tokens_made += 1
            if self.on_token is not None:
                self.on_token(row, token)
        if ended or len(tokens) >= self.settings.max_new_tokens:
            self.done[row] = True
            self.rows_done += 1
            if self.on_finished is not None:
                self.on_finished(row, self.answer(row))

    def answer(self, row: int) -> Generated:
        """To ``row``, as far as it goes."""
        return Generated(self.tokens[row], self.ends[row] is not None, self.ends[row])


@dataclass
class _Batch:
    """The running batch: the prompt in each slot, ``history`` [B, L + 1] of token ids, and ``cache`` of the first L.

    The newest tokens are in ``history`` alone: the next forward reads them and writes them into the cache.
    """

    job: _Job
    rows: list[int]
    history: Tensor
    cache: DynamicCache

    def live(self) -> list[int]:
        """The slots whose answers have not ended."""
        return [slot for slot, row in enumerate(self.rows) if not self.job.done[row]]


def _refill(job: _Job, batch: _Batch | None, waiting: list[int]) -> _Batch | None:
    """Drop ended rows and start waiting prompts, once a quarter of the slots is free.

    Until then ended rows are decoded on for nothing, because every change of the slots copies the whole cache.
    """
    live = batch.live() if batch is not None else []
    free = job.settings.batch_size - len(live)
    if waiting and (batch is None or can_join(batch.cache)) and 4 * free >= job.settings.batch_size:
        fresh = _prefill(job, [waiting.pop() for _ in range(min(free, len(waiting)))])
        if batch is None:
            return fresh
        return _join(_keep(batch, live), _keep(fresh, fresh.live()))
    if batch is not None and 4 * (len(batch.rows) - len(live)) >= len(batch.rows):
        return _keep(batch, live)
    return batch


def _answer_in_fixed_shapes(job: _Job, waiting: list[int], show: Callable[[int, int], None]) -> _Batch | None:
    """Answer the waiting prompts batch by batch with one ``FixedBatch``; where it does not suit, return one that runs."""
    settings, fixed = job.settings, None
    size = min(settings.batch_size, len(waiting))
    while waiting:
        batch = _prefill(job, [waiting.pop() for _ in range(min(size, len(waiting)))])
        if not can_join(batch.cache):
            return batch  # a sliding window, or states of another form
        keys = None
        if settings.do_sample:
            draws = [(job.keys[row], step) for step in range(settings.max_new_tokens) for row in batch.rows]
            keys = noise_keys(settings.seed, draws).view(-1, len(batch.rows), 2).to(batch.history.device)
        if batch.live() and fixed is None:
            fixed = _checked_fixed_batch(job, batch, size, keys)
            if fixed is None:
                return batch
        if fixed is not None and batch.live():
            made = len(job.tokens[batch.rows[batch.live()[0]]])  # the same for all that have not ended
            fixed.load(batch.cache, batch.history, keys, made)
            decode(fixed, batch.rows, settings.max_new_tokens - made, job.add, job.done)
        show(job.rows_done, job.tokens_made)
    return None


def _checked_fixed_batch(job: _Job, batch: _Batch, size: int, keys: Tensor | None) -> FixedBatch | None:
    """A ``FixedBatch`` that has given the logits of the next token that the growing cache gives; None, said once, if not.

    The next token is chosen from those of the growing cache: either way the batch has gone on by one.
    """
    settings, model = job.settings, without_adapters(job.model)
    made, reason, fixed = len(job.tokens[batch.rows[batch.live()[0]]]), "", None
    try:
        fixed = FixedBatch(
            functools.partial(_forward, job),
            batch.cache,
            size,
            batch.history.shape[1] - 1 + settings.max_new_tokens,  # the longest prompt comes first
            additive=model.config._attn_implementation == "eager",
            ngram=settings.no_repeat_ngram_size,
            temperature=settings.temperature if settings.do_sample else None,
            top_p=settings.top_p,
        )
        fixed.record()
        fixed.load(batch.cache, batch.history, keys, made)
        fixed.advance(1)
    except Exception as error:  # whatever a model does to a mask of four dimensions, or a capture to what it meets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    expected = _last_logits(job, *_newest(batch), batch.cache)
    if fixed is not None and not reason:
        apart = float((fixed.logits[: len(expected)].float() - expected.float()).abs().max())
        largest = float(expected.float().abs().max().clamp(min=1.0))
        # Not the type of the logits, which accelerate makes fp32 whatever it computes in
        low = fixed.dtype in (torch.bfloat16, torch.float16)
        if not apart <= (FIXED_TOLERANCE_LOW if low else FIXED_TOLERANCE) * largest:
            reason = f"its logits are {apart:.2g} from those of a cache that grows"
    _choose_next(job, batch, expected)
    if reason:
        name = type(model).__name__
        _warn_once(f"generation: {name} is decoded with a growing cache, not in fixed shapes ({reason})")
        return None
    return fixed


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _prefill(job: _Job, rows: list[int]) -> _Batch:
    """Read the prompts of ``rows`` and choose the first token of each answer."""
    width = max(len(job.prompts[row]) for row in rows)
    padded = [[NOTHING] * (width - len(job.prompts[row])) + job.prompts[row] for row in rows]
    history = torch.tensor(padded, dtype=torch.long, device=_device(job.model))
    # A plain DynamicCache copies all of itself (`torch.cat`) for every new token
    cache = growing_cache(without_adapters(job.model).config)
    batch = _Batch(job, rows, history, cache)
    mask = history != NOTHING
    # Positions count tokens and not columns, so that padding does not move a prompt
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    _choose_next(job, batch, _last_logits(job, history.where(mask, job.pad), mask, positions, cache))
    return batch


def _decode_step(job: _Job, batch: _Batch) -> None:
    """Read the newest tokens and choose the next ones."""
    _choose_next(job, batch, _last_logits(job, *_newest(batch), batch.cache))


def _newest(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The newest tokens [B, 1], the mask [B, L + 1] over the cache and them, and their positions [B, 1]."""
    mask = batch.history != NOTHING
    return batch.history[:, -1:], mask, mask.long().sum(-1, keepdim=True) - 1


def _last_logits(job: _Job, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Logits [B, V] after the last of the new tokens ``ids`` [B, new]; ``mask`` [B, L + new] covers the cache too."""
    if job.together:
        on_any_process(True, _device(job.model))  # so that those that have ended come along
    # A state space model hides padding from its states: of one new token there is none
    seen = None if job.cache_argument == "cache_params" and ids.shape != mask.shape else mask.long()
    return _forward(job, ids, seen, positions, cache)


def _forward(job: _Job, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
    output = job.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{job.cache_argument: cache},
        **job.forward_options,
    )
    logits: Tensor = output.logits
    return logits[:, -1, : job.vocab_size]


def _call_along(job: _Job) -> None:
    """Call the model for nothing, so that the others can gather the weights that lie here."""
    ids = torch.full((1, 1), job.pad, dtype=torch.long, device=_device(job.model))
    job.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.zeros_like(ids), use_cache=False)


def _choose_next(job: _Job, batch: _Batch, logits: Tensor) -> None:
    """Append one token to the history of every slot and to the answer of every live row."""
    settings = job.settings
    if settings.no_repeat_ngram_size > 0:
        logits = ban_repeated_ngrams(logits, batch.history, settings.no_repeat_ngram_size)
    if settings.do_sample:
        draws = [(job.keys[row], len(job.tokens[row])) for row in batch.rows]
        noise = gumbel_noise(settings.seed, draws, logits.shape[-1], logits.device)
        logits = noise.add_(nucleus(logits.float() / settings.temperature, settings.top_p))
    chosen = logits.float().argmax(-1)  # `argmax` of bf16 is slow on a CPU
    batch.history = torch.cat([batch.history, chosen[:, None]], dim=1)
    for row, token in zip(batch.rows, chosen.tolist(), strict=True):
        if not job.done[row]:
            job.add(row, token)


def _keep(batch: _Batch, live: list[int]) -> _Batch:
    """Return the batch with the slots ``live`` alone; it is changed in place."""
    if len(live) < len(batch.rows):
        index = torch.tensor(live, dtype=torch.long, device=batch.history.device)
        keep_rows(batch.cache, index)
        batch.history = batch.history[index]
        batch.rows = [batch.rows[slot] for slot in live]
    return batch


def _join(old: _Batch, new: _Batch) -> _Batch:
    """Put two batches under each other, right-aligned, without the columns on the left that no row uses.

    ``new`` is never wider than ``old``: its prompts are shorter, and ``old`` has grown since.
    """
    if not new.rows:
        return old
    real = (old.history != NOTHING).any(0)
    unused = int(real.long().argmax())
    width = old.history.shape[1] - unused
    gap = width - new.history.shape[1]
    history = torch.nn.functional.pad(new.history, (gap, 0), value=NOTHING)
    join_rows(old.cache, new.cache, unused)
    return _Batch(old.job, old.rows + new.rows, torch.cat([old.history[:, unused:], history]), old.cache)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
