"""Which text of a row is learned: its conversation as the template writes it, cut where the assistant begins and ends.

A row becomes texts that take turns: what is only read, what is learned, what is only read, and so on. What is learned
begins where generation would begin, behind everything that the template writes to ask for an answer, and ends with the
template's end of turn, whatever ``eos_token`` is. See docs/targets.md.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from dts_hf.data.chat_templates import (
    Template,
    end_of_turn,
    has_markers,
    render_messages,
    render_with_markers,
)
from dts_hf.data.conversations import REASONING
from dts_hf.data.left_out import contents, is_written
from dts_hf.data.rows import Message, Row
from dts_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last_turn", "all_turns", "completion"]
TRAIN_ON: tuple[TrainOn, ...] = ("last_turn", "all_turns", "completion")
Span = tuple[int, int]
#: Prompts that show whom a template's markers enclose: texts that stand nowhere else, so what is found was said by them.
_PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "system", "content": "probe rule"}, {"role": "user", "content": "probe question"}),
    ({"role": "user", "content": "probe question"},),
    (
        {"role": "user", "content": "probe question"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "probecall", "function": {"name": "probe", "arguments": {}}}]},
        {"role": "tool", "name": "probe", "tool_call_id": "probecall", "content": "probe result"},
    ),
)  # fmt: skip


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
        self._sound_marks: set[bool] = set()

    def cut(self, row: Row) -> RowTexts:
        """Cut one row.

        Raises:
            UserError: the template cannot hold the row, or writes it so that no sound mask exists.
        """
        texts = self._cut(row)
        if not row.cut:
            return texts
        # Whoever wrote the response was stopped and had not ended: an end of turn here would teach to stop in mid-sentence
        *before, last = texts.texts
        end = self.end or str(self.tokenizer.eos_token)
        return texts._replace(texts=[*before, last.removesuffix(end) if texts.ends else last], ends=True)

    def _cut(self, row: Row) -> RowTexts:
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

    def left_out(self, row: Row, texts: RowTexts) -> str | None:
        """What of ``row`` the chat template does not write into ``texts``, such as ``a tool call``; None: nothing."""
        if not (self.template.is_chat and self.template.words(row) and (row.messages or row.tools)):
            return None
        whole, learned, turns = "".join(texts.texts), "".join(texts.texts[1::2]), self._turns(row)
        for what, text, turn in contents(row):
            if what == "the reasoning" and turn not in turns:
                continue  # templates drop earlier thoughts on purpose
            # A tool has its name in the prompt, too: what is to be learned must stand where it is
            if not is_written(text, learned if turn in turns else whole):
                return what
        return None

    def _cut_conversation(self, row: Row) -> RowTexts:
        messages, turns = row.conversation, self._turns(row)
        marks: list[Span] | None = None
        if has_markers(row, self.tokenizer):
            self._check_marks(row)
            whole, marks = render_with_markers(row, self.tokenizer)
        else:
            whole = render_messages(row, messages, self.tokenizer)
        if turns == [len(messages) - 1]:
            prompt = render_messages(row, row.prompt_messages, self.tokenizer, for_answer=True)
            if not whole.startswith(prompt):
                return self._behind(row, prompt, whole)
            starts: Iterator[int] = iter([len(prompt)])
        else:
            starts = (len(self._prompt(row, turn, whole)) for turn in turns)
        if marks is None:
            spans = [[self._turn(row, turn, start, whole)] for turn, start in zip(turns, starts, strict=True)]
        else:
            spans = self._marked(row, whole, marks, turns, list(starts))
        for turn, of_turn in zip(turns, spans, strict=True):
            self._check_said(row, turn, "".join(whole[start:stop] for start, stop in of_turn))
        texts, last = [], 0
        for start, stop in (span for of_turn in spans for span in of_turn):
            texts += [whole[last:start], whole[start:stop]]
            last = stop
        return RowTexts(texts, whole[:last].endswith(self.end or str(self.tokenizer.eos_token)), True)

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

    def _turn(self, row: Row, turn: int, start: int, whole: str) -> Span:
        """Where message ``turn`` stands in the whole conversation, from where generation begins to the end of turn."""
        messages = row.conversation
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

    def _marked(
        self, row: Row, whole: str, marks: Sequence[Span], turns: Sequence[int], starts: Sequence[int]
    ) -> list[list[Span]]:
        """What is marked of each turn, from where generation begins up to the end of turn, wherever the markers are set.

        Some enclose the header that generation is given (SmolLM3) or its line break, some the line break behind the end of
        turn, and some leave the end of turn out.

        Args:
            row: it is cut.
            whole: the conversation as it is written.
            marks: what the markers enclose.
            turns: the messages that are learned.
            starts: where generation of each of them begins.
        """
        spans: list[list[Span]] = [[] for _ in turns]
        for begin, end in marks:
            place = bisect_left(starts, end) - 1  # a mark may begin before its turn, with the header
            if place < 0:
                continue
            start, stop = max(begin, starts[place]), end
            if self.end is not None:
                kept, behind = whole[start:end].rstrip(), whole[end:].lstrip()
                if kept.endswith(self.end):
                    stop = start + len(kept)
                elif behind.startswith(self.end):
                    stop = len(whole) - len(behind) + len(self.end)
            if spans[place] and spans[place][-1][1] >= start:
                start = spans[place].pop()[0]
            if start < stop:
                spans[place].append((start, stop))
        unmarked = [turn for turn, of_turn in zip(turns, spans, strict=True) if not of_turn]
        if len(unmarked) == len(turns):
            raise UserError(
                f"row '{row.id}': the chat template marks nothing of this conversation with {{% generation %}}, so "
                "nothing would be learned from it"
            )
        if unmarked:
            raise TurnsDiffer(
                f"row '{row.id}': the chat template marks nothing of message {unmarked[0] + 1} with {{% generation %}}, so "
                "it would not be learned. Expected data.train_on: last_turn, or a chat template that marks every message "
                "of the assistant"
            )
        return spans

    def _check_marks(self, row: Row) -> None:
        """Refuse markers round what others than the assistant say; looked at once, for it is the template's doing."""
        if (row.tools is not None) in self._sound_marks:
            return
        for probe in _PROBES:
            probed = dataclasses.replace(
                row, kind="messages", messages=probe, answer=None, references=("probe answer",)
            )
            try:
                whole, marks = render_with_markers(probed, self.tokenizer)
            except UserError:  # no template knows every role
                continue
            marked = " ".join(whole[start:stop] for start, stop in marks)
            for message in probe:
                if message["role"] != "assistant" and message["content"] in marked:
                    raise UserError(
                        f"row '{row.id}': the chat template's {{% generation %}} markers enclose what the "
                        f"{message['role']} says, so that would be learned. Expected markers round the assistant's "
                        "messages alone, or a chat template without them"
                    )
        self._sound_marks.add(row.tools is not None)

    def _check_said(self, row: Row, turn: int, learned: str) -> None:
        """Refuse to teach the end of turn alone where the template leaves the rest of a message out."""
        message = row.conversation[turn]
        what = "tool calls" if message.get("tool_calls") else "thoughts"
        if what == "thoughts" and not any(message.get(key) for key in REASONING):
            return
        said = learned.removesuffix(self.end or str(self.tokenizer.eos_token))
        if not re.sub(r"<think>\s*</think>", "", said).strip():
            raise UserError(
                f"row '{row.id}': the chat template writes nothing of message {turn + 1}, for it leaves {what} out: the "
                f"student would learn to end its turn at once. Expected a chat template that knows {what}, or rows without "
                "such messages"
            )

    def _differs(self, row: Row, turn: int, whole: str, said: str, advice: str | None = None) -> TurnsDiffer:
        if not turn:
            return TurnsDiffer(
                f"row '{row.id}': the conversation begins with the assistant, so nothing asks for its first message: "
                "leave that out, or use data.train_on: last_turn"
            )
        # The last message may be the one that differs: then nothing else helps
        helps = turn < len(row.conversation) - 1 or len(self._turns(row)) > 1
        advice = ("data.train_on: last_turn" if helps else "another chat template") if advice is None else advice
        return TurnsDiffer(
            f"row '{row.id}': this chat template renders earlier turns differently: message {turn + 1} was "
            f"{from_difference(said, whole)} and becomes {from_difference(whole, said)}, so the tokens that are learned "
            f"would not be those that are generated." + (f" Expected {advice}" if advice else "")
        )


def from_difference(text: str, other: str) -> str:
    """``text`` from where it differs from ``other`` on, shortened, in quotes."""
    same = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, same - 10)
    return repr(text[start : start + 40])
