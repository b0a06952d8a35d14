"""Several sources with weights, splits and columns: exact counts, the same rows every time, ids, manifest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dts_hf.data.manifest import manifest
from dts_hf.data.mixture import is_mixed, summary, weighted
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_many, load_mixture, load_rows
from dts_hf.distill import distill
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.evaluation.evaluate import _load_rows
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.recipe.schema import Recipe, Source
from dts_hf.runs.comparison import check_same_rows
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.start import _check_same
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer


def rows(count: int) -> list[Row]:
    return [Row(f"r{k}", f"q{k}", "", ("a",)) for k in range(count)]


def write(path: Path, count: int, **more: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"question": f"q{k}", "answer": path.stem, **more}) + "\n" for k in range(count))
    )
    return str(path)


@given(count=st.integers(1, 40), hundredths=st.integers(1, 350))
def test_counts_are_exact_and_even(count: int, hundredths: int) -> None:
    expected = (2 * hundredths * count + 100) // 200  # round half up, in whole numbers
    if not expected:
        with pytest.raises(UserError, match=f"s: a weight of .* leaves none of its {count} rows"):
            weighted(rows(count), hundredths / 100, "s")
        return
    mixed = weighted(rows(count), hundredths / 100, "s")
    times = Counter(row.instruction for row in mixed)
    assert len(mixed) == expected == len({row.id for row in mixed})
    assert max(times.values()) - min(times.values() if len(times) == count else [0]) <= 1


def test_ids_and_order() -> None:
    assert [row.id for row in weighted(rows(2), 2, "s")] == ["r0", "r1", "r0#2", "r1#2"]
    assert weighted(rows(3), 1, "s") == rows(3)
    half = [row.id for row in weighted(rows(100), 0.5, "s")]
    assert half == sorted(half, key=lambda name: int(name[1:])) and len(half) == 50
    # As good as random, and written out: another version of Python, another process and another seed have these, too
    assert half[:8] == [row.id for row in weighted(rows(100), 0.5, "s")][:8]
    assert set(half) == {row.id for row in weighted(rows(100)[::-1], 0.5, "s")}
    assert 15 <= sum(int(name[1:]) < 50 for name in half) <= 35
    more = {row.id for row in weighted(rows(100), 0.6, "s")}
    assert more > set(half)
    both = [row.id for row in weighted(rows(4), 2.5, "s")]
    assert both[:8] == ["r0", "r1", "r2", "r3", "r0#2", "r1#2", "r2#2", "r3#2"] and len(both) == 10
    assert all(name.endswith("#3") for name in both[8:])


def test_a_mixture_of_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", 4), write(tmp_path / "b.jsonl", 3)
    mixture = load_mixture([Source(source=first, weight=0.5), second, Source(source=first, weight=2)])
    assert Counter(row.id.split("-")[0] for row in mixture.rows) == {"a": 2, "b": 3, "a.2": 8}
    assert [(part.rows, part.used) for part in mixture.parts] == [(4, 2), (3, 3), (4, 8)]
    assert is_mixed(mixture.parts) and summary(mixture.parts) == (
        f"mixed 13 rows: 2 of {Path(first).name} (4 rows x 0.5); 3 of b.jsonl; 8 of a.jsonl (4 rows x 2)"
    )
    assert not is_mixed(load_mixture(first).parts) and load_mixture([first]).rows == load_rows(first)
    # A limit is of them all, the first ones, and does not change which half is taken.
    assert load_many([Source(source=first, weight=0.5), second], limit=3) == mixture.rows[:3]
    assert load_many([Source(source=first, weight=0.5)], limit=1) == mixture.rows[:1]


def test_files_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    sources = [write(tmp_path / folder / "train.jsonl", 2) for folder in ("a", "b")]
    assert [row.id for row in load_many(sources)] == ["train-1", "train-2", "train.2-1", "train.2-2"]
    assert [row.id for row in load_rows(f"{tmp_path}/*/train.jsonl")][2] == "train.2-1"
    own = [write(tmp_path / folder / "own.jsonl", 1, id=1) for folder in ("a", "b")]
    with pytest.raises(UserError, match=r"the id '1' is already used by .*data\.columns: \{id: null\}"):
        load_many(own)
    assert [row.id for row in load_many(own, columns={"id": None})] == ["own-1", "own.2-1"]


def test_columns_and_split_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("ask,gold\na,b\n")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "set" / f"{split}.jsonl", 1)
    mixed = load_many(
        [
            Source(source=str(tmp_path / "mine.csv"), columns={"instruction": "ask", "output": "gold"}),
            Source(source=str(tmp_path / "set"), split="test"),
            str(tmp_path / "set"),
        ],
        columns={"answer": "answer"},
    )
    assert [row.response for row in mixed] == ["b", "test", "train"]
    with pytest.raises(UserError, match=r"mine\.csv: split: got 'test', but one file has no splits"):
        load_many([Source(source=str(tmp_path / "mine.csv"), split="test")])


def test_the_manifest_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), 4)
    write(Path("b.jsonl"), 3)

    def described(*sources: Any) -> dict[str, Any]:
        mixture = load_mixture(sources)
        return manifest(sources, mixture.rows, parts=mixture.parts)

    halves = described(Source(source="a.jsonl", weight=0.5), "b.jsonl")
    assert halves["source"] == ["a.jsonl", "b.jsonl"] and halves["rows"] == 5
    assert halves["mixture"] == [
        {"source": "a.jsonl", "weight": 0.5, "rows": 4, "used": 2},
        {"source": "b.jsonl", "weight": 1.0, "rows": 3, "used": 3},
    ]
    assert "mixture" not in described("a.jsonl")
    # Other weights or columns are other data, also where the number of rows is the same: a run is not resumed on them.
    digests = {
        described(*sources)["sha256"]
        for sources in (
            ("a.jsonl", "b.jsonl"),
            (Source(source="a.jsonl", weight=2), "b.jsonl"),
            ("a.jsonl", Source(source="b.jsonl", weight=2)),
            (Source(source="a.jsonl", columns={"response": "answer"}), "b.jsonl"),
            (Source(source="a.jsonl", columns={"output": "answer"}), "b.jsonl"),
        )
    }
    assert len(digests) == 5
    assert described(Source(source="a.jsonl"), "b.jsonl") == described("a.jsonl", "b.jsonl")


# ------------------------------------------------------------------------------------------ a run


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher on the disk, and rows as people have them."""
    tiny_llama(layers=2).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("ask,gold\n" + "".join(f"Say {k},It is {k}.\n" for k in range(8)))
    write(Path("theirs.jsonl"), 4)
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    Path("held.json").write_text(json.dumps([{"conversations": talk}, {"conversations": talk}]))
    return tmp_path


def mixed_recipe(**data: Any) -> Recipe:
    columns = {"instruction": "ask", "output": "gold"}
    first = {"source": "mine.csv", "weight": 0.5, "columns": columns}
    values = {"train": [first, {"source": "theirs.jsonl", "weight": 2}], "validation": "held.json", **data}
    return recipe(data=values, training={"max_steps": 2}, evaluation={"models": [], "every_steps": None},
                  output={"report": False})  # fmt: skip


def test_a_run_on_a_mixture(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = mixed_recipe()
    run = distill(made)
    train = run.read_data_manifest()["splits"]["train"]
    assert (train["rows"], train["source"]) == (12, ["mine.csv", "theirs.jsonl"])
    assert [(part["rows"], part["used"], part["weight"]) for part in train["mixture"]] == [(8, 4, 0.5), (4, 8, 2.0)]
    line = "data.train: mixed 12 rows: 4 of mine.csv (8 rows x 0.5); 8 of theirs.jsonl (4 rows x 2)"
    assert line in " ".join(capsys.readouterr().err.split())
    assert run.read_recipe().data == made.data
    # A weight is not changed in the middle of a run, whatever the number of rows.
    other = mixed_recipe(train=[{"source": "mine.csv", "weight": 1, "columns": {"instruction": "ask", "output": "gold"}},
                                {"source": "theirs.jsonl"}])  # fmt: skip
    again = load_mixture(other.data.train)
    assert len(again.rows) == 12
    with pytest.raises(UserError, match="the rows of 'train' have changed since this run was started"):
        check_same_rows(run, {"splits": {"train": manifest(other.data.train, again.rows, parts=again.parts)}})


def test_a_moved_file_is_the_same_run_and_another_weight_is_not(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"source": "theirs.jsonl", "weight": 2, "columns": {"question": "question"}}
    was = mixed_recipe(train=source)
    args = LanguageModeling(was).training_arguments("run")
    _check_same(was, mixed_recipe(train={**source, "source": "moved.jsonl"}), args, RunDirectory(workplace / "run"))
    assert "resumed with data.train.source" in capsys.readouterr().err
    for change in ({"weight": 1}, {"split": "test"}, {"columns": {"question": "answer"}}):
        with pytest.raises(UserError, match=rf"data\.train\.{next(iter(change))}"):
            _check_same(was, mixed_recipe(train={**source, **change}), args, RunDirectory(workplace / "run"))


def test_held_out_rows_are_read_with_their_columns_again(workplace: Path) -> None:
    """When a finished run is evaluated."""
    held_out = {"source": "mine.csv", "columns": {"instruction": "ask", "output": "gold"}}
    made = mixed_recipe(validation=held_out)
    rows = LanguageModeling(made).load_rows()
    assert [row.response for row in rows.validation] == [f"It is {k}." for k in range(8)]
    read = _load_rows("run", made, EvaluationOptions(rows=20))  # the recipe's evaluation.rows are fewer
    assert [row.id for row in read["validation"]] == [row.id for row in rows.validation]


def test_the_doctor_tells_what_was_mixed(workplace: Path) -> None:
    Path("recipe.yaml").write_text(mixed_recipe().to_yaml())
    check = diagnose("recipe.yaml")["rows"]
    assert "4 of mine.csv (8 rows x 0.5); 8 of theirs.jsonl (4 rows x 2)" in check.summary
    assert [part["used"] for part in check.values["mixture"]] == [4, 8]


def test_a_share_that_is_held_out_has_its_own_part_of_each_source(workplace: Path) -> None:
    splits = distill(mixed_recipe(validation=0.3)).read_data_manifest()["splits"]
    rows = LanguageModeling(mixed_recipe(validation=0.3)).load_rows()
    for name, of_split in (("train", rows.train), ("validation", rows.validation)):
        of_mine = sum(row.instruction.startswith("Say") for row in of_split)
        described = splits[name]
        assert described["rows"] == len(of_split) > 0
        assert [part["used"] for part in described["mixture"]] == [of_mine, len(of_split) - of_mine]
    assert splits["train"]["sha256"] == splits["validation"]["sha256"]
