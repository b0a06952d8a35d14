"""What a teacher alone reads: tokenised beside the student's row, with the same labels, in every chat template."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from dts_hf.data.chat_templates import get_template, resolve_template
from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.encoded_files import LEAST_ROWS, encode_cached
from dts_hf.data.encoding import encode_rows
from dts_hf.data.formats import parse_row
from dts_hf.data.rows import Row
from dts_hf.data.samplers import dummy_row
from dts_hf.data.sources import rows_from_dataset
from dts_hf.data.teacher_context import TEACHER_BATCH, split_batch, teacher_side, with_teacher_prefix
from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response
from tests.support.chats import FAMILIES, chat, chat_tokenizer, spaced_tokenizer
from tests.support.tiny import tiny_tokenizer

LIMITS = {"max_length": 2000, "max_prompt_length": 1500}
WORDS = ["yes", "two  horses", "\n\nno", " « »", "naïve", "日本", "<b>", "Answer: 4", "e = mc²", "😀"]


def learned(row, labels, ids="input_ids"):
    return [token for token, label in zip(row[ids][1:], row[labels][1:], strict=True) if label != -100]


def check_sides(tokenizer, template, rows, **limits):
    """Labels of both sides are the same tokens and decode to the same text, in the reading order of the batch."""
    data, report = encode_rows(rows, tokenizer, template, **{**LIMITS, **limits}, may_be_empty=True)
    for k in range(len(data)):
        row = data[k]
        ours, theirs = learned(row, "labels"), learned(row, "teacher_labels", "teacher_input_ids")
        assert ours == theirs and ours
        assert tokenizer.decode(ours) == tokenizer.decode(theirs)
        assert len(row["teacher_input_ids"]) >= len(row["input_ids"])
        assert len(row["teacher_input_ids"]) <= {**LIMITS, **limits}["max_length"]
    if len(data):
        for collator in (PaddedCollator(0), PackedCollator()):
            batch = collator([data[k] for k in range(len(data))])
            read, labels = split_batch(batch)
            ours = select_response(batch["labels"].unsqueeze(-1), batch["labels"])[1]
            assert torch.equal(ours, select_response(labels.unsqueeze(-1), labels)[1])
            assert read.keys() == batch.keys() - {"labels", "row_id", *TEACHER_BATCH.values()}
    return data, report


def random_rows(draw, turns):
    rows = []
    for k in range(8):
        said = [
            ("a" if turn % 2 else "u", " ".join(draw.choices(WORDS, k=draw.randint(1, 6))))
            for turn in range(2 * turns)
        ]
        prefix = draw.choice(["", "Proof: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))])
        rows.append(dataclasses.replace(chat(*said), id=str(k), teacher_prefix=prefix))
    return rows


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("turns", [1, 2])
def test_both_sides_learn_the_same_text(family, turns):
    tokenizer, draw = chat_tokenizer(family), random.Random(f"{family} {turns}")
    template = resolve_template("auto", tokenizer)
    rows = random_rows(draw, turns)
    data, report = check_sides(tokenizer, template, rows, train_on="last_turn")
    assert len(data) == 8 and report.prefixed == sum(bool(row.teacher_prefix) for row in rows)
    for k, row in enumerate(rows):
        read, seen = (tokenizer.decode(data[k][ids]) for ids in ("teacher_input_ids", "input_ids"))
        if row.teacher_prefix:
            assert row.teacher_prefix.strip() in read and row.teacher_prefix.strip() not in seen
        else:
            assert read == seen


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_tokenizers_that_put_a_space_before_a_text(scheme):
    tokenizer = spaced_tokenizer("mistral", scheme)
    check_sides(tokenizer, resolve_template("auto", tokenizer), random_rows(random.Random(scheme), 1))


@pytest.mark.soak
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_sides_learn_the_same_text_long(family):
    tokenizer = chat_tokenizer(family)
    for seed in range(200):
        draw = random.Random(seed)
        options = {"train_on": "last_turn", "max_length": draw.choice([40, 90, 400]), "max_prompt_length": 30}
        rows = random_rows(draw, draw.randint(1, 2))
        check_sides(
            tokenizer, resolve_template("auto", tokenizer), rows, long_rows=draw.choice(["cut", "drop"]), **options
        )


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "marked"])
def test_all_turns_are_learned_on_both_sides(family):
    tokenizer = chat_tokenizer(family)
    row = dataclasses.replace(chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2")), teacher_prefix="HINT")
    data, _ = check_sides(tokenizer, resolve_template("auto", tokenizer), [row], train_on="all_turns")
    read = tokenizer.decode(data[0]["teacher_input_ids"])
    assert read.index("A1") < read.index("HINT") < read.index("Q2")


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat"])
def test_where_the_text_stands(name):
    tokenizer = tiny_tokenizer()
    row = Row("a", "Add.", "2 and 2", ("4",), teacher_prefix="It is four.")
    prompt = get_template(name).render(with_teacher_prefix(row), tokenizer)
    assert "It is four.\n\nAdd." in prompt and prompt.replace("It is four.\n\n", "") == get_template(name).render(
        row, tokenizer
    )
    check_sides(tokenizer, get_template(name), [row])
    finished = Row("b", "2 + 2 =", "", (" 4",), kind="prompt", teacher_prefix="It is four.")
    assert with_teacher_prefix(finished).instruction == "It is four.\n\n2 + 2 ="
    with pytest.raises(UserError, match=r"row 'c'.*learned whole"):
        with_teacher_prefix(Row("c", "", "", ("text",), kind="text", teacher_prefix="more"))


def test_rows_that_are_too_long_behind_the_text_are_counted_and_named():
    tokenizer, template = tiny_tokenizer(), get_template("plain")
    rows = [
        Row("fits", "Say", "", ("yes",), teacher_prefix="no"),
        Row("long", "Say", "", ("yes",), teacher_prefix="so " * 60),
        Row("long for both", "Say", "", ("yes " * 60,), teacher_prefix="no"),
        Row("without", "Say", "", ("yes",), teacher_prefix=""),
    ]
    limits = {"max_length": 60, "max_prompt_length": 20}
    data, report = check_sides(tokenizer, template, rows, **limits)
    assert data.row_ids == ["fits", "without"] and report.dropped_ids == ["long", "long for both"]
    assert report.teacher_too_long == 1 and "only behind the teacher's text: 1" in report.summary()
    assert not report.is_whole

    data, report = check_sides(tokenizer, template, rows, long_rows="cut", **limits)
    assert data.row_ids == ["fits", "long for both", "without"] and report.cut == 1  # nothing of an answer fits
    middle = Row("m", "Say", "", ("yes " * 8,), teacher_prefix="so " * 16)
    alone = encode_rows([dataclasses.replace(middle, teacher_prefix=None)], tokenizer, template, **limits)[0]
    data, report = check_sides(tokenizer, template, [middle], long_rows="cut", **limits)
    assert report.cut == report.teacher_too_long == 1 and len(data[0]["teacher_input_ids"]) == 60
    assert (
        data[0]["input_ids"] == alone[0]["input_ids"][: len(data[0]["input_ids"])] and len(data[0]["input_ids"]) < 60
    )


def test_the_column_is_read_and_a_missing_one_is_named():
    columns = {"teacher_prefix": "proof"}
    obj = {"instruction": "Add", "output": "4", "proof": "2 + 2"}
    assert parse_row(obj, "f", "0", columns).teacher_prefix == "2 + 2"
    assert parse_row({**obj, "proof": None}, "f", "0", columns).teacher_prefix == ""
    assert parse_row(obj, "f", "0").teacher_prefix is None
    with pytest.raises(UserError, match="proof"):
        parse_row({"instruction": "Add", "output": "4"}, "f", "0", columns)
    with pytest.raises(UserError, match="expected a string"):
        parse_row({**obj, "proof": 4}, "f", "0", columns)
    answer = {"instruction": "Add", "output": "4"}
    with pytest.raises(UserError, match="output: output"):  # it is for the teacher, unless it is said to be more
        parse_row(answer, "f", "0", {"teacher_prefix": "output"})
    row = parse_row(answer, "f", "0", {"teacher_prefix": "output", "output": "output"})
    assert (row.teacher_prefix, row.response) == ("4", "4")


def test_many_rows_come_out_of_a_file_as_they_are_in_memory(tmp_path):
    tokenizer, template = tiny_tokenizer(), get_template("plain")
    raw = [
        {"instruction": "Say it", "output": "yes " * (1 + k % 3), "hint": "h " * (k % 4)} for k in range(LEAST_ROWS)
    ]
    rows = rows_from_dataset(raw, columns={"teacher_prefix": "hint"})
    kept, report = encode_cached(rows, tokenizer, template, cache_dir=tmp_path, **LIMITS)
    plain, expected = encode_rows(rows, tokenizer, template, **LIMITS)
    assert type(kept) is not type(plain) and report == expected
    assert all(kept[k] == plain[k] for k in (0, 1, 2, 3, LEAST_ROWS - 1)) and kept.digest == plain.digest
    assert kept.subset(3)[2] == plain.subset(3)[2] and kept.teacher_lengths == plain.teacher_lengths
    other = encode_rows(rows_from_dataset(raw), tokenizer, template, **LIMITS)[0]
    assert other.digest != plain.digest and "teacher_labels" not in other[0]


def test_what_only_fills_a_batch_has_no_label_for_the_teacher():
    data = encode_rows(
        [Row("a", "Say", "", ("yes",), teacher_prefix="no")], tiny_tokenizer(), get_template("plain"), **LIMITS
    )[0]
    filler = dummy_row(data[0], [-100])
    batch = PaddedCollator(0)([data[0], filler])
    assert (batch["teacher_labels"][1] == -100).all() and batch["teacher_attention_mask"][1].sum() == 1
    with pytest.raises(ValueError, match="not the same tokens"):
        PaddedCollator(0)([{**data[0], "teacher_labels": [-100] * len(data[0]["teacher_input_ids"])}])


def test_the_row_of_a_generated_answer():
    """For text that the student has written: its tokens behind another prompt, none of them made anew."""
    assert teacher_side([1, 2, 3], [7, 8]) == ([1, 2, 3, 7, 8], [-100, -100, -100, 7, 8])
    assert teacher_side([1], [7, 8, 9], [7, -100, 9]).labels == [-100, 7, -100, 9]
    assert teacher_side([1], []).labels == [-100]
