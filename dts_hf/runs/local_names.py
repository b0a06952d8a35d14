"""Names in a recipe that are files and folders of this machine, and would be names on the Hub for everybody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Where a recipe or a manifest of data names a model or rows; elsewhere a word without "/" is a file's by chance.
_NAMES_SOMETHING = ("model", "tokenizer", "from", "train", "validation", "source", "sets")


def local_names(recipe: Mapping[str, Any]) -> list[str]:
    """The names in ``recipe`` that are relative paths here and now."""
    found: set[str] = set()

    def look(value: str) -> str:
        # Of rows a split may follow the name
        if not Path(value).is_absolute() and any(Path(name).exists() for name in (value, value.partition(":")[0])):
            found.add(value)
        return value

    with_names(recipe, look)
    return sorted(found)


def with_names(value: Any, change: Callable[[str], str], named: bool = False) -> Any:
    """``value`` with ``change`` of every text in it that may be the name of a model, of rows or of a folder.

    Args:
        value: JSON-like.
        change: gives the text that stands in the place of one.
        named: whether ``value`` stands where only such a name stands.
    """
    if isinstance(value, Mapping):
        return {key: with_names(item, change, _names(key, item)) for key, item in value.items()}
    if isinstance(value, list):
        return [with_names(item, change, named) for item in value]
    return change(value) if isinstance(value, str) and value and (named or "/" in value) else value


def _names(key: str, item: Any) -> bool:
    return key in _NAMES_SOMETHING and not isinstance(item, Mapping)
