"""What answers depend on, as short digests: the fingerprint of a protocol in use, the tokenizer, the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.data.chat_templates import leading_special_ids, resolve_template
from dts_hf.data.rows import Row
from dts_hf.evaluation.protocol import Protocol
from dts_hf.models.quantization import stored_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def digest_of(values: Any) -> str:
    """Sixteen hexadecimal digits that stand for ``values``, which JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def rows_digest(rows: Sequence[Row]) -> str:
    """Digest of what is asked and what counts as right, in order."""
    return digest_of([_asked_in(row) for row in rows])


def _asked_in(row: Row) -> list[Any]:
    asked: list[Any] = [row.id, row.instruction, row.input, row.messages, list(row.references)]
    # Only where there is more: the digest of an ordinary row is in metrics.json of earlier versions
    more = {
        "kind": row.kind if row.kind == "prompt" else None,
        "answer": row.answer,
        "tools": row.tools,
        "chat_template_kwargs": row.chat_template_kwargs,
    }
    given = {key: value for key, value in more.items() if value}
    return [*asked, given] if given else asked


def describe_protocol(protocol: Protocol, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The entry ``protocol`` of ``metrics.json``: ``fingerprint``, ``name``, ``tokenizer`` and ``protocol.values()``.

    Scores of equal ``fingerprint`` can be compared. The batch size is left out because the text does not depend on it
    (in fp32; see ``generation.engine.generate``). The template ``auto`` is described as the one that it stands for.
    """
    protocol = protocol.resolved(resolve_template(protocol.template, tokenizer).name)
    described = {"tokenizer": tokenizer_digest(tokenizer, protocol.template), **protocol.values()}
    return {"fingerprint": digest_of(described), "name": protocol.name, **described}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Digest of what the tokenizer is, not of where it was loaded from.

    Args:
        tokenizer: its vocabulary, its end token and what it puts around a prompt count; padding is never attended to.
        template: name of the prompt template. One that writes its special tokens itself is the tokenizer's chat
            template; under another one only the tokens that the tokenizer puts before a text matter.
    """
    # Not the path, and not the padding: the same tokenizer in another folder, or with another pad token, gives one text
    written = resolve_template(template, tokenizer).is_chat
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        tokenizer.chat_template if written else leading_special_ids(tokenizer),
    ]
    return digest_of(parts)


def model_digest(model: PreTrainedModel) -> str:
    """Digest of configuration, end tokens and a sample of every weight: finds a model that was changed or replaced."""
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)  # of the reader
    stops = getattr(model.generation_config, "eos_token_id", None)
    digest = hashlib.sha256(json.dumps([config, stops], sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in stored_parts(weight.detach()):
            values = part.flatten()
            # A thousand values of each: training moves all of them, and the whole of a large model would take minutes
            digest.update(values[:: max(1, len(values) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def files_digest(source: str) -> str:
    """Digest of a model by name, and for a folder by the names, sizes and times of its files: it is not loaded here."""
    # The engine has the weights in a process of its own, and reading gigabytes here to hash them would take minutes
    files = sorted(Path(source).iterdir()) if Path(source).is_dir() else []
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return digest_of([source, listed])
