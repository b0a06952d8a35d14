"""What answers are compared with: the references of rows, as a model that says just what was learned would say them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dts_hf.data.chat_templates import Template
from dts_hf.data.rows import Row
from dts_hf.data.targets import TextCutter
from dts_hf.errors import UserError
from dts_hf.evaluation.text_metrics import has_reference
from dts_hf.generation.shares import decode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def references_of(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[tuple[str, ...]]:
    """The references of each row.

    Where the response is more than its content (thoughts, tool calls), the first one is the text that is learned of it,
    decoded as an answer is. Of any other row they are the texts of the data, without an end token spelt out behind them.
    """
    cutter = TextCutter(tokenizer, template, "last_turn")
    return [
        tuple(map(cutter.without_end, row.references)) if row.answer is None else _as_learned(row, cutter)
        for row in rows
    ]


def checked_references(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, set_name: str
) -> list[tuple[str, ...]]:
    """``references_of``, of which at least one must have a text.

    Args:
        rows: at least one.
        tokenizer: of the model that answers.
        template: of the prompts.
        set_name: what errors call the rows.

    Raises:
        UserError: no answer could be compared with anything.
    """
    references = references_of(rows, tokenizer, template)
    if not any(map(has_reference, references)):
        raise UserError(
            f"evaluation on '{set_name}': none of the {len(rows)} rows has a reference to compare answers with (row "
            f"'{rows[0].id}' has {references[0][0]!r}); expected responses with a text, or with tool calls that the chat "
            "template writes"
        )
    return references


def note_on_references(scores: Mapping[str, Any], set_name: str) -> str | None:
    """A line for people where some rows had nothing to compare an answer with; None where all had."""
    count = scores.get("without_reference", 0)
    if not count:
        return None
    return f"{set_name}: {count:,} of {scores['n']:,} rows have no reference text: left out of ROUGE-L and exact match"


def _as_learned(row: Row, cutter: TextCutter) -> tuple[str, ...]:
    try:
        learned = "".join(cutter.cut(row).texts[1:])
    except UserError:  # a template that holds no such turn: it was not trained on, and can still be asked
        return row.references
    end = cutter.end or str(cutter.tokenizer.eos_token)
    tokens = cutter.tokenizer(learned.removesuffix(end), add_special_tokens=False, verbose=False)["input_ids"]
    return (decode_answer(cutter.tokenizer, list(tokens)), *row.references[1:])
