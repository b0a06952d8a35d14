"""Sibling discovery: the classes that lie in the files of one folder, by name, and one of them built from a recipe.

A new policy or divergence is a new file in its folder; no list is edited. A file without a class of that kind is no harm.
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
    """Every subclass of ``base`` with a ``name`` of its own in the modules of a folder, by name, in the order of the files.

    Folders within it are not searched: what they hold is for the modules here to import.

    Args:
        package: the package whose folder it is.
        path: the package's ``__path__``.
        base: what a class has to derive from; one without a ``name`` is a base itself.
    """
    classes: dict[str, type[Kind]] = {}
    modules = sorted(info.name for info in pkgutil.iter_modules(path) if not info.ispkg)
    for module in (importlib.import_module(f"{package}.{name}") for name in modules):
        for value in vars(module).values():
            # A module also has the classes that it imports: they count where they are defined.
            named = inspect.isclass(value) and issubclass(value, base) and "name" in vars(value)
            if named and value.__module__ == module.__name__:
                classes[value.name] = value
    return classes


def options_of(kind: type) -> list[str]:
    """The names of a class's options: the parameters of its ``__init__``."""
    return list(inspect.signature(kind).parameters)


def build(
    kinds: Mapping[str, type[Kind]], name: Any, options: Mapping[str, Any], *, name_key: str, key: str, noun: str = ""
) -> Kind:
    """Build ``kinds[name](**options)``.

    Args:
        kinds: the classes by name.
        name: the one that the recipe asks for.
        options: its options in the recipe.
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
