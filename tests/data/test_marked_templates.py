"""What a chat template does wrong: markers in the wrong place, and parts of a row that it does not write."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dts_hf.data.chat_templates import encode_prompt, resolve_template
from dts_hf.data.encoding import EncodingReport, encode_rows
from dts_hf.data.rows import Row
from dts_hf.data.targets import all_turns_are_sound
from dts_hf.errors import UserError
from tests.support.chats import chat, chat_tokenizer, encoded_rows
from tests.support.tiny import tiny_llama
from tests.support.trainers import trainer_for

THREE = chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2"), ("u", "Q3"), ("a", "A3"))
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
}
START, STOP = "{% generation %}", "{% endgeneration %}"
OTHERS = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
#: How each template writes a message of the assistant, and what asks for one.
SAID = "{{ '<|im_start|>assistant\n' }}" + START + "{{ message.content + '<|im_end|>' }}" + STOP + "{{ '\n' }}"
ASKS = "{{ '<|im_start|>assistant\n' }}"


def tokenizer_with(said: str = SAID, others: str = OTHERS, asks: str = ASKS):
    tokenizer = chat_tokenizer("marked")
    tokenizer.chat_template = (
        f"{{% for message in messages %}}{{% if message.role == 'assistant' %}}{said}{{% else %}}{others}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )
    return tokenizer


def learned(tokenizer, *rows: Row, **options) -> list[list[str]]:
    """What is learned of each row, checked to begin with what generation sees where it is the last turn alone."""
    template = resolve_template("auto", tokenizer)
    dataset, _ = encode_rows(rows, tokenizer, template, max_length=2000, max_prompt_length=1900, **options)
    for index, row in enumerate(rows):
        start = dataset.spans(index)[-1][0]
        assert dataset[index]["input_ids"][:start] == encode_prompt(row, tokenizer, template, 1900).ids
    return [
        [tokenizer.decode(dataset[index]["input_ids"][start:stop]) for start, stop in dataset.spans(index)]
        for index in range(len(rows))
    ]


def test_a_marked_turn_begins_where_generation_does():
    off = ASKS + "{% if not enable_thinking | default(true) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    row = chat(("u", "Q1"), ("a", "A1"), chat_template_kwargs={"enable_thinking": False})
    assert learned(tokenizer_with(asks=off), row) == [["A1<|im_end|>"]]
    thinks = tokenizer_with(asks=ASKS + "{{ '<think>\n' }}")
    assert learned(thinks, THREE, train_on="last_turn") == [["A3<|im_end|>"]]
    with pytest.raises(UserError, match=r"message 2 was .*think.*Expected data\.train_on: last_turn"):
        learned(thinks, THREE)
    assert learned(tokenizer_with(), THREE) == [["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"]]


def test_a_mask_does_not_depend_on_the_rows_before_it():
    header = START + "{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}" + STOP
    asks = "{% if messages[-1].role != 'tool' %}" + ASKS + "{% endif %}"
    tokenizer = tokenizer_with(header, asks=asks)
    with_tool = chat(("u", "Q1"), ("a", "weather()"), ("t", "sunny"), ("a", "A1"))
    plain = dataclasses.replace(chat(("u", "Q1"), ("a", "A1")), id="plain")
    expected = [["weather()<|im_end|>", "<|im_start|>assistant\nA1<|im_end|>"], ["A1<|im_end|>"]]
    assert learned(tokenizer, with_tool, plain) == expected
    assert learned(tokenizer, plain, with_tool) == expected[::-1]


@pytest.mark.parametrize(
    ("others", "role"),
    [(START + OTHERS + STOP, "system"),
     (f"{{% if message.role == 'user' %}}{START}{OTHERS}{STOP}{{% else %}}{OTHERS}{{% endif %}}", "user"),
     (f"{{% if message.role == 'tool' %}}{START}{OTHERS}{STOP}{{% else %}}{OTHERS}{{% endif %}}", "tool")],
)  # fmt: skip
def test_markers_round_what_others_say_are_refused(others, role):
    with pytest.raises(UserError, match=f"row 'r': .*markers enclose what the {role} says"):
        learned(tokenizer_with(others=others), THREE)
    # The words of a question may stand in an answer
    assert learned(tokenizer_with(), chat(("u", "weather in Paris"), ("a", "search: weather in Paris")))


def test_markers_on_the_last_turn_alone_are_refused_for_all_turns():
    said = "{% if loop.last %}" + SAID + "{% else %}" + OTHERS + "{% endif %}"
    tokenizer = tokenizer_with(said)
    with pytest.raises(UserError, match=r"marks nothing of message 2 .*Expected data\.train_on: last_turn"):
        learned(tokenizer, THREE)
    assert learned(tokenizer, THREE, train_on="last_turn") == [["A3<|im_end|>"]]
    assert not all_turns_are_sound([THREE], tokenizer, resolve_template("auto", tokenizer))
    assert all_turns_are_sound([THREE], tokenizer_with(), resolve_template("auto", tokenizer))


def report_for(family: str, row: Row, **options) -> EncodingReport:
    report = encoded_rows(family, row, **options).report
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("row", "what"),
    [(chat(("u", "Q1"), {**CALL, "content": "I look."}), "a tool call"),
     (chat(("u", "Q1"), ("a", "A1"), tools=(WEATHER,)), "the tools"),
     (chat(("u", "Q1"), {"role": "assistant", "content": "A1", "reasoning_content": "hm"}), "the reasoning")],
)  # fmt: skip
def test_what_a_template_does_not_write_is_said(row, what):
    report = report_for("llama3", row)
    assert report.ignored == 1 and not report.is_whole
    assert f"the chat template leaves something out of 1 (such as {what} of row 'r')" in report.summary()
    written = report_for("qwen3", row)
    assert written.ignored == 0 and written.is_whole


def test_tools_that_say_json_are_written():
    # As Llama 3.1 writes what a tool says
    others = "{% if message.role == 'tool' %}{{ message.content | tojson }}{% else %}" + OTHERS + "{% endif %}"
    tokenizer = tokenizer_with(others=others)
    row = chat(("u", "Q1"), ("a", "look"), ("t", 'two "lines"\nof é'), ("a", "A1"))
    _, report = encode_rows(
        [row], tokenizer, resolve_template("auto", tokenizer), max_length=900, max_prompt_length=800
    )
    assert report.ignored == 0


@pytest.mark.parametrize("family", ["llama3", "zephyr", "marked"])
def test_a_tool_call_that_a_template_leaves_out_is_refused(family):
    with pytest.raises(UserError, match=r"row 'r': the chat template writes nothing of message 2.*knows tool calls"):
        encoded_rows(family, chat(("u", "Q1"), CALL, ("t", "sunny"), ("a", "A1"), tools=(WEATHER,)))
    assert report_for("mistral", chat(("u", "Q1"), CALL, tools=(WEATHER,))).is_whole


@pytest.mark.parametrize("streamed", [False, True])
def test_the_trainer_warns_of_what_the_template_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    given: Any = (lambda rows: Dataset.from_list(rows).to_iterable_dataset()) if streamed else list
    tokenizer = chat_tokenizer("llama3")
    rows = [
        {"messages": [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}], "tools": [WEATHER]}
    ] * 4
    models = [tiny_llama(vocab=len(tokenizer), seed=seed) for seed in (0, 1)]
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(
            tmp_path, model=models[0], teacher=models[1], rows=given(rows), processing_class=tokenizer
        )
        if streamed:
            trainer.train()
    example = "" if streamed else " (such as the tools of row 'train_dataset-1')"
    assert f"the chat template leaves something out of 4{example};" in caplog.text
