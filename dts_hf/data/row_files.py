"""Row files by the ending of their name: the objects in them, and how many there are. What they mean is checked elsewhere.

A row file is data of a stranger. It may be cut off, be no text, or be a few bytes that unpack to more than the memory
holds: all of that is a ``UserError`` that names the file and the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dts_hf.data.table_files import arrow_objects, count_parquet_rows, parquet_objects
from dts_hf.data.text_files import csv_objects, json_lines, json_objects, read_lines

DATA_SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow",
)  # fmt: skip
_ENDING = re.compile(r"\.(jsonl|json|csv|tsv)(\.gz)?$|\.(parquet|arrow)$")
#: How the objects of a file are read, by the ending of its name without ``.gz``.
READERS = {
    "jsonl": json_lines,
    "json": json_objects,
    "csv": csv_objects,
    "tsv": csv_objects,
    "parquet": parquet_objects,
    "arrow": arrow_objects,
}


def row_file_stem(file: Path) -> str:
    """The name of a row file without its ending: ``test`` of ``test.jsonl.gz``."""
    return _ENDING.sub("", file.name)


def _form(file: Path) -> str:
    found = _ENDING.search(file.name)
    return (found[1] or found[3]) if found else "jsonl"


def read_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number, place, object) of every object in a row file; objects are not checked.

    Raises:
        UserError: the file cannot be read, or is not what its name says.
    """
    return READERS[_form(file)](file)


def count_rows(file: Path) -> int:
    """Lines that are not blank; rows of a Parquet file from its footer. The rows themselves are not looked at.

    Raises:
        UserError: as for ``read_objects``.
    """
    form = _form(file)
    if form == "parquet":
        return count_parquet_rows(file)
    if form == "jsonl":
        return sum(1 for _, line in read_lines(file) if line.strip())
    return sum(1 for _ in read_objects(file))
