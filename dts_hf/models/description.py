"""What a model and a tokenizer are once they are loaded: the record that a resumed run must find again.

Not the files are described but what has become of them: every format (shards, GGUF, adapters), every place and every
change that a recipe itself makes to a configuration are the same to it. Nothing is sampled: all weights are read once, about
as fast as memory is.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
import xxhash
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from dts_hf.files import digest, json_digest, jsonable, text_digest

#: What the Trainer itself sets in a model's configuration: from the tokenizer, for the time of training, as it is saved.
SET_BY_TRAINER = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "architectures", "dtype")
#: What our own generation reads of a model's generation config: where answers end, and an empty prompt begins.
READ_TO_ANSWER = ("bos_token_id", "eos_token_id")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: transformers imports the Python code that comes with a model under this name.
REMOTE_CODE = "transformers_modules"
# Of models that were described before they were sharded: a teacher's answers are kept under the same digest afterwards.
# Weights that are trained are described once, before training.
_read_whole: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def versions() -> dict[str, str]:
    """What names the values of configurations and the rules of tokenizers: another version may have other ones."""
    return {"transformers": transformers.__version__, "tokenizers": version("tokenizers")}


# ----------------------------------------------------------------------------------------------------------------- models


def describe_model(
    model: nn.Module, name: str | None = None, revision: str | None = None, generation: Iterable[str] | None = None
) -> dict[str, Any]:
    """A model that has just been loaded; the values are JSON's.

    Args:
        model: full, on one process; with the adapter that it is trained with, if any.
        name: of the folder or on the Hub; None: it was cut out of another one. A quantised model's weights are those of its
            files: packed, they may differ in their last bits from one card to another.
        revision: branch, tag or commit on the Hub.
        generation: the settings of its generation config that act; None: all, as of a student that is saved with them.

    Returns:
        ``config``, ``generation``, ``adapter``, ``commit`` (on the Hub), ``code`` (digest of what came with it) and
        digests of weights: ``weights``; of a model with an adapter ``frozen_weights``; of a quantised one
        ``unpacked_weights`` and ``files``.
    """
    settings = describe_config(getattr(model, "generation_config", None))
    if generation is not None:
        settings = {key: settings.get(key) for key in generation}
    values = {**_settings(model), "generation": settings}
    values["commit"] = commit_of(name, revision)
    if _is_quantized(model):
        values["files"] = _files_digest(name) or values["commit"]
    found = _weights(model, frozen=bool(_adapters(model)))
    if found:
        _read_whole[model] = found
    return values | (found or _read_whole.get(model, {}))


def describe_for_training(model: nn.Module, trained: bool) -> dict[str, Any]:
    """The same of a model that a user has made, as far as it can be told exactly when a trainer starts.

    Args:
        model: student or teacher; what of its weights is sharded over processes is left out.
        trained: it is the student, whose trained weights a checkpoint brings.
    """
    values = _settings(model)
    values["config"] = {key: value for key, value in values["config"].items() if key not in SET_BY_TRAINER}
    if trained:
        kinds = {name.replace("_orig_mod.", ""): str(weight.dtype) for name, weight in model.named_parameters()
                 if weight.requires_grad}  # fmt: skip
        values["trained"] = f"{text_digest(chr(10).join(kinds))} of {len(kinds):,} tensors"
        values["trained_dtypes"] = sorted({*kinds.values()})
    return values | _weights(model, frozen=trained)


def commit_of(name: str | None, revision: str | None) -> str | None:
    """The commit on the Hub that a model has just been loaded from, as the cache knows it; None: it came from elsewhere.

    Args:
        name: as the recipe has it.
        revision: branch, tag or commit.
    """
    if name is None or Path(name).exists():
        return None
    try:
        path = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except HFValidationError:  # package:NAME/FILE.gguf
        return None
    found = re.search(r"snapshots/([0-9a-f]{40})/", Path(path).as_posix()) if isinstance(path, str) else None
    return found[1] if found else None


def knows_weights(described: Mapping[str, Any]) -> bool:
    """Whether a record of ``describe_model`` tells other weights from these: then the folder that they lie in may be any."""
    if "files" in described:  # quantised: what is left unpacked is not all
        return described["files"] is not None
    return "weights" in described or "frozen_weights" in described


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """A checksum over names, types, shapes and all bytes; None where there are none, or not all can be read here.

    Args:
        tensors: by name, of any shapes; on any device.
    """
    xxh3, count = xxhash.xxh3_64(), 0
    for name, tensor in tensors:
        # Shares of FSDP, partitions of ZeRO-3, tensors that only promise to be loaded
        if not _is_plain(tensor) or tensor.is_meta or hasattr(tensor, "ds_id"):
            return None
        xxh3.update(f"{name.replace('_orig_mod.', '')} {tensor.dtype} {[*tensor.shape]}".encode())
        xxh3.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        count += tensor.numel()
    return f"xxh3:{xxh3.hexdigest()} of {count:,} numbers" if count else None


def _settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "config": describe_config(config),
        "adapter": {name: _adapter(adapter) for name, adapter in _adapters(model).items()},
        "code": _code_digest(type(_base(model))),
    }


def _weights(model: nn.Module, frozen: bool) -> dict[str, str]:
    """The digest of the weights under the name of what it is of; empty where they cannot be read."""
    if frozen:
        name, tensors = "frozen_weights", _frozen(model)
    elif _is_quantized(model):
        name, tensors = "unpacked_weights", _unpacked(model)
    else:
        name, tensors = "weights", _tensors(model)
    found = weights_digest(tensors)
    return {} if found is None else {name: found}


def describe_config(config: Any) -> dict[str, Any]:
    """``to_dict`` without what is not of the model: the place that it was loaded from, and who wrote it."""
    if not hasattr(config, "to_dict"):
        return {}
    return _without_origin(json.loads(json.dumps(jsonable(config.to_dict()))))


def _without_origin(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_origin(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not key.startswith("_") and key != "transformers_version"
    }


def _adapter(adapter: Any) -> dict[str, Any]:
    """A configuration of peft's, whose sets have no order, without the place of the model below and the writer."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.to_dict().items()}
    for key in ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"):
        values.pop(key, None)
    return dict(json.loads(json.dumps(jsonable(values))))


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The configurations of its adapters, whether peft or transformers has put them there."""
    found = getattr(model, "peft_config", None)
    return dict(found) if isinstance(found, Mapping) else {}


def _base(model: nn.Module) -> Any:
    """The model below peft's wrapper, else ``model``."""
    return model.get_base_model() if _adapters(model) and hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that are saved; the others follow from the configuration."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}", buffer


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is not trained, and what quantisation has not packed."""
    parameters = _unpacked(model) if _is_quantized(model) else model.named_parameters()
    return ((name, parameter) for name, parameter in parameters if not parameter.requires_grad)


def _unpacked(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What quantisation has left as it was: norms, embeddings, the output layer."""
    for name, parameter in model.named_parameters():
        if _is_plain(parameter) and parameter.is_floating_point():
            yield name, parameter


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _is_quantized(model: nn.Module) -> bool:
    return getattr(_base(model), "hf_quantizer", None) is not None


def _files_digest(name: str | None) -> str | None:
    """Of the weights in a folder; None: it is a name on the Hub, where the commit tells."""
    paths = sorted(Path(name).glob("*.safetensors")) if name else []
    return text_digest("\n".join(f"{path.name} {digest(path)}" for path in paths)) if paths else None


def _code_digest(kind: type) -> str | None:
    """Of the Python files that came with a model or a tokenizer; None where its class is one of transformers'."""
    if not kind.__module__.startswith(REMOTE_CODE):
        return None
    folder = Path(inspect.getfile(sys.modules[kind.__module__])).parent
    return text_digest("\n".join(f"{path.name} {digest(path)}" for path in sorted(folder.glob("*.py"))))


# ------------------------------------------------------------------------------------------------------------- tokenizers


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer: what it makes of a text; the values are JSON's.

    Returns:
        ``class``, ``vocabulary``, ``rules`` (merges, how a text is split, what is put around it) and ``chat_template`` as
        digests, and its special tokens as ``"<|im_end|> (2)"``.
    """
    vocabulary = tokenizer.get_vocab()
    values: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "code": _code_digest(type(tokenizer)),
        "vocabulary": f"{json_digest(sorted(vocabulary.items()))} of {len(vocabulary):,} tokens",
        "rules": _rules_digest(tokenizer),
        "chat_template": json_digest(tokenizer.chat_template) if tokenizer.chat_template else None,
    }
    for name in SPECIAL:
        token = getattr(tokenizer, name, None)
        values[name] = None if token is None else f"{token} ({tokenizer.convert_tokens_to_ids(str(token))})"
    return values


def _rules_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    for key in ("truncation", "padding"):  # of the last call
        rules.pop(key, None)
    return json_digest(rules)
