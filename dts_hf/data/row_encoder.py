"""The texts of rows as tokens: read and learned apart, under the limits, and without tokenising what cannot fit."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from dts_hf.data.chat_templates import (
    EncodedPrompt,
    leading_special_ids,
    longest_token,
    shortened_prompt,
    with_limited_input,
)
from dts_hf.data.rows import Row
from dts_hf.data.targets import RowTexts, TextCutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedRow(NamedTuple):
    """One row as tokens.

    Attributes:
        ids: its tokens, at most ``max_length``.
        spans: starts and ends of what is learned, at least one of each.
        cut: the row was longer.
        prompt_cut: its input was shortened.
        ignored: what of it the chat template does not write.
        teacher_ids, teacher_spans: the same of the row as its teacher reads it, where it reads more (``teacher_rows``).
    """

    ids: array[int]
    spans: array[int]
    cut: bool
    prompt_cut: bool
    ignored: str | None
    teacher_ids: array[int] | None = None
    teacher_spans: array[int] | None = None

    @property
    def read(self) -> tuple[array[int], array[int]]:
        """Tokens and spans of the row as its teacher reads it."""
        if self.teacher_ids is None or self.teacher_spans is None:
            return self.ids, self.spans
        return self.teacher_ids, self.teacher_spans


class RowEncoder:
    """Tokenises rows.

    Args:
        tokenizer: of the student.
        cutter: says what of a row is learned.
        max_length: of a row, in tokens; the rest is cut.
        max_prompt_length: of what comes before the first token that is learned.
        eos: id of the end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cutter: TextCutter,
        max_length: int,
        max_prompt_length: int,
        eos: int,
    ) -> None:
        self.tokenizer, self.cutter, self.eos = tokenizer, cutter, eos
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.before = leading_special_ids(tokenizer)
        self.longest = longest_token(tokenizer)
        self.adds_space = _adds_space(tokenizer)

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | None]:
        """The rows as tokens; None where the prompt does not fit, or nothing that is learned is left.

        Raises:
            UserError: the template cannot hold a row.
        """
        limit = self.max_prompt_length * self.longest
        limited = [with_limited_input(row, limit) for row in rows]
        cut = [self.cutter.cut(row) for row in limited]
        fits = [len(texts.texts[0]) - len(row.input) <= limit for texts, row in zip(cut, limited, strict=True)]
        kept = [texts for texts, fit in zip(cut, fits, strict=True) if fit]
        left = self.max_length * self.longest + 1
        short = [_shortened(texts, left) for texts in kept]
        tokens = iter(
            parts if part is texts else self._settled(texts, part, parts, left)
            for texts, part, parts in zip(kept, short, self._tokens(short), strict=True)
        )
        return [
            self._row(row, texts, next(tokens)) if fit else None
            for row, texts, fit in zip(limited, cut, fits, strict=True)
        ]

    def _settled(self, row: RowTexts, short: RowTexts, parts: list[list[int]], left: int) -> list[list[int]]:
        """The tokens of a row that was shortened, at least as many of them as ``max_length`` as the whole row has them.

        No token is longer than the longest of the vocabulary, but a normalizer may take characters out, an unknown token
        may stand for many, and what comes behind a cut may change the tokens before it. So a longer piece is asked, too.

        Args:
            row: whole.
            short: its first ``left`` characters behind the prompt.
            parts: the tokens of ``short``.
            left: grows until nothing changes any more.
        """
        while short is not row:
            longer = _shortened(row, left + left // 4 + 1000)
            (more,) = self._tokens([longer])
            first, again = (list(chain(*found[1:]))[: self.max_length + 1] for found in (parts, more))
            # One token too many is enough to know that the row is cut, and is not looked at
            if len(first) > self.max_length and first[:-1] == again[:-1] and parts[0] == more[0]:
                return parts
            left *= 2
            short = _shortened(row, left)
            (parts,) = self._tokens([short])
        return parts

    def _row(self, row: Row, texts: RowTexts, parts: list[list[int]]) -> EncodedRow | None:
        template = self.cutter.template
        # Of a text all is learned, and its first token is the row's
        opened = template.writes_special_tokens(row) or (parts[0] or parts[1])[: len(self.before)] == self.before
        prompt = EncodedPrompt(parts[0] if opened else self.before + parts[0], False)
        if len(prompt.ids) > self.max_prompt_length:
            # Only an input is shortened: any other prompt, cut, would ask for something else
            length = len(prompt.ids)
            fitting = shortened_prompt(row, self.tokenizer, template, length, self.max_prompt_length)
            if fitting is None:
                return None
            prompt = fitting
        ids = array("i", prompt.ids)
        spans: list[tuple[int, int]] = []
        for number, part in enumerate(parts[1:]):
            start = max(len(ids), 1)  # nothing predicts the first token of a row
            ids.extend(part)
            if number % 2 == 0:
                spans.append((start, len(ids)))
        if not texts.ends:
            ids.append(self.eos)
            spans[-1] = (spans[-1][0], len(ids))
        cut = len(ids) > self.max_length
        ids = ids[: self.max_length]
        bounds = [bound for start, stop in spans if start < len(ids) for bound in (start, min(stop, len(ids)))]
        if not bounds:
            return None
        return EncodedRow(ids, array("i", bounds), cut, prompt.cut, self.cutter.left_out(row, texts))

    def _tokens(self, rows: Sequence[RowTexts]) -> list[list[list[int]]]:
        """The tokens of every text of every row."""
        whole = [self._cut_tokens(row.texts) if self.adds_space and row.is_one else None for row in rows]
        apart = [text for row, known in zip(rows, whole, strict=True) if known is None for text in row.texts]
        ids = iter(self._ids(apart) if apart else [])
        return [
            [next(ids) for _ in row.texts] if known is None else known for row, known in zip(rows, whole, strict=True)
        ]

    def _cut_tokens(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of one text that was cut, for a tokenizer that puts a space before every text.

        Tokenised apart, each part would get a space that the text does not have. So the text is tokenised whole, if no
        token reaches over a cut and the first part is what it is by itself, which is where generation starts.

        Returns:
            None where that is not so; then the parts are tokenised apart.
        """
        if not self.tokenizer.is_fast:
            return None
        text = "".join(texts)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        parts: list[list[int]] = []
        first = stop = 0
        for part in texts:
            stop += len(part)
            last = first
            while last < len(ids) and offsets[last][1] <= stop:
                last += 1
            if last < len(ids) and offsets[last][0] < stop:
                return None
            parts.append(ids[first:last])
            first = last
        return parts if parts[0] == self._ids([texts[0]])[0] else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        )


def _shortened(row: RowTexts, left: int) -> RowTexts:
    """Its first ``left`` characters behind the prompt, itself if it has no more: 60 MB of text take 12 GB and minutes."""
    if sum(map(len, row.texts[1:])) <= left:
        return row
    texts = row.texts[:1]
    for text in row.texts[1:]:
        texts.append(text[:left])
        left -= len(texts[-1])
    return row._replace(texts=texts)


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a space before every text (Llama 2, Mistral): then a part of a text is not tokenised as that part."""
    alone, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\na"))
    return list(behind[-len(alone) :]) != list(alone)
