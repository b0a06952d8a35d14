"""Tokenizers with the chat templates of real model families, and how a row's mask looks as text."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.rows import Row
from tests.support.tiny import tiny_tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
#: Special tokens of each family: those of the turns, ``bos_token`` and ``eos_token``.
FAMILIES: dict[str, tuple[list[str], str, str]] = {
    "chatml": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
    "smollm2": (["<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>"),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (
        [
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
        "<s>",
        "</s>",
    ),
    "phi3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<s>", "<|endoftext|>"),
    "phi4": (["<|im_start|>", "<|im_sep|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "qwen3": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
    "zephyr": ([], "<s>", "</s>"),
    "marked": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
    "marked_header": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "reasoning": (["<|user|>", "<|assistant|>"], "<s>", "</s>"),
    "bare": ([], "<|endoftext|>", "<|endoftext|>"),
}


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The tiny byte-level BPE with the chat template and the special tokens of ``family``."""
    special, bos, eos = FAMILIES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos, "additional_special_tokens": special})
    if family == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    return tokenizer


def spaced_tokenizer(family: str, scheme: str = "always") -> PreTrainedTokenizerFast:
    """A small BPE that puts a space before a text as Llama 2 (``always``) and Mistral (``first``) do."""
    special, bos, eos = FAMILIES[family]
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [*string.printable, "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, initial_alphabet=alphabet, special_tokens=[bos, eos], show_progress=False
    )
    backend.train_from_iterator(["the sky is blue and the answer is blue"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    return tokenizer


def encoded_rows(family: str, *rows: Row, template: str = "auto", **options: Any) -> EncodedDataset:
    """``rows`` as training sees them."""
    tokenizer = chat_tokenizer(family)
    limits = {"max_length": 2000, "max_prompt_length": 1900, **options}
    return encode_rows(rows, tokenizer, resolve_template(template, tokenizer), **limits)[0]


def marked(family: str, row: Row, **options: Any) -> str:
    """The row as training sees it, what is learned between ``«`` and ``»``."""
    dataset, tokenizer = encoded_rows(family, row, **options), chat_tokenizer(family)
    ids, text, last = dataset[0]["input_ids"], "", 0
    for start, stop in dataset.spans(0):
        text += f"{tokenizer.decode(ids[last:start])}«{tokenizer.decode(ids[start:stop])}»"
        last = stop
    return text + str(tokenizer.decode(ids[last:]))


def chat(*messages: tuple[str, str] | dict[str, Any], given: int | None = None, **fields: Any) -> Row:
    """A conversation from (role, content) pairs, ``u``, ``a``, ``s`` and ``t`` for the roles."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    said = [m if isinstance(m, dict) else {"role": roles[m[0]], "content": m[1]} for m in messages]
    last = said[-1]
    answer = last if set(last) - {"role", "content"} else None
    asked = [message["content"] for message in said if message["role"] == "user"]
    return Row("r", asked[-1], "", (last.get("content") or "",), tuple(said[:-1]), "messages", answer, given, **fields)
