"""Rows to be answered, of every form; and responses that were cut, which teach no end of turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dts_hf.data.asked import asked_row, with_answer
from dts_hf.data.chat_templates import get_template, resolve_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.formats import parse_row
from dts_hf.data.mapped_rows import row_line
from dts_hf.data.rows import Row
from dts_hf.data.sources import rows_from_dataset
from dts_hf.errors import UserError
from tests.support.tiny import tiny_tokenizer

USER, SYSTEM = {"role": "user", "content": "Name a fruit"}, {"role": "system", "content": "Be brief."}
OLD = {"role": "assistant", "content": "a fig"}
SHAREGPT = [{"from": "human", "value": "Name a fruit"}, {"from": "gpt", "value": "a fig"}]
TOOL = {"type": "function", "function": {"name": "count", "description": "counts", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {}}}],
}
FORMS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Name a fruit", "input": "of the south", "output": "a fig"},
    "references": {"instruction": "Name a fruit", "output": ["a fig", "a date"]},
    "history": {
        "query": "And one more",
        "response": "a fig",
        "history": [["Name a fruit", "a pear"]],
        "system": "Be brief.",
    },
    "question": {"question": "Name a fruit", "answer": "a fig", "tools": [TOOL]},
    "finished": {"prompt": "A fruit is", "completion": " a fig"},
    "lists": {"prompt": [SYSTEM, USER], "completion": [OLD]},
    "messages": {"messages": [SYSTEM, USER, OLD]},
    "calls": {"messages": [USER, CALL, {"role": "tool", "content": "3"}, OLD], "tools": [TOOL]},
    "sharegpt": {"conversations": SHAREGPT, "system": "Be brief."},
    "thoughts": {"question": "Name a fruit", "answer": "a fig", "reasoning": "figs are sweet"},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_takes_the_place_of_the_response_and_nothing_else(form: str) -> None:
    obj = {**FORMS[form], "topic": {"deep": [1, None]}, "stars": 4.5}
    before = json.dumps(obj)
    row, has_response = asked_row(obj, "rows", "r1")
    written = json.loads(json.dumps(with_answer(obj, row, "a plum", cut=False)))
    again = parse_row(written, "written", "other")
    assert has_response and json.dumps(obj) == before
    assert (again.response, again.id, again.cut) == ("a plum", "r1", False) and again.answer is None
    same = (
        ("kind", "prompt_messages", "instruction", "input", "given", "tools")
        if form != "thoughts"
        else ("prompt_messages",)
    )
    assert all(getattr(again, name) == getattr(row, name) for name in same)
    assert set(obj) <= set(written) and (written["topic"], written["stars"]) == (obj["topic"], 4.5)
    original = json.dumps(written["original_response"])
    assert "a fig" in original and ("figs are sweet" in written.get("original_reasoning", "")) == (form == "thoughts")


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_its_response_asks_the_same(form: str) -> None:
    obj = {
        key: value for key, value in FORMS[form].items() if key not in ("output", "response", "answer", "reasoning")
    }
    if "completion" in obj:
        obj["completion"] = None
    for name in ("messages", "conversations"):
        if name in obj:
            obj[name] = obj[name][:-1]
    row, has_response = asked_row(obj, "rows", "r1")
    full, _ = asked_row({**FORMS[form], "reasoning": None}, "rows", "r1")
    assert not has_response
    same = ("kind", "prompt_messages", "instruction", "input", "tools")
    assert all(getattr(row, name) == getattr(full, name) for name in same)
    written = with_answer(obj, row, "a plum", cut=True, number=2)
    again = parse_row(written, "written", "other")
    assert (again.response, again.id, again.cut) == ("a plum", "r1#2", True) and written["source_id"] == "r1"
    assert again.prompt_messages == full.prompt_messages and "original_response" not in written


def test_columns_of_an_earlier_call_stay() -> None:
    first = with_answer(FORMS["alpaca"], *asked_row(FORMS["alpaca"], "rows", "r1")[:1], "a plum", cut=True, number=1)
    row, _ = asked_row(first, "rows", "r9")
    second = with_answer(first, row, "a quince", cut=False, number=3)
    assert (second["original_response"], second["source_id"], second["id"]) == ("a fig", "r1#1", "r1#1#3")
    assert second["finish_reason"] == "stop"


def test_a_text_asks_nothing_and_a_wrong_row_is_named() -> None:
    with pytest.raises(UserError, match="row 'r1' is a text"):
        asked_row({"text": "Once"}, "rows.jsonl: line 1", "r1")
    with pytest.raises(UserError, match=r"rows\.jsonl: line 2"):
        asked_row({"prompt": 3}, "rows.jsonl: line 2", "r2")


# -------------------------------------------------------------------------------------------- responses that were cut


def learned(row: Row, template: str, **tokenizer: Any) -> str:
    """The text of the tokens that are learned."""
    words = tiny_tokenizer(**tokenizer)
    found = get_template(template) if template != "auto" else resolve_template("auto", words)
    encoded, _ = encode_rows([row], words, found, max_length=200, max_prompt_length=150)
    example = encoded[0]
    return str(words.decode([token for token in example["labels"] if token != -100]))


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain", "auto"])
@pytest.mark.parametrize("form", ["alpaca", "finished", "messages"])
def test_a_response_that_was_cut_teaches_no_end_of_turn(template: str, form: str) -> None:
    if form == "messages" and template in ("alpaca", "plain"):
        pytest.skip("a conversation needs a chat template")
    whole, cut, stopped = (
        parse_row({**FORMS[form], **more}, "rows", "r1")
        for more in ({}, {"finish_reason": "length"}, {"finish_reason": "stop"})
    )
    assert (whole.cut, cut.cut, stopped.cut) == (False, True, False)
    assert learned(whole, template) == learned(stopped, template) == learned(cut, template) + "<|im_end|>"
    assert learned(cut, template).strip() == "a fig"


def test_the_column_can_be_left_out_and_counts_in_what_rows_are_known_by() -> None:
    obj = {**FORMS["alpaca"], "finish_reason": "length"}
    (left_out,) = rows_from_dataset([obj], columns={"finish_reason": None})
    (cut,) = rows_from_dataset([obj])
    assert not left_out.cut and cut.cut and row_line(cut) != row_line(left_out)
