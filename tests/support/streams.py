"""Rows that come as a stream, in every make, and which of them a trainer takes."""

from __future__ import annotations

from typing import Any

import datasets
from torch.utils.data import IterableDataset

from tests.support.trainers import ROWS

LONG = {"instruction": "Say it", "input": "", "output": "yes " * 200}
#: 13 rows that fit, and three that do not; 13 are no multiple of any batch here.
MIXED = [*ROWS[:3], LONG, *ROWS[3:9], LONG, LONG, *ROWS[9:13]]
FIT = {"max_length": 128, "max_prompt_length": 64}
IN_ORDER = {"train_sampling_strategy": "sequential"}


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def as_stream(rows: Any) -> Any:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


def as_function(rows: Any) -> Any:
    def generate() -> Any:
        yield from rows

    return generate


def rows_of_steps(trainer: Any) -> list[list[int]]:
    """The numbers of the rows of each micro-batch, filled while it trains."""
    seen: list[list[int]] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["row_id"].tolist())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    return seen
