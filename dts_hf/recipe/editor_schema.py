"""The JSON schema for editors: ``schema.py``'s, with every policy, divergence and training key that is installed.

Options of policies and divergences come from their signatures: type, range and choices from the annotation, the meaning from
the docstring, the default from a policy that was built without options. Nothing is listed here.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from dts_hf.recipe.schema import recipe_json_schema
from dts_hf.recipe.training_keys import range_schema, training_schema
from dts_hf.recipe.yaml_files import NUMBER
from dts_hf.registry import Between, Keys, annotations_of, defaults_of, range_of, split_docstring

#: Where the documentation's site has it (docs/_site.py writes it there).
SCHEMA_URL = "https://dts-hf.github.io/dts_hf/recipe.schema.json"
#: The line by which an editor finds it; every recipe of the repository begins with it.
MODELINE = f"# yaml-language-server: $schema={SCHEMA_URL}"
_TYPES = {float: "number", int: "integer", bool: "boolean", str: "string", type(None): "null"}


def editor_schema() -> dict[str, Any]:
    """``recipe_json_schema`` with all that the installed packages define; imports torch and transformers."""
    from dts_hf.divergences import DIVERGENCES
    from dts_hf.temperature import temperature_policies

    schema = recipe_json_schema()
    schema["properties"]["training"] |= {"properties": training_schema(), "additionalProperties": False}
    policies, divergences = temperature_policies(), DIVERGENCES
    for kinds, prefix in ((policies, "temperature"), (divergences, "divergence")):
        schema["$defs"] |= {f"{prefix}.{name}": _options(name, kind) for name, kind in kinds.items()}
    del schema["$defs"]["NamedOptions"]
    constant = {
        "type": "number",
        **range_schema(range_of(policies["constant"], "value")),
        "description": "The policy constant.",
    }
    quoted = {"type": "string", "pattern": rf"^(?=.*[1-9])\+?{NUMBER.removeprefix('[-+]?')}$"}
    _replace(schema["properties"]["temperature"], [constant, quoted, *_choices("temperature", policies)])
    _replace(schema["$defs"]["Loss"]["properties"]["divergence"], _choices("divergence", divergences))
    _require_sources(schema)
    about: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_URL}
    return {**about, **schema, "title": "dts_hf recipe"}


def _require_sources(schema: dict[str, Any]) -> None:
    """A mapping of ``data.train`` needs its source, but where a base may bring it: lists are replaced, mappings merged."""
    keys = ("train", "validation")
    for key in keys:
        for branch in schema["$defs"]["Data"]["properties"][key]["anyOf"]:
            for item in branch.get("items", {}).get("anyOf", ()):
                if "$ref" in item:
                    item["required"] = ["source"]
    needed = {"properties": {"data": {"properties": {key: {"required": ["source"]} for key in keys}}}}
    schema |= {"if": {"not": {"required": ["extends"]}}, "then": needed}


def _replace(node: dict[str, Any], choices: list[dict[str, Any]]) -> None:
    kept: dict[str, Any] = {key: node[key] for key in ("description", "default") if key in node}
    node.clear()
    node |= {**kept, "oneOf": choices}


def _choices(prefix: str, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """A name, a name with its options, or the options of the choice that an extended recipe makes."""
    references = [{"$ref": f"#/$defs/{prefix}.{name}"} for name in kinds]
    about = "Options of the choice that an extended recipe has made."
    return [
        {"enum": list(kinds), "type": "string"},
        *({**reference, "required": ["name"]} for reference in references),
        {"description": about, "not": {"required": ["name"]}, "anyOf": references},
    ]


def _options(name: str, kind: type) -> dict[str, Any]:
    about, described = split_docstring(inspect.getdoc(kind) or "")
    hints, properties = annotations_of(kind), {}
    for option, default in defaults_of(kind).items():
        properties[option] = {**node_of(hints[option]), "description": described.get(option, "")}
        if default is not None:
            properties[option]["default"] = list(default) if isinstance(default, tuple) else default
    return {
        "type": "object",
        "title": name,
        "description": about.partition("\n\n")[0].replace("\n", " "),
        "properties": {"name": {"const": name, "description": "Name of the choice."}, **properties},
        "additionalProperties": False,
    }


def node_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a value of the annotation ``hint``; of one that is not known here, of any value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "__metadata__"):  # Annotated
        node = node_of(inner[0])
        for mark in hint.__metadata__:
            if isinstance(mark, Between):
                node |= range_schema(mark)
            elif isinstance(mark, Keys):
                node |= {
                    "properties": {key: node_of(value) for key, value in mark.types},
                    "additionalProperties": False,
                }
        return node
    if origin in (Union, types.UnionType):
        return {"anyOf": [node_of(branch) for branch in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is Sequence:
        return {"type": "array", "items": node_of(inner[0])}
    if origin is Mapping:
        return {"type": "object"}
    return {"type": _TYPES[hint]} if hint in _TYPES else {}
