"""Prompt templates, and the tokens of a prompt cut to a limit without losing the marker that starts the response."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dts_hf.data.template_limits import check_limits
from dts_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dts_hf.data.rows import Message, Row


#: The name that stands for the tokenizer's chat template, or Alpaca where it has none.
AUTO = "auto"
_ALPACA_OPENING = "Below is an instruction that describes a task"
_ALPACA_CONTEXT = ", paired with an input that provides further context"
_ALPACA_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def is_dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template can write the day, as those of Llama 3.2 do: tomorrow's tokens are others then."""
    return "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None), default=str)


@dataclass(frozen=True)
class Template:
    """How a row becomes the text that the model continues with its response.

    Attributes:
        name: the word in ``data.prompt_template``.
        description: one line for ``dts-hf list templates``.
        word: ``word(row, tokenizer) -> str``, the whole prompt up to and with the marker that starts the response.
        is_chat: it is the tokenizer's chat template. Its text carries the special tokens, so none are put before it, and
            what ends a response is its own end of turn.
        wraps_prompts: rows of kind ``prompt`` are worded, too; otherwise they go in as they are.
    """

    name: str
    description: str
    word: Callable[[Row, PreTrainedTokenizerBase], str]
    is_chat: bool
    wraps_prompts: bool = True

    def words(self, row: Row) -> bool:
        """Whether the row is put into the template, and not taken as the finished text that it is."""
        return row.kind != "text" and (row.kind != "prompt" or self.wraps_prompts)

    def render(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt of ``row``; of a text there is none.

        Raises:
            UserError: the template cannot hold the row.
        """
        return self.word(row, tokenizer) if self.words(row) else row.instruction

    def writes_special_tokens(self, row: Row) -> bool:
        """Whether the text of ``row`` begins with its special tokens itself, so that none are put before it."""
        return self.is_chat and self.words(row)


def _single_turn(row: Row, template: str) -> None:
    """Refuse a conversation that a text template would silently shorten."""
    advice = "Use data.prompt_template: chat, or rows with one user message."
    if row.messages is not None and [message["role"] for message in row.messages] != ["user"]:
        roles = ", ".join(message["role"] for message in row.messages)
        raise UserError(
            f"row '{row.id}': the template '{template}' holds one user message, but this prompt has the messages "
            f"{roles}. {advice}"
        )
    lost = [key for key in row.answer or () if key not in ("role", "content")] + ["tools"] * bool(row.tools)
    if lost:
        raise UserError(f"row '{row.id}': the template '{template}' has no place for {', '.join(lost)}. {advice}")


def _render_alpaca(row: Row, _tokenizer: PreTrainedTokenizerBase) -> str:
    _single_turn(row, "alpaca")
    context, block = (_ALPACA_CONTEXT, f"### Input:\n{row.input}\n\n") if row.input else ("", "")
    return f"{_ALPACA_OPENING}{context}{_ALPACA_REQUEST}### Instruction:\n{row.instruction}\n\n{block}### Response:\n"


def _render_plain(row: Row, _tokenizer: PreTrainedTokenizerBase) -> str:
    _single_turn(row, "plain")
    return "".join(f"{text}\n\n" for text in (row.instruction, row.input) if text)


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    return render_messages(row, row.prompt_messages, tokenizer, for_answer=True)


def render_messages(
    row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, for_answer: bool = False
) -> str:
    """The tokenizer's chat template on ``messages``, with the tools and the template arguments of ``row``.

    Args:
        row: whose messages they are.
        messages: some of its conversation, from the first one on.
        tokenizer: has the template.
        for_answer: end with what asks for an answer (``add_generation_prompt``).

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    with _explained(row, tokenizer):
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=_tools(row),  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=for_answer,
                **(row.chat_template_kwargs or {}),
            )
        )


def render_with_markers(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation of ``row``, and what the template's ``{% generation %}`` markers enclose, in characters.

    Raises:
        UserError: the template refuses the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with _explained(row, tokenizer):
        tools = _tools(row)
        # As ``apply_chat_template`` calls it, which would give the spans in tokens of the text as a whole
        rendered: Any = render_jinja_template(
            conversations=[[{k: v for k, v in message.items() if v is not None} for message in row.conversation]],
            tools=tools,  # type: ignore[arg-type]
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **(row.chat_template_kwargs or {})},
        )
        (text,), (spans,) = rendered
        return text, spans


def has_markers(row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template for ``row`` marks what the assistant says (``{% generation %}``)."""
    with _explained(row, tokenizer):
        return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=_tools(row))) is not None


def _tools(row: Row) -> list[dict[str, Any]] | None:
    return None if row.tools is None else [dict(tool) for tool in row.tools]


@contextmanager
def _explained(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Whatever a chat template raises, in words: it is foreign code, and may fail in any way."""
    if not tokenizer.chat_template:
        raise UserError(
            "data.prompt_template: got 'chat', but this tokenizer has no chat template. "
            "Expected 'alpaca' or 'plain', or the tokenizer of an instruction-tuned model."
        )
    _check_limits(tokenizer)
    try:
        yield
    except Exception as error:
        raise UserError(f"row '{row.id}': the tokenizer's chat template refuses this conversation: {error}") from error


def _check_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    given: Any = tokenizer.chat_template  # of some tokenizers several, by name
    for source in given.values() if isinstance(given, dict) else [given]:
        if isinstance(source, str):
            check_limits(source)


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
        expected = ", ".join([AUTO, *TEMPLATES])
        raise UserError(f"{key}: got {name!r}, expected one of {expected}.{nearest(str(name), TEMPLATES)}")
    return TEMPLATES[name]


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, key: str = "data.prompt_template") -> Template:
    """Return the template called ``name``; ``auto``: ``chat`` where the tokenizer has a chat template, else ``alpaca``.

    A chat template that we wrote into a student's folder (``written_template``) is the text template it stands for.
    A template that was named wraps finished prompts (rows of kind ``prompt``), too; under ``auto`` they stay as they are.

    Raises:
        UserError: no template has this name; the message begins with ``key``.
    """
    if name != AUTO:
        return get_template(name, key)
    written = _WRITTEN.match(str(tokenizer.chat_template))
    found = TEMPLATES[written[1] if written else "chat" if tokenizer.chat_template else "alpaca"]
    return dataclasses.replace(found, wraps_prompts=False)


def written_mark(name: str) -> str:
    """What a chat template begins with that stands for our text template ``name``: a comment of Jinja."""
    return f"{{# dts_hf: {name} #}}"


_WRITTEN = re.compile(r"\{# dts_hf: (alpaca|plain) #\}")


#: What the assistant says in the conversation that shows how a chat template ends a turn.
_PROBE = "probe answer"


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """The token that the chat template writes behind an answer, as text (``<|im_end|>``, ``<|eot_id|>``, ``</s>``).

    Returns:
        None where it writes no token of its own there, or where no chat template is used: ``eos_token`` ends an answer.

    Raises:
        UserError: see ``check_limits``.
    """
    if not template.is_chat or not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    _check_limits(tokenizer)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:
        return None
    _, found, behind = text.rpartition(_PROBE)
    behind = behind.lstrip()
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    run: list[str] = []
    while ends := [token for token in known if token.strip() and behind.startswith(token)]:
        run.append(max(ends, key=len))
        behind = behind[len(run[-1]) :]
    if not found or not run:
        return None
    # Cohere closes the response, and then the turn
    return str(tokenizer.eos_token) if tokenizer.eos_token in run else run[0]


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


def behind_special_ids(before: list[int], ids: list[int]) -> list[int]:
    """``ids`` with ``before`` in front, unless they begin so: text that was rendered elsewhere may bring its BOS token."""
    return ids if ids[: len(before)] == before else before + ids


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
    limit = max_prompt_length * longest_token(tokenizer)
    given, rows = rows, [with_limited_input(row, limit) for row in rows]
    texts = [template.render(row, tokenizer) for row in rows]
    # A text that cannot fit is not tokenised: 60 MB of one would take 12 GB and minutes
    fits = [row.kind != "text" and len(text) - len(row.input) <= limit for row, text in zip(rows, texts, strict=True)]
    known = [text if fit else "" for text, fit in zip(texts, fits, strict=True)]
    encoded = tokenizer(known, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    before = leading_special_ids(tokenizer)
    prompts: list[EncodedPrompt | None] = []
    for row, whole, fit, ids in zip(rows, given, fits, encoded, strict=True):
        prompt = ids if template.writes_special_tokens(row) else behind_special_ids(before, ids)
        if fit and len(prompt) > max_prompt_length:
            prompts.append(shortened_prompt(row, tokenizer, template, len(prompt), max_prompt_length))
        else:
            prompts.append(EncodedPrompt(prompt, row is not whole) if fit else None)
    return prompts


def with_limited_input(row: Row, limit: int) -> Row:
    """``row``, its input cut to ``limit`` characters where it is longer."""
    return row if len(row.input) <= limit else dataclasses.replace(row, input=row.input[:limit])


def shortened_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: Template, length: int, max_prompt_length: int
) -> EncodedPrompt | None:
    """The prompt of ``row`` with its input cut to fit; see ``encode_prompts``.

    Args:
        row: its prompt is too long.
        tokenizer: of the model that reads it.
        template: from ``resolve_template``.
        length: of the whole prompt, in tokens.
        max_prompt_length: what it may be.

    Returns:
        None where the prompt does not fit with an empty input either.
    """
    before = [] if template.writes_special_tokens(row) else leading_special_ids(tokenizer)
    ends = _token_ends(row.input, tokenizer)
    last, excess = len(ends) - 1, length - max_prompt_length
    while last > 0:
        # Taking k tokens off the input nearly always takes k off the prompt: one or two rounds.
        last = max(last - excess, 0)
        text = template.render(dataclasses.replace(row, input=row.input[: ends[last]].rstrip()), tokenizer)
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        prompt = behind_special_ids(before, ids)
        excess = len(prompt) - max_prompt_length
        if excess <= 0:
            return EncodedPrompt(prompt, True)
    return None


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest entry of the vocabulary: a text of n tokens has at most n times as many."""
    return _longest_of(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=2)  # 0.1 s for 150,000 entries, and a stream is encoded in many small blocks
def _longest_of(tokenizer: PreTrainedTokenizerBase, _size: int) -> int:
    return max(map(len, tokenizer.get_vocab()))


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
