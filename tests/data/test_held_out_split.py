"""The share of the training rows that ``data.validation: SHARE`` holds out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dts_hf.data.formats import parse_row
from dts_hf.data.held_out_split import split_off
from dts_hf.data.mixture import weighted
from dts_hf.data.rows import Row
from dts_hf.errors import UserError


def rows_of(*given: dict[str, Any], name: str = "train") -> list[Row]:
    return [parse_row(row, f"{name}.jsonl", f"{name}-{number}") for number, row in enumerate(given, 1)]


QUESTIONS = rows_of(*({"instruction": f"Question {n}", "output": f"answer {n}"} for n in range(100)))


def test_a_share_of_texts_is_held_out():
    texts = rows_of(*({"text": f"Story {n}."} for n in range(100)), name="texts")
    train, held_out = split_off(texts, 0.05)
    assert (len(train), len(held_out)) == (95, 5) and {row.id for row in train}.isdisjoint(row.id for row in held_out)
    train, held_out = split_off([*texts, *QUESTIONS], 0.3)
    kinds = [row.kind for row in held_out]
    assert len(held_out) == 60 and min(kinds.count("text"), kinds.count("instruction")) > 15


def test_the_choice_depends_on_the_rows_alone():
    again = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    assert {row.id for row in split_off(QUESTIONS, 0.1)[1]} == {row.id for row in split_off(again, 0.1)[1]}


@pytest.mark.parametrize("weight", [0.5, 2.5, 5])
def test_weights_repeat_no_row_that_is_held_out(weight):
    rows = weighted(QUESTIONS, weight, "train.jsonl")
    train, held_out = split_off(rows, 0.1)
    held_ids = {row.id for row in held_out}
    assert len(held_out) == (5 if weight == 0.5 else 10) and not any("#" in name for name in held_ids)
    assert {row.instruction for row in train}.isdisjoint(row.instruction for row in held_out)
    if weight >= 1:
        assert held_ids == {row.id for row in split_off(QUESTIONS, 0.1)[1]}, "the same as without weights"


def test_a_frequent_prompt_is_no_small_share():
    rows = rows_of(*({"instruction": "Summarise." if n % 2 else f"Q{n}", "output": f"a{n}"} for n in range(200)))
    for share in (0.05, 0.1, 0.3):
        assert len(split_off(rows, share)[1]) == round(200 * share)
    one = rows_of(*({"instruction": "Summarise.", "output": f"a{n}"} for n in range(20)))
    with pytest.raises(UserError, match="leaves none to train on"):
        split_off(one, 0.1)


def talk(name: str, turns: int, before: tuple[dict[str, str], ...] = ()) -> dict[str, Any]:
    said = [
        {"role": role, "content": f"{name} {role} {turn}"} for turn in range(turns) for role in ("user", "assistant")
    ]
    return {"messages": [*before, *said]}


def test_the_turns_of_a_conversation_stay_together():
    rows = rows_of(*(talk(f"talk {n}", turns) for n in range(100) for turns in (1, 2, 3, 4)))
    train, held_out = split_off(rows, 0.05)
    learned = {message["content"] for row in train for message in row.conversation}
    assert len(held_out) == 20 and not any(row.response in learned for row in held_out)


def test_an_example_that_all_conversations_begin_with_does_not_tie_them_together():
    before = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
    assert len(split_off(rows_of(*(talk(f"talk {n}", 1, before) for n in range(100))), 0.1)[1]) == 10
