"""Configurations of three families, small enough to build, whose memory is estimated and measured."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig, OPTConfig

LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
OPT = OPTConfig(
    vocab_size=512, hidden_size=64, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
    dropout=0.0,
)  # fmt: skip
