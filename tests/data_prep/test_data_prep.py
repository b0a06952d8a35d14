"""The evaluation sets: every upstream format, the protocol's rules, counts, checksums, and nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dts_hf.data.sources import load_rows
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import KNOWN_SETS, PreparedSet, list_sets, read_manifest, resolve_set
from dts_hf.files import file_sha256
from tests.support.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA_PREP = ROOT / "data_prep"
SCRIPTS = ("dolly", "self_instruct", "unni", "s_ni", "vicuna", "glue")


@pytest.fixture(scope="module")
def prep() -> SimpleNamespace:
    names = (*SCRIPTS, "job", "lengths", "reading", "same_question", "download", "upstream")
    return SimpleNamespace(**{name: importlib.import_module(f"dts_hf.data_prep.{name}") for name in names})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data"


def call(script: Any, out: Path, source: Path | str, *options: str, other: bool = True) -> int:
    arguments = ["--source", str(source), "--output", str(out), *options]
    return int(script.main(arguments + (["--allow-other-counts"] if other else [])))


def write_lines(path: Path, rows: Sequence[Any], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)[:-1] + end
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(prepared: PreparedSet) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in prepared.path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == prepared.rows == len(load_rows(prepared.path))
    return rows


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"Do {number}", "input": "", "output": f"Done {number}", **fields}


LONG = "word " * 300


def no_files(out: Path) -> bool:
    return not [path for path in out.rglob("*") if path.is_file() and ".downloads" not in path.parts]


# ---------------------------------------------------------------------------------------------------- upstream formats


def test_dolly_of_minillm(prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "release"
    raw = [row(k, topic="open_qa", prompt="unused") for k in range(1_010)]
    raw[3]["input"] = raw[1_005]["input"] = LONG
    write_lines(source / "raw.jsonl", raw)
    write_lines(source / "valid.jsonl", [row(k) for k in range(5_000, 5_004)])
    assert call(prep.dolly, out, source, "--tokenizer", tokenizer) == 0
    # The first 1,000 lines of the raw file are the development set, whatever is dropped from them afterwards.
    valid = rows_of(resolve_set("dolly", out, split="valid"))
    assert len(valid) == 999 and valid[3] == {
        "id": "dolly-00004", "instruction": "Do 4", "input": "", "output": "Done 4", "category": "open_qa",
    }  # fmt: skip
    train = rows_of(resolve_set("dolly", out, split="train"))
    assert [r["id"] for r in train] == [f"dolly-0{k}" for k in range(1_000, 1_010) if k != 1_005]
    assert [r["id"] for r in rows_of(resolve_set("dolly", out))] == [f"dolly-test-0000{k}" for k in range(4)]
    manifest = read_manifest(out / "dolly")
    assert manifest["dropped"] == {"train: prompt over 256 tokens": 1, "valid: prompt over 256 tokens": 1}
    assert manifest["source"]["files"][0]["sha256"] == file_sha256(source / "raw.jsonl")
    assert manifest["tokenizer"]["is_gpt2"] is False and manifest["counts_as_expected"] is False


def test_dolly_of_databricks(
    prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream = [
        {"instruction": f"Ask {k}", "context": f"Text[{k}] {k}." if k % 2 else "", "response": f"Yes {k}",
         "category": "closed_qa"} for k in range(1_600)
    ]  # fmt: skip
    upstream[2]["context"] = LONG
    upstream[1_599]["response"] = " "
    source = write_lines(tmp_path / "databricks-dolly-15k.jsonl", upstream)
    assert call(prep.dolly, out, source, "--tokenizer", tokenizer) == 2
    assert "--test valid.jsonl" in capsys.readouterr().err and no_files(out)
    # MiniLLM's text of the same questions differs in marks and punctuation.
    test = write_lines(tmp_path / "valid.jsonl", [{"instruction": "Ask 7!", "input": "Text 7", "output": "Yes 7"}])
    assert call(prep.dolly, out, source, "--tokenizer", tokenizer, "--test", str(test)) == 0
    valid, train = (rows_of(resolve_set("dolly", out, split=split)) for split in ("valid", "train"))
    numbers = [int(r["id"].removeprefix("dolly-")) for r in valid + train]
    # Dropped: the long prompt, the question of the test row, the row without a response. 1,000 short rows are valid.
    assert numbers == [k for k in range(1_599) if k not in (2, 7)] and len(valid) == 1_000
    assert [r["output"] for r in rows_of(resolve_set("dolly", out))] == ["Yes 7"]
    assert len(read_manifest(out / "dolly")["source"]["files"]) == 2

    assert call(prep.dolly, out, source, "--tokenizer", tokenizer, "--own-split") == 0
    counts = {split: entry["rows"] for split, entry in read_manifest(out / "dolly")["files"].items()}
    assert counts == {"train": 98, "valid": 1_000, "test": 500}
    assert "not MiniLLM's" in read_manifest(out / "dolly")["rules"][0]
    assert call(prep.dolly, out, source, "--own-split", "--test", str(test)) == 2


MARKS = ("[3]", "[12]", "[123]", "[a]", "[3][4]", "[3, 4]", "[citation needed]", "[Note 1]", " [7] ")
#: Something of everything that a mark can stand behind or before, in the order in which no two are alike.
TEXT = 'He flew an aircraft. It (a "big" one) was fast; very, "so" fast! Was it [sic]? Yes: 300 km/h\n- end'


def marked_everywhere(text: str) -> list[str]:
    return [text[:place] + mark + text[place:] for place in range(len(text) + 1) for mark in MARKS]


def databricks(number: int, context: str, instruction: str = "Ask") -> dict[str, str]:
    return {"instruction": f"{instruction} {number}", "context": context, "response": f"Yes {number}"}


def as_test(raw: dict[str, str], **changed: str) -> dict[str, str]:
    return {"instruction": raw["instruction"], "input": raw["context"], "output": raw["response"]} | changed


@pytest.mark.parametrize("marks", ["test", "source", "instruction"])
def test_no_test_row_of_dolly_is_trained_on_wherever_its_marks_stand(
    prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: str
) -> None:
    """Wikipedia's marks stand in one edition of the rows and not in the other."""
    monkeypatch.setattr(prep.dolly, "DEV_ROWS", 5)
    texts = marked_everywhere(TEXT)
    plain = [databricks(number, TEXT) for number in range(len(texts))]
    marked = [databricks(number, text) for number, text in enumerate(texts)]
    if marks == "instruction":
        marked = [raw | {"instruction": text + f" {number}"} for number, (raw, text) in enumerate(zip(plain, texts))]
        plain = [raw | {"instruction": f"{TEXT} {number}"} for number, raw in enumerate(plain)]
    for rows in (plain, marked):  # the answer differs too: the question alone has to tell
        for number, raw in enumerate(rows):
            raw["response"] += f" {'plain' if rows is plain else 'marked'} {number}"
    source, test = (marked, plain) if marks == "source" else (plain, marked)
    others = [databricks(number, "", "Say") for number in range(9)]
    file = write_lines(tmp_path / "databricks-dolly-15k.jsonl", [*source, *others])
    held_out = write_lines(tmp_path / "valid.jsonl", [as_test(raw) for raw in test])
    assert call(prep.dolly, out, file, "--tokenizer", "none", "--test", str(held_out)) == 0
    kept = [r["instruction"] for split in ("valid", "train") for r in rows_of(resolve_set("dolly", out, split=split))]
    assert kept == [raw["instruction"] for raw in others]


def test_a_test_row_of_dolly_is_known_by_its_answer_too(
    prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Databricks emptied some contexts after MiniLLM had taken its rows."""
    monkeypatch.setattr(prep.dolly, "DEV_ROWS", 2)
    source = write_lines(tmp_path / "databricks.jsonl", [databricks(number, "") for number in range(9)])
    test = write_lines(tmp_path / "valid.jsonl", [as_test(databricks(4, ""), input="A text that is gone.")])
    assert call(prep.dolly, out, source, "--tokenizer", "none", "--test", str(test)) == 0
    kept = [r["instruction"] for split in ("valid", "train") for r in rows_of(resolve_set("dolly", out, split=split))]
    assert kept == [f"Ask {number}" for number in range(9) if number != 4]


def test_dolly_is_refused_when_the_test_rows_are_not_in_the_source(
    prep: SimpleNamespace,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prep.dolly, "DEV_ROWS", 5)
    source = write_lines(tmp_path / "databricks.jsonl", [databricks(number, "") for number in range(200)])

    def prepared(strangers: int, *options: str) -> int:
        rows = [databricks(number, "", "Ask" if number >= strangers else "Other") for number in range(100)]
        test = write_lines(tmp_path / "valid.jsonl", [as_test(raw) | {"output": "Of its own"} for raw in rows])
        return call(prep.dolly, out, source, "--tokenizer", "none", "--test", str(test), *options)

    assert prepared(2) == 2
    message = capsys.readouterr().err
    assert "98 of 100" in message and "at least 99" in message and "'dolly-test-00000'" in message and no_files(out)
    assert "--allow-missing-test-rows" in message
    assert prepared(1) == 0  # the later edition lacks a row
    assert prepared(2, "--allow-missing-test-rows") == 0
    assert any("98 of 100 test rows" in rule for rule in read_manifest(out / "dolly")["rules"])


@pytest.mark.parametrize("layout", ["minillm", "ours", "own split"])
def test_repeated_questions_stay_out_of_train_whatever_the_source(
    prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """databricks-dolly-15k has eight rows twice, so a split by position alone leaks."""
    monkeypatch.setattr(prep.dolly, "DEV_ROWS", 5)
    monkeypatch.setattr(prep.dolly, "TEST_ROWS", 5)
    source = tmp_path / "release"
    options = ["--tokenizer", "none"]
    if layout == "own split":  # rows 0 to 4 are valid, 5 to 9 test
        rows = [databricks(k, "") for k in range(20)] + [databricks(7, ".[1]"), databricks(2, "")]
        source = write_lines(tmp_path / "databricks.jsonl", rows)
        options.append("--own-split")
    else:
        held_out, rest = [row(k) for k in range(5, 10)], [row(k) for k in (*range(5), *range(10, 20))]
        repeated = [row(7, input=".[1]"), row(2)]
        if layout == "minillm":
            write_lines(source / "raw.jsonl", [*rest, *repeated])
            write_lines(source / "valid.jsonl", held_out)
        else:
            write_lines(source / "train.jsonl", [*rest[5:], *repeated])
            write_lines(source / "valid.jsonl", rest[:5])
            write_lines(source / "test.jsonl", held_out)
    assert call(prep.dolly, out, source, *options) == 0
    numbers = {
        split: [int(r["instruction"].split()[1]) for r in rows_of(resolve_set("dolly", out, split=split))]
        for split in ("train", "valid", "test")
    }
    assert numbers == {"train": [*range(10, 20)], "valid": [*range(5)], "test": [*range(5, 10)]}
    assert read_manifest(out / "dolly")["dropped"] == {"train: the question of a held-out row": 2}


def test_the_quickstart_trains_on_no_held_out_question(prep: SimpleNamespace) -> None:
    data = DATA_PREP.parent / "recipes" / "data"
    train, held_out = (
        [json.loads(line) for line in (data / f"quickstart_{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "validation")
    )
    asked = {key for r in held_out for key in prep.same_question.identity(r)}
    assert len(asked) == 2 * len(held_out) and prep.same_question.without(train, asked) == train
    assert len(prep.same_question.without([*train, held_out[0] | {"output": "?"}], asked)) == len(train)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_a_question_is_the_same_in_every_form_of_unicode(prep: SimpleNamespace, form: Any) -> None:
    text = "Who wrote É\ufb01n, and where?[3]"
    plain = prep.same_question.plain
    assert plain(unicodedata.normalize(form, text)) == plain(text) == "whowroteéfinandwhere"


def test_rows_that_leave_train_do_not_count_against_the_published_number(
    prep: SimpleNamespace,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = KNOWN_SETS["glue/sst2"]
    monkeypatch.setitem(prep.glue.KNOWN_SETS, "glue/sst2", replace(known, rows={"train": 4, "validation": 2}))
    rows = [{"sentence": text, "label": 1} for text in ("Good .", "bad", "so so", "fine")]
    for name, part in (
        ("train", rows),
        ("validation", [{"sentence": "good.", "label": 1}, {"sentence": "oh", "label": 0}]),
    ):
        write_lines(tmp_path / "glue" / "sst2" / f"{name}.jsonl", part)
    assert call(prep.glue, out, tmp_path / "glue", "--tasks", "sst2", other=False) == 0
    manifest = read_manifest(out / "glue" / "sst2")
    assert manifest["counts_as_expected"] is True and manifest["files"]["train"]["rows"] == 3
    assert manifest["dropped"] == {"train: the question of a held-out row": 1}
    assert "dropped 1: train: the question of a held-out row" in capsys.readouterr().out


def test_self_instruct(
    prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream = [
        {"id": f"user_{k}", "motivation_app": "Mail", "instruction": f"Write {k}",
         "instances": [{"input": LONG if k == 1 else "", "output": f"Text {k}"}]} for k in range(4)
    ]  # fmt: skip
    source = write_lines(tmp_path / "user.jsonl", upstream)
    assert call(prep.self_instruct, out, source, "--tokenizer", tokenizer) == 0
    rows = rows_of(resolve_set("self_instruct", out))
    assert [r["id"] for r in rows] == ["user_0", "user_2", "user_3"]
    assert rows[0]["category"] == "Mail" and rows[0]["output"] == "Text 0"
    upstream[2]["instances"].append({"input": "", "output": "second"})
    assert call(prep.self_instruct, out, write_lines(tmp_path / "user.jsonl", upstream), "--tokenizer", "none") == 2
    assert "user.jsonl: line 3: field 'instances'" in capsys.readouterr().err


def test_vicuna(prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [{"question_id": k, "category": "generic", "turns": [f"Why {k}?"]} for k in (1, 2)]
    questions.append({"question_id": 3, "category": "math", "text": "How?"})
    source = write_lines(tmp_path / "question.jsonl", questions)
    assert call(prep.vicuna, out, source) == 2
    assert "--answers" in capsys.readouterr().err
    answers = [
        {"question_id": 1, "text": "Because 1"},
        {"question_id": 2, "choices": [{"turns": ["Because 2", "second turn"]}]},
        {"instruction": "How?", "output": "So"},
    ]
    assert call(prep.vicuna, out, source, "--answers", str(write_lines(tmp_path / "a.jsonl", answers))) == 0
    rows = rows_of(resolve_set("vicuna", out))
    assert [(r["id"], r["output"]) for r in rows] == [
        ("vicuna-1", "Because 1"), ("vicuna-2", "Because 2"), ("vicuna-3", "So")
    ]  # fmt: skip
    assert call(prep.vicuna, out, source, "--answers", str(write_lines(tmp_path / "b.jsonl", answers[:2]))) == 2
    assert "question.jsonl: line 3" in capsys.readouterr().err
    assert len(rows_of(resolve_set("vicuna", out))) == 3  # the failed run changed nothing


def test_unnatural_instructions(
    prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = prep.lengths.Lengths(tokenizer).of_texts
    eleven, ten = "abcdefghijk", "bcdfghjklm"
    while length([eleven])[0] > 11:
        eleven = eleven[:-1]
    while length([ten])[0] > 10:
        ten = ten[:-1]
    assert length([eleven, ten]) == [11, 10]
    core = [
        {"instruction": "Sort", "instances": [{"input": "b", "output": eleven, "constraints": "None."},
                                              {"input": "c", "output": ten, "constraints": "None."}]},
        {"instruction": "Join", "instances": [{"input": LONG, "output": eleven}, {"input": "d", "output": eleven}]},
        {"instruction": "Cut", "instances": [{"input": "e", "output": eleven}]},
    ]  # fmt: skip
    source = tmp_path / "core_data.jsonl.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("core_data.jsonl", "".join(json.dumps(item) + "\n" for item in core))
        archive.writestr("__MACOSX/._core_data.jsonl", b"\0junk")
    monkeypatch.setattr(prep.unni, "MAX_ROWS", 2)
    assert call(prep.unni, out, source, "--tokenizer", tokenizer) == 0
    rows = rows_of(resolve_set("unni", out))
    assert [(r["id"], r["input"]) for r in rows] == [("unni-00000", "b"), ("unni-00003", "d")]
    manifest = read_manifest(out / "unni")
    assert list(manifest["dropped"].values()) == [1, 1, 1] and any("core set" in rule for rule in manifest["rules"])


def test_super_natural_instructions(
    prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = tmp_path / "natural-instructions"
    (checkout / "splits" / "default").mkdir(parents=True)
    (checkout / "splits" / "default" / "test_tasks.txt").write_text("task2_b\ntask1_a\n")
    long, short = "a long enough reference text", "ab"
    instances = [{"id": f"task1-{k}", "input": f"in {k}", "output": [long, short]} for k in range(120)]
    instances[5]["output"] = [short, long]  # the FIRST reference decides
    tasks = {
        "task1_a": {"Definition": ["Name it."], "Categories": ["Title Generation"], "Instances": instances},
        "task2_b": {"Definition": "Fix it.", "Instances": [{"input": "x", "output": [long]}]},
        "task3_train": {"Definition": ["Not a test task."], "Instances": []},
    }
    for name, content in tasks.items():
        (checkout / "tasks").mkdir(exist_ok=True)
        (checkout / "tasks" / f"{name}.json").write_text(json.dumps(content))
    script = prep.s_ni
    assert call(script, out, checkout, "--tokenizer", tokenizer, "--bins", "11_,0_2") == 0
    rows = rows_of(resolve_set("s_ni", out))
    assert len(rows) == 100 and rows[0]["id"] == "task2_b-00000" and rows[1]["output"] == [long, short]
    assert rows[1] | {"output": 0} == {
        "id": "task1-0", "instruction": "Name it.", "input": "in 0", "output": 0, "category": "Title Generation",
        "task": "task1_a",
    }  # fmt: skip
    assert [r["id"] for r in rows_of(resolve_set("s_ni", out, split="test_0_2"))] == ["task1-5"]
    assert call(script, out, checkout, "--tokenizer", tokenizer) == 0
    assert not (out / "s_ni" / "test_0_2.jsonl").exists()  # no file that the manifest does not know
    (checkout / "tasks" / "task1_a.json").write_text('{"Definition": ["x"],\n"Instances": [{"input": 1,')
    assert call(script, out, checkout, "--tokenizer", tokenizer) == 2
    assert "task1_a.json: line 2: broken JSON" in capsys.readouterr().err
    assert call(script, out, checkout, "--bins", "11") == 2
    assert "Did you mean '11_'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["valid.jsonl", "test.jsonl.gz"])
def test_super_natural_instructions_from_a_folder_with_one_file(
    prep: SimpleNamespace, out: Path, tmp_path: Path, tokenizer: str, name: str
) -> None:
    rows = [row(k, output=["a long enough reference text", "ab"]) for k in range(3)]
    source = write_lines(tmp_path / "sinst" / name, rows).parent
    assert call(prep.s_ni, out, source, "--tokenizer", tokenizer) == 0
    assert [r["instruction"] for r in rows_of(resolve_set("s_ni", out))] == ["Do 0", "Do 1", "Do 2"]
    assert [file["name"] for file in read_manifest(out / "s_ni")["source"]["files"]] == [name]


@pytest.mark.parametrize("script", ["unni", "s_ni"])
def test_short_answers_are_no_long_ones_even_if_nothing_is_counted(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl", [row(k, output="Yes" if k else "a long enough reference") for k in range(9)]
    )
    assert call(getattr(prep, script), out, source, "--tokenizer", "none") == 2
    message = capsys.readouterr().err
    assert "8 of 9 rows" in message and "fewer than 11 bytes" in message and no_files(out)
    write_lines(source, [row(k, output="Yes" if k == 0 else "a long enough reference") for k in range(9)])
    assert call(getattr(prep, script), out, source, "--tokenizer", "none") == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_examples(prep: SimpleNamespace, capsys: pytest.CaptureFixture[str], script: str) -> None:
    with pytest.raises(SystemExit):
        getattr(prep, script).main(["--help"])
    assert f"\n    dts-hf prepare {script} --" in capsys.readouterr().out


TSV = {
    "cola/CoLA": "gj04\t1\t\tIt \"runs.\ngj04\t0\t*\tRuns it. \n",
    "sst2/SST-2": "sentence\tlabel\na fine film \t1\ndull\t0\n",
    "mrpc/MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe \"said\tHe did say\n0\t3\t4\tA\tB\n",
    "stsb/STS-B": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA dog\tA cat\t2.500\n1\tx\tOne\tOne\t5\n",
    "qqp/QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n9\t1\t2\tWhy?\tWhat for?\t1\n8\t3\n7\t1\t2\tA?\tB?\t0\n",
    "mnli/MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tP\tH\tx\tcontradiction\n1\tP\tH\tx\tneutral\n",
    "qnli/QNLI": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWho?\tBlue.\tnot_entailment\n",
    "rte/RTE": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tA.\tA.\tentailment\n",
    "wnli/WNLI": "index\tsentence1\tsentence2\tlabel\n0\tIt is.\tIce is.\t0\n1\tIt was.\tIce was.\t1\n",
}  # fmt: skip
LABELS = {"cola": [1, 0], "sst2": [1, 0], "mrpc": [1, 0], "stsb": [2.5, 5.0], "qqp": [1, 0], "mnli": [2, 1],
          "qnli": [0, 1], "rte": [1, 0], "wnli": [0, 1]}  # fmt: skip


def of_train(text: str, task: Any) -> str:
    """The lines of ``text`` with other questions: those of validation would leave train."""
    lines = [line.split("\t") for line in text.splitlines()]
    first = 0 if isinstance(task.label, int) else 1
    places = [column if first == 0 else lines[0].index(column) for column in task.columns.values()]
    for cells in lines[first:]:
        for place in places:
            if place < len(cells):
                cells[place] += "trained on"
    return "".join("\t".join(cells) + "\n" for cells in lines)


@pytest.mark.parametrize("layout", ["folder", "zip", "parquet", "rows"])
def test_glue(prep: SimpleNamespace, out: Path, tmp_path: Path, layout: str) -> None:
    source = tmp_path / "glue_data"
    tsv_names = prep.glue.TSV_NAMES
    for key, text in TSV.items():
        task, folder = key.split("/")
        splits = KNOWN_SETS[f"glue/{task}"].rows
        text_of = {split: of_train(text, prep.glue.TASKS[task]) if split == "train" else text for split in splits}
        if layout == "folder":
            (source / folder).mkdir(parents=True)
            for split in splits:
                (source / folder / tsv_names[split]).write_text(text_of[split], encoding="utf-8", newline="")
        elif layout == "zip":
            source.mkdir(exist_ok=True)
            with zipfile.ZipFile(source / f"{folder}.zip", "w") as archive:
                for split in splits:
                    archive.writestr(f"{folder}/{tsv_names[split]}", text_of[split])
        else:
            job = SimpleNamespace(dropped={"line with too few fields": 0})
            table = prep.glue.TASKS[task]
            for split in splits:
                rows = [r for _, r in prep.glue.read_tsv(text_of[split].encode(), "x", table, job)]
                if layout == "rows":
                    write_lines(source / task / f"{split}.jsonl.gz", rows)
                else:
                    write_parquet(source / task / f"{split}-00000-of-00001.parquet", rows)
    assert call(prep.glue, out, source) == 0
    for task, labels in LABELS.items():
        prepared = resolve_set(f"glue/{task}", out)
        rows = [json.loads(line) for line in prepared.path.read_text(encoding="utf-8").splitlines()]
        assert [r["label"] for r in rows] == labels and [type(r["label"]) for r in rows] == [type(x) for x in labels]
        assert [set(r) for r in rows] == [{"id", "idx", "label", *prep.glue.TASKS[task].columns}] * 2
        split = KNOWN_SETS[f"glue/{task}"].split
        second = 2 if task == "qqp" else 1  # QQP's broken line keeps its number
        assert [r["id"] for r in rows] == [f"{task}-{split}-0", f"{task}-{split}-{second}"]
    cola, sst2, mrpc = (resolve_set(f"glue/{task}", out).path.read_text("utf-8") for task in ("cola", "sst2", "mrpc"))
    assert [json.loads(line)["sentence"] for line in cola.splitlines()] == ['It "runs.', "Runs it. "]
    assert json.loads(sst2.split("\n")[0])["sentence"] == "a fine film "  # GLUE's trailing space
    assert json.loads(mrpc.split("\n")[0])["sentence1"] == 'He "said'
    if layout in ("folder", "zip"):
        assert read_manifest(out / "glue" / "qqp")["dropped"] == {"line with too few fields": 2}
    assert set(read_manifest(out / "glue" / "mnli")["files"]) == {
        "train",
        "validation_matched",
        "validation_mismatched",
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n", "dev.tsv: line 2: label: got 'maybe'"),
        (
            "index\tsentence1\tlabel\n0\tA\tentailment\n",
            "dev.tsv: line 1: no column 'sentence2'; found 'index', 'sentence1', 'label'",
        ),
        ("index\tsentence1\tsentence2\tlabel\n", "no rows are left for validation"),
    ],
)
def test_glue_refuses(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text(text)
    assert call(prep.glue, out, tmp_path, "--tasks", "rte", "--without", "train") == 2
    assert expected in capsys.readouterr().err and no_files(out)


# --------------------------------------------------------------------------------- counts, checksums, damaged sources


def test_other_counts_are_refused_and_both_are_named(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [row(k) for k in range(79)])
    assert call(prep.vicuna, out, source, other=False) == 2
    assert "test has 79 rows, expected 80" in capsys.readouterr().err and no_files(out)
    write_lines(source, [row(k) for k in range(80)])
    assert call(prep.vicuna, out, source, other=False) == 0
    assert read_manifest(out / "vicuna")["counts_as_expected"] is True


def test_checksums(prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [row(1)])
    content = source.read_bytes()
    good = (hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    for digest in good:
        wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
        assert call(prep.vicuna, out, source, "--checksum", wrong) == 2
        message = capsys.readouterr().err
        assert "rows.jsonl: wrong checksum" in message and digest in message and wrong in message and no_files(out)
    for digest in good:
        assert call(prep.vicuna, out, source, "--checksum", digest.upper()) == 0
    assert call(prep.vicuna, out, source, "--checksum", "abc") == 2


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "zip"])
def test_truncated_files_are_refused(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source, rows = tmp_path / f"rows.{kind}", [row(k) for k in range(50)]
    if kind == "parquet":
        write_parquet(source, rows)
    elif kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("core.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    else:
        write_lines(source, rows)
    source.write_bytes(source.read_bytes()[: -9 if kind == "jsonl" else -60])
    assert call(prep.unni, out, source, "--tokenizer", "none") == 2
    message = capsys.readouterr().err
    assert f"rows.{kind}" in message and no_files(out)
    if kind.startswith("jsonl"):
        assert "line " in message


@pytest.mark.parametrize(
    "name", ["../evil.jsonl", "/etc/evil.jsonl", "a/../../evil.jsonl", "..\\evil.jsonl", "C:\\e.jsonl"]
)
def test_zip_members_that_lead_outside_are_refused(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = tmp_path / "core.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("core.jsonl", json.dumps(row(1)) + "\n")
        archive.writestr(name, json.dumps(row(2)) + "\n")
    assert call(prep.unni, out, source, "--tokenizer", "none") == 2
    assert "leads out of its folder" in capsys.readouterr().err and no_files(out)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"instruction": "x"}, "rows.jsonl: line 2: field 'output' is missing"),
        ({"instruction": "", "output": "y"}, "rows.jsonl: line 2: field 'instruction' is empty"),
        ([1], "rows.jsonl: line 2: expected an object"),
        ({"id": "one", "instruction": "x", "output": "y"}, "the id 'one' is already used by"),
    ],
)
def test_wrong_rows_are_named(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: Any, expected: str
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [row(1, id="one"), bad])
    assert call(prep.vicuna, out, source) == 2
    assert expected in capsys.readouterr().err and no_files(out)


def test_missing_sources_and_tokenizers(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [row(1)])
    assert call(prep.vicuna, out, tmp_path / "row.jsonl") == 2
    assert "Did you mean 'rows.jsonl'?" in capsys.readouterr().err
    assert call(prep.dolly, out, tmp_path, "--tokenizer", "none") == 2
    assert "there is no train.jsonl or train.jsonl.gz in it; found rows.jsonl" in capsys.readouterr().err
    assert call(prep.self_instruct, out, source, "--tokenizer", str(tmp_path / "nothing")) == 2
    assert "--tokenizer: " in capsys.readouterr().err
    assert call(prep.glue, out, tmp_path, "--tasks", "sst") == 2
    assert "Did you mean 'sst2'?" in capsys.readouterr().err
    # Without a tokenizer the rule is left out, and the manifest says so.
    assert call(prep.self_instruct, out, source, "--tokenizer", "none") == 0
    manifest = read_manifest(out / "self_instruct")
    assert manifest["tokenizer"] is None and manifest["rules"][0].startswith("NOT applied")


# ------------------------------------------------------------------------------------------------- nothing half-written


def splits_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.jsonl")}


def test_a_second_run_changes_nothing(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "secret_folder" / "rows.jsonl", [row(k, output=["a ü", "b"]) for k in range(3)])
    assert call(prep.vicuna, out, source) == 0 and call(prep.vicuna, tmp_path / "again", source) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "vicuna").iterdir()}
    assert call(prep.vicuna, out, source) == 0 and "nothing changed" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "vicuna").iterdir()}
    for path, (content, _) in before.items():
        assert (tmp_path / "again" / "vicuna" / path.name).read_bytes() == content
    assert "secret_folder" not in (out / "vicuna" / "manifest.json").read_text()
    # A file that somebody changed is written again.
    (out / "vicuna" / "test.jsonl").write_text("{}\n")
    assert call(prep.vicuna, out, source) == 0
    assert (out / "vicuna" / "test.jsonl").read_bytes() == before[out / "vicuna" / "test.jsonl"][0]


@pytest.mark.parametrize("step", range(5))
def test_an_exception_anywhere_leaves_the_old_set_or_none(
    prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    source = tmp_path / "source"
    for number, split in enumerate(("train", "valid", "test")):
        write_lines(source / f"{split}.jsonl", [row(10 + number)])
    assert call(prep.dolly, out, source, "--tokenizer", "none") == 0
    old = splits_in(out / "dolly")
    for number, split in enumerate(("train", "valid", "test")):
        write_lines(source / f"{split}.jsonl", [row(20 + number)])
    calls = []

    def failing(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls.append(function)
            if len(calls) == step + 2:  # writes and renames: the second to the sixth
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(Path.write_bytes))
        patch.setattr(os, "replace", failing(os.replace))
        assert call(prep.dolly, out, source, "--tokenizer", "none") == 2
    if read_manifest(out / "dolly"):
        assert splits_in(out / "dolly") == old and step < 2
    else:
        with pytest.raises(UserError, match="not prepared"):
            resolve_set("dolly", out)
    assert not list((out / "dolly").glob(".*"))
    assert call(prep.dolly, out, source, "--tokenizer", "none") == 0
    assert [r["instruction"] for r in rows_of(resolve_set("dolly", out))] == ["Do 22"]


def test_kill_between_two_files(prep: SimpleNamespace, out: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, split in enumerate(("train", "valid", "test")):
        write_lines(source / f"{split}.jsonl", [row(10 + number)])
    code = (
        "import os, signal, sys; from dts_hf.data_prep import dolly\n"
        "replace, done = os.replace, []\n"
        "def killing(*a):\n"
        "    done.append(a)\n"
        "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(*a)\n"
        "os.replace = killing\n"
        "dolly.main(['--source', sys.argv[1], '--output', sys.argv[2], '--tokenizer', 'none', '--allow-other-counts'])"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(source), str(out)], timeout=120, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not read_manifest(out / "dolly") and list((out / "dolly").glob(".*.tmp"))
    assert call(prep.dolly, out, source, "--tokenizer", "none") == 0
    assert sorted(path.name for path in (out / "dolly").iterdir()) == [
        "manifest.json", "test.jsonl", "train.jsonl", "valid.jsonl",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- finding a set


def test_resolve_set(prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"self_instruct: this set is not prepared.*\n  dts-hf prepare self_instruct"):
        resolve_set("SelfInst", out)
    source = write_lines(tmp_path / "mine.jsonl.gz", [row(1), row(2)])
    assert call(prep.self_instruct, out, source, "--tokenizer", "none") == 0
    monkeypatch.setenv("DTS_HF_DATA", str(out))
    prepared = resolve_set("self-instruct")
    assert (prepared.name, prepared.path, prepared.rows) == ("self_instruct", out / "self_instruct" / "test.jsonl", 2)
    by_path = resolve_set(source)
    assert (by_path.name, by_path.rows) == ("mine", 2) and by_path.manifest["sha256"] == file_sha256(source)
    with pytest.raises(UserError, match=r"no split 'train' of self_instruct; found test"):
        resolve_set("self_instruct", split="train")
    with pytest.raises(UserError, match=r"got 'dolyl', expected dolly.*Did you mean 'dolly'\?"):
        resolve_set("dolyl")
    with pytest.raises(UserError, match=r"no such file\. Did you mean 'mine\.jsonl\.gz'\?"):
        resolve_set(tmp_path / "mine.jsonl")
    prepared.path.write_text(prepared.path.read_text().replace("Do 1", "Do 9"))
    with pytest.raises(UserError, match="was changed since it was prepared"):
        resolve_set("self_instruct")
    prepared.path.unlink()
    with pytest.raises(UserError, match="is missing"):
        resolve_set("self_instruct")
    (out / "self_instruct" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        resolve_set("self_instruct")


def test_list_sets(prep: SimpleNamespace, out: Path, tmp_path: Path) -> None:
    assert call(prep.vicuna, out, write_lines(tmp_path / "rows.jsonl", [row(1)])) == 0
    listed = {item["name"]: item for item in list_sets(out)}
    assert set(listed) == set(KNOWN_SETS) and all(item["about"] for item in listed.values())
    assert listed["vicuna"]["state"] == "prepared, other counts than published"
    assert listed["vicuna"]["rows"] == "test 1" and listed["vicuna"]["where"] == str(out / "vicuna")
    assert listed["glue/sst2"]["where"] == "dts-hf prepare glue --tasks sst2"
    assert listed["dolly"]["rows"] == "train 11,435, valid 1,000, test 500"
    (out / "vicuna" / "test.jsonl").write_text("")
    assert {item["name"]: item for item in list_sets(out)}["vicuna"]["state"].startswith("broken: test.jsonl")
    (out / "vicuna" / "manifest.json").write_text('{"files": {"test": "test.jsonl"}}')
    assert {item["name"]: item for item in list_sets(out)}["vicuna"]["state"].startswith("broken: manifest.json")
    with pytest.raises(UserError, match="no split 'test' of vicuna; found none"):
        resolve_set("vicuna", out)
    (out / "dolly").mkdir()
    (out / "dolly" / "manifest.json").write_text("{")
    assert {item["name"]: item for item in list_sets(out)}["dolly"]["state"].startswith("broken: ")


def test_every_set_is_in_the_tables(prep: SimpleNamespace) -> None:
    readme = (DATA_PREP / "README.md").read_text(encoding="utf-8")
    for known in KNOWN_SETS.values():
        assert importlib.import_module(f"dts_hf.data_prep.{known.prepare}").arguments() is not None
        for count in known.rows.values():
            assert f"{count:,}" in readme, f"{known.name}: the README must state {count:,} rows"
    for name, upstream in prep.upstream.UPSTREAM.items():
        for word in (name, upstream.address, upstream.original, upstream.blob, upstream.revision or "not pinned"):
            assert word is None or word in readme, f"{name}: the README must name {word}"


@pytest.mark.parametrize("script", sorted(DATA_PREP.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_of_earlier_versions_still_work(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "dts-hf prepare" in done.stdout


def test_another_edition_of_the_default_file_is_said(
    prep: SimpleNamespace, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "valid.jsonl", [row(k) for k in range(80)])
    known = prep.upstream.UPSTREAM["vicuna"]
    for blob, said in ((prep.download.git_blob(source), False), (known.blob, True)):
        monkeypatch.setitem(prep.upstream.UPSTREAM, "vicuna", known._replace(address=str(source), blob=blob))
        assert prep.vicuna.main(["--output", str(out)]) == 0
        assert any("another edition" in rule for rule in read_manifest(out / "vicuna")["rules"]) is said


def test_a_row_without_the_field_names_those_it_has(
    prep: SimpleNamespace, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "glue" / "sst2" / "train.jsonl", [{"text": "fine", "label": 1}])
    write_lines(tmp_path / "glue" / "sst2" / "validation.jsonl", [{"sentence": "fine", "label": 1}])
    assert call(prep.glue, out, tmp_path / "glue", "--tasks", "sst2") == 2
    assert "no field 'sentence'; found 'text', 'label'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "file"),
    [("self_instruct", "user_oriented_instructions.jsonl"), ("unni", "test.jsonl"), ("vicuna", "test.jsonl"),
     ("s_ni", "valid.jsonl")],
)  # fmt: skip
def test_every_set_reads_a_folder(prep: SimpleNamespace, out: Path, tmp_path: Path, script: str, file: str) -> None:
    rows = [row(k, output="a reference of more than eleven bytes") for k in range(3)]
    write_lines(tmp_path / "folder" / file, rows)
    options = [] if script == "vicuna" else ["--tokenizer", "none"]
    assert call(getattr(prep, script), out, tmp_path / "folder", *options) == 0
    assert len(rows_of(resolve_set(script, out))) == 3


# ------------------------------------------------------------------------------------------------------ the real rows


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("script", "name", "source", "counts", "published"),
    [
        ("dolly", "dolly", "dolly", {"train": 13_947, "valid": 500, "test": 450}, False),
        ("self_instruct", "self_instruct", "self_inst/test.jsonl", {"test": 252}, False),
        ("vicuna", "vicuna", "vicuna/test.jsonl", {"test": 80}, True),
        ("s_ni", "s_ni", "s_ni/test_11plus.jsonl", {"test": 1_525}, False),
        ("unni", "unni", "uinst/test_11plus_head.jsonl", {"test": 44}, False),
    ],
)
def test_the_five_sets_from_real_rows(
    prep: SimpleNamespace, out: Path, shared_data_dir: Path, script: str, name: str, source: str,
    counts: dict[str, int], published: bool,
) -> None:  # fmt: skip
    options = [] if script == "vicuna" else ["--tokenizer", "none"]
    assert call(getattr(prep, script), out, shared_data_dir / source, *options, other=not published) == 0
    manifest = read_manifest(out / name)
    assert {split: entry["rows"] for split, entry in manifest["files"].items()} == counts
    assert manifest["counts_as_expected"] is published
    for split, count in counts.items():
        prepared = resolve_set(name, out, split=split)
        assert len(load_rows(prepared.path)) == count
    if name == "s_ni":
        assert any(isinstance(r["output"], list) and len(r["output"]) > 1 for r in rows_of(resolve_set(name, out)))


@pytest.mark.shared_data
@pytest.mark.parametrize("marks", [pytest.param("as published", marks=pytest.mark.soak), "everywhere"])
def test_no_real_test_row_of_dolly_is_left_in_train(
    prep: SimpleNamespace, out: Path, shared_data_dir: Path, tmp_path: Path, marks: str
) -> None:
    """Databricks' file as it is now: MiniLLM's rows are among it, their bracketed marks taken out."""
    folder = shared_data_dir / "dolly"
    held_out = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        train = [json.loads(line) for line in file]
    made = [
        r | {"input": f'{r["input"]}"[1] ' if number % 2 else re.sub(r"(?<=[.,;)])(?= )", "[2][a]", r["input"])}
        for number, r in enumerate(held_out)
    ]
    test = held_out if marks == "as published" else made
    raw = []
    for r in held_out:
        context = re.sub(r"\[(\d+|[a-z])\]", "", r["input"])
        raw.append({"instruction": r["instruction"], "context": context, "response": r["output"] + "."})
    answers_differ = [r | {"output": f"{number}"} for number, r in enumerate(test)]  # the question has to tell
    others = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in train]
    source = write_lines(tmp_path / "databricks-dolly-15k.jsonl", [*others[:7_000], *raw, *others[7_000:]])
    file_of_test = write_lines(tmp_path / "valid.jsonl", answers_differ)
    assert call(prep.dolly, out, source, "--tokenizer", "none", "--test", str(file_of_test)) == 0
    kept = [r for split in ("valid", "train") for r in rows_of(resolve_set("dolly", out, split=split))]
    left = {f"dolly-{number:05d}" for number in range(7_000, 7_000 + len(raw))} & {r["id"] for r in kept}
    assert not left, f"{len(left)} of {len(raw)} test questions are left"
    assert len(train) - len(kept) <= 25  # and hardly anything else leaves: questions that were asked twice


@pytest.mark.shared_data
def test_the_real_file_of_short_answers_is_refused(
    prep: SimpleNamespace, out: Path, shared_data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data_dir / "uinst" / "test_short.jsonl"
    assert call(prep.unni, out, source, "--tokenizer", "none") == 2
    assert "of 945 rows have a first reference of fewer than 11 bytes" in capsys.readouterr().err


@pytest.mark.shared_data
def test_gpt2_length_rule_on_real_rows(prep: SimpleNamespace, out: Path, shared_data_dir: Path) -> None:
    folder = os.environ.get("DTS_HF_GPT2_TOKENIZER")
    if not folder:
        pytest.skip("DTS_HF_GPT2_TOKENIZER names no folder with GPT-2's vocab.json and merges.txt")
    source = shared_data_dir / "self_inst" / "test.jsonl"
    assert call(prep.self_instruct, out, source, "--tokenizer", folder, other=False) == 0  # 252 -> 242
    manifest = read_manifest(out / "self_instruct")
    assert manifest["counts_as_expected"] is True and manifest["tokenizer"]["is_gpt2"] is True
    source = shared_data_dir / "s_ni" / "test_11plus.jsonl"
    assert call(prep.s_ni, out, source, "--tokenizer", folder) == 0
    assert read_manifest(out / "s_ni")["dropped"] == {}


@pytest.mark.shared_data
def test_glue_from_real_rows(prep: SimpleNamespace, out: Path, shared_data_dir: Path, tmp_path: Path) -> None:
    # CoLA has 19 and STS-B 6 rows of validation in train: they leave it.
    complete = {"cola": (8_532, 1_043), "mrpc": (3_668, 408), "rte": (2_490, 277), "stsb": (5_743, 1_500),
                "wnli": (635, 71)}  # fmt: skip
    assert call(prep.glue, out, shared_data_dir / "glue", "--tasks", ",".join(complete), other=False) == 0
    assert call(prep.glue, out, shared_data_dir / "glue", "--tasks", "sst2") == 0
    assert call(prep.glue, out, shared_data_dir / "glue", "--tasks", "qnli", "--without", "train") == 0
    parts = tmp_path / "glue"
    for task in ("mnli", "qqp"):
        (parts / task).mkdir(parents=True)
    for name in ("train.jsonl.gz", "validation.jsonl.gz"):
        (parts / "qqp" / name).write_bytes((shared_data_dir / "glue" / "qqp_subset" / name).read_bytes())
    mnli = shared_data_dir / "glue" / "mnli_subset"
    (parts / "mnli" / "train.jsonl").write_bytes((mnli / "train.jsonl").read_bytes())
    (parts / "mnli" / "validation_matched.jsonl.gz").write_bytes((mnli / "validation.jsonl.gz").read_bytes())
    assert call(prep.glue, out, parts, "--tasks", "mnli,qqp", "--without", "validation_mismatched") == 0
    expected = complete | {"sst2": (67_344, 785), "qnli": (5_463,), "mnli": (3_000, 7_469), "qqp": (25_366, 7_400)}
    for task, counts in expected.items():
        manifest = read_manifest(out / "glue" / task)
        assert tuple(entry["rows"] for entry in manifest["files"].values()) == counts
        assert manifest["counts_as_expected"] is (task in complete)
