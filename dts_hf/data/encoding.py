"""Rows as tokens: prompt and response under a length limit, and a report of what was dropped or cut."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from torch.utils.data import Dataset

from dts_hf.data.prompt_templates import Template, encode_prompts
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(TypedDict):
    """One tokenised row: ``labels`` are ``input_ids`` with -100 on the prompt; ``row_id`` indexes the data set."""

    input_ids: list[int]
    labels: list[int]
    row_id: int


class EncodedDataset(Dataset[Example]):
    """Tokenised rows, prompt then response, held as compact arrays.

    Attributes:
        row_ids: the id of each row.
        ids: the tokens of each row.
        lengths: tokens of each row, prompt and response.
        prompt_lengths: tokens of each row's prompt, at least 1; they carry no label.
        report: what became of the rows when they were encoded; None for tokens that come from elsewhere.
    """

    report: EncodingReport | None = None

    def __init__(self, row_ids: Sequence[str], ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        self.row_ids = list(row_ids)
        self.prompt_lengths = list(prompt_lengths)
        self.lengths = [len(row) for row in ids]
        self.ids = [array("i", row) for row in ids]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # negative indices count from the end; row_id is always the place
        ids = self.ids[index].tolist()
        prompt = self.prompt_lengths[index]
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "row_id": index}

    def subset(self, n: int) -> EncodedDataset:
        """Return the first ``n`` rows (all of them when there are fewer)."""
        return EncodedDataset(self.row_ids[:n], self.ids[:n], self.prompt_lengths[:n])


@dataclass
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows, kept, dropped: counts of rows; ``rows == kept + dropped``.
        cut: rows whose response was cut, so that they end without the end-of-sequence token.
        prompts_cut: rows whose input was shortened to fit ``max_prompt_length``.
        unlabelled: rows kept of which no label counts, so that nothing is learned from them.
        dropped_ids, unlabelled_ids: the first five ids of such rows (of tokenised rows: their numbers, from 0).
        prompt_tokens, response_tokens: tokens kept; those of responses carry the labels.
    """

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    cut: int = 0
    prompts_cut: int = 0
    unlabelled: int = 0
    dropped_ids: list[str] = field(default_factory=list)
    unlabelled_ids: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    response_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every row is learned from as it was given."""
        return not (self.dropped or self.cut or self.prompts_cut or self.unlabelled)

    def summary(self) -> str:
        """Return one line for people."""
        parts = [f"{self.kept:,} of {self.rows:,} rows kept"]
        if self.dropped:
            parts.append(f"dropped as too long: {self.dropped:,} ({_first_of(self.dropped_ids, self.dropped)})")
        if self.unlabelled:
            parts.append(
                f"without a label that counts: {self.unlabelled:,} ({_first_of(self.unlabelled_ids, self.unlabelled)})"
            )
        if self.cut:
            parts.append(f"responses cut: {self.cut:,}")
        if self.prompts_cut:
            parts.append(f"inputs shortened: {self.prompts_cut:,}")
        parts.append(f"{self.prompt_tokens:,} prompt and {self.response_tokens:,} response tokens")
        return "; ".join(parts)


def _first_of(ids: Sequence[str], count: int) -> str:
    return ", ".join(ids) + (", ..." if count > len(ids) else "")


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
    long_rows: str = "drop",
    progress: str | None = None,
    name: str = "data",
    may_be_empty: bool = False,
) -> tuple[EncodedDataset, EncodingReport]:
    """Tokenise prompts and responses: ``prompt + response + end-of-sequence``, labels on response and end.

    Prompt and response are tokenised apart, so the first response token never depends on the prompt's last characters
    and generation starts from the very tokens that training saw.

    Args:
        rows: the rows; ``row.response`` is the one trained on.
        tokenizer: the student's tokenizer; its ``eos_token`` ends every response and is a target, also when it is the
            padding token as well.
        template: from ``get_template``.
        max_length: limit of a row in tokens.
        max_prompt_length: limit of its prompt in tokens; below ``max_length``. Longer prompts have their *input*
            shortened; a row whose prompt does not fit even then is dropped.
        long_rows: ``"drop"`` rows longer than ``max_length``, or ``"cut"`` their response (the end is lost with it).
        progress: the title of a progress bar on stderr, shown for more than 2,000 rows; None shows none.
        name: what errors call these rows, such as ``data.train``.
        may_be_empty: no row has to be left, for the rows are some of many.

    Raises:
        UserError: limits that contradict each other, a tokenizer without an end-of-sequence token, no row left.
    """
    end = _checked_end(tokenizer, max_length, max_prompt_length, long_rows)
    report = EncodingReport(rows=len(rows))
    row_ids: list[str] = []
    encoded: list[list[int]] = []
    prompt_lengths: list[int] = []
    for block in _blocks(rows, progress):
        prompts = encode_prompts(block, tokenizer, template, max_prompt_length)
        texts = [row.response for row in block]
        responses = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for row, prompt, response in zip(block, prompts, responses, strict=True):
            ids = [] if prompt is None else [*prompt.ids, *response, end]
            # A prompt that does not fit is dropped under both rules: cut, it would ask for something else.
            if prompt is None or (long_rows == "drop" and len(ids) > max_length):
                report.dropped += 1
                report.dropped_ids += [row.id] if len(report.dropped_ids) < 5 else []
                continue
            report.cut += len(ids) > max_length
            report.prompts_cut += prompt.cut
            row_ids.append(row.id)
            encoded.append(ids[:max_length])
            prompt_lengths.append(len(prompt.ids))
    dataset = EncodedDataset(row_ids, encoded, prompt_lengths)
    report.kept = len(dataset)
    report.prompt_tokens = sum(prompt_lengths)
    report.response_tokens = sum(dataset.lengths) - report.prompt_tokens
    dataset.report = report
    if not len(dataset) and not may_be_empty:
        raise UserError(
            f"{name}: no row left: all {len(rows)} rows are too long for data.max_prompt_length = {max_prompt_length} and "
            f"data.max_length = {max_length} (in tokens). Raise the limits, or use data.long_rows: cut."
        )
    return dataset, report


def _checked_end(tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int, long_rows: str) -> int:
    """The id that ends every response, once limits and tokenizer are known to fit together."""
    if long_rows not in ("drop", "cut"):
        raise UserError(f"data.long_rows: got {long_rows!r}, expected 'drop' or 'cut'")
    if not 0 < max_prompt_length < max_length:
        raise UserError(
            f"data.max_prompt_length: got {max_prompt_length}, expected at least 1 and less than "
            f"data.max_length ({max_length}), or no response fits"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token (eos_token): the student could never learn to stop"
        )
    return int(tokenizer.eos_token_id)


def _blocks(rows: Sequence[Row], progress: str | None, size: int = 1000) -> Iterator[list[Row]]:
    """Yield the rows in blocks (tokenizers work on a block in parallel), moving a progress bar along."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=progress is None or len(rows) <= 2 * size
    ) as bar:
        task = bar.add_task(progress or "", total=len(rows))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])
            bar.advance(task, size)
