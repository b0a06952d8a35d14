"""The quickstart's instruction set: the committed files are what the generator writes, and the split does not leak."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from dts_hf.data_prep import quickstart

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "recipes" / "data"
FIELDS = {"id", "kind", "instruction", "input", "output"}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return quickstart


@pytest.fixture(scope="module")
def splits(generator: ModuleType) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    train, validation = (
        [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
        for name in (generator.TRAIN, generator.VALIDATION)
    )
    return train, validation


def prompt(row: dict[str, str]) -> tuple[str, str]:
    return row["instruction"].strip().lower(), row["input"].strip().lower()


def test_committed_files_are_what_the_generator_writes(generator: ModuleType) -> None:
    for name, text in generator.build().items():
        assert (DATA / name).read_bytes() == text.encode("utf-8"), f"{name}: run dts-hf prepare quickstart"


def test_sizes_and_kinds(splits: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    train, validation = splits
    assert 1000 <= len(train) <= 1500
    assert len(validation) == 64
    kinds, held_out_kinds = Counter(row["kind"] for row in train), Counter(row["kind"] for row in validation)
    assert len(kinds) >= 12
    assert min(kinds.values()) >= 60
    assert kinds.keys() == held_out_kinds.keys()
    assert set(held_out_kinds.values()) == {4}


def test_every_row_is_valid(splits: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    for row in [*splits[0], *splits[1]]:
        assert set(row) == FIELDS, row
        assert all(isinstance(value, str) and value == value.strip() for value in row.values()), row
        assert row["id"] and row["kind"] and row["instruction"] and row["output"], row
        assert "*" not in row["instruction"] and " | " not in "".join(row.values()), row
        assert row["output"].isascii() and row["instruction"].isascii(), row
        assert len(row["output"].split()) <= 30, row


def test_ids_and_prompts_are_unique_and_nothing_leaks(
    splits: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    train, validation = splits
    ids = [row["id"] for row in [*train, *validation]]
    assert len(set(ids)) == len(ids)
    prompts = [prompt(row) for row in train]
    assert len(set(prompts)) == len(prompts)
    assert len({prompt(row) for row in validation}) == len(validation)
    assert not {prompt(row) for row in validation} & set(prompts)
    inputs = {row["input"].lower() for row in train} - {""}
    assert not {row["input"].lower() for row in validation} & inputs


def test_topics_are_apart(generator: ModuleType) -> None:
    items = generator.all_items()
    train = {item.topic.lower() for item in items if not item.held_out}
    assert not [item.topic for item in items if item.held_out and item.topic.lower() in train]


def test_first_rows_are_balanced(splits: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    for rows in splits:
        counts = Counter(row["kind"] for row in rows[:32])
        assert set(counts.values()) == {2}
        assert len(counts) == 16


def test_word_problems_are_right(splits: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    for row in [*splits[0], *splits[1]]:
        if row["kind"] == "arithmetic":
            before, after = row["output"].split(" = ")
            a, sign, b = before.split()[-3:]
            result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert result == int(after.split()[0]), row
            assert result > 0, row


def test_main_writes_and_checks(generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path)]
    assert generator.main([*options, "--check"]) == 2
    assert "differs" in capsys.readouterr().err
    assert generator.main(options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([generator.TRAIN, generator.VALIDATION])
    assert generator.main([*options, "--check"]) == 0


def test_readme_states_counts_and_sums(
    generator: ModuleType, splits: tuple[list[dict[str, str]], list[dict[str, str]]]
) -> None:
    readme = (ROOT / "data_prep" / "README.md").read_text(encoding="utf-8")
    train, validation = (Counter(row["kind"] for row in rows) for rows in splits)
    for kind, count in train.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| {kind} |"))
        assert line.endswith(f"| {count} | {validation[kind]} |"), line
    assert f"{sum(train.values()):,} for training, {sum(validation.values())} held out" in readme
    for name in (generator.TRAIN, generator.VALIDATION):
        checksum = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
        assert checksum in readme, f"{name}: the README must state sha256 {checksum}"
