"""Families of which a student can be cut, those with several kinds of layers among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.families import FAMILIES, SIZES, Family

IDS = torch.tensor([[5, 60, 300, 17, 9, 41, 8, 100]])
JAMBA = {**FAMILIES["Jamba"].options, "attn_layer_period": 4, "attn_layer_offset": 1}
ROUTED = FAMILIES["Qwen3-MoE"].options
#: Families whose layers differ in ways that the tiny models of the table do not all show.
MIXED: dict[str, Family] = {
    "DeepSeek-V3, 2 dense": Family("DeepseekV3Config", {**FAMILIES["DeepSeek-V3"].options, "first_k_dense_replace": 2}),
    "Qwen3-MoE, every second": Family("Qwen3MoeConfig", {**ROUTED, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    "Qwen3-MoE, both keys": Family("Qwen3MoeConfig", {**ROUTED, "mlp_only_layers": [3], "decoder_sparse_step": 2}),
    "GPT-Neo": Family("GPTNeoConfig", {
        "vocab_size": 320, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]], "window_size": 4, "bos_token_id": 0, "eos_token_id": 2}),
    "SmolLM3, one without rotation": Family("SmolLM3Config", {**SIZES, "no_rope_layers": [1, 0, 1, 1]}),
    "Jamba, one attention layer": Family("JambaConfig", JAMBA),
    "Llama 4 text": Family("Llama4TextConfig", {
        **SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 8, "interleave_moe_layer_step": 2}, model="Llama4ForCausalLM"),
}  # fmt: skip
ALL = {**{name: family for name, family in FAMILIES.items() if family.trains and family.prunes}, **MIXED}


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
