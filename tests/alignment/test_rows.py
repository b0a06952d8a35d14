"""Rows as a teacher with another tokenizer and another template reads them."""

from __future__ import annotations

import pytest
import torch

from dts_hf.alignment import batch as keys
from dts_hf.alignment.rows import RowAligner
from dts_hf.alignment.token_bytes import token_bytes
from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.encoding import encode_rows
from dts_hf.data.samplers import dummy_row
from dts_hf.data.sources import rows_from_dataset
from dts_hf.loss.selection import IGNORE_INDEX
from tests.support.alignment import instruction_rows, tokenizer_of
from tests.support.tiny import tiny_tokenizer

LIMITS = {"max_length": 128, "max_prompt_length": 64}


def aligned(student, teacher, rows=None, train_on=None, template="auto", **limits):
    limits = {**LIMITS, **limits}
    read = rows_from_dataset(instruction_rows() if rows is None else rows)
    resolved = resolve_template(template, student)
    data, _ = encode_rows(read, student, resolved, train_on=train_on, **limits)
    limits.pop("long_rows", None)
    aligner = RowAligner(student, teacher, template, train_on=train_on, **limits)
    return data, aligner, aligner.align(data, read)


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "word_piece"])
def test_labels_of_both_sides_are_the_same_bytes(kind):
    student, teacher = tiny_tokenizer(), tokenizer_of(kind, 900)
    data, aligner, report = aligned(student, teacher)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    pairs = 0
    for place in range(len(data)):
        row, example = data.aligned[place], data[place]
        labels = [token for token in example["labels"] if token != IGNORE_INDEX]
        asked = [int(token) for token in row.teacher_labels if token != IGNORE_INDEX]
        assert len(row.covered) == len(labels)
        for i, j in zip(row.student.tolist(), row.teacher.tolist(), strict=True):
            pair = (labels[i], asked[j])
            assert pair == aligner.ends[0] or ours.contents[pair[0]] == theirs.contents[pair[1]]
        pairs += len(row.student)
        if kind == "byte_level":  # every byte of the answer, and its end, on both sides
            said = [
                b"".join(table.contents[token] for token in side[:-1])
                for table, side in ((ours, labels), (theirs, asked))
            ]
            assert said[0] == said[1] and row.covered.all() and row.length == len(said[0])
            assert (labels[-1], asked[-1]) == aligner.ends[0]
            prompt = teacher.decode(row.ids[: int(row.labels[0])])
            assert prompt.startswith("[user]") and prompt.endswith("[assistant]")
    assert report.pairs == pairs > len(data) and report.unaligned == {}


def test_rows_that_one_side_cannot_read_are_counted_by_name():
    data, _, report = aligned(tiny_tokenizer(), tokenizer_of("word_piece", 900), [
        {"id": "known", "instruction": "Say", "output": "no"}, {"id": "strange", "instruction": "Say", "output": "ŧ"},
    ])  # fmt: skip
    assert report.unaligned == {"the teacher's tokenizer changes the text or does not know it": 1}
    assert (
        report.unaligned_ids == ["strange"] and "labels alone" in report.summary() and "(strange)" in report.summary()
    )
    assert len(data.aligned[1].ids) == 1 and not data.aligned[1].covered.any() and not len(data.aligned[1].labels)


def test_turns_are_aligned_one_by_one():
    said = ["Two horses have eight legs together.", "no", "The boat sailed over the lake."]
    messages = [
        m for text in said for m in ({"role": "user", "content": "Ask"}, {"role": "assistant", "content": text})
    ]
    student, teacher = tiny_tokenizer(), tokenizer_of("byte_level", 900)
    data, aligner, _ = aligned(student, teacher, [{"id": "a", "messages": messages}], "all_turns")
    row = data.aligned[0]
    labels = [token for token in data[0]["labels"] if token != IGNORE_INDEX]
    asked = [int(token) for token in row.teacher_labels if token != IGNORE_INDEX]
    pairs = [(labels[i], asked[j]) for i, j in zip(row.student, row.teacher, strict=True)]
    assert pairs.count(aligner.ends[0]) == 3 and row.covered.all() and row.length == len("".join(said))


def test_a_text_is_aligned_from_its_second_token_on():
    student, teacher = tiny_tokenizer(chat=False), tokenizer_of("byte_level", 900, chat=False)
    data, _, report = aligned(student, teacher, [{"id": "a", "text": "The boat sails over the lake."}])
    row = data.aligned[0]
    assert report.unaligned == {} and len(row.covered) == len(data.ids[0]) - 1 and len(row.student) > 1
    # What both sides are asked for begins and ends at the same bytes, so it leaves out what one of them alone reads first
    labels = [token for token in data[0]["labels"] if token != IGNORE_INDEX]
    ours, theirs = token_bytes(student), token_bytes(teacher)
    said = b"".join(ours.contents[token] for token, kept in zip(labels, row.covered, strict=True) if kept)
    asked = b"".join(theirs.contents[token] for token in row.ids[row.labels])
    assert said.removesuffix(b"<|im_end|>") == asked.removesuffix(b"</s>") and not row.covered[0]
    assert len(said.removesuffix(b"<|im_end|>")) == row.length > 0


def test_a_row_that_was_cut_is_aligned_as_far_as_it_goes():
    student, teacher = tokenizer_of("byte_level", 300), tokenizer_of("byte_level", 900)
    data, aligner, _ = aligned(student, teacher, max_length=40, max_prompt_length=38, long_rows="cut")
    assert data.report.cut > 2
    ours, theirs = token_bytes(student), token_bytes(teacher)
    for place in range(len(data)):
        row, labels = data.aligned[place], [token for token in data[place]["labels"] if token != IGNORE_INDEX]
        if labels[-1] == aligner.ends[0][0]:
            continue
        said = b"".join(ours.contents[token] for token, kept in zip(labels, row.covered, strict=True) if kept)
        assert said == b"".join(theirs.contents[token] for token in row.ids[row.labels])  # neither has an end
        assert len(said) == row.length
        assert not len(row.labels) or len(row.ids) == int(row.labels[-1]) + 1  # what is not asked for is not read


def test_padded_and_packed_batches_carry_the_same_pairs():
    data, _, _ = aligned(tiny_tokenizer(), tokenizer_of("byte_level", 900))
    examples = [*(data[k] for k in range(len(data))), dummy_row(data[0], [IGNORE_INDEX])]
    found = []
    for batch in (PaddedCollator(2)(examples), PackedCollator()(examples)):
        labels, asked = (
            (rows[:, 1:] != IGNORE_INDEX).nonzero() for rows in (batch["labels"], batch[keys.TEACHER_LABELS])
        )
        assert len(labels) == len(batch[keys.COVERED]) and len(asked) == batch[keys.PAIRS_TEACHER].max() + 1
        ours = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX][batch[keys.PAIRS_STUDENT]]
        theirs = batch[keys.TEACHER_LABELS][:, 1:]
        theirs = theirs[theirs != IGNORE_INDEX][batch[keys.PAIRS_TEACHER]]
        found.append((ours.tolist(), theirs.tolist(), batch[keys.ANSWER_BYTES].tolist()))
        read = keys.teacher_batch(batch)
        assert read.keys() == {"input_ids", "attention_mask" if "attention_mask" in batch else "position_ids"}
    assert found[0] == found[1] and found[0][2][-1] == 0
    assert torch.equal(batch["row_id"], torch.tensor([*range(len(data)), -2]))
