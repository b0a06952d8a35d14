"""``Row``: one instruction with its references, whatever format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

#: One message of a conversation: ``role`` and ``content``, and what else a chat template may know of it
#: (``tool_calls``, ``reasoning_content``, ``name``, ``tool_call_id``).
Message: TypeAlias = dict[str, Any]
#: What the text of a row is: an instruction that a prompt template words, a conversation, a finished prompt that the
#: response continues as it stands, or a text that is learned whole.
Kind = Literal["instruction", "messages", "prompt", "text"]


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction with its references.

    Attributes:
        id: unique in its data set; predictions, caches and samples are found by it.
        instruction: what is asked; the last user message of a conversation, a finished prompt, nothing for a text.
        input: the text that the instruction is about, or an empty string.
        references: good responses; the first one is trained on. Of a text, the text.
        messages: the conversation before the last response, or None where there is none. It may hold earlier responses.
        kind: what the text of the row is.
        answer: the last response as a message, where it is more than its content (``tool_calls``,
            ``reasoning_content``); see ``conversation``.
        given: how many of ``messages`` are the prompt of a prompt/completion row, whose completion is what follows;
            None for other rows.
        tools: descriptions (JSON schema) of the tools that the conversation may call.
        chat_template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        teacher: what the row says of its teacher, where ``data.teacher_column`` names a column.
        teacher_prefix: what the teacher alone reads before the last question, where ``data.teacher_prefix_column`` names a
            column; empty: nothing.
        cut: the last response stops where whoever wrote it was stopped, so no end of turn is learned behind it.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    messages: tuple[Message, ...] | None = None
    kind: Kind = "instruction"
    answer: Message | None = None
    given: int | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    teacher: Any = None
    cut: bool = False
    teacher_prefix: str | None = None

    @property
    def response(self) -> str:
        """The reference that is trained on."""
        return self.references[0]

    @property
    def conversation(self) -> tuple[Message, ...]:
        """All messages, the last response among them; of an instruction the question and its response."""
        answer = self.answer or {"role": "assistant", "content": self.response}
        return (*self.prompt_messages, answer)

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages before the last response; of an instruction the question, its input below it."""
        if self.messages is not None:
            return self.messages
        content = "\n\n".join(text for text in (self.instruction, self.input) if text)
        return ({"role": "user", "content": content},)
