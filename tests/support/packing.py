"""Tiny models of families that pack, packed rows for them, and what they make of them."""

from __future__ import annotations

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dts_hf.models.packed_attention import cu_seqlens_mask

LENGTHS = [9, 1, 14, 5]


def build(kind, config, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(
            config(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **options)
        ).eval()


def mistral():  # a window of 4: shorter than most rows
    return build(
        MistralForCausalLM, MistralConfig, intermediate_size=64, num_key_value_heads=2, sliding_window=4, head_dim=8
    )


def qwen():
    return build(Qwen2ForCausalLM, Qwen2Config, intermediate_size=64, num_key_value_heads=2)


def opt():
    return build(OPTForCausalLM, OPTConfig, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)


def bloom():
    return build(BloomForCausalLM, BloomConfig)


def packed_inputs(lengths=LENGTHS):
    ids = torch.arange(3, 3 + 7 * sum(lengths), 7).remainder(64)[None]
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": cu_seqlens_mask(lengths),
    }


def rows_alone(inputs, lengths=LENGTHS):
    """Each row of ``packed_inputs`` as a batch of its own."""
    return [
        {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
        for ids in inputs["input_ids"].split(lengths, dim=1)
    ]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def states_and_gradient(model, rows):
    """Logits of all tokens, one row after the other, and the gradient of a loss that needs all of them."""
    model.zero_grad()
    logits = torch.cat([model(**row, use_cache=False).logits[0] for row in rows])
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits.tanh() * weights).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
