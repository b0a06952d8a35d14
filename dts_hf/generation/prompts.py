"""Prompts as the engine takes them: none is empty, and each leaves room for its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dts_hf.errors import UserError
from dts_hf.models.head import without_adapters


def checked_prompts(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    row_keys: Sequence[str] | None = None,
) -> list[list[int]]:
    """The prompts as ``generate`` takes them: an empty one is started with one token.

    Args:
        model: causal language model of ``transformers``.
        prompts: token ids of each prompt.
        max_new_tokens: longest answer, in tokens.
        row_keys: names of the prompts, for messages.

    Raises:
        UserError: a prompt leaves no room for its answer within the model's positions, or is empty and the model names
            no token to start with.
    """
    base = without_adapters(model)
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
