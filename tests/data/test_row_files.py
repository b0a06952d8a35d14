"""Every kind of row file holds the same rows; what is broken names the file and the place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from dts_hf.data import file_limits
from dts_hf.data.row_files import DATA_SUFFIXES, count_rows, read_objects, row_file_stem
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_many, load_rows
from dts_hf.errors import UserError

OBJECTS = [
    {"instruction": "Say it.", "input": 'a, "b"\n\tc', "output": "é ✓"},
    {"instruction": "Add.", "input": "", "output": "5"},
    {"instruction": "x" * 200_000, "input": "", "output": "long"},  # above the csv module's own limit
]


def as_csv(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(OBJECTS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(OBJECTS)
    return stream.getvalue().encode("utf-8-sig")


def as_arrow(table: pa.Table, form: Any = pa.ipc.new_stream, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with form(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


TABLE = pa.Table.from_pylist(OBJECTS)
FILES = {
    "a.json": json.dumps(OBJECTS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(OBJECTS, indent=2).encode(),
    "data.json": json.dumps({"version": 1, "data": OBJECTS}).encode(),
    "indented_data.json": json.dumps({"data": OBJECTS}, indent=1).encode(),
    "lines.json": "".join(json.dumps(obj) + "\n" for obj in OBJECTS).encode(),
    "packed.json.gz": gzip.compress(json.dumps(OBJECTS).encode()),
    "a.csv": as_csv(","),
    "a.tsv": as_csv("\t"),
    "a.csv.gz": gzip.compress(as_csv(",")),
    "stream.arrow": as_arrow(TABLE),
    "file.arrow": as_arrow(TABLE, pa.ipc.new_file),
    "dictionary.arrow": as_arrow(pa.table({name: TABLE[name].dictionary_encode() for name in TABLE.column_names})),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    stem = name.partition(".")[0]
    expected = [
        Row(f"{stem}-{k}", obj["instruction"], obj["input"], (obj["output"],)) for k, obj in enumerate(OBJECTS, 1)
    ]
    assert load_rows(path) == expected and load_rows(path, limit=1) == expected[:1]
    assert count_rows(path) == 3 and row_file_stem(path) == stem and name.endswith(DATA_SUFFIXES)


def test_cells_of_csv_are_text_and_empty_ones_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,question, answer,tools\r\n\r\n07,6 x 7?,42,\r\n008,NULL,1e3,\r\n")
    assert load_rows(path) == [Row("07", "6 x 7?", "", ("42",)), Row("008", "NULL", "", ("1e3",))]
    talk = [{"role": "user", "content": "Hi, you"}, {"role": "assistant", "content": "Hello."}]
    path.write_text('messages,x\n"' + json.dumps(talk).replace('"', '""') + '",1\n')
    assert load_rows(path)[0].messages == (talk[0],)


def test_a_line_of_csv_is_named_where_the_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"one\ntwo\nthree",4\nfive,\n')
    with pytest.raises(UserError, match=r"a\.csv: line 5: field 'answer' is null or an empty cell"):
        load_rows(path)


BROKEN = {
    "wide": ("a.csv", b"question,answer\na,b\na,b,c\n", r"a\.csv: line 3: found 3 cells, expected 2 as in the first line"),
    "narrow": ("a.tsv", b"question\tanswer\na b\n", r"line 2: found 1 cells, expected 2"),
    "open quote": ("a.csv", b'question,answer\n"a,b\nc,d\n', r"line 2: broken CSV: unexpected end of data.*quotes in it"),
    "text behind a quote": ("a.tsv", b'question\tanswer\n"a" b\tc\n', r"line 2: broken TSV: .*ends with one"),
    "two columns": ("a.csv", b"answer,answer\na,b\n", r"line 1: two columns are called 'answer'"),
    "no rows": ("a.csv", b"question,answer\n", r"a\.csv: the file holds no rows"),
    "no bytes": ("a.csv", b"", r"a\.csv: the file holds no rows"),
    "not UTF-8": ("a.csv", b"question,answer\na,\xff\n", r"line 2: byte 3 is not UTF-8"),
    "zero byte": ("a.csv", b"question,answer\na,\x00\n\x00", r"a\.csv: line 3: "),
    "commas in tabs": ("a.tsv", b"question,answer\na,b\n", r"line 1: got one column 'question,answer'.* separated by tabs"),
    "semicolons": ("a.csv", b"question;answer\na;b\n", r"line 1: got one column 'question;answer'.* separated by commas"),
    "other key": ("a.json", b'{\n"train": [],\n"test": []}', r"expected a list of rows, or .* keys 'train', 'test'"),
    "list of lists": ("a.json", b"[[1], [2]]", r"a\.json: row 1: expected an object"),
    "a number": ("a.json", b"5", r"a\.json: line 1: expected an object"),
    "half a list": ("a.json", b'[{"a": 1},\n', r"a\.json: broken JSON: .* at line 2, column 1"),
    "half an object": ("a.json", b'{"a": 1,\n"b"', r"a\.json: broken JSON: .* at line 2, column 4"),
    "an empty list": ("a.json", b"[]", r"a\.json: the file holds no rows"),
    "a key twice": ("a.jsonl", b'\n{"a": 1, "c": {"a": 2}, "a": 1}', r"a\.jsonl: line 2: the key 'a' is there twice"),
    "an inner key twice": ("a.jsonl", b'{"m": [{"a": 1, "a": 2}]}', r"a\.jsonl: line 1: the key 'a' is there twice"),
    "a key twice in a list": ("a.json", b'[{"a": 1}, {"m": [{"b": 1, "b": 1}]}]', r"a\.json: row 2: the key 'b' is there"),
    "a key twice in data": ("a.json", b'{"data": [{"a": 1}, {"b": 1, "b": 2}]}', r"a\.json: row 2: the key 'b' is there"),
    "data twice": ("a.json", b'{"data": [{"a": 1}],\n"data": []}', r"a\.json: the key 'data' is there twice"),
    "a key twice before a fault": ("a.json", b'[{"a": 1, "a": 1},\n{', r"a\.json: the key 'a' is there twice"),
    "deep": ("a.json", b"[" * 100_000, r"a\.json: broken JSON"),
    "no table": ("a.arrow", b"no table", r"a\.arrow: not a readable Arrow file"),
    "empty table": ("a.arrow", b"", r"a\.arrow: "),
    "half a table": ("a.arrow", as_arrow(TABLE)[:-100_000], r"a\.arrow: cannot be read: Expected to be able to read"),
    "compressed": ("a.arrow", as_arrow(TABLE, compression="zstd"), r"a\.arrow: a compressed Arrow file.*Parquet"),
    "compressed file": ("a.arrow", as_arrow(TABLE, pa.ipc.new_file, compression="lz4"), r"a compressed Arrow file"),
    "compressed dictionary": (
        "a.arrow",
        as_arrow(pa.table({"a": TABLE["instruction"].dictionary_encode()}), compression="lz4"),
        r"a compressed Arrow file",
    ),
    "row of a table": ("a.arrow", as_arrow(pa.table({"question": ["a", None], "answer": ["b", "c"]})), r"row 2: field 'que"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path / file)


def test_offsets_of_an_arrow_file_that_lead_outside(tmp_path: Path) -> None:
    """Read as they are, they would read the memory of the process."""
    path = tmp_path / "a.arrow"
    content = as_arrow(pa.table({"text": ["abc", "defg"]}))
    offsets = b"\x00\x00\x00\x00\x03\x00\x00\x00\x07\x00\x00\x00"
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, b"\x00\x00\x00\x00\xff\xff\xff\x7f\x07\x00\x00\x00"))
    with pytest.raises(UserError, match=r"a\.arrow: not a readable Arrow file"):
        load_rows(path)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_limits, "FREE_BYTES", 1 << 16)
    again = pa.DictionaryArray.from_arrays([0] * 1000, ["x" * (1 << 17)])
    (tmp_path / "a.arrow").write_bytes(as_arrow(pa.table({"text": again})))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + b" " * (1 << 20) + b"]"))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\n" + b"\n" * (1 << 19)))
    for name in ("a.arrow", "b.json.gz", "c.csv.gz"):
        with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
            list(read_objects(tmp_path / name))
    monkeypatch.setattr(file_limits, "LONGEST_DOCUMENT", 1 << 10)
    (tmp_path / "d.json").write_text(json.dumps(OBJECTS))
    with pytest.raises(
        UserError, match=r"d\.json: one JSON value of more than 0 MiB, which is read whole; save it as JSON l"
    ):
        load_rows(tmp_path / "d.json")


# ------------------------------------------------------------------------------------------ folders of datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_list(OBJECTS)
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "test": 1}
    )
    return tmp_path / "saved"


def test_folders_that_datasets_has_saved(saved: Path) -> None:
    assert [row.response for row in load_rows(saved)] == ["é ✓", "5", "long"]
    assert [row.response for row in load_rows(saved, split="test")] == ["5"]
    # Rows that were filtered or mapped lie beside them as files of the cache.
    (saved / "test" / "cache-1.arrow").write_bytes(as_arrow(TABLE))
    assert [row.response for row in load_rows(saved / "test")] == ["5"]
    assert len(load_many([str(saved / "test"), str(saved)])) == 4
    with pytest.raises(UserError, match=r"saved: no split 'tests'; found test, train\. Did you mean 'test'\?"):
        load_rows(saved, split="tests")


def test_folders_of_datasets_that_are_broken(saved: Path) -> None:
    state = saved / "test" / "state.json"
    for content, message in (
        (b"{", "cannot be read as a data set that datasets has saved"),
        (b'{"_data_files": 5}', "cannot be read as a data set"),
        (b'{"_data_files": [{"filename": "../../x.arrow"}]}', "names files that are not here"),
        (b'{"_data_files": []}', "names files that are not here: none"),
    ):
        state.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_rows(saved, split="test")
