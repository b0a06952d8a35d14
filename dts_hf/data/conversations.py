"""Conversations: messages as OpenAI, TRL and chat templates have them, and ShareGPT's ``{from, value}``, as one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dts_hf.data.cells import from_json, items, kind, mapping, plain, text
from dts_hf.data.rows import Message
from dts_hf.errors import UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Names of the speakers in ShareGPT files, as LLaMA-Factory and Axolotl know them. ``CALL``: the assistant calls a tool.
CALL = "function_call"
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    CALL: CALL, "tool_call": CALL,
}  # fmt: skip
#: Roles of other vocabularies, for the hint alone: what they say is not always what ours say.
OTHER_ROLES = {
    "function": "tool", "ipython": "tool", "model": "assistant", "bot": "assistant", "human": "user", "gpt": "assistant",
}  # fmt: skip
#: Keys of a message that hold its thoughts; ``apply_chat_template`` knows all three.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Keys of a message that say whether it is learned: OpenAI's, ours of other sets, ms-swift's, Axolotl's.
LEARNED = ("weight", "train", "loss", "training")
_MEDIA = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio", "input_image")


def read_messages(value: object, where: str, *, sharegpt: bool = False) -> tuple[Message, ...]:
    """Check a list of messages and bring each into the form that chat templates take.

    Args:
        value: the list, or the list as JSON.
        where: place and column, for errors.
        sharegpt: the speakers may have ShareGPT's names in the form ``{role, content}``, too.

    Raises:
        UserError: no list, or a message that is wrong.
    """
    expected = "a list of messages {role, content}, or {from, value}"
    checked = []
    for number, message in enumerate(items(value, where, expected), 1):
        place = f"{where}: message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{place}: expected an object {{role, content}}, got {kind(message)}")
        given = {str(key): inner for key, inner in message.items() if inner is not None}
        if "role" not in given and "from" in given:
            checked.append(_sharegpt_message(given, place, "from", "value"))
        elif sharegpt and given.get("role") not in ROLES:
            checked.append(_sharegpt_message(given, place, "role", "content"))
        else:
            checked.append(_message(given, place))
    return tuple(checked)


def check_whole(messages: Sequence[Message], where: str) -> None:
    """A conversation ends with the assistant, which answers somebody.

    Raises:
        UserError: it does not.
    """
    if len(messages) < 2:
        raise UserError(f"{where}: expected a list of at least two messages (user, assistant)")
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the last message has the role '{messages[-1]['role']}', expected 'assistant' (the response). Leave "
            "out what is behind the last response"
        )
    if not any(message["role"] == "user" for message in messages[:-1]):
        raise UserError(f"{where}: no message before the response has the role 'user'")


def _sharegpt_message(message: Mapping[str, Any], where: str, role_key: str, text_key: str) -> Message:
    name = message.get(role_key)
    role = SPEAKERS.get(name) if isinstance(name, str) else None
    if role is None:
        hint = nearest(name, SPEAKERS) if isinstance(name, str) else ""
        raise UserError(f"{where}: {role_key}: got {name!r}, expected one of {', '.join(SPEAKERS)}.{hint}")
    others = {key: inner for key, inner in message.items() if key not in (role_key, text_key)}
    if role != CALL:
        return _message({"role": role, "content": message.get(text_key), **others}, where, text_key)
    place = f"{where}: {text_key} of a {name}"
    calls = from_json(text(message.get(text_key), place), place)
    calls = calls if isinstance(calls, list) else [calls]
    return _message({"role": "assistant", "tool_calls": calls, **others}, where)


def _message(message: Mapping[str, Any], where: str, text_key: str = "content") -> Message:
    """One message in our form: role, content and whatever else a chat template may read, without null."""
    role = message.get("role")
    if role not in ROLES:
        near = OTHER_ROLES.get(role) if isinstance(role, str) else None
        hint = f" Did you mean '{near}'?" if near else nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"{where}: role: got {role!r}, expected one of {', '.join(ROLES)}.{hint}")
    # Of other roles nothing is learned anyway
    left_out = [key for key in LEARNED if key in message and message[key] in (0, False)]
    if left_out and role == "assistant":
        raise UserError(
            f"{where}: {left_out[0]}: got {message[left_out[0]]!r}, but a message cannot be left out of the targets alone: "
            "end the conversation before it, or leave the key out and use data.train_on: last_turn"
        )
    if "function_call" in message:
        raise UserError(f"{where}: function_call: expected tool_calls: [{{type, function: {{name, arguments}}}}]")
    calls = message.get("tool_calls")
    read: Message = {"role": role, "content": ""}
    if isinstance(calls, str) or calls:
        read["tool_calls"] = _tool_calls(calls, f"{where}: tool_calls")
    # A system message may be empty: templates use that to switch their default one off. So may the result of a tool.
    may_be_empty = role in ("system", "developer", "tool") or "tool_calls" in read or _thinks(message)
    given = message.get("content")
    if given is not None or not ("tool_calls" in read or _thinks(message)):
        read["content"] = text(_joined(given, f"{where}: {text_key}"), f"{where}: {text_key}", empty=may_be_empty)
    known = ("role", "content", "tool_calls", *LEARNED)
    others = {key: inner for key, inner in message.items() if key not in known}
    for key in {*REASONING} & others.keys():
        text(others[key], f"{where}: {key}", empty=True)
    return {**read, **plain(others, where)}


def _thinks(message: Mapping[str, Any]) -> bool:
    return any(message.get(key) for key in REASONING)


def _joined(content: object, where: str) -> object:
    """The text of content in parts; templates of language models take a text, and those that take parts join them."""
    content = content.tolist() if hasattr(content, "tolist") else content
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for number, part in enumerate(content, 1):
        place = f"{where}, part {number}"
        name = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if name in _MEDIA:
            raise UserError(f"{place}: got type {name!r}, but only text is learned: leave rows with {name} out")
        if name not in ("text", "input_text", "output_text"):
            raise UserError(f"{place}: got type {name!r}, expected 'text'; thoughts go into reasoning_content")
        texts.append(text(part["text"] if isinstance(part, Mapping) and "text" in part else part, place, empty=True))
    return "".join(texts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """``[{type, function: {name, arguments}}]`` with arguments as an object, which is what chat templates write out."""
    read = []
    for number, one in enumerate(items(calls, where, "a list of {type, function: {name, arguments}}"), 1):
        place = f"{where}, call {number}"
        call = mapping(one, place, "an object {type, function: {name, arguments}}")
        function = call if call.get("function") is None else call["function"]
        function = mapping(function, f"{place}: function", "an object {name, arguments}")
        name = text(function.get("name"), f"{place}: name")
        arguments = function.get("arguments")
        as_json = isinstance(arguments, str)  # OpenAI has them so; a template would write a text in quotes
        arguments = mapping(arguments or {}, f"{place}: arguments", "an object, or one as JSON")
        arguments = plain(arguments, place, nulls=as_json)
        rest = {key: inner for key, inner in function.items() if key not in ("name", "arguments", "type", "id")}
        outer = {key: inner for key, inner in call.items() if call is not function and key not in ("type", "function")}
        if call is function and call.get("id") is not None:
            outer["id"] = call["id"]
        written = {"name": name, "arguments": arguments, **plain(rest, place)}
        read.append({"type": "function", "function": written, **plain(outer, place)})
    return read


def read_tools(value: object, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a row as ``{type: function, function: {name, description, parameters}}``.

    Args:
        value: a list of them, that list as JSON, or nothing. A description without ``type`` (LLaMA-Factory) is completed.
        where: place and column, for errors.

    Returns:
        None where there are none: some templates write an empty list into the prompt.

    Raises:
        UserError: anything else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    expected = "a list of tools (JSON schemas), or that list as JSON"
    as_json = isinstance(value, str)
    tools = []
    for number, tool in enumerate(items(value, where, expected), 1):
        place = f"{where}, tool {number}"
        if callable(tool):
            raise UserError(
                f"{place}: got a function, expected its schema: transformers.utils.get_json_schema(function)"
            )
        schema = mapping(tool, place, "an object with name, description and parameters")
        # In a table null fills up what another tool has; in JSON it was written by somebody.
        schema = plain(schema, place, nulls=as_json)
        if isinstance(schema.get("name"), str) and "function" not in schema:
            schema = {"type": "function", "function": {key: schema[key] for key in schema if key != "type"}}
        tools.append(schema)
    return tuple(tools) or None
