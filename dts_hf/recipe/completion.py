"""What the shell offers for ``KEY=VALUE``: keys of a recipe, and the values of those that have a choice.

The schema knows them all, but it takes seconds to make, for which nobody holds the Tab key: it is kept in the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dts_hf.files import write_text_atomic

Schema = Mapping[str, Any]


def completions(incomplete: str) -> list[str]:
    """What may stand where ``incomplete`` stands: ``loss.kd_ratio=``, ``temperature.rule=gap``; sections end with a dot."""
    schema = _schema()
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={choice}" for choice in _values(_nodes(schema, key.split("."))) if choice.startswith(value)]
    *sections, last = key.split(".")
    prefix = "".join(f"{section}." for section in sections)
    offered: dict[str, None] = {}
    for node in _nodes(schema, sections):
        for name, inside in node.get("properties", {}).items():
            if not name.startswith(last):
                continue
            branches = list(_branches(inside, schema))
            is_section = any("properties" in branch for branch in branches)
            if is_section:
                offered[f"{prefix}{name}."] = None
            if not is_section or any(True for _ in _values(branches)):
                offered[f"{prefix}{name}="] = None
    return list(offered)


def _nodes(schema: Schema, path: list[str]) -> list[Schema]:
    """What the schema says of the value at ``path``: every branch of it."""
    nodes = list(_branches(schema, schema))
    for part in path:
        inside = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
        nodes = [branch for node in inside for branch in _branches(node, schema)]
    return nodes


def _branches(node: Schema, schema: Schema) -> Iterator[Schema]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    yield node
    for key in ("anyOf", "oneOf"):
        for branch in node.get(key, ()):
            yield from _branches(branch, schema)


def _values(nodes: list[Schema]) -> Iterator[str]:
    """The choices among ``nodes``, each once, as a recipe writes them."""
    found: dict[str, None] = {}
    for node in nodes:
        choices = node.get("enum", [node["const"]] if "const" in node else [])
        if node.get("type") == "boolean":
            choices = [True, False]
        for choice in choices:
            found[choice if isinstance(choice, str) else json.dumps(choice)] = None
    yield from found


def _schema() -> dict[str, Any]:
    """The schema for editors, kept for the versions that are installed."""
    versions = "-".join(metadata.version(name) for name in ("dts-hf", "transformers"))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "dts_hf" / f"schema-{versions}.json"
    try:
        schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        from dts_hf.recipe.editor_schema import editor_schema

        schema = editor_schema()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps(schema))
        except OSError:  # a home that cannot be written: then it is made each time
            pass
    return schema
