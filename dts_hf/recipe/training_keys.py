"""The keys of ``training:``, which are those of ``transformers.TrainingArguments``, and ranges that it does not check."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from enum import EnumMeta
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from dts_hf.registry import Between

RESERVED_TRAINING_KEYS = {
    "output_dir": "not allowed here: it is the run directory, set output.dir",
    "label_smoothing_factor": "not supported: the loss takes the labels as they are; the teacher does the smoothing",
    "hub_token": "not allowed here: recipes are saved and shared. Run 'hf auth login' or set HF_TOKEN",
}
RENAMED_TRAINING_KEYS = {  # keys of older versions that many recipes still carry
    "warmup_ratio": "warmup_steps (a value below 1 is a share of all steps)",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}
LARGEST = 2**31 - 1  # beyond it tokenizers, tensors, timers and random generators overflow, in words that name no key
COUNT, COUNT_FROM_ZERO, STEPS = Between(1, LARGEST), Between(0, LARGEST), Between(0, LARGEST, "high")
DECAY, SEED = Between(0.0, 1.0, "low"), Between(0, 2**32 - 1)
#: TrainingArguments takes any number for these, and the run fails later, in words that do not name the key, or never learns.
#: The high ends are far beyond what anybody trains with: they refuse a slip of the keyboard, not a bold choice.
TRAINING_RANGES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
         "dataloader_prefetch_factor", "eval_accumulation_steps", "torch_empty_cache_steps", "ddp_timeout"), COUNT,
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), STEPS),
    **dict.fromkeys(("warmup_steps", "eval_delay"), COUNT_FROM_ZERO),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha"), Between(0.0, 1000.0)),
    "adam_epsilon": Between(0.0, 1.0), "adam_beta1": DECAY, "adam_beta2": DECAY, "max_grad_norm": Between(low=0.0),
    "max_steps": Between(-1, LARGEST), "seed": SEED, "data_seed": SEED, "local_rank": Between(-1, LARGEST),
    "ddp_bucket_cap_mb": Between(1, 1_000_000),
    "dataloader_num_workers": Between(0, 512),  # processes: what is far beyond the cores takes the machine down
}  # fmt: skip
#: No other number may be infinite: ``max_grad_norm: .inf`` measures the gradient and does not clip it.
MAY_BE_INFINITE = ("max_grad_norm",)
#: Keys whose value is a mapping, a file of one, or ``name=value, ...``, with numbers inside.
MAY_HOLD_NUMBERS = (
    "lr_scheduler_kwargs", "optim_args", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
    "accelerator_config", "fsdp_config", "deepspeed",
)  # fmt: skip
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf|infinity)", re.IGNORECASE)


def non_finite(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, number) of every NaN and infinity inside a mapping or list that is one value of ``training:``.

    ``optim_args`` and the mappings that may be JSON are text in which such numbers are looked for, too.
    """
    if isinstance(value, float) and not math.isfinite(value):
        yield "", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from ((f".{key}{rest}", number) for rest, number in non_finite(item))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from ((f".{index}{rest}", number) for rest, number in non_finite(item))
    elif isinstance(value, str):
        for key, number in re.findall(r"""([\w.]+)["']?\s*[=:]\s*([-+]?(?:[A-Za-z]+|[\d.]+[eE]\+?\d+))\b""", value):
            if _NOT_FINITE.fullmatch(number) or (number[-1].isdigit() and math.isinf(float(number))):
                yield f".{key}", number


@functools.cache
def training_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields of the installed ``transformers.TrainingArguments`` by name."""
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


@functools.cache
def adapter(key: str) -> TypeAdapter[Any]:
    """A strict check of one ``TrainingArguments`` field; where pydantic knows no check, everything passes."""
    from transformers import TrainingArguments

    hint = typing.get_type_hints(TrainingArguments)[key]
    options = typing.get_args(hint) or [hint]
    enums: list[Any] = [option for option in options if isinstance(option, EnumMeta)]
    choices = training_fields()[key].metadata.get("choices") or [member.value for enum in enums for member in enum]
    if key == "fsdp":  # the constructor takes more than its annotation says
        hint = Any
    elif choices:
        hint = Literal[tuple(choices)]
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return TypeAdapter(Any)


def whole_training_values(training: Mapping[str, Any]) -> dict[str, Any]:
    """``training`` with 2.0 and 1e3 as whole numbers where a key takes nothing else."""
    return {
        key: int(value)
        if isinstance(value, float) and value.is_integer() and key in training_fields() and not _takes(key, value)
        else value
        for key, value in training.items()
    }


def _takes(key: str, value: Any) -> bool:
    try:
        adapter(key).validate_python(value)
    except ValidationError:
        return False
    return True


@functools.cache
def key_schema(key: str) -> dict[str, Any]:
    """The JSON schema of one key, with its range."""
    node = adapter(key).json_schema()
    if "$defs" in node:  # they would have to stand at the root of the whole schema
        definitions = node.pop("$defs")
        if any("enum" not in definition for definition in definitions.values()):
            return {"type": "null"}  # an object of Python, which no file can hold
        return dict(_inlined(node, definitions))
    limits = TRAINING_RANGES.get(key, Between())
    ranges = range_schema(limits, may_be_infinite=key in MAY_BE_INFINITE)
    for branch in (node, *node.get("anyOf", ())):
        if branch.get("type") in ("number", "integer"):
            branch.update(ranges)
    return node


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """``node`` with what it refers to written out."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "$ref" in node:
        return definitions[node["$ref"].rpartition("/")[2]]
    return {key: _inlined(value, definitions) for key, value in node.items()}


def range_schema(limits: Between, may_be_infinite: bool = False) -> dict[str, float]:
    """``limits`` in the words of a JSON schema, where infinity is a number: a finite one has a maximum."""
    low, high = limits.low, limits.high
    words = {}
    if low != -float("inf"):
        words["minimum" if limits.ends in ("both", "low") else "exclusiveMinimum"] = low
    if high != float("inf"):
        words["maximum" if limits.ends in ("both", "high") else "exclusiveMaximum"] = high
    elif not may_be_infinite:
        words["maximum"] = sys.float_info.max
    return words


def training_schema() -> dict[str, Any]:
    """The JSON schema of each ``training:`` key, with the help text of the installed ``TrainingArguments``."""
    schema = {}
    for key, field in training_fields().items():
        if key not in RESERVED_TRAINING_KEYS:
            text = " ".join(str(field.metadata.get("help", "")).split())
            schema[key] = {**key_schema(key), "description": text}
    return schema
