"""What a chat template may leave out of a conversation without a word: system message, tools, calls, thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dts_hf.data.conversations import REASONING
from dts_hf.data.rows import Row


def contents(row: Row) -> Iterator[tuple[str, str, int | None]]:
    """What a template may not know: its name, a text that stands where it is written, and the message it is of.

    The message is None for what nobody says, the tools.
    """
    for place, message in enumerate(row.conversation):
        if message["role"] in ("system", "developer", "tool"):
            yield f"the {message['role']} message", _plain(message.get("content")), place
        for call in message.get("tool_calls") or ():
            yield "a tool call", _plain((call.get("function") or call).get("name")), place
        for key in REASONING:
            yield "the reasoning", _plain(message.get(key)), place
    for tool in row.tools or ():
        yield "the tools", _plain((tool.get("function") or tool).get("name")), None


def is_written(text: str, whole: str) -> bool:
    """Whether ``text`` stands in ``whole``, as it is or as JSON, which many templates write what a tool says as."""
    text = text.strip()
    return text in whole or any(json.dumps(text, ensure_ascii=ascii_)[1:-1] in whole for ascii_ in (False, True))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else ""
