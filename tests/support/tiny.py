"""Tiny random models and a small tokenizer for the tests: built in memory, no network, the same on every run."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Model = TypeVar("Model", bound=PreTrainedModel)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TINY_VOCAB = 320  # the 4 special tokens, 256 bytes, 60 merges; also the default width of the tiny models

CORPUS = [
    "Name three fruits that grow on trees. Apples, pears and plums grow on trees.",
    "Write the sentence in the past tense. The boat sails over the lake. The boat sailed over the lake.",
    "How many legs do two horses have together? Two horses have eight legs together.",
    "Below is a short text. Give the answer that the text gives, in one sentence.",
    "### Instruction: ### Input: ### Response: a task, a request and the context of the task",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def _byte_level_bpe() -> str:
    """Return the trained byte-level BPE as JSON: any text can be encoded and decoded again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat: bool = True, pad: str = "eos", bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 320 tokens whose end-of-sequence token is ``<|im_end|>``.

    Args:
        chat: give it a ChatML-like chat template.
        pad: ``"eos"`` (the padding token is the end-of-sequence token) or ``"own"`` (``<|pad|>``).
        bos: put ``<|endoftext|>`` before every text that is encoded with special tokens, as LLaMA tokenizers do.
    """
    backend = Tokenizer.from_str(_byte_level_bpe())
    if bos:
        token = SPECIAL_TOKENS[0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, backend.token_to_id(token))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token={"eos": "<|im_end|>", "own": "<|pad|>"}[pad],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _unlike_zero(model: torch.nn.Module) -> None:
    """Spread the initial weights: with the usual 0.02 a tiny model gives nearly the same logits for every input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5)


def _random(kind: type[Model], config: PreTrainedConfig, seed: int, attn: str) -> Model:
    """A model of ``config`` in fp32 and eval mode, the same for the same ``seed``; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float().eval()
        model.set_attn_implementation(attn)
        _unlike_zero(model)
    return model


def tiny_llama(
    vocab: int = TINY_VOCAB,
    layers: int = 2,
    hidden: int = 32,
    tie: bool = True,
    seed: int = 0,
    attn: str = "sdpa",
    max_positions: int = 1024,
) -> LlamaForCausalLM:
    """Return a random LLaMA in fp32 and eval mode: 4 heads, 2 key-value heads, eos = 2."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _random(LlamaForCausalLM, config, seed, attn)


def tiny_gpt2(
    vocab: int = TINY_VOCAB,
    layers: int = 2,
    hidden: int = 32,
    tie: bool = True,
    seed: int = 0,
    attn: str = "sdpa",
    max_positions: int = 1024,
) -> GPT2LMHeadModel:
    """Return a random GPT-2 (learned absolute positions) in fp32 and eval mode, dropout 0: 4 heads, eos = 2."""
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=max_positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _random(GPT2LMHeadModel, config, seed, attn)
