"""Recipe files and overrides become one nested dict: strict YAML, ``extends``, merging, paths. No types, no ranges."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dts_hf.console import secrets_in
from dts_hf.errors import UserError, nearest, not_readable

# The keys that hold a path or a model name; a value that starts with ./ or ../ is relative to the file that says it.
PATH_KEYS: tuple[tuple[str, ...], ...] = (
    ("student", "model"),
    ("student", "init", "from"),
    ("teacher", "model"),
    ("teacher", "tokenizer"),
    ("teacher", "cache"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "on_policy", "vllm_folder"),
    ("task", "mismatched"),
    ("evaluation", "sets"),
    ("temperature", "run"),
    ("temperature", "match_mean_of"),
    ("temperature", "gap_source", "replay"),
)
_OF_TEACHER = ("model", "tokenizer", "cache")  # of each of several
#: A number in quotes, as far as a recipe takes one.
NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
MERGE_TAG = "tag:yaml.org,2002:merge"
# A recipe has some hundred bytes, three levels and a few bases. What is far beyond is no recipe, and takes for ever.
MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_BASES = 200_000, 20_000, 20, 20


def read_values(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Read ``path``, what it extends, and the overrides on top.

    Returns:
        The merged values, and for every dotted key the file (or ``command line``) that it came from.
    """
    origins: dict[str, str] = {}
    values = _read_chain(path, origins, [])
    if overrides:
        changes = expand(_parse_overrides(overrides), "")
        origins.update(dict.fromkeys(_dotted_keys(changes), "command line"))
        values = _merge(values, changes)
    return values, origins


def dump_values(values: Mapping[str, Any]) -> str:
    """``values`` as YAML in their own order; ``read_values`` gives them back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def shown(value: Any) -> str:
    """``value`` as a person would write it in a recipe, on one short line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def with_line(source: str, key: str) -> str:
    """``source`` and the line of it where a token stands, of several the one that names ``key``; else ``source`` alone.

    Args:
        source: a recipe file, or what else the values came from.
        key: dotted.
    """
    try:
        with open(source, encoding="utf-8") as file:
            text = file.read(MAX_BYTES)
    except (OSError, ValueError):
        return source
    lines = text.splitlines()
    found = [number for number, _ in secrets_in(text)]
    named = [number for number in found if key.rpartition(".")[2] in lines[number - 1]]
    return f"{source}: line {(named or found)[0]}" if found else source


def _read_chain(path: Path, origins: dict[str, str], below: list[Path]) -> dict[str, Any]:
    """The values of one file on top of those that it extends; ``origins`` maps dotted paths to file names."""
    resolved = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
    if resolved in below:
        raise UserError(f"{path}: extends: this file extends itself through {', '.join(p.name for p in below)}")
    if len(below) > MAX_BASES:
        raise UserError(f"{path}: extends: more than {MAX_BASES} recipes extend one another")
    values = expand(_read_yaml(path), path.parent)
    base = values.pop("extends", None)
    merged: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: extends: got {shown(base)}, expected the file name of another recipe")
        if not os.path.isfile(path.parent / base):
            siblings = [p.name for p in path.parent.glob("*.yaml") if p != path]
            raise UserError(f"{path}: extends: {base}: no such recipe file.{nearest(base, siblings)}")
        merged = _read_chain(path.parent / base, origins, [*below, resolved])
    origins.update(dict.fromkeys(_dotted_keys(values), str(path)))
    return _merge(merged, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe file.{nearest(path.name, siblings)}") from None
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise not_readable(error, f"{path}: cannot read this recipe: {reason}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: this is no recipe: it has more than {MAX_BYTES:,} bytes")
    values = parse_yaml(text, str(path))
    if values is None:
        raise UserError(f"{path}: the file is empty, expected a recipe with student, teacher, data and output")
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {shown(values)}, expected a mapping of sections (student:, teacher:, ...)")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-4 is a number, ``no`` is a word, a date is a word), no key twice, no tag, no bomb."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values_below(node, 0, {}, set()) > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES:,} values", node.start_mark)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            problem = f"tag {event.tag!r}: a recipe is plain values, tags are not used"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"key {shown(key)} " + ("appears twice" if isinstance(key, str) else "is not a name")
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _whole_number(loader: _Loader, node: Any) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= 2**63:  # no float, no tensor
        raise yaml.constructor.ConstructorError(None, None, "a whole number beyond 2^63", node.start_mark)
    return value


def _values_below(node: yaml.Node, depth: int, counts: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """How many values ``node`` stands for once its aliases are written out; each node is counted once."""
    if node in above or depth > MAX_DEPTH:
        problem = "an alias inside of its own anchor" if node in above else f"more than {MAX_DEPTH} levels"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    if node not in counts:
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[node] = 1 + sum(_values_below(child, depth + 1, counts, above | {node}) for child in children)
    return counts[node]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else, so that any reader gets the string."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


_Loader.yaml_implicit_resolvers = {}


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)|[-+]?\.inf|\.nan",
    "merge": "<<",
}.items():
    for _target in (_Loader, _Dumper):
        _target.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def parse_yaml(text: str, source: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        source: what errors call it.

    Raises:
        UserError: it is broken, or none that a recipe could be; with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{source}: {where}broken YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise UserError(f"{source}: broken YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: broken YAML: more than {MAX_DEPTH} levels") from None


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"override {override!r}: expected key=value, for example training.learning_rate=1e-4")
        if len(keys) > MAX_DEPTH:
            raise UserError(f"override {override!r}: the key has more than {MAX_DEPTH} levels")
        new: Any = parse_yaml(text, f"override {override!r}")
        for key in reversed(keys):
            new = {key: new}
        values = _merge(values, new)
    return values


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` on top of ``old``. Another ``name`` is another choice: the old one's options do not belong to it."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            same_choice = "name" not in before or value.get("name", before["name"]) == before["name"]
            merged[key] = _merge(before, value) if same_choice else value
        else:
            merged[key] = value
    return merged


def expand(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Write short forms out, and resolve ``./``, ``../`` and ``~/`` against ``folder``."""
    expanded = _copied(values)
    if (number := _as_number(expanded.get("temperature"))) is not None:
        expanded["temperature"] = {"name": "constant", "value": number}
    for holder, key in ((expanded, "temperature"), (expanded.get("loss"), "divergence")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = {"name": holder[key]}
    teachers = expanded.get("teachers")
    several = [
        ("teachers", name, key) for name in (teachers if isinstance(teachers, dict) else ()) for key in _OF_TEACHER
    ]
    for *sections, key in (*PATH_KEYS, *several):
        at: Any = expanded
        for section in sections:
            at = at.get(section) if isinstance(at, dict) else None
        if isinstance(at, dict) and key in at:
            many = isinstance(at[key], list)
            paths = [_resolve(item, folder) for item in (at[key] if many else [at[key]])]
            at[key] = paths if many else paths[0]
    output = expanded.get("output")
    # ./ stands for where the person is there, wherever the recipe lies; ~ would become a folder of that name
    if isinstance(output, dict) and isinstance(output.get("dir"), str) and output["dir"].startswith("~/"):
        output["dir"] = _resolve(output["dir"], folder)
    return expanded


def _as_number(value: Any) -> float | None:
    """``value`` where it is a number, also one in quotes; None where it is anything else."""
    if isinstance(value, str) and re.fullmatch(NUMBER, value.strip()):
        return float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` and the mappings in it as new dicts."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _resolve(value: Any, folder: str | Path) -> Any:
    if isinstance(value, dict) and "source" in value:  # a source of data.train with its weight
        return {**value, "source": _resolve(value["source"], folder)}
    if not isinstance(value, str) or not value.startswith(("./", "../", "~/")):
        return value
    # Relative to the current folder where possible: a saved recipe then holds no home path.
    absolute = Path(os.path.abspath(os.path.join(folder, os.path.expanduser(value))))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {}
        found |= inner or {f"{prefix}{key}": value}
    return found


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{key}.")
