"""The columns of a row: the fields that are known, the other names they go by, and ``data.columns`` applied to a row.

No format is understood here (see ``formats``); the recipe checks its ``data.columns`` against ``FIELDS``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dts_hf.errors import UserError, nearest

#: Our names of columns, which ``data.columns`` maps to those of the rows, and what each holds.
FIELDS: dict[str, str] = {
    "instruction": "what is asked",
    "question": "what is asked",
    "query": "what is asked",
    "problem": "what is asked",
    "prompt": "what is asked; beside 'completion' a finished prompt, or the first messages of a conversation",
    "input": "the text that the instruction is about",
    "output": "the response, or a list of them: the first is trained on, the others are references",
    "answer": "the response",
    "response": "the response",
    "solution": "the response",
    "completion": "the response; beside 'prompt' what continues it, a text or messages",
    "messages": "a conversation: a list of {role, content}",
    "conversations": "a conversation: a list of {from, value} (ShareGPT) or {role, content}",
    "text": "a text that is learned whole",
    "system": "the system prompt",
    "history": "earlier turns: a list of [question, answer]",
    "tools": "the tools that may be called: a list of JSON schemas, or that list as JSON",
    "chat_template_kwargs": "further arguments of the chat template: a mapping",
    "reasoning_content": "what the assistant thinks before it responds",
    "finish_reason": "why the response ends: 'length' where it was cut, so that no end of turn is learned behind it",
    "label": "refused where it may mark bad responses: true or false, 0 or 1",
    "images": "refused",
    "videos": "refused",
    "audio": "refused",
    "id": "the row's id",
    "teacher": "which of several teachers the row has; see data.teacher_column, which names it for all rows",
    "teacher_prefix": "what the teacher alone reads; see data.teacher_prefix_column, which names it for all rows",
}
#: Other names that stand for a field where the rows have no column of its own name.
ALIASES: dict[str, tuple[str, ...]] = {
    "input": ("context",),
    "system": ("system_prompt",),
    "reasoning_content": ("reasoning", "thinking"),
    "images": ("image",),
    "videos": ("video",),
    "audio": ("audios",),
    "tools": ("functions",),
}
_FIELD_OF = {name: field for field, names in ALIASES.items() for name in names}

_PLAIN = frozenset((str, int, bool, list, dict, type(None)))

#: ``{our name: their column}``; None: the field is left out, whatever the rows have.
Columns = Mapping[str, str | None]


class Record:
    """One row by our names: what ``data.columns`` and the aliases make of its columns.

    Args:
        obj: the row as read.
        columns: as in the recipe, or None.
        where: the place, for errors.

    Attributes:
        where: the place.
        mapped: the fields that ``columns`` names.

    Raises:
        UserError: ``columns`` names a field that there is none, or a column that the row has not.
    """

    def __init__(self, obj: Mapping[Any, Any], columns: Columns | None, where: str) -> None:
        columns = columns or {}
        if problem := unknown_fields(columns):
            raise UserError(f"data.columns: {problem}")
        self.where = where
        self._obj = obj
        self.mapped = frozenset(field for field, name in columns.items() if name is not None)
        renamed = {name for name in columns.values() if name is not None}
        self._values = {str(key): _given(obj[key]) for key in obj if key not in renamed and key not in columns}
        self._names: dict[str, str] = {}
        for name in [key for key in self._values if key in _FIELD_OF]:
            value, field = self._values.pop(name), _FIELD_OF[name]
            if field not in columns and self._values.get(field) is None and value is not None:
                self._values[field], self._names[field] = value, name
        for field, column in columns.items():
            if column is not None:
                self._values[field], self._names[field] = _given(_named(obj, column, field, where)), column

    def get(self, field: str) -> Any:
        """The value of ``field``; None where the row has none."""
        return self._values.get(field)

    def has(self, field: str) -> bool:
        """Whether there is a value: null is none."""
        return self._values.get(field) is not None

    def column(self, field: str) -> str:
        """The column that ``data.columns`` names for ``field``; empty: none."""
        return self._names.get(field, "")

    def is_null(self, field: str) -> bool:
        """Whether the row has the column, without a value."""
        return field in self._values and self._values[field] is None

    @property
    def names(self) -> list[str]:
        """All fields and other columns, those without a value, too."""
        return list(self._values)

    def place(self, field: str) -> str:
        """``FILE: line 3: field 'output' (column 'gold')``, for errors about its value."""
        name = self._names.get(field, field)
        return f"{self.where}: field '{field}'" + (f" (column '{name}')" if name != field else "")

    def found(self) -> str:
        """The columns of the row as it was read, for errors."""
        return listed(self._obj)


def unknown_fields(columns: Columns) -> str:
    """What is wrong with the names on the left of ``data.columns``; empty where nothing is."""
    for field in columns:
        if field not in FIELDS:
            return f"{field!r} is no field of ours, expected one of {', '.join(FIELDS)}.{nearest(str(field), FIELDS)}"
    return ""


def listed(names: Iterable[object], most: int = 30) -> str:
    """Names of columns in quotes, for errors; of very many the first ones."""
    shown = [f"'{str(name)[:80]}'" for name in names]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most)) or "none"


def _given(value: Any) -> Any:
    """``value`` in Python's own types, as pandas does not have them: arrays, and NaN where there is nothing."""
    if type(value) in _PLAIN:
        return value
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _named(obj: Mapping[Any, Any], name: str, field: str, where: str) -> Any:
    """The value of the column that ``data.columns`` names; a row without its teacher is told of with all of them."""
    try:
        return _value_at(obj, name, field, where)
    except UserError:
        if field != "teacher":  # which may have a default
            raise
        return None


def _value_at(obj: Mapping[Any, Any], name: str, field: str, where: str) -> Any:
    """The column called ``name``, or what is inside of one: ``answers.text.0``."""
    if name in obj:
        return obj[name]
    value: Any = obj
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part[:9]) < len(value):
            value = value[int(part[:9])]
        else:
            raise UserError(
                f"{where}: there is no column '{name}', which data.columns names for '{field}'; found the columns "
                f"{listed(obj)}.{nearest(name, map(str, obj))}"
            )
    return value
