"""Which text of a row is learned: its conversation as the template writes it, cut where the assistant begins and ends.

A row becomes texts that take turns: what is only read, what is learned, what is only read, and so on. What is learned
begins where generation would begin, behind everything that the template writes to ask for an answer, and ends with the
template's end of turn, whatever ``eos_token`` is. See docs/targets.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from dts_hf.data.chat_templates import (
    Template,
    end_of_turn,
    has_markers,
    render_messages,
    render_with_markers,
)
from dts_hf.data.rows import Row
from dts_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last_turn", "all_turns", "completion"]
TRAIN_ON: tuple[TrainOn, ...] = ("last_turn", "all_turns", "completion")
Span = tuple[int, int]


class TurnsDiffer(UserError):
    """The chat template writes earlier turns otherwise than they were said: only the last one has a sound mask."""


class RowTexts(NamedTuple):
    """The text of one row.

    Attributes:
        texts: in turns read and learned; what is read comes first, and may be empty.
        ends: the last text ends with an end of turn; otherwise ``eos_token`` is appended, and learned.
        is_one: the texts are one text that was cut, and not prompt and response that were put together.
    """

    texts: list[str]
    ends: bool
    is_one: bool


def all_turns_are_sound(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether every row has a sound mask with the default ``train_on``."""
    cutter = TextCutter(tokenizer, template, None)
    try:
        for row in rows:
            cutter.cut(row)
    except TurnsDiffer:
        return False
    return True


class TextCutter:
    """Cuts rows into what is read and what is learned.

    Args:
        tokenizer: of the student.
        template: from ``resolve_template``.
        train_on: ``last_turn``: the last message of the assistant; ``completion``: all of them in the completion of a
            prompt/completion row, of other rows the last one; ``all_turns``: all of them. None: ``completion`` for
            prompt/completion rows, else ``all_turns``.

    Raises:
        UserError: another ``train_on``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, train_on: TrainOn | None) -> None:
        if train_on is not None and train_on not in TRAIN_ON:
            raise UserError(f"data.train_on: got {train_on!r}, expected {', '.join(TRAIN_ON)}, or null")
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self.end = end_of_turn(tokenizer, template)
        self._asking: dict[str, str] = {}

    def cut(self, row: Row) -> RowTexts:
        """Cut one row.

        Raises:
            UserError: the template cannot hold the row, or writes it so that no sound mask exists.
        """
        worded = self.template.words(row)
        said, end = self._spelt_end(row.response)
        if not worded:  # a text, or a finished prompt and its completion
            texts = [self.template.render(row, self.tokenizer), said + end if end else row.response]
            return RowTexts(texts, bool(end), True)
        if end and said:  # the template, or ``encode_rows``, writes one itself
            answer = None if row.answer is None else {**row.answer, "content": said}
            row = dataclasses.replace(row, references=(said, *row.references[1:]), answer=answer)
        if self.template.is_chat:
            return self._cut_conversation(row)
        return RowTexts([self.template.render(row, self.tokenizer), row.response], False, False)

    def without_end(self, response: str) -> str:
        """``response`` without an end token that is spelt out behind it."""
        said, end = self._spelt_end(response)
        return said if end and said else response

    def _spelt_end(self, response: str) -> tuple[str, str]:
        """``response`` as what is said, and the end token behind that; spaces that follow this are lost."""
        stripped = response.rstrip()
        end = next((end for end in (self.end, self.tokenizer.eos_token) if end and stripped.endswith(str(end))), "")
        return (stripped.removesuffix(str(end)), str(end)) if end else (response, "")

    def _cut_conversation(self, row: Row) -> RowTexts:
        messages, turns = row.conversation, self._turns(row)
        if has_markers(row, self.tokenizer):
            whole, spans = render_with_markers(row, self.tokenizer)
            spans = self._adjusted(row, whole, spans)
            if len(turns) < sum(message["role"] == "assistant" for message in messages):
                start = len(self._prompt(row, turns[0], whole))
                spans = [(max(a, start), b) for a, b in spans if b > start]
            if not spans:
                raise UserError(
                    f"row '{row.id}': the chat template marks nothing of this conversation with {{% generation %}}, so "
                    "nothing would be learned from it"
                )
        else:
            whole = render_messages(row, messages, self.tokenizer)
            if len(turns) == 1 and turns[0] == len(messages) - 1:
                prompt = render_messages(row, row.prompt_messages, self.tokenizer, for_answer=True)
                if not whole.startswith(prompt):
                    return self._behind(row, prompt, whole)
                spans = [self._span(whole, len(prompt))]
            else:
                spans = [self._turn(row, turn, whole) for turn in turns]
        ends = whole[: spans[-1][1]].endswith(self.end or str(self.tokenizer.eos_token))
        texts, last = [], 0
        for start, stop in spans:
            texts += [whole[last:start], whole[start:stop]]
            last = stop
        return RowTexts(texts, ends, True)

    def _turns(self, row: Row) -> list[int]:
        """The places in the conversation of the messages that are learned."""
        last = len(row.conversation) - 1
        train_on = self.train_on or ("all_turns" if row.given is None else "completion")
        first = {"last_turn": last, "all_turns": 0, "completion": last if row.given is None else row.given}[train_on]
        said = [k for k, message in enumerate(row.conversation) if message["role"] == "assistant"]
        return [k for k in said if k >= first]

    def _prompt(self, row: Row, turn: int, whole: str) -> str:
        """What generation would see before message ``turn``; the whole conversation must begin with it."""
        prompt = render_messages(row, row.conversation[:turn], self.tokenizer, for_answer=True) if turn else ""
        if not turn or not whole.startswith(prompt):
            raise self._differs(row, turn, whole, prompt)
        return prompt

    def _turn(self, row: Row, turn: int, whole: str) -> Span:
        """Where message ``turn`` stands in the whole conversation, from where generation begins to the end of turn."""
        messages = row.conversation
        start = len(self._prompt(row, turn, whole))
        if turn == len(messages) - 1:
            return self._span(whole, start)
        # As it was said: a template may write a message otherwise once others follow, and then it was never generated so
        said = render_messages(row, messages[: turn + 1], self.tokenizer)
        span = self._span(said, start)
        if not whole.startswith(said[: span[1]]):
            raise self._differs(row, turn, whole, said[: span[1]])
        return span

    def _span(self, text: str, start: int) -> Span:
        """The last message of ``text``: from ``start`` to its end of turn, or to its last character that is no space."""
        # From behind: the message itself may hold the end of turn, spelt out
        stop = -1 if self.end is None else text.rfind(self.end, start)
        return (start, stop + len(self.end)) if stop >= 0 and self.end else (start, max(start, len(text.rstrip())))

    def _behind(self, row: Row, prompt: str, whole: str) -> RowTexts:
        """Prompt and response where the template writes a finished conversation otherwise than prompt and response.

        DeepSeek-R1 opens ``<think>`` in the prompt and leaves it out afterwards. What generation sees counts.
        """
        if row.answer is not None and set(row.answer) - {"role", "content"}:
            raise self._differs(row, len(row.conversation) - 1, whole, prompt, "")
        end = self.end or ""
        return RowTexts([prompt, row.response + end], bool(end), True)

    def _adjusted(self, row: Row, whole: str, spans: list[Span]) -> list[Span]:
        """Marked spans from where generation begins up to the end of turn, wherever the template's author set the markers.

        Some enclose the header that generation is given (SmolLM3) or its line break, some the line break behind the end of
        turn, and some leave the end of turn out.
        """
        asking = self._asks(row)
        adjusted: list[Span] = []
        for begin, end in spans:
            text = whole[begin:end]
            asked = whole.find(asking, max(0, begin - len(asking))) if asking else -1
            start, stop = max(begin, asked + len(asking)) if 0 <= asked <= begin else begin, end
            if self.end is not None:
                kept, behind = text.rstrip(), whole[end:].lstrip()
                if kept.endswith(self.end):
                    stop = begin + len(kept)
                elif behind.startswith(self.end):
                    stop = len(whole) - len(behind) + len(self.end)
            if adjusted and adjusted[-1][1] >= start:
                start = adjusted.pop()[0]
            if start < stop:
                adjusted.append((start, stop))
        return adjusted

    def _asks(self, row: Row) -> str:
        """What the template writes to ask for an answer, such as ``<|im_start|>assistant``."""
        key = repr(row.chat_template_kwargs)
        if key not in self._asking:
            plain = render_messages(row, row.prompt_messages, self.tokenizer)
            asked = render_messages(row, row.prompt_messages, self.tokenizer, for_answer=True)
            self._asking[key] = asked[len(plain) :] if asked.startswith(plain) else ""
        return self._asking[key]

    def _differs(self, row: Row, turn: int, whole: str, said: str, advice: str | None = None) -> TurnsDiffer:
        if not turn:
            return TurnsDiffer(
                f"row '{row.id}': the conversation begins with the assistant, so nothing asks for its first message: "
                "leave that out, or use data.train_on: last_turn"
            )
        same = next((k for k, (a, b) in enumerate(zip(whole, said, strict=False)) if a != b), len(whole))
        start = max(0, same - 10)
        # The last message may be the one that differs: then nothing else helps
        helps = turn < len(row.conversation) - 1 or len(self._turns(row)) > 1
        advice = ("data.train_on: last_turn" if helps else "another chat template") if advice is None else advice
        return TurnsDiffer(
            f"row '{row.id}': this chat template renders earlier turns differently: message {turn + 1} was "
            f"{said[start : start + 40]!r} and becomes {whole[start : start + 40]!r}, so the tokens that are learned "
            f"would not be those that are generated." + (f" Expected {advice}" if advice else "")
        )
