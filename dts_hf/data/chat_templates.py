"""Prompt templates, and the tokens of a prompt cut to a limit without losing the marker that starts the response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dts_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dts_hf.data.rows import Message, Row


#: The name that stands for the tokenizer's chat template, or Alpaca where it has none.
AUTO = "auto"
_ALPACA_OPENING = "Below is an instruction that describes a task"
_ALPACA_CONTEXT = ", paired with an input that provides further context"
_ALPACA_REQUEST = ". Write a response that appropriately completes the request.\n\n"


@dataclass(frozen=True)
class Template:
    """How a row becomes the text that the model continues with its response.

    Attributes:
        name: the word in ``data.prompt_template``.
        description: one line for ``dts-hf list templates``.
        render: ``render(row, tokenizer) -> str``, the whole prompt up to and with the marker that starts the response.
        writes_special_tokens: the text itself carries the special tokens (chat), so none are put before it.
        wraps_prompts: rows of kind ``prompt`` are worded by the template, too; otherwise they go in as they are.
    """

    name: str
    description: str
    render: Callable[[Row, PreTrainedTokenizerBase], str]
    writes_special_tokens: bool
    wraps_prompts: bool = True


def _single_turn(row: Row, template: str) -> None:
    """Refuse a conversation that a text template would silently shorten."""
    if row.messages is not None and [message["role"] for message in row.messages] != ["user"]:
        roles = ", ".join(message["role"] for message in row.messages)
        raise UserError(
            f"row '{row.id}': the template '{template}' holds one user message, but this prompt has the messages "
            f"{roles}. Use data.prompt_template: chat, or rows with one user message."
        )


def _render_alpaca(row: Row, _tokenizer: PreTrainedTokenizerBase) -> str:
    _single_turn(row, "alpaca")
    context, block = (_ALPACA_CONTEXT, f"### Input:\n{row.input}\n\n") if row.input else ("", "")
    return f"{_ALPACA_OPENING}{context}{_ALPACA_REQUEST}### Instruction:\n{row.instruction}\n\n{block}### Response:\n"


def _render_plain(row: Row, _tokenizer: PreTrainedTokenizerBase) -> str:
    _single_turn(row, "plain")
    return "".join(f"{text}\n\n" for text in (row.instruction, row.input) if text)


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "data.prompt_template: got 'chat', but this tokenizer has no chat template. "
            "Expected 'alpaca' or 'plain', or the tokenizer of an instruction-tuned model."
        )
    try:
        return str(tokenizer.apply_chat_template(chat_messages(row), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(f"row '{row.id}': the tokenizer's chat template refuses this conversation: {error}") from error


def chat_messages(row: Row) -> list[Message]:
    """The prompt of ``row`` as messages: its own, or instruction and input as one of the user's."""
    return [*row.prompt_messages]


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("alpaca", "the Alpaca text: instruction, input and response under headings", _render_alpaca, False),
        Template("chat", "the tokenizer's own chat template, for instruction-tuned models", _render_chat, True),
        Template("plain", "the instruction, an empty line, the input, an empty line", _render_plain, False),
    )
}


def get_template(name: str, key: str = "data.prompt_template") -> Template:
    """Return the template called ``name``.

    Raises:
        UserError: no template has this name; the message lists them, names the nearest and begins with ``key``.
    """
    if name not in TEMPLATES:
        expected = ", ".join(TEMPLATES)
        raise UserError(f"{key}: got {name!r}, expected one of {expected}.{nearest(str(name), TEMPLATES)}")
    return TEMPLATES[name]


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, key: str = "data.prompt_template") -> Template:
    """Return the template called ``name``; ``auto``: ``chat`` where the tokenizer has a chat template, else ``alpaca``.

    A template that was named wraps finished prompts (rows of kind ``prompt``), too; under ``auto`` they stay as they are.

    Raises:
        UserError: no template has this name; the message begins with ``key``.
    """
    if name != AUTO:
        return get_template(name, key)
    found = TEMPLATES["chat" if tokenizer.chat_template else "alpaca"]
    return dataclasses.replace(found, wraps_prompts=False)


#: What the assistant says in the conversation that shows how a chat template ends a turn.
_PROBE = "probe answer"


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """The token that the chat template writes behind an answer, as text (``<|im_end|>``, ``<|eot_id|>``, ``</s>``).

    Returns:
        None where it writes no token of its own there, or where no chat template is used: ``eos_token`` ends an answer.
    """
    if not template.writes_special_tokens or not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:
        return None
    _, found, behind = text.rpartition(_PROBE)
    behind = behind.lstrip()
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    ends = [token for token in known if token.strip() and behind.startswith(token)]
    return max(ends, key=len, default=None) if found else None


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The ids of the tokens that end an answer: the chat template's own end of turn, else ``eos_token``.

    Generation stops at them, and they are the last target of every answer.
    """
    end = end_of_turn(tokenizer, template)
    token = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
    return [] if token is None else [int(token)]  # type: ignore[arg-type]


class EncodedPrompt(NamedTuple):
    """The tokens of one prompt; ``cut`` says that the row's input was shortened to make it fit."""

    ids: list[int]
    cut: bool


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer by itself puts before a text: its BOS token, or nothing (GPT-2, SmolLM2)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return list(full[:start])


def encode_prompts(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_length: int
) -> list[EncodedPrompt | None]:
    """Encode the prompts of ``rows``, each cut to at most ``max_prompt_length`` tokens.

    Only the row's *input* is shortened, from its end and between two tokens. The instruction and the marker that
    starts the response are never touched: a prompt without that marker asks for something else.

    Args:
        rows: the rows; their responses are not looked at.
        tokenizer: the tokenizer of the model that reads the prompts.
        template: from ``get_template``.
        max_prompt_length: the limit in tokens, special tokens included.

    Returns:
        One entry a row, in order; ``None`` where the prompt is too long even with an empty input.

    Raises:
        UserError: the template cannot hold a row (see ``Template``).
    """
    if not rows:
        return []
    prefix = [] if template.writes_special_tokens else leading_special_ids(tokenizer)

    def encode(shortened: list[Row]) -> list[list[int]]:
        texts = [template.render(row, tokenizer) for row in shortened]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [prefix + ids for ids in encoded["input_ids"]]

    def cut(row: Row, length: int) -> EncodedPrompt | None:
        ends = _token_ends(row.input, tokenizer)
        last, excess = len(ends) - 1, length - max_prompt_length
        while last > 0:
            # Taking k tokens off the input nearly always takes k off the prompt: one or two rounds.
            last = max(last - excess, 0)
            ids = encode([dataclasses.replace(row, input=row.input[: ends[last]].rstrip())])[0]
            excess = len(ids) - max_prompt_length
            if excess <= 0:
                return EncodedPrompt(ids, True)
        return None

    return [
        EncodedPrompt(ids, False) if len(ids) <= max_prompt_length else cut(row, len(ids))
        for row, ids in zip(rows, encode(rows), strict=True)
    ]


def encode_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_length: int
) -> EncodedPrompt | None:
    """Encode one prompt; see ``encode_prompts``.

    Args:
        row: the row; its responses are not looked at.
        tokenizer: the tokenizer of the model that reads the prompt.
        template: from ``get_template``.
        max_prompt_length: the limit in tokens, special tokens included.
    """
    return encode_prompts([row], tokenizer, template, max_prompt_length)[0]


def _token_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the places where ``text`` may be cut: 0 and the end of each token (of each character without offsets)."""
    if not tokenizer.is_fast:
        return list(range(len(text) + 1))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return sorted([0, *(end for _, end in offsets)])
