"""Encoded rows in memory-mapped files: the same tokens, made once, shared, and made again where a file is broken."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dts_hf.data import cache, encoded_files
from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoded_files import MappedDataset, encode_cached
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from tests.support.chats import chat, chat_tokenizer
from tests.support.tiny import tiny_tokenizer

TOKENIZER, PLAIN = tiny_tokenizer(), get_template("plain")
LIMITS = {"max_length": 90, "max_prompt_length": 70, "long_rows": "drop"}
COUNT = 2300  # three blocks
ROWS = [Row(f"r{k}", f"Say {k}.", "", (f"It is {k}. " * (k % 9),)) for k in range(COUNT)]


def cached(folder: Path, rows=ROWS, tokenizer=TOKENIZER, template=PLAIN, **limits) -> EncodedDataset:
    return encode_cached(rows, tokenizer, template, cache_dir=folder, **{**LIMITS, **limits})[0]


def assert_same(found: EncodedDataset, expected: EncodedDataset) -> None:
    assert found.row_ids == expected.row_ids and found.lengths == expected.lengths
    assert found.prompt_lengths == expected.prompt_lengths and found.target_counts == expected.target_counts
    assert [found.spans(k) for k in range(len(found))] == [expected.spans(k) for k in range(len(expected))]
    assert [found[k] for k in range(len(found))] == [expected[k] for k in range(len(expected))]
    assert found.report == expected.report


@pytest.fixture
def never_encoded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the rows were encoded again")

    def start():
        monkeypatch.setattr(encoded_files, "encoded_blocks", refuse)
        monkeypatch.setattr(encoded_files, "encode_rows", refuse)

    return start


@pytest.mark.parametrize("long_rows", ["drop", "cut"])
def test_a_file_gives_the_rows_that_memory_gives(tmp_path, long_rows):
    found = cached(tmp_path, long_rows=long_rows)
    expected = encode_rows(ROWS, TOKENIZER, PLAIN, **{**LIMITS, "long_rows": long_rows})[0]
    assert isinstance(found, MappedDataset) and len(expected) > 0
    assert (expected.report.dropped if long_rows == "drop" else expected.report.cut) > 100
    assert_same(found, expected)
    assert type(found[5]["input_ids"][0]) is int and found[-1]["row_id"] == len(found) - 1
    assert [found.subset(1500)[k] for k in (0, 1499)] == [expected[k] for k in (0, 1499)]
    assert len(found.subset(1500)) == len(found.subset(1500).ids) == len(found.subset(1500).target_counts) == 1500
    with pytest.raises(IndexError):
        found[len(found)]


def test_several_turns_are_learned_as_in_memory(tmp_path):
    tokenizer, template = chat_tokenizer("chatml"), get_template("chat")
    talks = [
        replace(chat(("u", "Hi"), ("a", "Oh" * (k % 5 + 1)), ("u", "Yes?"), ("a", "No.")), id=str(k))
        for k in range(1200)
    ]
    limits = {"max_length": 400, "max_prompt_length": 200, "train_on": "all_turns"}
    found = cached(tmp_path, talks, tokenizer, template, **limits)
    assert len(found.spans(3)) > 1
    assert_same(found, encode_rows(talks, tokenizer, template, **{**LIMITS, **limits})[0])


def test_rows_are_encoded_once(tmp_path, never_encoded):
    first = cached(tmp_path)
    never_encoded()
    assert_same(cached(tmp_path), first)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    "change", ["id", "text", "order", "limit", "long_rows", "train_on", "template", "token", "chat_template", "code"]
)
def test_whatever_changes_tokens_makes_another_file(tmp_path, monkeypatch, change):
    rows, tokenizer, template, limits = list(ROWS), tiny_tokenizer(), PLAIN, dict(LIMITS)

    def name() -> str:
        return encoded_files.fingerprint(rows, tokenizer, template, limits)

    before = name()
    assert name() == before == encoded_files.fingerprint(list(ROWS), tiny_tokenizer(), PLAIN, dict(LIMITS))
    if change == "id":
        rows[7] = replace(rows[7], id="other")
    elif change == "text":
        rows[7] = replace(rows[7], references=("other",))
    elif change == "order":
        rows[7], rows[8] = rows[8], rows[7]
    elif change == "limit":
        limits["max_length"] += 1
    elif change == "long_rows":
        limits["long_rows"] = "cut"
    elif change == "train_on":
        limits["train_on"] = "last_turn"
    elif change == "template":
        template = get_template("alpaca")
    elif change == "token":
        tokenizer.add_tokens(["Say"])
    elif change == "chat_template":
        tokenizer.chat_template = "{{ messages }}"
    else:
        monkeypatch.setattr(encoded_files, "code_digest", lambda: "another version")
    assert name() != before


def test_a_template_that_writes_the_date_makes_a_file_a_day(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    today = encoded_files.fingerprint(ROWS, tokenizer, PLAIN, LIMITS)

    class Tomorrow(encoded_files.datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(encoded_files.datetime, "date", Tomorrow)
    assert encoded_files.fingerprint(ROWS, tokenizer, PLAIN, LIMITS) != today


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "empty", "no record", "foreign record", "changed record", "older format", "a file"]
)
def test_a_broken_file_is_made_again(tmp_path, damage):
    expected = encode_rows(ROWS, TOKENIZER, PLAIN, **LIMITS)[0]
    cached(tmp_path)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    rows, record = place / "rows.arrow", place / "record.json"
    content = bytearray(rows.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-1000])
    elif damage == "empty":
        rows.write_bytes(b"")
    elif damage == "no record":
        record.unlink()
    elif damage == "foreign record":
        record.write_text("[]")
    elif damage == "changed record":
        text = record.read_text()
        record.write_text(text.replace(f'"kept": {len(expected)}', f'"kept": {len(expected) - 1}'))
        assert record.read_text() != text
    elif damage == "older format":
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 0}))
    else:
        shutil.rmtree(place)
        (tmp_path / f".{place.name}.unfinished").mkdir()  # of a process that was killed
    assert_same(cached(tmp_path), expected)
    assert sorted(path.name for path in place.iterdir()) == ["record.json", "rows.arrow"]
    assert not list(tmp_path.glob(".*.unfinished"))


def test_a_folder_under_the_name_of_another_is_made_again(tmp_path):
    others = [replace(row, references=("No.",)) for row in ROWS]
    cached(tmp_path)
    (first,) = (path for path in tmp_path.iterdir() if path.is_dir())
    cached(tmp_path, others)
    (second,) = (path for path in tmp_path.iterdir() if path.is_dir() and path != first)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert_same(cached(tmp_path), encode_rows(ROWS, TOKENIZER, PLAIN, **LIMITS)[0])
    assert_same(cached(tmp_path, others), encode_rows(others, TOKENIZER, PLAIN, **LIMITS)[0])


def _hold(place: Path, held, seconds: float) -> None:
    with cache._lock(place):
        held.put(os.getpid())
        time.sleep(seconds)


def test_waiting_for_another_process_is_said_and_ends(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(cache, "SILENCE", 0.2)
    fork = multiprocessing.get_context("fork")
    held = fork.SimpleQueue()
    place = tmp_path / encoded_files.fingerprint(ROWS, TOKENIZER, PLAIN, {**LIMITS})
    holder = fork.Process(target=_hold, args=(place, held, 60))
    holder.start()
    pid = held.get()
    try:
        cache.limit_waiting(1)
        found = cached(tmp_path)
    finally:
        cache.limit_waiting()
        holder.kill()
        holder.join()
    assert not isinstance(found, MappedDataset) and len(found) > 0
    said = capsys.readouterr().err
    assert said.count("waiting for") == 1 and f"waiting for process {pid} on " in said and str(place) in said
    assert f"process {pid} on " in caplog.text and "has held its lock for 1" in caplog.text
    assert isinstance(cached(tmp_path), MappedDataset)  # a lock ends with its process


def test_a_file_that_grows_is_waited_for(tmp_path, monkeypatch):
    growing = cache._unfinished(tmp_path / "a")
    growing.mkdir()
    with cache._lock(tmp_path / "a"):
        cache.limit_waiting(0.5)
        began = time.monotonic()
        try:
            sizes = iter(range(12))  # one look each tenth of a second
            monkeypatch.setattr(cache, "_size", lambda path: next(sizes, 99))
            with pytest.raises(TimeoutError), cache._lock(tmp_path / "a"):
                raise AssertionError("it is held")
        finally:
            cache.limit_waiting()
    assert time.monotonic() - began > 1.5


def _encode(folder: Path, made) -> None:
    encode = encoded_files.encoded_blocks

    def counted(*arguments, **options):
        made.put(1)
        return encode(*arguments, **options)

    encoded_files.encoded_blocks = counted
    assert len(cached(folder)) > 0


def test_of_several_processes_one_encodes(tmp_path):
    fork = multiprocessing.get_context("fork")
    made = fork.SimpleQueue()
    processes = [fork.Process(target=_encode, args=(tmp_path, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.get() == 1 and made.empty()


def test_without_a_place_to_write_rows_stay_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = cached(tmp_path / "file" / "folder")
    assert not isinstance(found, MappedDataset)
    assert_same(found, encode_rows(ROWS, TOKENIZER, PLAIN, **LIMITS)[0])
    assert f"cannot keep the encoded rows in {tmp_path / 'file'}" in caplog.text


def test_few_rows_stay_in_memory(tmp_path):
    assert not isinstance(cached(tmp_path, ROWS[:10]), MappedDataset) and not list(tmp_path.iterdir())


def test_no_row_left_is_refused_from_a_file_too(tmp_path):
    rows = [Row(str(k), "Say it. " * 80, "", ("No.",)) for k in range(1000)]
    for _ in range(2):
        with pytest.raises(UserError, match="no row left: all 1000 rows are too long"):
            cached(tmp_path, rows)


def test_a_worker_gets_a_path_and_no_rows(tmp_path):
    found = cached(tmp_path)
    assert len(pickle.dumps(found)) < 2000 < sum(found.lengths)
    assert_same(pickle.loads(pickle.dumps(found)), found)


def test_a_token_takes_four_bytes_in_the_file(tmp_path):
    rows = [Row(str(k), "Say it.", "", ("word " * 200,)) for k in range(1000)]
    found = cached(tmp_path, rows, max_length=1000)
    tokens = sum(found.lengths)
    assert tokens > 200_000 and found.path.stat().st_size < 4.3 * tokens


# ------------------------------------------------------------------------------------------- rows that are far too long


def _shrinking(kind: str):
    """A tokenizer of which a text has fewer tokens than its characters promise."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    replaced = {"removes": ("~", ""), "merges": ("~~~~", "a")}
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(*replaced[kind])
    return tokenizer


@pytest.mark.parametrize("kind", ["plain", "removes", "merges"])
@pytest.mark.parametrize("text", ["Word by word. ", "~" * 40 + "b", "~", "x", " ", "é🙂"])
@pytest.mark.parametrize("long_rows", ["drop", "cut"])
def test_a_long_row_is_what_its_whole_text_would_be(monkeypatch, kind, text, long_rows):
    tokenizer = tiny_tokenizer() if kind == "plain" else _shrinking(kind)
    rows = [Row(str(size), "Say.", "", (text * (size // len(text)),)) for size in (90, 2000, 30_000)]

    def encoded():
        return encode_rows(rows, tokenizer, PLAIN, **{**LIMITS, "long_rows": long_rows}, may_be_empty=True)[0]

    found = encoded()
    monkeypatch.setattr("dts_hf.data.row_encoder._shortened", lambda row, left: row)
    assert_same(found, encoded())
