"""A text template (Alpaca, plain) as a chat template, for what knows only those: pipelines, servers, other people's code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dts_hf.data.chat_templates import Template, encode_prompt, leading_special_ids, written_mark
from dts_hf.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands for the user's message while the template is taken apart.
_SLOT = "\u2063the question\u2063"
#: Questions whose tokens are compared: letters, spaces and line breaks at both ends, other alphabets, marks of Jinja.
PROBES = (
    "Name a fish.",
    " two\n\nlines \n",
    "Wie heißt das? 何ですか",
    "{{ braces }} {% and %} <tags> \"quotes\" \\n 'more'",
)
_REFUSAL = "this model was trained on single questions: give one user message, as text, and no system message"


def as_chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A Jinja chat template that makes the very tokens of ``template``.

    It holds one question of the user and, behind it, its answer; other conversations are refused, because the student has
    never seen one. It begins with a mark by which ``auto`` knows the template that it stands for.

    Args:
        template: of text; a chat template needs none.
        tokenizer: of the student.

    Returns:
        None where the tokenizer has a chat template already, or where the tokens would differ.
    """
    if template.is_chat or tokenizer.chat_template:
        return None
    before, found, after = template.render(_row(_SLOT), tokenizer).partition(_SLOT)
    assert found, template.name
    start = str(tokenizer.decode(leading_special_ids(tokenizer)))
    written = (
        written_mark(template.name)
        + "{% if messages | length > 2 or messages[0]['role'] != 'user' or messages[0]['content'] is not string "
        + "or (messages | length == 2 and messages[1]['role'] != 'assistant') %}"
        + "{{ raise_exception(" + json.dumps(_REFUSAL) + ") }}{% endif %}"
        + "{{ " + json.dumps(start + before) + " + messages[0]['content'] + " + json.dumps(after) + " }}"
        + "{% if messages | length == 2 %}{{ messages[1]['content'] + eos_token }}{% endif %}"
    )  # fmt: skip
    return written if all(_same_tokens(probe, written, template, tokenizer) for probe in PROBES) else None


def _row(question: str) -> Row:
    return Row("probe", question, "", ("",))


def _same_tokens(question: str, written: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    ours = encode_prompt(_row(question), tokenizer, template, 10**6)
    # As a pipeline calls it: the text first, and then its tokens without a further special token
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], chat_template=written, tokenize=False, add_generation_prompt=True
    )
    return ours is not None and ours.ids == tokenizer(str(text), add_special_tokens=False)["input_ids"]
