"""Pairs of models as they are distilled, from their shapes alone: random weights, no download; and a batch for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """One backbone. ``family``: gpt2 (its MLP is four times as wide) or llama."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int = 0
    intermediate: int = 0
    tied: bool = True

    def matmuls(self) -> list[tuple[int, int]]:
        """(in, out) of the weights of one layer that meet every token."""
        h, m = self.hidden, self.intermediate
        if self.family == "gpt2":
            return [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)]
        kv = h * self.kv_heads // self.heads
        return [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]


class Batch:
    """Counts of a batch with ``lengths``: (tokens, labelled tokens) of each row."""

    lengths: Any

    @property
    def tokens(self) -> int:
        return sum(total for total, _ in self.lengths)

    @property
    def labelled(self) -> int:
        return sum(response for _, response in self.lengths)


@dataclass(frozen=True)
class Shape(Batch):
    """A pair and its batch."""

    teacher: Model
    student: Model
    vocab: int
    rows: int
    time: int

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, labelled tokens) of each row: from T down to 0.3 T in equal steps, 65 % of T on average."""
        spread = [1.0 - 0.7 * number / max(self.rows - 1, 1) for number in range(self.rows)]
        totals = [max(round(self.time * part), 4) for part in spread]
        return [(total, total // 2) for total in totals]


SHAPES = {
    "gpt2": Shape(Model("gpt2", 48, 1600, 25), Model("gpt2", 12, 768, 12), 50257, 16, 512),
    "135m": Shape(Model("llama", 30, 576, 9, 3, 1536), Model("llama", 20, 576, 9, 3, 1536), 49152, 32, 512),
    "8b": Shape(
        Model("llama", 32, 4096, 32, 8, 14336, tied=False), Model("llama", 16, 2048, 32, 8, 8192), 128256, 8, 1024
    ),
}
QUICK_SHAPES = {
    "gpt2": Shape(Model("gpt2", 3, 48, 4), Model("gpt2", 2, 32, 4), 512, 4, 24),
    "135m": Shape(Model("llama", 3, 32, 4, 2, 64), Model("llama", 2, 32, 4, 2, 64), 512, 4, 24),
    "8b": Shape(Model("llama", 3, 64, 4, 2, 96, tied=False), Model("llama", 2, 32, 4, 2, 64), 1024, 4, 24),
}


def make_model(shape: Shape, model: Model, dtype: str, seed: int, device: str) -> Any:
    """Random weights, made on the device; logits with a standard deviation of about 2."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    common = {"vocab_size": shape.vocab, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    positions = max(1024, shape.time)
    config: Any
    if model.family == "gpt2":
        sizes = {"n_embd": model.hidden, "n_layer": model.layers, "n_head": model.heads, "n_positions": positions}
        config = GPT2Config(**common, **sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    else:
        config = LlamaConfig(
            **common,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=model.tied,
        )
    torch.manual_seed(seed)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=2.0 / model.hidden**0.5)
    return made
