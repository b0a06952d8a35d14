"""A tiny random model of every family that the package speaks of: built in memory from its configuration.

The weights are spread far from their usual 0.02, so that no layer is close to the identity, no logit close to zero, and
what one token does to another is far above rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny import TINY_VOCAB

VOCAB = TINY_VOCAB
LAYERS = 4
HIDDEN = 32

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
#: Shorter than the longest row of the tests, yet long enough that no position of padding is left without a token to look
#: at: Gemma 2's own attention then gives NaN in float64.
WINDOW = {"sliding_window": 8, "layer_types": MIXED}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 24, **EXPERTS}


@dataclass(frozen=True)
class Family:
    """What is expected of one family.

    Attributes:
        config: name of the configuration's class in transformers, and its options.
        inside: the widest number format that the family computes in throughout: ``float32`` where its code goes down to
            it whatever the weights are (routers, state space models), so that float64 cannot be compared to 1e-9.
        packs: whether packed rows are accepted (and then have to be exact), else refused.
        prunes: whether a student of three of its four layers can be cut out of it.
        trains: False where the family is refused, by one message, before training.
        model: the class that is built; by default what ``AutoModelForCausalLM`` takes.
        note: what ``docs/models.md`` says about its pruning, or why it is refused.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inside: str = "float64"
    packs: bool = True
    prunes: bool = True
    trains: bool = True
    model: str = "AutoModelForCausalLM"
    note: str = ""

    @property
    def class_name(self) -> str:
        if self.model != "AutoModelForCausalLM":
            return self.model
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[getattr(transformers, self.config).model_type]

    def configuration(self, **changes: Any) -> Any:
        return getattr(transformers, self.config)(**copy.deepcopy({**self.options, **changes}))

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        """A random model in evaluation mode, without dropout; the same for the same seed."""
        config = self.configuration(**changes)
        for name, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(config, name, 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls = getattr(transformers, self.model)
            if dtype == torch.float64:
                config._experts_implementation = "eager"  # the grouped matmul of routed experts knows no float64
            model = cls.from_config(config) if self.model.startswith("Auto") else cls(config)
            model = model.to(dtype).eval()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 and not name.endswith(("A_log", ".D")):
                        parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
                    elif name.endswith("bias"):
                        parameter.normal_(std=0.2)
        return model


def _llama_like(config: str, inside: str = "float64", **options: Any) -> Family:
    return Family(config, {**SIZES, **options}, inside=inside)


FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2Config", GPT2_SIZES),
    "OPT": Family("OPTConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": HIDDEN, "bos_token_id": 0, "eos_token_id": 2,
        "pad_token_id": 3}),
    "LLaMA": _llama_like("LlamaConfig", tie_word_embeddings=True),
    "LLaMA, untied": _llama_like("LlamaConfig", tie_word_embeddings=False),
    "Mistral": _llama_like("MistralConfig", sliding_window=8),
    "Qwen2": _llama_like("Qwen2Config", use_sliding_window=True, max_window_layers=0, **WINDOW),
    "Qwen3": _llama_like("Qwen3Config", head_dim=8),
    "Gemma 1": _llama_like("GemmaConfig", head_dim=8, inside="float32"),
    "Gemma 2": _llama_like("Gemma2Config", head_dim=8, final_logit_softcapping=3.0, **WINDOW, inside="float32"),
    "Gemma 3": _llama_like("Gemma3TextConfig", head_dim=8, **WINDOW, inside="float32"),
    "Phi": _llama_like("PhiConfig"),
    "Phi-3": _llama_like("Phi3Config"),
    "GPT-NeoX": Family("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "GPT-J": Family("GPTJConfig", {**GPT2_SIZES, "rotary_dim": 4}, inside="float32"),
    "Falcon": Family("FalconConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}, packs=False),
    "BLOOM": Family("BloomConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 3}, packs=False),
    "MPT": Family("MptConfig", {
        "vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}, inside="float32", packs=False),
    "StableLM": _llama_like("StableLmConfig"),
    "OLMo 2": _llama_like("Olmo2Config"),
    "Cohere": _llama_like("CohereConfig", logit_scale=0.25, inside="float32"),
    "Granite": _llama_like("GraniteConfig", logits_scaling=4.0),
    "SmolLM3": _llama_like("SmolLM3Config"),
    "GLM4": _llama_like("Glm4Config", head_dim=8),
    "Starcoder2": _llama_like("Starcoder2Config"),
    "Nemotron": _llama_like("NemotronConfig", head_dim=8),
    "Mixtral": Family("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}, inside="float32"),
    "Qwen3-MoE": Family("Qwen3MoeConfig", {
        **SIZES, **ROUTED, "head_dim": 8, "mlp_only_layers": [1], "decoder_sparse_step": 1}, inside="float32"),
    "OLMoE": Family("OlmoeConfig", {**SIZES, **EXPERTS}, inside="float32"),
    "DeepSeek-V3": Family("DeepseekV3Config", {
        **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}, inside="float32"),
    "gpt-oss": Family("GptOssConfig", {
        **SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, inside="float32",
        packs=False),
    "Mamba": Family("MambaConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 3}, inside="float32", packs=False),
    "Jamba": Family("JambaConfig", {
        **SIZES, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        inside="float32", packs=False),
    "LFM2": Family("Lfm2Config", {
        **SIZES, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}, packs=False),
    "Llama 4 text": Family("Llama4TextConfig", {
        **SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 64, "interleave_moe_layer_step": 1}, inside="float32", model="Llama4ForCausalLM"),
    "Gemma 3 with vision": Family("Gemma3Config", {
        "text_config": {**SIZES, "head_dim": 8, **WINDOW}, "mm_tokens_per_image": 4, "image_token_index": 300,
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
                          "image_size": 28, "patch_size": 14}}, inside="float32",
        model="Gemma3ForConditionalGeneration", note="into `Gemma3ForCausalLM`; text alone"),
    "T5": Family("T5Config", {
        "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, trains=False,
        model="T5ForConditionalGeneration", note="is an encoder-decoder model"),
    "BART": Family("BartConfig", {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}, trains=False,
        model="BartForConditionalGeneration", note="is an encoder-decoder model"),
    "BERT": Family("BertConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48}, trains=False, model="BertLMHeadModel", note="is not causal"),
    "RecurrentGemma": Family("RecurrentGemmaConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "lru_width": HIDDEN}, trains=False,
        note="changes its logits in a way that dts_hf does not know"),
    "xLSTM": Family("xLSTMConfig", {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_blocks": 2, "num_heads": 4}, trains=False,
        note="cannot compute a loss in the place of its output layer"),
}  # fmt: skip
