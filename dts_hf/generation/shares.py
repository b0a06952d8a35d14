"""How prompts are shared out over processes, so that a row's answer depends neither on their number nor on a kill.

In fp32 the text of a row does not depend on the rows beside it: each process takes a strided share of the prompts (of
two processes every second one, sorted by length), and whatever answer is there already is kept. In bf16 and fp16 it
does, in near-ties: there the prompts are cut into blocks of ``BLOCK_BATCHES`` batches, a block is answered as a whole
and by one process, and a block that a kill left incomplete is answered again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dts_hf.distributed.sharding import is_sharded
from dts_hf.generation.engine import Generated, GenerationSettings, generate, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BATCHES = 4  # below fp32: batches that are answered together, whatever was killed and however many processes


def answer_share(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    turn_ends: Sequence[int] = (),
    known: Container[int],
    on_finished: Callable[[int, Generated], None],
    rank: int = 0,
    world: int = 1,
    row_keys: Sequence[str] | None = None,
    progress: str | None = None,
    answer: Callable[..., list[Generated]] = generate,
) -> None:
    """Answer the prompts that fall to this process and have no answer yet; every process calls it.

    Args:
        model: causal language model, or the engine of another backend.
        tokenizer: of the model.
        prompts: token ids of every prompt, also of those that others answer.
        settings: limits and sampling.
        turn_ends: tokens at which generation stops besides the end tokens of tokenizer and model.
        known: places in ``prompts`` that have an answer, the same on all processes.
        on_finished: called with the place in ``prompts`` and the answer as soon as a row has ended.
        rank: number of this process.
        world: number of processes that share the prompts.
        row_keys: one name per prompt, which its sampling noise follows.
        progress: title of the progress bar of the first process, or None.
        answer: what generates; has the signature of ``generation.engine.generate``.
    """
    calls = share_out(
        [len(prompt) for prompt in prompts], rows_are_independent(model), settings.batch_size, rank, world
    )
    for number, (block, together) in enumerate(calls, start=1):
        missing = [place for place in block if place not in known]
        todo = block if together and missing else missing

        def finished(position: int, generated: Generated, todo: list[int] = todo) -> None:
            on_finished(todo[position], generated)

        part = f", part {number} of {len(calls)}" if len(calls) > 1 else ""
        # Of a sharded model even no prompt is a call: the others may need the weights that lie here
        if todo or (isinstance(model, torch.nn.Module) and is_sharded(model)):
            answer(
                model,
                [prompts[place] for place in todo],
                settings,
                eos_token_ids=stop_token_ids(model, tokenizer, turn_ends),
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,  # never attended to: any id does
                row_keys=None if row_keys is None else [row_keys[place] for place in todo],
                progress=None if rank or progress is None else progress + part,
                on_finished=finished,
            )


def share_out(
    lengths: Sequence[int], independent: bool, batch_size: int, rank: int, world: int
) -> list[tuple[list[int], bool]]:
    """Choose the prompts that one process answers.

    Prompts of similar length are neighbours, and so each process gets about the same work. Every process gets the same
    number of calls, so that those of a sharded model stay together.

    Args:
        lengths: of the prompts, in tokens.
        independent: whether the text of a row does not depend on the rows beside it.
        batch_size: prompts answered at the same time.
        rank: number of the process.
        world: number of processes.

    Returns:
        For each call of ``generate``: the places of its prompts, and whether they must be answered together.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    if independent:
        return [(order[rank::world], False)]
    size = BLOCK_BATCHES * batch_size
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    blocks += [[]] * (-len(blocks) % world)
    return [(block, True) for block in blocks[rank::world]]


def rows_are_independent(model: Any) -> bool:
    """Whether the model computes in fp32, where the text of a row does not depend on the rows beside it."""
    if not isinstance(model, torch.nn.Module):
        return True  # another backend batches as it likes: there is nothing to keep equal
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    # `_original_forward` is what accelerate leaves on a model whose forward it has wrapped in autocast
    autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    lowered = autocast or hasattr(model, "_original_forward")
    return exact and not lowered and torch.get_float32_matmul_precision() == "highest"


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer without special tokens, spaces around it, or what follows a spelt-out end mark.

    ``<n>`` is a line break, as in MiniLLM's code.
    """
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.split("<|endoftext|>", 1)[0].replace("<n>", "\n").strip()
