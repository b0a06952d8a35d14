"""What is wrong with a recipe, in words: key path, value, what was expected, the nearest right word.

Ranges, choices and known keys are read from JSON schemas (of the recipe's models, and of ``TrainingArguments``), so a
message cannot disagree with the check that failed. Problems are ``{dotted key: text}``.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import EnumMeta
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from dts_hf.errors import UserError, nearest
from dts_hf.recipe.yaml_files import shown

Schema = Mapping[str, Any]
LARGEST = 2**31 - 1  # beyond it tokenizers, tensors and random generators overflow, in words that name no key
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
# TrainingArguments takes any number for these and the run fails later, in words that do not name the key.
POSITIVE_TRAINING_KEYS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "learning_rate",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "seed",
    "data_seed",
)
ALSO_ZERO = ("learning_rate", "seed", "data_seed")


# ------------------------------------------------------------------------------------- problems of keys, types, ranges


def schema_problems(error: ValidationError, values: Mapping[str, Any], schema: Schema) -> dict[str, str]:
    """Pydantic's findings about ``values`` in our words; the branches of a union become one problem."""
    problems: dict[str, str] = {}
    for found in error.errors(include_url=False):
        path = _path_in(values, found["loc"], missing=found["type"] == "missing")
        key = ".".join(map(str, path))
        if found["type"] == "extra_forbidden":
            problems[key] = _unknown_key(path, schema)
        elif found["type"] == "missing":
            problems[key] = f"is missing, expected {_expected(_node(schema, path), schema)}"
        elif found["type"] == "value_error":
            problems[key] = str(found["ctx"]["error"])
        else:
            value = functools.reduce(lambda holder, part: holder[part], path, values)
            problems[key] = _wrong_value(value, _node(schema, path), schema)
    # A union reports the whole value for one branch and the item inside for the other: the item says more.
    return {key: text for key, text in problems.items() if not any(other.startswith(f"{key}.") for other in problems)}


def _path_in(values: Any, location: Sequence[str | int], missing: bool) -> list[Any]:
    """The part of pydantic's location that is in ``values``: its names of union branches are not."""
    path: list[Any] = []
    for part in location:
        inside = part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)
        if inside:
            values = values[part]
            path.append(part)
    return [*path, location[-1]] if missing else path


def _unknown_key(path: Sequence[Any], schema: Schema) -> str:
    siblings = [key for branch in _branches(_node(schema, path[:-1]), schema) for key in branch.get("properties", {})]
    word = str(path[-1])
    if hint := nearest(word, siblings):
        return f"unknown key.{hint}"
    elsewhere = [key for key in _keys(schema, schema) if key.rpartition(".")[2] == word]
    if not elsewhere and word in training_fields():
        elsewhere = [f"training.{word}"]
    return f"unknown key, expected one of {', '.join(siblings)}." + (
        f" Did you mean '{elsewhere[0]}'?" if elsewhere else ""
    )


def _wrong_value(value: Any, node: Schema, schema: Schema) -> str:
    choices = _choices(node, schema)
    hint = nearest(value, choices) if isinstance(value, str) and len(choices) > 1 else ""
    expected = _expected(node, schema)
    if isinstance(value, (bool, int, float)) and expected.startswith("text"):
        hint = " Put it in quotes."
    elif isinstance(value, int) and value > LARGEST:
        hint = f" The largest is {LARGEST}."
    return f"got {shown(value)}, expected {expected}{'.' if hint else ''}{hint}"


# ------------------------------------------------------------------------------------------------ reading JSON schemas


def _resolved(node: Schema, schema: Schema) -> Schema:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _branches(node: Schema, schema: Schema) -> Iterator[Schema]:
    node = _resolved(node, schema)
    for branch in node.get("anyOf", ()):
        yield from _branches(branch, schema)
    if "anyOf" not in node:
        yield node


def _node(schema: Schema, path: Sequence[Any]) -> Schema:
    """The schema of the value at ``path``; the branch of a union that has the next key."""
    node = schema
    for part in path:
        for branch in _branches(node, schema):
            inside = branch.get("items") if isinstance(part, int) else branch.get("properties", {}).get(part)
            if inside is None and isinstance(branch.get("additionalProperties"), Mapping):
                inside = branch["additionalProperties"]  # of a mapping whose keys are the user's
            if inside is not None:
                node = inside
                break
    return node


def _keys(node: Schema, schema: Schema, prefix: str = "") -> Iterator[str]:
    for branch in _branches(node, schema):
        for key, inside in branch.get("properties", {}).items():
            yield f"{prefix}{key}"
            yield from _keys(inside, schema, f"{prefix}{key}.")


def _choices(node: Schema, schema: Schema) -> list[str]:
    branches = list(_branches(node, schema))
    values = [value for branch in branches for value in branch.get("enum", [branch.get("const")])]
    return [value for value in values if isinstance(value, str)]


def _expected(node: Schema, schema: Schema) -> str:
    return " or ".join(dict.fromkeys(_expected_one(branch, schema) for branch in _branches(node, schema)))


def _expected_one(node: Schema, schema: Schema) -> str:
    if "enum" in node:
        return f"one of {', '.join(shown(value) for value in node['enum'])}"
    if "const" in node:
        return shown(node["const"])
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _describe_range(node)
    if kind == "array":
        words = "a list of at least one item" if node.get("minItems") else "a list"
        return f"{words}, each {_expected(node['items'], schema)}" if node.get("items") else words
    if kind == "object":
        return f"a mapping with {', '.join(node['properties'])}" if node.get("properties") else "a mapping"
    if node.get("minLength"):
        return "text that is not empty"
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(str(kind), "another value")


def _describe_range(node: Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None and high < LARGEST:
        return f" between {low:,g} and {high:,g}" if high < 1e6 else f" between {low:,} and {high:,}"  # :g: 1e+06
    words = [
        f" {name} {node[key]:g}"
        for key, name in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "of at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in node and node[key] != LARGEST  # that one goes without saying
    ]
    return " and".join(words)


# ------------------------------------------------------------------------------ problems that other modules must judge


def deep_problems(values: Mapping[str, Any], schema: Schema) -> dict[str, str]:
    """Problems of the policy, the divergence and the training keys; what is no mapping is left to pydantic."""
    from dts_hf.divergences import build_divergence
    from dts_hf.temperature import build_temperature

    problems: dict[str, str] = {}
    loss = values.get("loss")
    temperature = _choice(values.get("temperature"))
    divergence = _choice(loss.get("divergence")) if isinstance(loss, Mapping) else {}
    if temperature:
        problems |= _refusal("temperature", lambda: build_temperature(**temperature))
    if divergence:
        problems |= _refusal("loss.divergence", lambda: build_divergence(divergence))
    if isinstance(training := values.get("training"), Mapping):
        problems |= _training_problems(training, schema)
    return problems


def _choice(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) and isinstance(value.get("name"), str) else {}


def _refusal(section: str, build: Callable[[], object]) -> dict[str, str]:
    try:
        build()
    except UserError as error:
        key, colon, text = str(error).partition(": ")
        return {key: text} if colon and key.startswith(section) else {section: str(error)}
    return {}


def _training_problems(training: Mapping[str, Any], schema: Schema) -> dict[str, str]:
    known = training_fields()
    problems = {}
    for key, value in training.items():
        if key in RESERVED_TRAINING_KEYS:
            text = RESERVED_TRAINING_KEYS[key]
        elif key in RENAMED_TRAINING_KEYS and key not in known:
            text = f"transformers no longer has this key, use {RENAMED_TRAINING_KEYS[key]}"
        elif key not in known:
            elsewhere = [name for name in _keys(schema, schema) if name.rpartition(".")[2] == key]
            hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else nearest(key, known)
            text = f"transformers.TrainingArguments has no such key.{hint}"
        else:
            text = _training_value_problem(key, value)
        if text:
            problems[f"training.{key}"] = text
    return problems


def _training_value_problem(key: str, value: Any) -> str:
    adapter = _adapter(key)
    try:
        adapter.validate_python(value)
    except ValidationError:
        node = adapter.json_schema()
        return _wrong_value(value, node, node)
    number = isinstance(value, (int, float)) and key in POSITIVE_TRAINING_KEYS
    if number and not (value > 0 or (value == 0 and key in ALSO_ZERO)):
        return f"got {shown(value)}, expected a number {'of at least' if key in ALSO_ZERO else 'above'} 0"
    if number and key in ("seed", "data_seed") and value >= 2**32:
        return f"got {shown(value)}, expected a number below 2^32"
    return ""


@functools.cache
def training_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields of the installed ``transformers.TrainingArguments`` by name."""
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
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


def training_schema() -> dict[str, Any]:
    """The JSON schema of each ``training:`` key, with the help text of the installed ``TrainingArguments``."""
    schema = {}
    for key, field in training_fields().items():
        if key not in RESERVED_TRAINING_KEYS:
            text = " ".join(str(field.metadata.get("help", "")).split())
            schema[key] = {**_adapter(key).json_schema(), "description": text}
    return schema


# ------------------------------------------------------------------------------------------- what other modules define


def protocol_values(name: str) -> dict[str, Any]:
    """The keys of ``evaluation:`` that an evaluation protocol fixes; nothing for an unknown one (the schema says so)."""
    from dts_hf.evaluation.protocol import PROTOCOLS  # light: loads no torch

    if name not in PROTOCOLS:
        return {}
    protocol = PROTOCOLS[name]
    values = {key: getattr(protocol, key) for key in ("max_new_tokens", "do_sample", "no_repeat_ngram_size")}
    return {**values, "seeds": list(protocol.seeds)}
