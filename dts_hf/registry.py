"""Found by name: the classes that lie in the files of one folder, and one of them built from a recipe's words.

A new policy or divergence is a new file in its folder; no list is edited.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dts_hf.errors import UserError, nearest

Kind = TypeVar("Kind")


def classes_beside(package: str, path: Iterable[str], base: type[Kind]) -> dict[str, type[Kind]]:
    """Every subclass of ``base`` with a ``name`` of its own in the modules of ``package`` (folder ``path``), by name."""
    found: dict[str, type[Kind]] = {}
    for module_info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{module_info.name}")
        for value in vars(module).values():
            wanted = inspect.isclass(value) and issubclass(value, base) and "name" in vars(value)
            if wanted and value.__module__ == module.__name__:
                found[value.name] = value
    return found


def options_of(kind: type) -> list[str]:
    """The names of a class's options: the parameters of its ``__init__``."""
    return list(inspect.signature(kind).parameters)


def build(
    kinds: Mapping[str, type[Kind]], name: Any, options: Mapping[str, Any], *, name_key: str, key: str, noun: str = ""
) -> Kind:
    """``kinds[name](**options)``.

    Args:
        kinds: the classes by name.
        name: which of them.
        options: what its ``__init__`` takes.
        name_key: the recipe key that holds the name, for messages (``temperature.name``).
        key: the recipe key that holds the options (``temperature``).
        noun: what a kind is called (``policy``); may be empty.

    Raises:
        UserError: unknown name or option, with the nearest right word; or what the class itself refuses.
    """
    if name not in kinds:
        raise UserError(f"{name_key}: got {name!r}, expected one of {', '.join(kinds)}.{nearest(str(name), kinds)}")
    known = options_of(kinds[name])
    for option in options:
        if option not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it takes no options"
            raise UserError(
                f"{key}.{option}: unknown option of {noun}{' ' if noun else ''}'{name}', {expected}."
                f"{nearest(str(option), known)}"
            )
    return kinds[name](**options)
