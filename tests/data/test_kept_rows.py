"""Rows read once and then mapped: the same rows, split, mixture, manifest and run; and every fault of the cache."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from dts_hf.data import cache, encoded_files, kept_rows
from dts_hf.data.held_out_split import split_off
from dts_hf.data.kept_rows import load_mixture_once
from dts_hf.data.manifest import manifest
from dts_hf.data.mapped_rows import MappedRows
from dts_hf.data.mixture import parts_of
from dts_hf.data.sources import load_mixture
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.files import file_sha256
from dts_hf.recipe.schema import Source
from tests.support.launching import environment
from tests.support.recipes import recipe

CALL = {"type": "function", "function": {"name": "look", "arguments": {"b": [1, 2.5, None], "a": "ä🙂\u2028"}}}
KINDS = [
    {"instruction": "Say.", "input": "Now.", "output": ["Yes.", "No."]},
    {"prompt": "Once", "completion": " more."},
    {"text": "All of it."},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "Five", "reasoning_content": "5"},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
]


@pytest.fixture(autouse=True)
def kept_from_the_first_byte(monkeypatch, tmp_path):
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))


def write(path: Path, count: int = 40) -> Path:
    rows = [{**KINDS[k % len(KINDS)], **({"instruction": f"Say {k}."} if k % 4 == 0 else {})} for k in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def never_read(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the rows were read again")

    def start():
        for name in ("read_mixture", "load_mixture"):
            monkeypatch.setattr(kept_rows, name, refuse)

    return start


def test_rows_of_every_kind_come_back_as_they_were(tmp_path, never_read):
    expected = load_mixture(write(tmp_path / "train.jsonl"))
    assert {row.kind for row in expected.rows} == {"instruction", "prompt", "text", "messages"}
    for attempt in ("made", "read"):
        found = load_mixture_once(tmp_path / "train.jsonl")
        assert isinstance(found.rows, MappedRows) and found.parts == expected.parts
        assert list(found.rows) == expected.rows and found.rows[-1] == expected.rows[-1], attempt
        assert list(found.rows[5:9]) == expected.rows[5:9] and len(found.rows[5:9]) == 4
        assert json.dumps(list(map(dataclasses.asdict, found.rows))) == json.dumps(
            list(map(dataclasses.asdict, expected.rows))
        )  # the order of keys as well
        never_read()
    assert len(pickle.dumps(found.rows)) < 1000 and list(pickle.loads(pickle.dumps(found.rows))) == expected.rows
    shutil.rmtree(tmp_path / "cache")  # what is mapped stays
    assert list(found.rows[2:]) == expected.rows[2:] and list(found.rows.picked([3, 1])) == [
        expected.rows[3],
        expected.rows[1],
    ]


@pytest.mark.parametrize("weight", [1, 0.5, 2.5])
@pytest.mark.parametrize("limit", [None, 13, 60])
def test_mixture_split_and_manifest_are_those_of_rows_in_memory(tmp_path, weight, limit):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", 20)
    sources = [
        Source(source=str(tmp_path / "a.jsonl"), weight=weight),
        Source(source=str(tmp_path / "b.jsonl"), columns={"id": None}),
    ]
    expected, found = load_mixture(sources, limit=limit), load_mixture_once(sources, limit=limit)
    assert isinstance(found.rows, MappedRows) and list(found.rows) == expected.rows and found.parts == expected.parts
    halves, expected_halves = split_off(found.rows, 0.2), split_off(expected.rows, 0.2)
    for half, expected_half in zip(halves, expected_halves, strict=True):
        assert isinstance(half, MappedRows) and list(half) == list(expected_half)
        assert parts_of(half, found) == parts_of(expected_half, expected)
        assert list(half[:3]) == list(expected_half[:3])
    told = [manifest(sources, rows.rows, parts=rows.parts) for rows in (found, expected)]
    assert told[0] == told[1]


def test_rows_of_the_hub(monkeypatch, never_read):
    held = datasets.Dataset.from_list([{"instruction": f"Say {k}", "output": "Yes."} for k in range(30)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
    expected = load_mixture("owner/set")
    assert list(load_mixture_once("owner/set").rows) == expected.rows
    assert manifest("owner/set", load_mixture_once("owner/set").rows) == manifest("owner/set", expected.rows)
    never_read()
    assert list(load_mixture_once("owner/set").rows) == expected.rows
    held = held.select(range(20))  # of another revision
    with pytest.raises(AssertionError, match="read again"):
        load_mixture_once("owner/set")


@pytest.mark.parametrize("change", ["text", "name", "weight", "columns", "limit", "code"])
def test_whatever_changes_rows_makes_another_file(tmp_path, monkeypatch, change):
    path = write(tmp_path / "train.jsonl")
    options = {"limit": None, "columns": None}
    load_mixture_once(path, **options)
    source = Source(source=str(path))
    if change == "text":
        path.write_text(path.read_text().replace("Yes", "Yea", 1))
    elif change == "name":
        source = Source(source=str(path.rename(tmp_path / "other.jsonl")))
    elif change == "weight":
        source = Source(source=str(path), weight=2)
    elif change == "columns":
        options["columns"] = {"id": None}
    elif change == "limit":
        options["limit"] = 7
    else:
        monkeypatch.setattr(kept_rows, "code_digest", lambda: "another version")
    found = load_mixture_once(source, **options)
    assert list(found.rows) == load_mixture(source, **options).rows
    assert len([folder for folder in (tmp_path / "cache" / "rows").iterdir() if folder.is_dir()]) == 2


def test_a_wrong_row_is_told_each_time_and_nothing_is_kept(tmp_path):
    path = write(tmp_path / "train.jsonl")
    path.write_text(path.read_text() + '{"instruction": 5}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.jsonl: line 41"):
            load_mixture_once(path)
    assert not [name for name in (tmp_path / "cache" / "rows").iterdir() if not name.name.endswith(".lock")]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "train.jsonl")
    reading = kept_rows.read_mixture

    def changing(*arguments, **options):
        yield from reading(*arguments, **options)
        path.write_text(path.read_text().replace("Yes", "Yea"))

    monkeypatch.setattr(kept_rows, "read_mixture", changing)
    assert not isinstance(load_mixture_once(path).rows, MappedRows)
    assert "a file was written to while it was read" in caplog.text


def test_a_row_that_json_does_not_hold_stays_in_memory(tmp_path, caplog):
    import datetime

    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
           "chat_template_kwargs": {"day": datetime.date(2026, 1, 1)}}  # fmt: skip
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "train.parquet")
    found = load_mixture_once(tmp_path / "train.parquet")
    assert not isinstance(found.rows, MappedRows) and found == load_mixture(tmp_path / "train.parquet")
    assert not caplog.records and not list((tmp_path / "cache" / "rows").glob("*/"))


@pytest.mark.parametrize("responses", ["data", "teacher"])
@pytest.mark.usefixtures("workplace")
def test_a_run_from_kept_rows_is_the_run_from_memory(monkeypatch, responses, never_read):
    def run(name: str):
        data = {"responses": responses, "validation": 0.25, "teacher_max_new_tokens": 4}
        made = distill(recipe(data=data, output={"dir": name, "report": False}))
        told = made.read_data_manifest()
        if told["teacher_answers"]:
            del told["teacher_answers"]["cached"]
        return file_sha256(made.final_path / "model.safetensors"), told, made.read_log()[-1].get("loss")

    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1 << 40)
    memory = run("memory")
    assert not Path("cache/rows").exists()
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr(encoded_files, "LEAST_ROWS", 2)
    assert run("first") == memory
    never_read()
    assert run("second") == memory


# --------------------------------------------------------------------------------------------------- faults of a cache


def folder_of(tmp_path: Path) -> Path:
    (found,) = (folder for folder in (tmp_path / "cache" / "rows").iterdir() if folder.is_dir())
    return found


def test_nobody_else_may_read_the_cache(tmp_path):
    before = os.umask(0)
    try:
        load_mixture_once(write(tmp_path / "train.jsonl"))
    finally:
        os.umask(before)
    folder = folder_of(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.parent, folder, *folder.iterdir())}
    assert modes == {"rows": 0o700, folder.name: 0o700, "rows.arrow": 0o600, "record.json": 0o600}
    assert {path.stat().st_mode & 0o777 for path in folder.parent.glob(".*.lock")} == {0o600}


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no record", "a list", "another version", "foreign keys", "a link", "anybody's"]
)
def test_a_broken_or_foreign_file_is_made_again(tmp_path, damage):
    expected = list(load_mixture_once(write(tmp_path / "train.jsonl")).rows)
    folder = folder_of(tmp_path)
    rows, record = folder / "rows.arrow", folder / "record.json"
    content = bytearray(rows.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-100])
    elif damage == "no record":
        record.unlink()
    elif damage == "a list":
        record.write_text("[]")
    elif damage == "another version":
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 0}))
    elif damage == "foreign keys":
        record.write_text(json.dumps({**json.loads(record.read_text()), "parts": [{"from": "there"}]}))
    elif damage == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(0o777)
    if damage == "a link":  # neither read nor removed: it leads to somebody else's
        assert list(load_mixture_once(tmp_path / "train.jsonl").rows) == expected
        assert (tmp_path / "elsewhere" / "rows.arrow").is_file()
        return
    found = load_mixture_once(tmp_path / "train.jsonl").rows
    assert isinstance(found, MappedRows) and list(found) == expected
    assert folder.stat().st_mode & 0o777 == 0o700 and json.loads(record.read_text())["format"] == cache.FORMAT


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_a_cache_that_may_only_be_read_serves_what_it_has(tmp_path, monkeypatch, caplog, code, never_read):
    def refuse(path):
        raise OSError(code, os.strerror(code), str(path))

    expected = load_mixture_once(write(tmp_path / "train.jsonl")).rows
    monkeypatch.setattr(cache, "_lock", refuse)
    other = load_mixture_once(write(tmp_path / "other.jsonl", 7))
    assert not isinstance(other.rows, MappedRows) and len(other.rows) == 7
    assert f"cannot keep the rows in {tmp_path / 'cache' / 'rows'}" in caplog.text and os.strerror(code) in caplog.text
    never_read()
    assert list(load_mixture_once(tmp_path / "train.jsonl").rows) == list(expected)


FULL = """
import resource, sys
from dts_hf.data import kept_rows
kept_rows.LEAST_BYTES = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
found = kept_rows.load_mixture_once("train.jsonl")
print(type(found.rows).__name__, len(found.rows))
"""
STOPPED = """
import os, sys, time
from dts_hf.data import cache, kept_rows
kept_rows.LEAST_BYTES = 1
def wait(path):
    open("waiting", "w").close()
    time.sleep(60)
cache.file_sha256 = wait  # the rows are written, the record is not
kept_rows.load_mixture_once("train.jsonl")
"""


def start(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment("single", None), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_leaves_nothing_and_the_rows_in_memory(tmp_path):
    write(tmp_path / "train.jsonl")
    stdout, stderr = start(tmp_path, FULL).communicate(timeout=120)
    assert stdout.split() == ["list", "40"] and "cannot keep the rows" in stderr, stderr
    assert not [path for path in (tmp_path / "cache" / "rows").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_that_is_killed_while_it_writes_holds_nobody_up(tmp_path):
    expected = load_mixture(write(tmp_path / "train.jsonl")).rows
    process = start(tmp_path, STOPPED)
    until = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert list((tmp_path / "cache" / "rows").glob(".*.unfinished/rows.arrow"))
    found = load_mixture_once(tmp_path / "train.jsonl").rows
    assert isinstance(found, MappedRows) and list(found) == expected
    assert not list((tmp_path / "cache" / "rows").glob(".*.unfinished"))


READING = """
import sys
from dts_hf.data import kept_rows
kept_rows.LEAST_BYTES = 1
reading = kept_rows.read_mixture
def told(*arguments, **options):
    print("read")
    return reading(*arguments, **options)
kept_rows.read_mixture = told
print(len(kept_rows.load_mixture_once("train.jsonl").rows))
"""


def test_of_two_runs_at_once_one_reads(tmp_path):
    write(tmp_path / "train.jsonl")
    processes = [start(tmp_path, READING) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(told) == [["40"], ["read", "40"]]
