"""The rows of a recipe, read once: one process reads and checks them, and all of them then share what it wrote.

Without this every process would hold the text of all rows, to give most of it to nobody: the tokens are read from a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dts_hf.data.cache import FORMAT, code_digest, default_cache, kept
from dts_hf.data.columns import Columns
from dts_hf.data.mapped_rows import MappedRows, NotKept, write_rows
from dts_hf.data.mixture import Mixture, Part
from dts_hf.data.sources import (
    Sources,
    as_sources,
    hub_dataset,
    load_mixture,
    public_name,
    read_mixture,
    source_files,
    split_for,
)  # fmt: skip
from dts_hf.files import file_sha256
from dts_hf.recipe.schema import Source

logger = logging.getLogger(__name__)

#: Smaller sources are read sooner than a file of their rows is written and checked.
LEAST_BYTES = 1 << 18


def load_mixture_once(
    sources: Sources,
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Columns | None = None,
    cache_dir: str | Path | None = None,
    name: str = "data",
) -> Mixture:
    """``load_mixture``, with rows that stay in a file of the cache where they are many.

    Args:
        sources: as in ``load_mixture``.
        split: see there.
        limit: see there.
        columns: see there.
        cache_dir: of the files; None: ``rows`` in ``default_cache``.
        name: what warnings call these rows.

    Raises:
        UserError: see there.
    """
    options: dict[str, Any] = {"split": split, "limit": limit, "columns": columns}
    key = _key(sources, **options)
    if key is None:
        return load_mixture(sources, **options)
    folder = default_cache() / "rows" if cache_dir is None else Path(cache_dir).expanduser()

    def make(path: Path) -> Mapping[str, Any]:
        parts: list[Part] = []
        write_rows(path, read_mixture(sources, parts, **options))
        if _key(sources, **options) != key:
            raise OSError("a file was written to while it was read")
        return {"parts": [part.described() for part in parts]}

    try:
        return kept(folder / key, make, _opened)
    except (OSError, NotImplementedError) as error:
        # A row that JSON does not hold is no fault of anybody
        level = logging.DEBUG if isinstance(error, NotKept) else logging.WARNING
        logger.log(level, "%s: cannot keep the rows in %s (%s); each process reads them", name, folder, error)
        return load_mixture(sources, **options)


def _opened(path: Path, record: Mapping[str, Any]) -> Mixture:
    parts = [Part(**{"split": None, **part}) for part in record["parts"]]
    return Mixture(MappedRows(path, str(record["sha256"])), tuple(parts))


def _key(sources: Sources, split: str, limit: int | None, columns: Columns | None) -> str | None:
    """A name for the rows: all that they depend on. None where they are few, or where nobody can tell.

    Raises:
        UserError: as ``source_files``.
    """
    listed = as_sources(sources)
    read = [_content(source, split_for(source, split)) for source in listed]
    if None in read or sum(size for content in read for _, _, size in content or ()) < LEAST_BYTES:
        return None
    described = {
        "format": FORMAT,
        "code": code_digest(),
        "libraries": [version(library) for library in ("dts_hf", "datasets", "pyarrow")],
        "sources": [
            [public_name(source.source), source.split, source.weight, source.columns, content]
            for source, content in zip(listed, read, strict=True)
        ],
        "split": split,
        "limit": limit,
        "columns": columns,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _content(source: Source, split: str) -> list[tuple[str, str, int]] | None:
    """(name, digest, bytes) of every file; of the Hub what ``datasets`` calls the fingerprint of a data set."""
    files = source_files(source.source, split=split)
    if files is not None:
        return [(file.name, file_sha256(file), file.stat().st_size) for file in files]
    dataset = hub_dataset(source.source, split)
    fingerprint = getattr(dataset, "_fingerprint", None)
    return None if fingerprint is None else [(source.source, str(fingerprint), int(dataset.data.nbytes))]
