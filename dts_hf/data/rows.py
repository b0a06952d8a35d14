"""``Row``: one instruction with its references, whatever format it came in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction with its references.

    Attributes:
        id: unique in its data set; predictions, caches and samples are found by it.
        instruction: what is asked; the last user message for a conversation.
        input: the text that the instruction is about, or an empty string.
        references: good responses; the first one is trained on.
        messages: the conversation before the response (``role``, ``content``), or None for an instruction row.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def response(self) -> str:
        """The reference that is trained on."""
        return self.references[0]
