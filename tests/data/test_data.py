"""Rows, every kind of bad row, encoding, collators, packing equal to separate rows, length groups."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.data.chat_templates import TEMPLATES, encode_prompt, get_template
from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.formats import parse_row
from dts_hf.data.manifest import manifest
from dts_hf.data.rows import Row
from dts_hf.data.samplers import LengthGroupedSampler
from dts_hf.data.sources import load_many, load_rows, rows_from_dataset
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
ALPACA = get_template("alpaca")
GOOD = {"id": "a", "instruction": "Add.", "input": "2 and 3", "output": "5"}
TALK = {
    "id": "t",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ],
}


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ rows


def test_rows_of_both_forms():
    assert parse_row(GOOD, "here", "d") == Row("a", "Add.", "2 and 3", ("5",))
    several = parse_row({"instruction": "Add.", "input": None, "output": ["5", "five"], "topic": 1}, "here", "d")
    assert several == Row("d", "Add.", "", ("5", "five")) and several.response == "5"
    assert parse_row({**GOOD, "id": 7}, "here", "d").id == "7"
    talk = parse_row(TALK, "here", "d")
    assert talk == Row("t", "Hi", "", ("Hello.",), tuple(TALK["messages"][:2]), "messages")


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


def talk(*messages: object) -> dict:
    return {"id": "t", "messages": list(messages)}


USER = {"role": "user", "content": "Hi"}
BAD_ROWS = {
    "list": ([1], r"expected an object \{instruction, .* got a list"),
    "no output": (
        without("output"),
        r"field 'output' is missing, the response; found the columns 'id', 'instruction', 'input', expected",
    ),
    "misspelt": (
        {**without("instruction"), "instrction": "x"},
        r"Did you mean 'instruction'\?.*\{instruction: instrction\}",
    ),
    "other name": ({**without("output"), "reply": "x"}, r"data\.columns, such as \{output: reply\}$"),
    "input kept": (without("instruction"), r"field 'instruction' is missing[^?]*\{instruction: NAME\}$"),
    "null": ({**GOOD, "output": None}, r"field 'output' is null or an empty cell"),
    "number": ({**GOOD, "output": 5}, r"field 'output': got the int 5, expected a string"),
    "bool": ({**GOOD, "input": True}, r"field 'input': got true or false, expected a string"),
    "empty instruction": ({**GOOD, "instruction": " \n"}, r"field 'instruction' is empty"),
    "empty response": ({**GOOD, "output": " "}, r"field 'output' is empty"),
    "no references": ({**GOOD, "output": []}, r"field 'output' is an empty list"),
    "empty reference": ({**GOOD, "output": ["x", ""]}, r"field 'output', reference 2 is empty"),
    "id list": ({**GOOD, "id": ["a"]}, r"field 'id': got \['a'\], expected a string"),
    "id empty": ({**GOOD, "id": ""}, r"field 'id': got ''"),
    "surrogate": ({**GOOD, "input": "\ud83d"}, r"field 'input' holds half of a surrogate pair"),
    "messages text": (
        {"messages": "hello"},
        r"field 'messages': got a string, expected a list of messages \{role, content\}",
    ),
    "one message": (talk(USER), r"field 'messages': expected a list of at least two"),
    "message text": (talk(USER, "x"), r"message 2: expected an object \{role, content\}, got a string"),
    "role": (talk({"role": "usr", "content": "x"}, USER), r"message 1: role: got 'usr'.* Did you mean 'user'\?"),
    "no role": (talk({"content": "x"}, USER), r"message 1: role: got None"),
    "content": (talk({"role": "user", "content": 3}, USER), r"message 1: content: got the int 3"),
    "ends with user": (talk(USER, USER), r"last message has the role 'user', expected 'assistant'"),
    "empty answer": (talk(USER, {"role": "assistant", "content": " "}), r"message 2: content is empty"),
    "no user": (
        talk({"role": "system", "content": ""}, {"role": "assistant", "content": "x"}),
        r"no message before the response has the role 'user'",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_name_file_and_line(name, tmp_path):
    row, message = BAD_ROWS[name]
    path = write(tmp_path / "rows.jsonl", {**GOOD, "id": "first"}, "", row)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}: line 3: ")


# ------------------------------------------------------------------------------------------ files


def test_jsonl_gzip_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    objects = [{"instruction": f"Say {k}.", "input": "", "output": [str(k), "x"]} for k in range(5)]
    plain = write(tmp_path / "set.jsonl", *objects)
    packed = tmp_path / "set.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    parquet = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist(objects), parquet)
    rows = load_rows(plain)
    assert [row.id for row in rows] == [f"set-{k}" for k in range(1, 6)]
    assert rows[1] == Row("set-2", "Say 1.", "", ("1", "x"))
    assert load_rows(packed) == load_rows(str(parquet)) == rows
    assert load_rows(packed, limit=2) == load_rows(parquet, limit=2) == rows[:2]


def test_parquet_conversations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "talk.parquet"
    pq.write_table(pa.Table.from_pylist([TALK]), path)
    assert load_rows(path) == [parse_row(TALK, "", "")]
    pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "output": None}]), path)
    with pytest.raises(UserError, match=r"talk\.parquet: row 2: field 'output' is null"):
        load_rows(path)


def test_a_line_ends_at_a_line_feed_only_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({**GOOD, "output": "one\u2028two\x85three"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert load_rows(path)[0].response == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"rows\.jsonl: the file holds no rows"),
        ("rows.jsonl", b"\n  \n", r"rows\.jsonl: the file holds no rows"),
        ("rows.jsonl", b'{"instruction": "a", "output": "b"}\n{"x": \n', r"line 2: broken JSON: .* at column \d"),
        ("rows.jsonl", b"[" * 100_000 + b"\n", r"one JSON list"),
        ("rows.jsonl", b'{"instruction": "a", "output": "b"}\n' + b"[" * 100_000, r"line 2: broken JSON"),
        ("rows.jsonl", b'[{"instruction": "a"}]', r"rows\.jsonl: this is one JSON list, expected JSON lines"),
        ("rows.jsonl", b'{"instruction": "a\xff"}', r"line 1: byte 19 is not UTF-8"),
        ("rows.jsonl.gz", b"no gzip", r"rows\.jsonl\.gz: the gzip file is broken after line 0"),
        ("rows.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], r"the gzip file is broken"),
        ("rows.parquet", b"no parquet", r"rows\.parquet: not a readable Parquet file"),
        ("rows.txt", b"a,b", r"rows\.txt: expected a file ending in \.jsonl"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(path)


def test_duplicate_ids_name_both_places(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD)
    with pytest.raises(UserError, match=r"line 3: the id 'a' is already used by .*rows\.jsonl: line 1"):
        load_rows(path)
    other = write(tmp_path / "other.jsonl", GOOD)
    first = write(tmp_path / "first.jsonl", {**GOOD, "id": "z"}, GOOD)
    with pytest.raises(UserError, match=r"other\.jsonl: the id 'a' is already used by .*first\.jsonl"):
        load_many([first, other])


def test_several_sources_and_limit(tmp_path):
    first = write(tmp_path / "first.jsonl", without("id"), without("id"))
    second = write(tmp_path / "second.jsonl", without("id"))
    assert [row.id for row in load_many([first, second])] == ["first-1", "first-2", "second-1"]
    assert [row.id for row in load_many([first, str(second)], limit=2)] == ["first-1", "first-2"]
    assert load_many(first) == load_rows(first)
    with pytest.raises(UserError, match="the list of sources is empty"):
        load_many([])
    with pytest.raises(UserError, match="the name of the source is empty"):
        load_rows("")


def test_folders_and_patterns(tmp_path):
    write(tmp_path / "b.jsonl", without("id"))
    write(tmp_path / "a.jsonl", without("id"))
    assert [row.id for row in load_rows(tmp_path)] == ["a-1", "b-1"]
    assert [row.id for row in load_rows(f"{tmp_path}/[b]*.jsonl")] == ["b-1"]
    with pytest.raises(UserError, match="no file matches"):
        load_rows(f"{tmp_path}/*.parquet")


def test_a_folder_with_splits_gives_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", without("id"))
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", without("id"))
    assert [row.id for row in load_rows(tmp_path)] == ["train-00000-of-00001-1"]
    assert [row.id for row in load_rows(tmp_path, split="test")] == ["test-00000-of-00001-1"]
    with pytest.raises(UserError, match=r"no file of the split 'tst'; found test, train\. Did you mean 'test'\?"):
        load_rows(tmp_path, split="tst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file ending in"):
        load_rows(tmp_path / "empty")


def test_missing_files_name_the_nearest(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file\. Did you mean 'train\.jsonl'\?"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file; the folder .*nowhere does not exist either"):
        load_rows(tmp_path / "nowhere" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"tran\.jsonl: no such file\. Did you mean 'train\.jsonl'\?"):
        load_rows("tran.jsonl")


def test_hub_name_while_offline_says_what_to_do(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"dts-hf-tests/nothing: no such file here.*split 'train'.*Give a local file"):
        load_rows("dts-hf-tests/nothing")


def test_hub_rows(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, *, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([without("id"), without("id")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/set:small", split="test", limit=1)
    assert calls == [("owner/set", "small", "test")] and [row.id for row in rows] == ["owner-set-1"]
    described = manifest("owner/set:small", rows)
    assert described["source"] == "owner/set:small" and len(described["sha256"]) == 64


def test_a_hub_row_that_cannot_be_read(monkeypatch):
    """As one with an image, where the library that reads it is not installed."""
    import datasets

    def rows():
        yield without("id")
        raise ImportError("To support decoding images,\nplease install 'Pillow'.")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(
        UserError, match=r"owner/set, split 'train': row 2: cannot be read: To support decoding images, pl"
    ):
        load_rows("owner/set")


def test_rows_from_python():
    import datasets

    rows = rows_from_dataset([GOOD, without("id")], "train_dataset")
    assert [row.id for row in rows] == ["a", "train_dataset-2"]
    assert rows_from_dataset(datasets.Dataset.from_list([GOOD, without("id")]), "train_dataset") == rows
    assert rows_from_dataset(rows) == rows
    with pytest.raises(UserError, match=r"train_dataset: row 2: expected an object .* got a string"):
        rows_from_dataset([GOOD, "x"], "train_dataset")
    with pytest.raises(UserError, match="there are no rows"):
        rows_from_dataset([])


def test_manifest(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", GOOD)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest(path, load_rows(path)) == {"source": "rows.jsonl", "sha256": digest, "rows": 1}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    other = write(tmp_path / "sub" / "other.jsonl", {**GOOD, "id": "b"})
    sources = [str(path), "sub/other.jsonl"]
    both = manifest(sources, load_many(sources))
    lines = f"{digest}  rows.jsonl\n{hashlib.sha256(other.read_bytes()).hexdigest()}  other.jsonl\n"
    assert both == {
        "source": ["rows.jsonl", "sub/other.jsonl"],
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "rows": 2,
    }


# ------------------------------------------------------------------------------------------ encoding


def encode(rows, **options):
    limits = {"max_length": 400, "max_prompt_length": 300, **options}
    return encode_rows(rows, TOKENIZER, limits.pop("template", ALPACA), **limits)


@pytest.mark.parametrize("pad", ["eos", "own"])
def test_the_end_is_a_target_whatever_pads(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    rows = [Row("a", "Add.", "2 and 3", ("5", "five")), Row("b", "Name a bird.", "", ("Owl, of course.",))]
    dataset, report = encode_rows(rows, tokenizer, ALPACA, max_length=400, max_prompt_length=300)
    batch = PaddedCollator(tokenizer.pad_token_id)([dataset[0], dataset[1]])
    for k, row in enumerate(rows):
        prompt = encode_prompt(row, tokenizer, ALPACA, 300).ids
        response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        length = dataset.lengths[k]
        assert dataset[k]["input_ids"] == [*prompt, *response, EOS]
        assert dataset[k]["labels"] == [IGNORE_INDEX] * len(prompt) + [*response, EOS]
        assert batch["labels"][k, :length].tolist() == dataset[k]["labels"]
        assert batch["attention_mask"][k].sum() == length
        assert (batch["labels"][k, length:] == IGNORE_INDEX).all()
    assert dataset.row_ids == ["a", "b"] and batch["row_id"].tolist() == [0, 1]
    assert (report.rows, report.kept, report.dropped, report.cut, report.prompts_cut) == (2, 2, 0, 0, 0)
    assert report.response_tokens == int((batch["labels"] != IGNORE_INDEX).sum())
    assert report.prompt_tokens + report.response_tokens == int(batch["attention_mask"].sum())


def test_long_rows_are_dropped_or_cut_and_counted():
    rows = [Row(f"r{k}", "Repeat.", "", ("ab " * (5 + 100 * (k > 0)),)) for k in range(8)]
    rows.append(Row("endless", "word " * 400, "", ("x",)))
    dataset, report = encode(rows, max_length=150, max_prompt_length=149)
    assert dataset.row_ids == ["r0"]
    assert (report.kept, report.dropped, report.dropped_ids) == (1, 8, ["r1", "r2", "r3", "r4", "r5"])
    assert "1 of 9 rows kept; dropped as too long: 8 (r1, r2, r3, r4, r5, ...);" in report.summary()
    dataset, report = encode(rows, max_length=150, max_prompt_length=149, long_rows="cut")
    assert (report.kept, report.dropped, report.cut, report.dropped_ids) == (8, 1, 7, ["endless"])
    assert dataset.lengths[1:] == [150] * 7 and all(dataset[k]["labels"][-1] != EOS for k in range(1, 8))
    assert "responses cut: 7" in report.summary()


def test_shortened_inputs_are_counted():
    _, report = encode([Row("a", "Repeat.", "ab " * 500, ("x",))], max_length=200, max_prompt_length=150)
    assert report.prompts_cut == 1 and "inputs shortened: 1" in report.summary()


def test_wrong_limits_and_nothing_left(monkeypatch):
    row = Row("a", "Add.", "", ("5",))
    with pytest.raises(UserError, match=r"data\.max_prompt_length: got 400, expected .* less than .*\(400\)"):
        encode([row], max_prompt_length=400)
    with pytest.raises(UserError, match="got 'keep', expected 'drop' or 'cut'"):
        encode([row], long_rows="keep")
    with pytest.raises(UserError, match=r"no row left: all 1 rows are too long"):
        encode([row], max_length=20, max_prompt_length=10)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_rows([row], tokenizer, ALPACA, max_length=400, max_prompt_length=300)


def test_subset_and_indices():
    dataset, _ = encode([Row(str(k), f"Say {k}.", "", (str(k),)) for k in range(5)])
    part = dataset.subset(2)
    assert len(part) == 2 and part.row_ids == ["0", "1"] and part[1] == dataset[1]
    assert len(dataset.subset(99)) == 5
    assert dataset[-1]["row_id"] == 4
    with pytest.raises(IndexError):
        dataset[5]


def test_many_rows_keep_their_order_and_show_progress(capsys):
    rows = [Row(str(k), "Say.", "", (f"x{k}",)) for k in range(2300)]
    dataset, report = encode(rows, progress="tokenising")
    assert dataset.row_ids == [row.id for row in rows] and report.kept == 2300
    assert TOKENIZER.decode(dataset[2222]["input_ids"]).endswith("\nx2222<|im_end|>")
    assert capsys.readouterr().out == ""


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = TEXT.filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.tuples(WORDS, TEXT, WORDS), min_size=1, max_size=6),
    template=st.sampled_from(list(TEMPLATES)),
    max_length=st.integers(2, 250),
    share=st.floats(0.0, 1.0),
    long_rows=st.sampled_from(["drop", "cut"]),
)
def test_any_rows_keep_every_promise(texts, template, max_length, share, long_rows):
    rows = [Row(str(k), *text[:2], (text[2],)) for k, text in enumerate(texts)]
    max_prompt = max(1, int(share * (max_length - 1)))
    limits = {"max_length": max_length, "max_prompt_length": max_prompt, "long_rows": long_rows}
    try:
        dataset, report = encode(rows, template=get_template(template), **limits)
    except UserError as error:
        assert "no row left" in str(error)
        return
    assert report.rows == report.kept + report.dropped == len(rows) and report.kept == len(dataset)
    cut = 0
    for k in range(len(dataset)):
        row = rows[int(dataset.row_ids[k])]
        example = dataset[k]
        ids, labels = example["input_ids"], example["labels"]
        prompt = encode_prompt(row, TOKENIZER, get_template(template), max_prompt).ids
        response = [*TOKENIZER(row.response, add_special_tokens=False)["input_ids"], EOS]
        assert len(labels) == len(ids) == dataset.lengths[k] <= max_length
        assert ids[: len(prompt)] == prompt and 0 < len(prompt) <= max_prompt
        assert labels == [IGNORE_INDEX] * len(prompt) + response[: max_length - len(prompt)]
        cut += len(prompt) + len(response) > max_length
    assert report.cut == cut and (long_rows == "cut" or cut == 0)


# ------------------------------------------------------------------------------------------ batches


def test_padding_to_a_multiple():
    dataset = EncodedDataset(["a", "b"], [[5, 6, 7], [8, 9, 10, 11, 12]], [1, 2])
    batch = PaddedCollator(pad_token_id=0, pad_to_multiple_of=4)([dataset[1], dataset[0]])
    assert batch["input_ids"].tolist() == [[8, 9, 10, 11, 12, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 10, 11, 12, -100, -100, -100], [-100, 6, 7] + [-100] * 5]
    assert batch["row_id"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_packing_by_hand():
    # The second row carries a label at its first place, which no data set of ours does: it must go.
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row_id": 4},
        {"input_ids": [8, 9], "labels": [8, 9], "row_id": 2},
    ]
    batch = PackedCollator()(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 6, 7, -100, 9]],
        "row_id": [4, 2],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def random_dataset(lengths=(5, 1, 9, 2, 13)) -> EncodedDataset:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 320, (n,), generator=draw).tolist() for n in lengths]
    return EncodedDataset([str(k) for k in range(len(rows))], rows, [1] * len(rows))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_separate_and_padded_rows(build, attention):
    model = build(attn=attention)
    dataset = random_dataset()
    examples = [dataset[k] for k in range(len(dataset))]
    packed, padded = PackedCollator()(examples), PaddedCollator(2)(examples)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([example["input_ids"]])).logits[0] for example in examples])
        inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
        together = model(**inputs, use_cache=False).logits[0]
        side = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        mixed = model(**inputs, use_cache=True).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(side[padded["attention_mask"].bool()], alone, rtol=1e-5, atol=2e-5)
    # Why callers pass use_cache=False: with a cache transformers ignores the boundaries (when this fails, no longer).
    assert (mixed - alone).abs().max() > 1.0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_and_padded_rows_give_equal_gradients(build):
    from dts_hf.loss.selection import select_response

    dataset = random_dataset()
    examples = [dataset[k] for k in range(len(dataset))]
    gradients = []
    for batch in (PackedCollator()(examples), PaddedCollator(2)(examples)):
        model = build()
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
        logits, targets = select_response(model(**inputs, use_cache=False).logits, batch["labels"])
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


# ------------------------------------------------------------------------------------------ length groups


def test_length_groups():
    lengths = [(k * 37) % 101 + 1 for k in range(1003)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and len(sampler) == 1003
    assert max(lengths) in [lengths[k] for k in first[:8]], "the longest row comes first"

    def padding(order):
        batches = [[lengths[k] for k in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.1 * padding(range(1003))
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(1003)) and second != first
    # A resumed run builds a new sampler: the order depends on seed and epoch alone, not on what was drawn before.
    resumed = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    torch.manual_seed(99)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(LengthGroupedSampler(lengths, batch_size=8, seed=4)) != first


@pytest.mark.parametrize(("rows", "batch"), [(1, 8), (7, 8), (8, 8), (9, 8), (70, 8), (5, 1)])
def test_length_groups_of_small_sets(rows, batch):
    for epoch in range(3):
        sampler = LengthGroupedSampler(range(1, rows + 1), batch)
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(rows))


def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_rows_it_would_have_seen(tmp_path):
    from transformers import Trainer, TrainingArguments

    dataset = random_dataset([3 + (k * 7) % 11 for k in range(22)])

    def rows_seen(resume_from: str | None = None) -> list[list[int]]:
        seen = []

        class Recorder(Trainer):
            def _get_train_sampler(self, train_dataset=None):
                return LengthGroupedSampler(dataset.lengths, self.args.train_batch_size, self.args.seed)

            def compute_loss(self, model, inputs, *args, **kwargs):
                seen.append(inputs.pop("row_id").tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=3,
            save_steps=8,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Recorder(tiny_llama(), arguments, train_dataset=dataset, data_collator=PaddedCollator(2))
        trainer.train(resume_from_checkpoint=resume_from)
        return seen

    whole = rows_seen()
    assert len(whole) == 18 and sorted(row for batch in whole[6:12] for row in batch) == list(range(22))
    assert rows_seen(str(tmp_path / "checkpoint-8")) == whole[8:]


# ------------------------------------------------------------------------------------------ real rows


@pytest.mark.shared_data
def test_dolly(shared_data_dir):
    valid, train = shared_data_dir / "dolly" / "valid.jsonl", shared_data_dir / "dolly" / "train.jsonl.gz"
    rows = load_rows(valid)
    assert len(rows) == 500 and rows[0].id == "dolly-valid-00000"
    assert len(load_rows(train)) == 13_951
    described = manifest(valid, rows)
    assert described["sha256"] == "f61a77b5f59f3f119a7e710036a7399eb8d7d990d85ee992e6c99d189019d73a"
    dataset, report = encode(rows, max_length=1024, max_prompt_length=512)
    assert report.rows == 500 == report.kept + report.dropped and report.kept > 300 and report.prompts_cut > 0
    assert max(dataset.lengths) <= 1024 and max(dataset.prompt_lengths) <= 512
    marker = TOKENIZER("### Response:\n", add_special_tokens=False)["input_ids"]
    for k in range(len(dataset)):
        prompt = dataset[k]["input_ids"][: dataset.prompt_lengths[k]]
        assert prompt[-len(marker) :] == marker or TOKENIZER.decode(prompt).endswith("### Response:\n")
        assert dataset[k]["input_ids"][-1] == EOS == dataset[k]["labels"][-1]
