"""Rows out of batches, and rows of answers: labels by length, whatever the padding token is."""

from __future__ import annotations

import pytest

from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.generation.engine import Generated
from dts_hf.loss import statistics as stats
from dts_hf.loss.selection import IGNORE_INDEX as NO
from dts_hf.loss.selection import last_answer
from dts_hf.on_policy.rollout import (
    Rollout,
    answered_row,
    prompt_length,
    rows_of_batch,
    teacher_prompt_length,
    texts_of_batch,
)
from dts_hf.on_policy.settings import OnPolicySettings

PAD = END = 2  # as in SmolLM2-Instruct and GPT-2: what fills a batch ends a turn, too
ROWS = [
    {"input_ids": [5, END, 7, 8, END], "labels": [NO, NO, 7, 8, END], "row_id": 4, "teacher_number": 1},
    {"input_ids": [9], "labels": [NO], "row_id": DUMMY_ROW, "teacher_number": 0},
    {"input_ids": [5, 6, END], "labels": [NO, NO, END], "row_id": 0, "teacher_number": 0},
    {"input_ids": [5, 6, 3, END, 6, 4, 4, END, 9], "labels": [NO, NO, 3, END, NO, NO, 4, END, NO], "row_id": 7,
     "teacher_number": 1},
]  # fmt: skip
COLLATORS = [PaddedCollator(PAD), PaddedCollator(PAD, pad_to_multiple_of=8), PackedCollator(), PackedCollator(True)]


@pytest.mark.parametrize("collator", COLLATORS)
def test_the_rows_of_a_batch_are_those_it_was_made_of(collator):
    assert rows_of_batch(collator(ROWS)) == ROWS
    without = [{name: row[name] for name in ("input_ids", "labels", "row_id")} for row in ROWS]
    assert rows_of_batch(collator(without)) == without


@pytest.mark.parametrize("collator", COLLATORS)
def test_the_texts_of_a_batch_are_counted_without_its_rows(collator):
    nothing = {"input_ids": [5, 5], "labels": [NO, NO], "row_id": 3, "teacher_number": 0}
    dummy = {"input_ids": [5, 5], "labels": [NO, 5], "row_id": DUMMY_ROW, "teacher_number": 0}
    for rows in (ROWS, [nothing], [nothing, *ROWS, dummy, nothing], ROWS[2:3]):
        assert int(texts_of_batch(collator(rows))) == sum(prompt_length(row) is not None for row in rows)


#: The same as a teacher reads them that is told more, but for the third.
READ = [
    {"teacher_input_ids": [5, 8, 8, END, 7, 8, END], "teacher_labels": [NO] * 4 + [7, 8, END]},
    {"teacher_input_ids": [9], "teacher_labels": [NO]},
    {"teacher_input_ids": [5, 6, END], "teacher_labels": [NO, NO, END]},
    {"teacher_input_ids": [5, 6, 3, END, 8, 8, 8, 6, 4, 4, END, 9],
     "teacher_labels": [NO, NO, 3, END, NO, NO, NO, NO, NO, 4, END, NO]},
]  # fmt: skip


@pytest.mark.parametrize("collator", COLLATORS)
def test_a_teacher_that_reads_more_reads_the_same_answer_behind_its_own_prompt(collator):
    rows = [{**row, **read} for row, read in zip(ROWS, READ, strict=True)]
    assert rows_of_batch(collator(rows)) == rows
    assert [teacher_prompt_length(row) for row in rows] == [4, None, 2, 9]
    assert [teacher_prompt_length(row) for row in ROWS] == [None] * 4
    for said in (Generated([3, 8], True, 11), Generated([], True, 11), Generated([9, 9], False), Generated([], False)):
        answer = [*said.tokens, *([] if said.end is None else [said.end])]
        made = [answered_row(row, said) if prompt_length(row) is not None else row for row in rows]
        assert made[0]["teacher_input_ids"] == [5, 8, 8, END, *answer]
        assert made[3]["teacher_input_ids"] == [5, 6, 3, END, 8, 8, 8, 6, 4, *answer]
        for one, without in zip(made, ROWS, strict=True):
            if prompt_length(without) is not None:
                of_student = answered_row(without, said)
                assert {name: one[name] for name in of_student} == of_student, "the student's side knows nothing of it"
                before = len(one["teacher_input_ids"]) - len(answer)
                assert one["teacher_labels"] == [NO] * before + answer
        assert rows_of_batch(collator(made)) == made, "the collator finds the same labels on both sides"


def test_the_prompt_is_what_comes_before_the_last_stretch_of_labels():
    assert [prompt_length(row) for row in ROWS] == [2, None, 2, 6]
    assert last_answer(ROWS[3]["labels"]) == (6, 8)
    assert prompt_length({"input_ids": [1, 2], "labels": [NO, NO], "row_id": 3}) is None, "nothing is learned of it"


@pytest.mark.parametrize("collator", COLLATORS)
def test_labels_are_the_tokens_of_the_answer_and_the_end_that_was_reached(collator):
    said = [Generated([PAD + 1, 8], True, END), Generated([], True, 11), Generated([9, 9], False)]
    asked = {}

    def answer(model, prompts, settings, *, eos_token_ids, pad_token_id, row_keys):
        asked.update(prompts=prompts, settings=settings, ends=eos_token_ids, keys=row_keys)
        return said

    settings = OnPolicySettings(temperature=0.7, top_p=0.9, max_new_tokens=5, batch_size=3)
    rollout = Rollout(settings, seed=3, answer=answer)
    (made,), sums = rollout.rows(None, [rows_of_batch(collator(ROWS))], 6, ends=[END, 11], pad=PAD)
    assert asked["prompts"] == [[5, END], [5, 6], [5, 6, 3, END, 6, 4]] and asked["ends"] == [END, 11]
    assert len({*asked["keys"]}) == 3
    chosen = asked["settings"]
    assert (chosen.do_sample, chosen.temperature, chosen.top_p, chosen.seed) == (True, 0.7, 0.9, 3)
    assert (chosen.max_new_tokens, chosen.batch_size) == (5, 3)
    assert made == [
        {**ROWS[0], "input_ids": [5, END, 3, 8, END], "labels": [NO, NO, 3, 8, END]},
        ROWS[1],
        {**ROWS[2], "input_ids": [5, 6, 11], "labels": [NO, NO, 11]},
        {**ROWS[3], "input_ids": [5, 6, 3, END, 6, 4, 9, 9], "labels": [NO] * 6 + [9, 9]},
    ]
    assert rows_of_batch(collator(made)) == made, "padding and packing hide none of it"
    assert sums == {
        stats.GENERATED_TEXTS: 3, stats.GENERATED_LENGTH.sum: 6, stats.GENERATED_TRUNCATED.sum: 1,
        stats.GENERATED_ENDED.sum: 2, stats.GENERATED_REPETITION.sum: 0,
    }  # fmt: skip


def test_an_answer_without_a_token_and_without_an_end_has_no_label():
    assert answered_row(ROWS[0], Generated([], False)) == {**ROWS[0], "input_ids": [5, END], "labels": [NO, NO]}


def test_the_noise_of_a_row_is_named_by_row_and_step_alone():
    keys = []

    def answer(model, prompts, settings, *, row_keys, **_):
        keys.append(row_keys)
        return [Generated([4], False)] * len(prompts)

    rollout = Rollout(OnPolicySettings(), seed=1, answer=answer)
    rows = [dict(row) for row in ROWS]
    for batches, step in (([rows], 3), ([[rows[3]], [rows[2], rows[0]]], 3), ([rows], 4)):
        rollout.rows(None, batches, step, ends=[END], pad=PAD)
    assert {*keys[0]} == {*keys[1]} and not {*keys[0]} & {*keys[2]}
