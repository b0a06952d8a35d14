"""One value of a row: text that a tokenizer takes, a list or a mapping, and the words for anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dts_hf.errors import UserError

MOST_LEVELS = 50  # of a value that is written into a prompt


def kind(value: object) -> str:
    """Name a JSON value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the {type(value).__name__} {_short(value)}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def text(value: object, where: str, empty: bool = False) -> str:
    """Check a text.

    Raises:
        UserError: no string, an empty one unless ``empty``, or one that tokenizers refuse.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: got {kind(value)}, expected a string")
    if not empty and not value.strip():
        raise UserError(f"{where} is empty")
    if not is_encodable(value):
        raise UserError(f"{where} holds half of a surrogate pair (a broken \\ud8xx escape); tokenizers refuse it")
    return value


def is_encodable(text: str) -> bool:
    """Whether ``text`` has no half of a surrogate pair; neither tokenizers nor files take one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def items(value: object, where: str, expected: str) -> Sequence[Any]:
    """Check a list, which may be written as JSON: a cell of a CSV file is always text.

    Raises:
        UserError: no list; the message says ``expected``.
    """
    value = from_json(value, where) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if hasattr(value, "tolist"):  # an array: what pandas makes of a list
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: got {kind(value)}, expected {expected}")
    return value


def mapping(value: object, where: str, expected: str) -> Mapping[str, Any]:
    """Check a mapping with names as keys, which may be written as JSON.

    Raises:
        UserError: no mapping; the message says ``expected``.
    """
    value = from_json(value, where) if isinstance(value, str) else value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: got {kind(value)}, expected {expected}")
    return value


def from_json(value: str, where: str) -> Any:
    """The value that a text holds as JSON.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: broken JSON: {reason}") from None


def plain(value: Any, where: str, *, nulls: bool = False, depth: int = 0) -> Any:
    """A value for a chat template, its texts checked and keys without a value left out.

    A table has one set of keys for all rows and fills those that a row lacks with null. Written to the prompt, they would
    be arguments that nobody gave.

    Args:
        value: of any type that JSON has.
        where: the place, for errors.
        nulls: keep null: somebody has written it.
        depth: levels above ``value``.

    Raises:
        UserError: a text that tokenizers refuse, or too many levels.
    """
    if depth > MOST_LEVELS:
        raise UserError(f"{where}: more than {MOST_LEVELS} levels of lists and objects")
    if isinstance(value, str):
        return text(value, where, empty=True)
    if isinstance(value, Mapping):
        return {
            text(str(key), where, empty=True): plain(inner, where, nulls=nulls, depth=depth + 1)
            for key, inner in value.items()
            if nulls or inner is not None
        }
    if isinstance(value, (list, tuple)):
        return [plain(inner, where, nulls=nulls, depth=depth + 1) for inner in value]
    return value
