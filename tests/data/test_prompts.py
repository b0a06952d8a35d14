"""Prompt templates: exact texts, special tokens never twice, and no prompt without its response marker."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.data.chat_templates import TEMPLATES, encode_prompt, encode_prompts, get_template, leading_special_ids
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WITH_INPUT = Row("a", "Add the numbers.", "2 and 3", ("5",))
NO_INPUT = Row("b", "Name a colour.", "", ("Red.",))
TWO_TURNS = Row(
    "c",
    "And a fish?",
    "",
    ("Trout.",),
    (
        {"role": "user", "content": "Name a bird."},
        {"role": "assistant", "content": "Owl."},
        {"role": "user", "content": "And a fish?"},
    ),
)
MARKERS = {"alpaca": "\n\n### Response:\n", "chat": "<|im_start|>assistant\n", "plain": "\n\n"}


def test_alpaca_text():
    assert get_template("alpaca").render(WITH_INPUT, TOKENIZER) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert get_template("alpaca").render(NO_INPUT, TOKENIZER) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_plain_and_chat_text():
    assert get_template("plain").render(WITH_INPUT, TOKENIZER) == "Add the numbers.\n\n2 and 3\n\n"
    assert get_template("plain").render(NO_INPUT, TOKENIZER) == "Name a colour.\n\n"
    assert get_template("chat").render(WITH_INPUT, TOKENIZER) == (
        "<|im_start|>user\nAdd the numbers.\n\n2 and 3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert get_template("chat").render(TWO_TURNS, TOKENIZER) == (
        "<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\nOwl.<|im_end|>\n"
        "<|im_start|>user\nAnd a fish?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_ids_are_those_of_the_tokenizer():
    expected = TOKENIZER.apply_chat_template(
        list(TWO_TURNS.messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(TWO_TURNS, TOKENIZER, get_template("chat"), 500).ids == expected


def test_unknown_template_names_the_nearest():
    with pytest.raises(
        UserError, match=r"got 'alpca', expected one of auto, alpaca, chat, plain\. Did you mean 'alpaca'\?"
    ):
        get_template("alpca")


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_text_templates_refuse_a_longer_conversation(name):
    with pytest.raises(UserError, match=rf"row 'c': the template '{name}' holds one user message.*user, assistant"):
        encode_prompt(TWO_TURNS, TOKENIZER, get_template(name), 500)
    single = Row("d", "Hi", "", ("Hello.",), ({"role": "user", "content": "Hi"},))
    assert encode_prompt(single, TOKENIZER, get_template(name), 500) is not None


def test_chat_without_a_chat_template():
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        encode_prompt(NO_INPUT, tiny_tokenizer(chat=False), get_template("chat"), 500)


def test_chat_template_that_refuses_a_conversation():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"row 'b': the tokenizer's chat template refuses.*roles must alternate"):
        encode_prompt(NO_INPUT, tokenizer, get_template("chat"), 500)


def test_bos_once_where_the_tokenizer_adds_it_and_never_in_chat():
    with_bos = tiny_tokenizer(bos=True)
    bos = with_bos.bos_token_id
    assert leading_special_ids(TOKENIZER) == []
    assert leading_special_ids(with_bos) == [bos]
    alpaca = encode_prompt(NO_INPUT, with_bos, get_template("alpaca"), 500).ids
    assert alpaca == [bos, *encode_prompt(NO_INPUT, TOKENIZER, get_template("alpaca"), 500).ids]
    with_bos.chat_template = "{{ bos_token }}" + TOKENIZER.chat_template
    chat = encode_prompt(NO_INPUT, with_bos, get_template("chat"), 500).ids
    assert chat[0] == bos and chat.count(bos) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_input_is_cut_as_little_as_needed(name):
    row = Row("long", "Repeat the text.", "the boat sails over the lake " * 30, ("Done.",))
    template = get_template(name)
    whole = encode_prompt(row, TOKENIZER, template, 10_000)
    assert not whole.cut
    limit = len(whole.ids) - 40
    prompt = encode_prompt(row, TOKENIZER, template, limit)
    assert prompt.cut and limit - 3 <= len(prompt.ids) <= limit
    text = TOKENIZER.decode(prompt.ids)
    assert "Repeat the text." in text and text.endswith(MARKERS[name])
    assert encode_prompt(row, TOKENIZER, template, len(whole.ids)) == whole


def test_slow_tokenizers_are_cut_by_characters(monkeypatch):
    row = Row("long", "Repeat.", "ab cd " * 50, ("Done.",))
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    prompt = encode_prompt(row, tokenizer, get_template("plain"), 60)
    assert prompt.cut and 57 <= len(prompt.ids) <= 60


def test_what_cannot_fit_is_none():
    row = Row("long", "word " * 200, "some input", ("Done.",))
    conversation = Row("talk", "x", "", ("y",), ({"role": "user", "content": "word " * 200},))
    assert encode_prompts([row, conversation], TOKENIZER, get_template("chat"), 50) == [None, None]
    assert encode_prompts([], TOKENIZER, get_template("chat"), 50) == []


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(TEMPLATES)),
    instruction=TEXT.filter(str.strip),
    text_input=TEXT,
    limit=st.integers(1, 200),
    bos=st.booleans(),
)
def test_no_prompt_loses_its_marker(name, instruction, text_input, limit, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    row = Row("x", instruction, text_input, ("r",))
    template = get_template(name)
    prompt = encode_prompt(row, tokenizer, template, limit)
    if prompt is None:
        empty = Row("x", instruction, "", ("r",))
        assert encode_prompt(empty, tokenizer, template, limit) is None
        return
    assert len(prompt.ids) <= limit
    text = tokenizer.decode(prompt.ids)
    assert text.endswith(MARKERS[name])
    assert instruction in text


def test_a_bos_that_the_text_brings_is_not_doubled():
    """Text that was rendered elsewhere begins with it already."""
    tokenizer, template = tiny_tokenizer(bos=True), get_template("plain")
    bos, word = tokenizer.bos_token, dataclasses.replace(template, wraps_prompts=False)
    limits = {"max_length": 40, "max_prompt_length": 20}
    for mark in ("", bos):
        text = Row("t", "", "", (f"{mark}Once upon",), kind="text")
        prompt = Row("p", f"{mark}Hi", "", (" you",), kind="prompt")
        encoded, _ = encode_rows([text, prompt], tokenizer, word, **limits)
        asked = encode_prompt(prompt, tokenizer, word, 20).ids
        rows = [encoded[number]["input_ids"] for number in (0, 1)]
        assert [row.count(tokenizer.bos_token_id) for row in rows] == [1, 1] and asked.count(
            tokenizer.bos_token_id
        ) == 1
        assert rows[0][0] == rows[1][0] == asked[0] == tokenizer.bos_token_id and rows[1][: len(asked)] == asked
        assert encoded[0]["labels"] == [IGNORE_INDEX, *rows[0][1:]]
    long = Row("l", f"{bos}Sum it up.", "word " * 40, ("x",))
    assert encode_prompt(long, tokenizer, template, 20).ids.count(tokenizer.bos_token_id) == 1
