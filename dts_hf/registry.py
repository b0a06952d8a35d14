"""Sibling discovery: the classes that lie in the files of one folder, by name, and one of them built from a recipe.

A new policy or divergence is a new file in its folder; no list is edited. A file without a class of that kind is no harm.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from dts_hf.errors import UserError, nearest

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Between:
    """The range of an option, as its annotation says it: ``Annotated[float, Between(0.0, 1.0)]``.

    The check of the value and the schema for editors both read it there, so that a range stands once.

    Attributes:
        low, high: its ends, which may be infinite.
        ends: which of them belong to it.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: Literal["both", "low", "high", "none"] = "both"

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if isinstance(value, float) and not math.isfinite(value):  # of a long whole number it raises OverflowError
            return False
        above = value > self.low or (value == self.low and self.ends in ("both", "low"))
        return above and (value < self.high or (value == self.high and self.ends in ("both", "high")))


@dataclass(frozen=True)
class Keys:
    """The keys of a mapping that is an option, as its annotation says them: ``Annotated[Mapping[str, Any], Keys(...)]``.

    Attributes:
        types: (key, annotation of its value).
    """

    types: tuple[tuple[str, Any], ...]


#: An option that is finite and above 0, and one that is a share.
PositiveFloat = Annotated[float, Between(low=0.0, ends="none")]
Share = Annotated[float, Between(0.0, 1.0)]


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


@functools.cache
def annotations_of(kind: type) -> dict[str, Any]:
    """The annotations of a class's options, with what ``Annotated`` adds to them."""
    return typing.get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]


def range_of(kind: type, option: str) -> Between:
    """The range that the annotation of an option says; without one, all finite numbers."""

    def ranges(hint: Any) -> Iterator[Between]:
        yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Between))
        for inner in typing.get_args(hint):
            yield from ranges(inner)

    return next(ranges(annotations_of(kind)[option]), Between())


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A class docstring as (markdown of what stands before ``Args:``, option -> meaning)."""
    about, _, args = text.replace("``", "`").partition("\nArgs:\n")
    args = args.partition("\nRaises:\n")[0]
    options: dict[str, str] = {}
    names: list[str] = []
    for line in args.splitlines():
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            options |= dict.fromkeys(names, start[2])
        elif line.strip():
            options |= {name: f"{options[name]} {line.strip()}" for name in names}
    return about.strip(), options


def defaults_of(kind: type) -> dict[str, Any]:
    """The options of a class with the values that are in force when none is given; None: nothing is."""
    defaults = {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
    }
    try:
        return {**defaults, **{name: value for name, value in kind().describe().items() if name in defaults}}
    except UserError:  # a policy that cannot do without an option
        return defaults


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
