"""What is wrong with a recipe, in words: key path, value, what was expected, the nearest right word.

Ranges, choices and known keys are read from JSON schemas (of the recipe's models, and of ``TrainingArguments``), so a
message cannot disagree with the check that failed. Problems are ``{dotted key: text}``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dts_hf.errors import nearest
from dts_hf.recipe.training_keys import LARGEST, training_fields
from dts_hf.recipe.yaml_files import shown

Schema = Mapping[str, Any]
UNSAID = (LARGEST, sys.float_info.max)  # ends of a range that go without saying


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
            problems[key] = wrong_value(value, _node(schema, path), schema)
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
    if list(path) == ["extends"]:  # of a file it is read, and taken out, before
        return "belongs to a recipe file, which load_recipe reads: a mapping of values extends nothing"
    siblings = [key for branch in _branches(_node(schema, path[:-1]), schema) for key in branch.get("properties", {})]
    word = str(path[-1])
    if hint := nearest(word, siblings):
        return f"unknown key.{hint}"
    elsewhere = [key for key in all_keys(schema, schema) if key.rpartition(".")[2] == word]
    if not elsewhere and word in training_fields():
        elsewhere = [f"training.{word}"]
    return f"unknown key, expected one of {', '.join(siblings)}." + (
        f" Did you mean '{elsewhere[0]}'?" if elsewhere else ""
    )


def wrong_value(value: Any, node: Schema, schema: Schema) -> str:
    """What is wrong with ``value``, which ``node`` of ``schema`` does not allow."""
    choices = _choices(node, schema)
    hint = nearest(value, choices) if isinstance(value, str) and len(choices) > 1 else ""
    expected = _expected(node, schema)
    if isinstance(value, (bool, int, float)) and expected.startswith("text") and "a mapping" not in expected:
        hint = " Put it in quotes."
    elif isinstance(value, float) and value == float("inf"):
        hint = " It must be finite."
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


def all_keys(node: Schema, schema: Schema, prefix: str = "") -> Iterator[str]:
    """The dotted keys below ``node`` of ``schema``, each behind ``prefix``."""
    for branch in _branches(node, schema):
        for key, inside in branch.get("properties", {}).items():
            yield f"{prefix}{key}"
            yield from all_keys(inside, schema, f"{prefix}{key}.")


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
    if low is not None and high is not None and high not in UNSAID:
        return f" between {low:,g} and {high:,g}" if high < 1e6 else f" between {low:,} and {high:,}"  # :g: 1e+06
    words = [
        f" {name} {node[key]:g}"
        for key, name in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "of at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in node and node[key] not in UNSAID
    ]
    return " and".join(words)


# ------------------------------------------------------------------------------------------- what other modules define


def protocol_values(name: str) -> dict[str, Any]:
    """The keys of ``evaluation:`` that an evaluation protocol fixes; nothing for an unknown one (the schema says so)."""
    from dts_hf.evaluation.protocol import PROTOCOLS  # light: loads no torch

    if name not in PROTOCOLS:
        return {}
    protocol = PROTOCOLS[name]
    values = {key: getattr(protocol, key) for key in ("max_new_tokens", "do_sample", "no_repeat_ngram_size")}
    return {**values, "seeds": list(protocol.seeds)}
