"""Every key that a recipe can have, and for each another value that is valid beside the rest of some recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from dts_hf.recipe.schema import recipe_json_schema
from dts_hf.recipe.training_keys import RESERVED_TRAINING_KEYS, key_schema, training_fields

#: Of one of several sections whose names are the user's.
NAME = "one"


def keys() -> dict[str, dict[str, Any]]:
    """Dotted key -> JSON schema of its value, of all keys but those of ``training`` and of choices by name."""
    whole = recipe_json_schema()

    def walk(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        node = whole["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        found = [*branches(whole, node)]
        sections = [branch for branch in found if "properties" in branch]
        inside = next((branch["additionalProperties"] for branch in found if "additionalProperties" in branch), None)
        if isinstance(inside, Mapping) and "$ref" in inside:  # sections by a name of one's own
            yield from walk(inside, f"{path}.{NAME}")
        elif path and not sections:
            yield path, dict(node)
        for section in sections or ([dict(node)] if not path else []):
            for key, inside in section["properties"].items():
                yield from walk(inside, f"{path}.{key}" if path else key)

    return {key: node for key, node in walk(whole, "") if key not in ("extends", "training")}


def branches(whole: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a value."""
    if "$ref" in node:
        yield from branches(whole, whole["$defs"][node["$ref"].rpartition("/")[2]])
    elif "anyOf" in node:
        for branch in node["anyOf"]:
            yield from branches(whole, branch)
    else:
        yield dict(node)


def training_keys() -> dict[str, dict[str, Any]]:
    """Key of ``training:`` -> JSON schema of its value."""
    return {key: key_schema(key) for key in training_fields() if key not in RESERVED_TRAINING_KEYS}


def other(node: Mapping[str, Any], now: Any) -> Iterator[Any]:
    """Values that the schema takes and that are not ``now``."""
    for branch in branches(recipe_json_schema(), node):
        if "enum" in branch or "const" in branch:
            yield from (value for value in branch.get("enum", [branch.get("const")]) if value != now)
        elif branch.get("type") == "boolean":
            yield not now
        elif branch.get("type") in ("integer", "number"):
            yield from _numbers(branch, now)
        elif branch.get("type") == "string":
            yield "other"
        elif branch.get("type") == "array":
            items = branch.get("items", {"type": "string"})
            yield from ([value] for value in other(items, None) if [value] != now)
        elif branch.get("type") == "object":
            yield {"key": "value"}


def _numbers(branch: Mapping[str, Any], now: Any) -> Iterator[Any]:
    low = branch.get("minimum", branch.get("exclusiveMinimum", 0))
    start = now if isinstance(now, (int, float)) and not isinstance(now, bool) else low
    candidates = (
        [start + 1, start + 2, start - 1] if branch["type"] == "integer" else [start / 2 + 0.1, start + 0.25, 0.5]
    )
    high = branch.get("maximum", branch.get("exclusiveMaximum", float("inf")))
    yield from (value for value in candidates if low <= value <= high and value != now)


def at(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is missing."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``values`` with another value of a dotted key."""
    changed = copy.deepcopy(dict(values))
    *sections, last = key.split(".")
    place = changed
    for section in sections:
        if not isinstance(place.get(section), dict):
            place[section] = {}
        place = place[section]
    place[last] = value
    return changed
