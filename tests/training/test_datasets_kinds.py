"""Whatever people keep rows in gives the numbers of the list: training rows, held-out rows, ``evaluate`` and ``predict``."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from torch.utils.data import Dataset

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.data.containers import as_rows
from dts_hf.data.sources import rows_from_dataset
from dts_hf.errors import UserError
from tests.support.classifiers import SST2, classifier
from tests.support.classifiers import rows_of as labelled_rows
from tests.support.streams import Stream, as_function, as_stream
from tests.support.tiny import tiny_tokenizer
from tests.support.trainers import ROWS, arguments, losses, plain, trainer_for

EVAL = ("loss", "kl", "ce_loss", "rows", "labels")
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
    for row in ROWS
]


class Numbered(Dataset):  # type: ignore[type-arg]
    """Read by number alone."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Polars:
    """What is used of a polars data frame."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def to_dicts(self) -> Any:
        return self.rows


def hf(rows: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def transformed(rows: Any) -> datasets.Dataset:
    """Rows that are made as they are read, of a column that is none of ours."""
    data = datasets.Dataset.from_dict({"number": list(range(len(rows)))})

    def transform(batch: Any) -> Any:
        chosen = [rows[number] for number in batch["number"]]
        return {name: [row[name] for row in chosen] for name in chosen[0]}

    return data.with_transform(transform)


MAKES: dict[str, Any] = {
    "Row": lambda rows: rows_from_dataset(rows),
    "deque": deque,
    "read by number": Numbered,
    "datasets": hf,
    "numpy format": lambda rows: hf(rows).with_format("numpy"),
    "torch format": lambda rows: hf(rows).with_format("torch"),
    "pandas format": lambda rows: hf(rows).with_format("pandas"),
    "arrow format": lambda rows: hf(rows).with_format("arrow"),
    "transform": transformed,
    "pandas": pd.DataFrame,
    "polars": Polars,
    "arrow": pa.Table.from_pylist,
    "stream": Stream,
    "streamed datasets": as_stream,
    "streamed torch format": lambda rows: as_stream(rows).with_format("torch"),
    "streamed arrow format": lambda rows: as_stream(rows).with_format("arrow"),
    "function": as_function,
}


@pytest.fixture(scope="module")
def of_lists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the rows give as lists: losses of training, and held-out numbers."""
    return {
        name: measured(tmp_path_factory.mktemp("lists"), rows, rows[:5])
        for name, rows in (("rows", ROWS), ("conversations", CONVERSATIONS))
    }


def measured(folder: Path, rows: Any, held_out: Any) -> dict[str, Any]:
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    trainer = trainer_for(folder, rows=rows, eval_dataset={"named": held_out}, options=options)
    start = trainer.evaluate(held_out), trainer.predict(held_out).metrics, trainer.evaluate()
    numbers = [
        [values[f"{prefix}_{name}"] for name in EVAL]
        for values, prefix in zip(start, ("eval", "test", "eval_named"), strict=True)
    ]
    trainer.train()
    return {"held out": numbers, "losses": losses(trainer)}


@pytest.mark.parametrize("make", MAKES)
def test_raw_rows_may_be_kept_in_anything(tmp_path: Path, of_lists: dict[str, Any], make: str) -> None:
    kind = "conversations" if make.endswith(("pandas", "numpy format", "torch format")) else "rows"
    rows = CONVERSATIONS if kind == "conversations" else ROWS  # nested ones where they might come as arrays
    found = measured(tmp_path, MAKES[make](rows), MAKES[make](rows[:5]))
    assert found["losses"] == of_lists[kind]["losses"]
    for ours, expected in zip(found["held out"], of_lists[kind]["held out"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-6)


def test_columns_by_other_names(tmp_path: Path) -> None:
    """A list, a data set and a stream of rows whose columns have names of their own."""
    named = [{"ask": row["instruction"], "gold": row["output"], "answer": "not this"} for row in ROWS]
    columns = {"instruction": "ask", "output": "gold", "answer": None}
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    expected = trainer_for(tmp_path, options=options)
    expected.train()
    for make in (list, hf, Stream):
        trainer = trainer_for(
            tmp_path, rows=make(named), options=options, columns=columns, eval_dataset=make(named[:3])
        )
        trainer.train()
        assert losses(trainer) == losses(expected)
        assert trainer.evaluate()["eval_rows"] == 3
    with pytest.raises(UserError, match="train_dataset: row 1"):
        trainer_for(tmp_path, rows=Stream(ROWS), options=options, columns=columns)


def test_data_frames_with_gaps_and_arrays_of_arrays() -> None:
    """Parquet files bring lists as arrays, and what is missing as NaN."""
    frame = pd.DataFrame({"input": ["a", None, np.nan], "number": [1, 2, np.nan]})
    frame["messages"] = [np.array([{"role": "user", "content": "x"}], dtype=object) for _ in range(3)]
    assert as_rows(frame, "train_dataset") == [
        {"input": text, "number": number, "messages": [{"role": "user", "content": "x"}]}
        for text, number in (("a", 1.0), (None, 2.0), (None, None))
    ]


def test_what_is_no_rows_is_refused_by_its_name(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": hf(ROWS), "test": hf(ROWS)})
    for rows, message in (
        (both, r"train_dataset: got several data sets \(train, test\), expected one of them, such as data\['train'\]"),
        ("rows.jsonl", "train_dataset: got 'rows.jsonl', expected rows; dts_hf.data.sources.load_rows reads those"),
        (tmp_path / "x", r"train_dataset: got '.*x', expected rows"),
        (iter(ROWS), "train_dataset: got list_iterator, which can be read once"),
        (7, "train_dataset: got int, which has no length"),
        ([], "train_dataset: there are no rows in it"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_for(tmp_path, rows=rows)
    trainer = trainer_for(tmp_path, eval_dataset=both)
    assert {"eval_train_rows", "eval_test_rows"} <= trainer.evaluate().keys()
    streamed = datasets.IterableDatasetDict({"a": as_stream(ROWS[:3]), "b": as_stream(plain(ROWS[:2]))})
    values = trainer.evaluate(streamed)
    assert (values["eval_a_rows"], values["eval_b_rows"]) == (3, 2)
    with pytest.raises(UserError, match=r"predict: got several data sets \(train, test\)"):
        trainer.predict(both)


@pytest.mark.parametrize("make", ["numpy format", "pandas", "arrow", "stream", "function"])
def test_classification_rows_may_be_kept_in_anything(tmp_path: Path, make: str) -> None:
    rows = labelled_rows(SST2, 8)

    def metrics(train: Any, held_out: Any) -> list[float]:
        trainer = ClassificationDistillationTrainer(
            classifier(seed=1), classifier(seed=2), task="sst2", args=arguments(tmp_path, max_steps=1),
            train_dataset=train, eval_dataset=held_out, processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.train()
        values = trainer.evaluate()
        return [values[name] for name in ("eval_loss", "eval_accuracy", "eval_rows")]

    assert metrics(MAKES[make](rows), MAKES[make](rows[:5])) == metrics(rows, rows[:5])
