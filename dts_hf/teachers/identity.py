"""Which teacher answers: everything that its states and its head depend on, so that two can be compared by name.

A cache of states, a compact cache and a teacher on another machine all carry one: what is trained on them is refused where
it is another teacher than the recipe's, and the difference is said in words. Nothing in it is a path, a row or a token of
access: it may be uploaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dts_hf.data.chat_templates import Template
from dts_hf.errors import UserError
from dts_hf.files import json_digest
from dts_hf.models.description import describe_config, describe_model, describe_tokenizer, versions, weights_digest
from dts_hf.models.head import Head, head_of

#: Final states, after the norm that ends the backbone: what the head reads. Engines often give those before it.
POST_NORM = "post_norm"
#: Types of the weights that a teacher can have.
DTYPES = ("float32", "bfloat16", "float16")
#: Of H and of V: far above every model, and small enough that what is made of it can be refused before it is tried.
MOST_WIDTH = 1 << 24
#: Compared only where the same versions of the libraries have written both: another one writes the same rules otherwise.
_OF_VERSION = ("tokenizer_rules", "config")
#: Told, and not compared: a branch may move without a change of the weights, and the same ones may lie elsewhere.
_TOLD_ONLY = ("model", "commit", "versions")
_WORDS = {
    "config": "configuration",
    "weights": "weights",
    "dtype": "type of the weights",
    "quantization": "quantisation",
    "adapter": "adapter",
    "hidden_size": "hidden size H",
    "vocab_size": "vocabulary V of the head",
    "head": "weight of the head",
    "bias": "bias of the head",
    "logit_scale": "logit scale",
    "softcap": "soft-cap of the logits",
    "states": "kind of states",
    "tokenizer": "tokenizer's vocabulary",
    "tokenizer_rules": "rules of the tokenizer",
    "template": "prompt template",
}


@dataclass(frozen=True)
class TeacherIdentity:
    """A teacher, its head, and what words the rows that it is asked; all values are JSON's.

    Attributes:
        model: Hub name, ``package:NAME/FILE.gguf``, or the last part of a folder's name.
        commit: on the Hub, resolved; None: it came from elsewhere.
        config, weights: digests of the configuration and of every weight (None: they cannot be read here, as of shares).
        dtype: torch's name of the type of the weights.
        quantization: as ``teacher.quantization`` has it.
        adapter: digest of its adapters' configurations; None: it has none.
        hidden_size, vocab_size: H, and V of the head.
        head, bias: digests of the head's weight ``[V, H]`` and bias ``[V]`` (None: it has none).
        logit_scale, softcap: as in ``Head``.
        tokenizer, tokenizer_rules: digests of what encoded the rows: the student's tokenizer, or the teacher's own where it
            is another one (``teacher.alignment``).
        template: its prompt template, of a chat template with its text.
        states: ``post_norm`` always; the flag is there so that others are refused.
        versions: of transformers and tokenizers, which name the values of configurations and rules.
    """

    model: str
    commit: str | None
    config: str
    weights: str | None
    dtype: str
    quantization: str
    adapter: str | None
    hidden_size: int
    vocab_size: int
    head: str
    bias: str | None
    logit_scale: float
    softcap: float | None
    tokenizer: str
    tokenizer_rules: str | None
    template: str
    states: str = POST_NORM
    versions: Mapping[str, str] = field(default_factory=versions)

    def as_json(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> TeacherIdentity:
        """What ``as_json`` gave.

        Args:
            values: the fields by name.
            where: the file or the server that they came from, for errors.

        Raises:
            UserError: a field is missing or unknown: another version wrote it.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        missing, unknown = sorted(known - {*values}), sorted({*values} - known)
        if missing or unknown:
            what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
            raise UserError(
                f"{where}: the teacher's identity {' and '.join(what)}: another version of dts_hf wrote it"
            )
        try:
            known_types: TypeAdapter[TeacherIdentity] = TypeAdapter(cls)
            found = known_types.validate_json(json.dumps(dict(values)), strict=True)
        except (ValidationError, ValueError, TypeError) as error:
            first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
            key, given = (first["loc"][0], repr(first["input"])[:60]) if first else ("identity", "no JSON")
            why = first["msg"] if first else error
            raise UserError(f"{where}: the teacher's identity: {key}: got {given}: {why}") from None
        for key, value in (("hidden_size", found.hidden_size), ("vocab_size", found.vocab_size)):
            if not 1 <= value <= MOST_WIDTH:
                raise UserError(f"{where}: the teacher's identity: {key}: got {value:,}, expected 1 to {MOST_WIDTH:,}")
        for key, number in (("logit_scale", found.logit_scale), ("softcap", found.softcap)):
            if number is not None and not (math.isfinite(number) and number):
                raise UserError(
                    f"{where}: the teacher's identity: {key}: got {number}, expected a finite number, not 0"
                )
        if found.dtype not in DTYPES:
            raise UserError(
                f"{where}: the teacher's identity: dtype: got {found.dtype!r}, expected one of {', '.join(DTYPES)}"
            )
        return found


def identity_of(
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    name: str,
    revision: str | None = None,
    quantization: str = "none",
) -> TeacherIdentity:
    """Describe a teacher that has just been loaded; all its weights are read once.

    Args:
        teacher: a causal language model, whole.
        tokenizer: what encodes the rows.
        template: what words them.
        name: of the teacher, as the recipe has it.
        revision: branch, tag or commit on the Hub.
        quantization: as the recipe has it.
    """
    return TeacherIdentity(**model_facts(teacher, name, revision, quantization), **rows_facts(tokenizer, template))


def model_facts(
    teacher: nn.Module, name: str, revision: str | None = None, quantization: str = "none"
) -> dict[str, Any]:
    """The part of an identity that a model tells, its head included.

    Args:
        teacher: a causal language model, whole.
        name: as the recipe has it.
        revision: branch, tag or commit on the Hub.
        quantization: as the recipe has it.
    """
    model, head = describe_model(teacher, name, revision), head_of(teacher)
    weights = [model[key] for key in ("weights", "frozen_weights", "unpacked_weights", "files") if model.get(key)]
    return {
        "model": shared_name(name),
        "commit": model["commit"],
        "config": json_digest(model["config"]),
        "weights": "; ".join(map(str, weights)) or None,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "quantization": quantization,
        "adapter": json_digest(model["adapter"]) if model["adapter"] else None,
        **head_facts(head),
    }


def config_digest(config: PreTrainedConfig, dtype: str) -> str:
    """``TeacherIdentity.config`` of the configuration of a model that is not loaded.

    Args:
        config: as it lies on the disk.
        dtype: torch's name of the type that the model would be loaded in, which loading writes into the configuration.
    """

    def loaded(values: dict[str, Any]) -> dict[str, Any]:
        found = {key: loaded(value) if isinstance(value, dict) else value for key, value in values.items()}
        return {**found, "dtype": dtype} if "dtype" in found else found

    return json_digest(loaded(describe_config(config)))


def head_facts(head: Head) -> dict[str, Any]:
    """The part of an identity that a head alone tells.

    Args:
        head: whole.
    """
    digest = weights_digest([("weight", head.weight)])
    assert digest is not None  # a whole head can be read
    return {
        "hidden_size": head.weight.shape[1],
        "vocab_size": head.vocab_size,
        "head": digest,
        "bias": None if head.bias is None else weights_digest([("bias", head.bias)]),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
    }


def rows_facts(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, Any]:
    """The part of an identity that says what words and encodes the rows.

    Args:
        tokenizer: what encodes them.
        template: what words them.
    """
    described = describe_tokenizer(tokenizer)
    return {
        "tokenizer": described["vocabulary"],
        "tokenizer_rules": described["rules"],
        "template": f"chat {described['chat_template']}" if template.is_chat else template.name,
    }


def differences(
    was: TeacherIdentity | Mapping[str, Any], now: TeacherIdentity | Mapping[str, Any], whose: str = "the cache"
) -> list[str]:
    """What differs, a line for each; empty where the two would give the same states and logits for the same rows.

    Args:
        was: of the cache or the server.
        now: of what is at hand; a mapping may hold some of the fields alone, and the others are not compared.
        whose: what the lines call the owner of ``was``.
    """
    before = was.as_json() if isinstance(was, TeacherIdentity) else dict(was)
    after = now.as_json() if isinstance(now, TeacherIdentity) else dict(now)
    same_versions = before.get("versions", versions()) == after.get("versions", versions())
    skipped = {*_TOLD_ONLY, *(() if same_versions else _OF_VERSION)}
    lines = []
    for key in [one.name for one in dataclasses.fields(TeacherIdentity)]:
        if key in skipped or key not in before or key not in after or before[key] == after[key]:
            continue
        if key == "weights" and None in (before[key], after[key]):  # shares cannot be read
            continue
        lines.append(f"{_WORDS[key]}: {_shown(before[key])} in {whose}, {_shown(after[key])} here")
    return lines


def shared_name(name: str) -> str:
    """The name of a model without a path of this machine: what may be uploaded.

    Args:
        name: Hub name, folder, file, or ``package:NAME/FILE.gguf``.
    """
    local = name.startswith((".", "/", "~")) or Path(name).exists() or "\\" in name
    return Path(name).resolve().name if local else name


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
