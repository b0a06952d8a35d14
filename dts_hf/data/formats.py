"""Every row format that is understood, turned into a ``Row``; everything wrong names the file and the line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from dts_hf.data.rows import Row
from dts_hf.errors import UserError, nearest

ROW_FORMAT = "{id, instruction, input, output} or {id, messages}"
ROLES = ("system", "user", "assistant", "tool")
# Names that other data sets use for our fields: only for the hint in an error message.
OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "instructions"),
    "output": ("response", "completion", "answer", "target", "responses", "outputs", "references"),
}


def parse_row(obj: Mapping[str, Any], where: str, default_id: str) -> Row:
    """Check one row and bring it into the one form.

    Args:
        obj: the row as read; fields other than those of the row format are ignored.
        where: the place named in errors, such as ``train.jsonl: line 3``.
        default_id: the id where the row has none.

    Raises:
        UserError: a missing field, a wrong type, an empty instruction or response.
    """
    if not isinstance(obj, Mapping):
        raise UserError(f"{where}: expected an object {ROW_FORMAT}, got {_kind(obj)}")
    row_id = obj.get("id")
    if row_id is None:
        row_id = default_id
    elif isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise UserError(f"{where}: field 'id': got {row_id!r}, expected a string that is not empty")
    elif not is_encodable(str(row_id)):
        raise UserError(f"{where}: field 'id' holds half of a surrogate pair (a broken \\ud8xx escape)")
    if obj.get("messages") is not None:
        return _conversation_row(obj["messages"], where, str(row_id))
    instruction = _text(_required(obj, "instruction", where), f"{where}: field 'instruction'")
    given_input = obj.get("input")
    text_input = "" if given_input is None else _text(given_input, f"{where}: field 'input'", empty=True)
    return Row(str(row_id), instruction, text_input, _references(_required(obj, "output", where), where))


def _kind(value: object) -> str:
    """Name a JSON value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the {type(value).__name__} {value!r}")


def _text(value: object, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: got {_kind(value)}, expected a string")
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


def _required(obj: Mapping[str, Any], name: str, where: str) -> object:
    if obj.get(name) is not None:
        return obj[name]
    if name in obj:
        raise UserError(f"{where}: field '{name}' is null, expected text")
    # "input" is no misspelt "instruction"; a field of ours is never offered for renaming.
    others = [key for key in obj if key not in ("id", "instruction", "input", "output", "messages")]
    close = get_close_matches(name, others, n=1, cutoff=0.6) or [key for key in OTHER_NAMES[name] if key in others]
    hint = f" Rename '{close[0]}' to '{name}'?" if close else ""
    found = ", ".join(f"'{key}'" for key in obj) or "none"
    raise UserError(f"{where}: field '{name}' is missing; found the fields {found}, expected {ROW_FORMAT}.{hint}")


def _references(output: object, where: str) -> tuple[str, ...]:
    if not isinstance(output, (list, tuple)):
        return (_text(output, f"{where}: field 'output'"),)
    if not output:
        raise UserError(f"{where}: field 'output' is an empty list, expected at least one response")
    return tuple(_text(text, f"{where}: field 'output', reference {k}") for k, text in enumerate(output, 1))


def _conversation_row(messages: object, where: str, row_id: str) -> Row:
    if not isinstance(messages, (list, tuple)) or len(messages) < 2:
        raise UserError(f"{where}: field 'messages': expected a list of at least two messages (user, assistant)")
    checked = []
    for k, message in enumerate(messages, 1):
        place = f"{where}: message {k}"
        if not isinstance(message, Mapping):
            raise UserError(f"{place}: expected an object {{role, content}}, got {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            raise UserError(f"{place}: role: got {role!r}, expected one of {', '.join(ROLES)}.{hint}")
        # Only a system message may be empty: templates use that to switch their default one off.
        content = _text(message.get("content"), f"{place}: content", empty=role == "system")
        checked.append({"role": role, "content": content})
    prompt, response = checked[:-1], checked[-1]
    if response["role"] != "assistant":
        raise UserError(
            f"{where}: the last message has the role '{response['role']}', expected 'assistant' (the response)"
        )
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    if not questions:
        raise UserError(f"{where}: no message before the response has the role 'user'")
    return Row(row_id, questions[-1], "", (response["content"],), tuple(prompt), "messages")
