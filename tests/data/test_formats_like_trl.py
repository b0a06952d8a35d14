"""Rows read as TRL reads them: its own functions, on the same rows. Skipped where TRL is not installed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dts_hf.data.formats import parse_row
from dts_hf.data.rows import Row
from tests.support.tiny import tiny_tokenizer

data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")

# ChatML with tools, calls and thoughts, as Qwen writes them
TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if no_think %}<think></think>{% endif %}{% endif %}"""
USER, ASSISTANT = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = [
    SYSTEM,
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "dry"},
    {**ASSISTANT, "reasoning_content": "It is dry."},
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "several turns": {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
    "tools": {"messages": CALLING, "tools": [TOOL]},
    "the last message is a call": {"messages": CALLING[:3], "tools": [TOOL]},
    "empty tools": {"messages": [USER, ASSISTANT], "tools": []},
    "arguments of the template": {
        "prompt": [USER],
        "completion": [ASSISTANT],
        "chat_template_kwargs": {"no_think": True},
    },
    "prompt and completion": {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
    "several messages as completion": {"prompt": [SYSTEM, USER], "completion": CALLING[2:], "tools": [TOOL]},
    "prompt of several turns": {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(row: Row, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> str:
    """What the template makes of the first ``count`` messages, or of all of them."""
    messages = [*row.conversation][:count]
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=None if row.tools is None else [*row.tools],
            tokenize=False,
            add_generation_prompt=count is not None,
            **(row.chat_template_kwargs or {}),
        )
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_become_the_same_text(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    obj = CONVERSATIONS[name]
    row = parse_row(obj, "here", "d")
    theirs = data_utils.maybe_apply_chat_template(copy.deepcopy(obj), tokenizer, tools=obj.get("tools"))
    if "messages" in obj:
        assert text_of(row, tokenizer) == theirs["text"] and row.given is None
    else:
        assert row.given == len(obj["prompt"])
        assert text_of(row, tokenizer) == theirs["prompt"] + theirs["completion"]
        assert text_of(row, tokenizer, row.given).startswith(theirs["prompt"])


def test_plain_rows_are_the_same_text() -> None:
    plain = {"prompt": "The sky is", "completion": " blue."}
    row = parse_row(plain, "here", "d")
    assert not data_utils.is_conversational(plain) and row.kind == "prompt"
    assert {"prompt": row.instruction, "completion": row.response} == plain
    assert parse_row({"text": "Once."}, "here", "d").response == "Once."


@pytest.mark.parametrize("name", ["user", "human"])
def test_sharegpt_becomes_the_same_messages(name: str) -> None:
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": name, "value": "Hi"},
        {"from": "assistant", "value": "Hello."},
    ]
    theirs = data_utils.maybe_convert_to_chatml({"conversations": copy.deepcopy(talk)})["messages"]
    ours = [*parse_row({"conversations": talk}, "here", "d").conversation]
    # TRL keeps the name of the speaker, which few templates know
    assert [message["content"] for message in ours] == [message["content"] for message in theirs]
    assert (ours == theirs) == (name == "user") and ours[1]["role"] == "user"


def test_tools_as_json_are_the_same_tools() -> None:
    obj = {"messages": CALLING, "tools": json.dumps([TOOL])}
    assert parse_row(obj, "here", "d").tools == (TOOL,)


def test_a_chosen_response_of_a_preference_set() -> None:
    import datasets

    pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    unpaired = data_utils.unpair_preference_dataset(datasets.Dataset.from_list([pair]))
    good = parse_row({**unpaired[0], "label": None}, "here", "d")
    assert parse_row(pair, "here", "d", {"completion": "chosen"}) == good
