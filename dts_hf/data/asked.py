"""Rows that are to be answered: with a response of their own or without, and the same row once it has another response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dts_hf.data.columns import ALIASES, Record
from dts_hf.data.formats import CUT, PAIRS, PROMPTS, RESPONSES, parse_row, response_field
from dts_hf.data.rows import Row
from dts_hf.errors import UserError

#: Stands for the response that a row does not have while the row is read.
_PLACEHOLDER = "?"
#: Who says the last message of a conversation that waits for its answer (ShareGPT's names, too).
_ASKING = ("user", "human", "tool", "observation")
#: Columns of a row that is written: the response of the data, and the id of the row that several answers are of.
ORIGINAL, SOURCE_ID = "original_response", "source_id"


def asked_row(obj: Any, where: str, default_id: str) -> tuple[Row, bool]:
    """A row that is to be answered, and whether it has a response of its own.

    Args:
        obj: the row as read; as ``formats.parse_row`` takes it, but its response may be missing.
        where: the place named in errors.
        default_id: the id where the row has none.

    Raises:
        UserError: as ``parse_row``, or it is a text, which asks nothing.
    """
    filled = _with_placeholder(obj) if isinstance(obj, Mapping) else None
    row = parse_row(obj if filled is None else filled, where, default_id)
    if row.kind == "text":
        raise UserError(f"{where}: row '{row.id}' is a text, which asks nothing: expected rows with a prompt")
    return row, filled is None


def unique_ids(records: Iterable[tuple[Row, Any]], source: str, answers: int = 1) -> Iterator[tuple[Row, Any]]:
    """``records``, of which no two have one id: the sampling noise of an answer follows it.

    Args:
        records: rows, and whatever comes with each.
        source: what errors call them.
        answers: that each row gets; several have ids of their own, which no row may have.

    Raises:
        UserError: two have, or a row has the id that an answer to another one gets.
    """
    places: dict[str, int] = {}
    for place, (row, rest) in enumerate(records, 1):
        before = places.setdefault(row.id, place)
        if before != place:
            raise UserError(
                f"--data: {source}: rows {before} and {place} have the id '{row.id}'; expected one of its own for each, or "
                "none: rows without are numbered"
            )
        yield row, rest
    for row_id in places if answers > 1 else ():
        base, mark, number = row_id.rpartition("#")
        if mark and base in places and number in map(str, range(1, answers + 1)):
            raise UserError(
                f"--data: {source}: row {places[row_id]} has the id '{row_id}', which answer {number} to row '{base}' would "
                "get, too; expected another one, or none: rows without are numbered"
            )


def with_answer(
    obj: Mapping[str, Any], row: Row, answer: str, *, cut: bool, number: int | None = None
) -> dict[str, Any]:
    """The columns of ``obj`` with another response, as ``data.train`` takes them.

    Conversations become ``messages``; of other rows the column of the response is replaced. The response that was there
    stays in ``original_response``, thoughts that belonged to it in ``original_reasoning_content``.

    Args:
        obj: the row as read.
        row: of ``asked_row``.
        answer: the new response.
        cut: it stops where its writer was stopped.
        number: which of several answers it is, from 1; they get ids of their own. None: the only one.
    """
    filled = _with_placeholder(obj)
    written = {str(key): value for key, value in obj.items()}
    message = {"role": "assistant", "content": answer}
    field = response_field(obj if filled is None else filled)
    if field is None:
        written["messages"] = [*row.prompt_messages, message]
        before: Any = row.answer or row.response
    else:
        before = obj.get(field)
        lists = any(isinstance(obj.get(name), (list, tuple)) for name in PROMPTS)
        written[field] = [message] if lists else answer
    if filled is None:
        written.setdefault(ORIGINAL, before)
    for name in ("reasoning_content", *ALIASES["reasoning_content"]):
        if written.get(name) is not None:  # what somebody else thought is no way to this answer
            written.setdefault(f"original_{name}", written[name])
            written[name] = None
    if written.get("id") is None:
        written["id"] = row.id
    if number is not None:
        written[SOURCE_ID] = row.id  # and not what an earlier call wrote there
        written["id"] = f"{row.id}#{number}"
    written["finish_reason"] = CUT if cut else "stop"
    return written


def _with_placeholder(obj: Mapping[str, Any]) -> dict[str, Any] | None:
    """``obj`` with a response, where it has a question alone; None where it needs none."""
    for field, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        said = obj.get(field)
        if not isinstance(said, (list, tuple)) or not said or not isinstance(said[-1], Mapping):
            continue
        names = (role, content) if role in said[-1] else ("role", "content")
        if str(said[-1].get(names[0])).lower() not in _ASKING:
            return None
        return {**obj, field: [*said, dict(zip(names, (_answerer(names[0]), _PLACEHOLDER), strict=True))]}
    record = Record(obj, None, "")
    if record.has("messages") or record.has("conversations"):
        return None
    asked = [field for field in PROMPTS if record.has(field)]
    if not asked or any(record.get(field) not in (None, "", [], ()) for field in RESPONSES):
        return None
    # A column that waits for the response says which one; else a prompt alone is a question and no finished text
    waiting = [field for field in RESPONSES if field in obj]
    partner = waiting[0] if waiting else {**dict(PAIRS), "prompt": "response"}[asked[0]]
    return {**obj, partner: _PLACEHOLDER}


def _answerer(key: str) -> str:
    return "assistant" if key == "role" else "gpt"
