"""What people keep rows in: lists, data sets, tables, streams; and what cannot be read as often as training reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from dts_hf.data.tokenised import TABLES, has_arrow_rows
from dts_hf.errors import UserError


class FromFunction(IterableDataset[Any]):
    """The rows that ``function()`` gives, which is called anew for each pass.

    Args:
        function: a generator function, or anything else that returns an iterator and takes no argument.
        name: what errors call the rows.
    """

    def __init__(self, function: Callable[[], Iterable[Any]], name: str) -> None:
        self.function, self.name = function, name

    def __iter__(self) -> Iterator[Any]:
        given = self.function()
        if not hasattr(given, "__iter__"):
            raise UserError(f"{self.name}: the function returned {type(given).__name__}, expected rows, one by one")
        return iter(given)


def as_rows(dataset: Any, name: str, *, keep_format: bool = False) -> Any:
    """``dataset`` as a list, a data set that is read by number, or a stream; rows of it are mappings or ``Row``.

    Args:
        dataset: one of these already; a pandas or polars data frame, an Arrow table; a function that gives the rows.
        name: what errors call it.
        keep_format: tokenised rows of a ``datasets.Dataset`` stay tensors or arrays where it says so; text never does.

    Raises:
        UserError: it can be read once only, has neither a length nor an iterator, or is no rows at all.
    """
    if isinstance(dataset, (str, bytes)) or hasattr(dataset, "__fspath__"):
        raise UserError(
            f"{name}: got {str(dataset)[:200]!r}, expected rows; dts_hf.data.sources.load_rows reads those of a file, a "
            "folder or the Hub"
        )
    # 1. Tables in memory are few enough rows for a list.
    for method in ("to_dicts", "to_pylist"):  # polars, Arrow
        if hasattr(dataset, method) and not isinstance(dataset, type):
            return getattr(dataset, method)()
    if hasattr(dataset, "itertuples") and hasattr(dataset, "notna"):  # pandas: what is missing there is NaN, no text
        return [
            {str(column): _plain(cell) for column, cell in row.items()}
            for row in dataset.astype(object).where(dataset.notna(), None).to_dict("records")
        ]
    # 2. A format gives a table for a row, or an array for a list of messages.
    if has_arrow_rows(dataset):
        tokens = "input_ids" in dataset.column_names
        return dataset if tokens and dataset.format["type"] not in TABLES else dataset.with_format(None)
    # 3. Streams.
    if callable(dataset) and not any(hasattr(dataset, method) for method in ("__iter__", "__getitem__")):
        if isinstance(dataset, type):
            raise UserError(f"{name}: got the class {dataset.__name__}, expected an instance of it")
        dataset = FromFunction(dataset, name)
    if isinstance(dataset, IterableDataset):
        if hasattr(dataset, "with_format") and not keep_format:
            dataset = dataset.with_format(None)
        if iter(dataset) is iter(dataset):
            raise UserError(
                f"{name}: got an iterable data set that can be read once, and this check would take its first row; "
                "expected one that begins anew each time (__iter__ as a generator function)"
            )
        return dataset
    # 4. What is left.
    if isinstance(dataset, Iterator):
        kind = "a generator" if inspect.isgenerator(dataset) else type(dataset).__name__
        raise UserError(
            f"{name}: got {kind}, which can be read once, and rows are read again in every epoch and evaluation; expected "
            "the generator function itself (rows, not rows()), which makes it a stream, or list(...) of it"
        )
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"):
        raise UserError(f"{name}: got {type(dataset).__name__}, which has no length; expected a list, or __len__")
    return dataset


def _plain(cell: Any) -> Any:
    """Lists and mappings of a data frame's cell, which Parquet files bring as arrays inside of each other."""
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if isinstance(cell, dict):
        return {key: _plain(value) for key, value in cell.items()}
    return [_plain(value) for value in cell] if isinstance(cell, (list, tuple)) else cell
