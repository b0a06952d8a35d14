"""How prompts are cut into batches and shared out over processes, so that a row's answer does not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BATCHES = 4  # below fp32: batches that are answered together, whatever was killed and however many processes


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer without special tokens, spaces around it, or what follows a spelt-out end mark.

    ``<n>`` is a line break, as in MiniLLM's code.
    """
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.split("<|endoftext|>")[0].replace("<n>", "\n").strip()


def rows_are_independent(model: Any) -> bool:
    """Whether the model computes in fp32, where the text of a row does not depend on the rows beside it."""
    if not isinstance(model, torch.nn.Module):
        return True  # another backend batches as it likes: there is nothing to keep equal
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    # `_original_forward` is what accelerate leaves on a model whose forward it has wrapped in autocast
    lowered = torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu") or hasattr(model, "_original_forward")
    return exact and not lowered and torch.get_float32_matmul_precision() == "highest"


def share_out(
    lengths: Sequence[int], independent: bool, batch_size: int, rank: int, world: int
) -> list[tuple[list[int], bool]]:
    """The rows that this process answers: (rows of one call of ``generate``, whether they belong together).

    Every process gets the same number of calls, so that those of a sharded model stay together. Prompts of similar
    length are neighbours, and so each process gets about the same work.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if independent:
        return [(order[rank::world], False)]
    size = BLOCK_BATCHES * batch_size
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    blocks += [[]] * (-len(blocks) % world)
    return [(block, True) for block in blocks[rank::world]]
