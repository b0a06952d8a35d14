"""The fingerprint of a protocol in use: with the tokenizer that reads the prompts. Scores that share it can be compared."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from dts_hf.data.prompt_templates import get_template, leading_special_ids
from dts_hf.evaluation.protocol import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe_protocol(protocol: Protocol, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The entry ``protocol`` of ``metrics.json``: ``fingerprint``, ``name``, ``tokenizer`` and ``protocol.values()``.

    The batch size is left out because the text does not depend on it (in fp32; see ``generation.engine.generate``).
    """
    described = {"tokenizer": tokenizer_digest(tokenizer, protocol.template), **protocol.values()}
    text = json.dumps(described, sort_keys=True)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "name": protocol.name, **described}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Digest of what the tokenizer is, not of where it was loaded from.

    Args:
        tokenizer: its vocabulary, its end token and what it puts around a prompt count; padding is never attended to.
        template: name of the prompt template. One that writes its special tokens itself is the tokenizer's chat
            template; under another one only the tokens that the tokenizer puts before a text matter.
    """
    written = get_template(template).writes_special_tokens
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        tokenizer.chat_template if written else leading_special_ids(tokenizer),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
