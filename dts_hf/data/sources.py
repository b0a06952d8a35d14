"""Where rows come from: files, folders, patterns, the Hub, a data set in memory; and the manifest of what was read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dts_hf.data.formats import ROW_FORMAT, parse_row
from dts_hf.data.row_files import read_objects, row_file_stem
from dts_hf.data.rows import Row
from dts_hf.errors import UserError, nearest
from dts_hf.files import file_sha256

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MOST_FILES = 50_000  # that are looked at to find the row files of a folder
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")


def load_rows(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Load and check the rows of one source.

    Args:
        source: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, a folder or a glob of such files, or the name of a
            data set on the Hub (``owner/name`` or ``owner/name:configuration``).
        split: the split of a Hub data set; in a folder whose file names begin with split names, the files to take.
        limit: read this many rows at most.

    Returns:
        At least one row, in file order. A row without an id is called ``<file>-<line>``.

    Raises:
        UserError: nothing there, or a row that is wrong, with file and line.
    """
    files = source_files(source, split=split)
    records = _hub_records(str(source), split) if files is None else _file_records(files)
    return _unique(islice(records, limit), source)


def load_many(
    sources: str | Path | Sequence[str | Path], *, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Load several sources one after the other as one data set; see ``load_rows``.

    Args:
        sources: one source, or a list of them.
        split: as in ``load_rows``, for every source.
        limit: at most this many rows altogether.

    Raises:
        UserError: as ``load_rows``, or an id that two sources use.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise UserError("no data: the list of sources is empty")
    named: list[tuple[Row, str]] = []
    for source in listed:
        if limit is None or len(named) < limit:
            remaining = None if limit is None else limit - len(named)
            named += [(row, str(source)) for row in load_rows(source, split=split, limit=remaining)]
    return _unique(iter(named))


def rows_from_dataset(dataset: Iterable[Any], name: str = "dataset") -> list[Row]:
    """Check the rows of a ``datasets.Dataset``, a list of dicts, or a list of ``Row``.

    Args:
        dataset: the rows; the row format is that of files.
        name: the name in errors and in the ids of rows without one.

    Raises:
        UserError: a row is wrong (the message counts rows from 1), or there are none.
    """

    def records() -> Iterator[tuple[Row, str]]:
        for k, obj in enumerate(dataset, 1):
            where = f"{name}: row {k}"
            yield (obj if isinstance(obj, Row) else parse_row(obj, where, f"{name}-{k}")), where

    return _unique(records(), name)


def source_files(source: str | Path, *, split: str = "train") -> list[Path] | None:
    """Return the files that ``source`` stands for, or None when it is the name of a Hub data set.

    Raises:
        UserError: the source is a path with nothing to read at it.
    """
    text = str(source)
    if not text.strip():
        raise UserError("no data: the name of the source is empty")
    # os.path answers False where Path raises: for a name that is too long, or holds a NUL.
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return _files_of_split(path, split)
    if os.path.exists(path):
        if not path.name.endswith(DATA_SUFFIXES) or not path.is_file():
            raise UserError(f"{text}: expected a file ending in {', '.join(DATA_SUFFIXES)}")
        return [path]
    if any(mark in text for mark in "*?["):
        root = Path(path.anchor)
        try:
            found = sorted(_few(root.glob(str(path.relative_to(root)) if path.anchor else str(path)), text))
        except (ValueError, OSError) as error:
            raise UserError(f"{text}: this pattern cannot be searched for: {error}") from None
        if not found:
            raise UserError(f"{text}: no file matches this pattern")
        return [file for match in found for file in source_files(match, split=split) or []]
    if _looks_like_a_path(text):
        in_folder = os.path.isdir(path.parent)
        beside = [file.name for file in path.parent.iterdir()] if in_folder else []
        missing = "" if in_folder else f"; the folder {path.parent} does not exist either"
        raise UserError(f"{text}: no such file{missing}.{nearest(path.name, beside)}")
    return None


def _looks_like_a_path(text: str) -> bool:
    endings = (*DATA_SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".arrow")
    return text.endswith(endings) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def _files_of_split(folder: Path, split: str) -> list[Path]:
    try:
        inside = _few(folder.rglob("*"), str(folder))
        files = sorted(file for file in inside if file.name.endswith(DATA_SUFFIXES) and file.is_file())
    except OSError as error:
        raise UserError(f"{folder}: cannot be searched: {error.strerror or error}") from None
    if not files:
        raise UserError(f"{folder}: no file ending in {', '.join(DATA_SUFFIXES)} in this folder")
    by_split = {file: _split_of(file) for file in files}
    if not any(by_split.values()):
        return files
    # A folder of the Hub's layout holds all splits: without this, test rows would be trained on.
    chosen = [file for file, name in by_split.items() if name == split]
    if not chosen:
        names = sorted({name for name in by_split.values() if name})
        raise UserError(f"{folder}: no file of the split '{split}'; found {', '.join(names)}.{nearest(split, names)}")
    return chosen


def _few(found: Iterator[Path], source: str) -> Iterator[Path]:
    """``found``, as long as it is not half of the disk."""
    for number, path in enumerate(found):
        if number == MOST_FILES:
            raise UserError(f"{source}: more than {MOST_FILES:,} files are in there; name a smaller folder")
        yield path


def _split_of(file: Path) -> str | None:
    word = re.match(r"[a-z]+", file.name.lower())
    return word[0] if word and word[0] in SPLIT_NAMES else None


def _file_records(files: Iterable[Path]) -> Iterator[tuple[Row, str]]:
    for file in files:
        empty = True
        for number, where, obj in read_objects(file):
            empty = False
            yield parse_row(obj, where, f"{row_file_stem(file)}-{number}"), where
        if empty:
            raise UserError(f"{file}: the file holds no rows; expected rows {ROW_FORMAT}")


def _hub_records(name: str, split: str) -> Iterator[tuple[Row, str]]:
    for default_id, where, obj in hub_objects(name, split):
        yield parse_row(obj, where, default_id), where


def hub_objects(name: str, split: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (default id, place, object) of every row of a Hub data set, unchecked.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    path, _, configuration = name.partition(":")
    if path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{path}"):
        # `text` or `json` is no data set, but a reader that would take whatever lies in the current folder.
        raise UserError(f"{name}: no such file here, expected a file, a folder or owner/name of a Hub data set")
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever readers, network and caches raise; an IndexError for ":"
        raise UserError(
            f"{name}: no such file here, and it cannot be loaded as a data set from the Hub, split '{split}': "
            f"{' '.join(str(error).split())[:300]}. Give a local file (.jsonl, .jsonl.gz, .parquet) instead, "
            f"or load the data set once with network access so that it is cached."
        ) from error
    for number, obj in enumerate(dataset, 1):
        where = f"{name}, split '{split}': row {number}"
        yield f"{path.replace('/', '-')}-{number}", where, obj


def _unique(records: Iterator[tuple[Row, str]], source: object = None) -> list[Row]:
    """The rows; two with one id are an error that names both places, and so are none where ``source`` must have some."""
    places: dict[str, str] = {}
    rows = []
    for row, where in records:
        if row.id in places:
            raise UserError(f"{where}: the id '{row.id}' is already used by {places[row.id]}; ids must be unique")
        places[row.id] = where
        rows.append(row)
    if source is not None and not rows:
        raise UserError(f"{source}: there are no rows in it; expected rows {ROW_FORMAT}")
    return rows


def manifest(
    sources: str | Path | Sequence[str | Path], rows: Sequence[Row], *, split: str = "train"
) -> dict[str, Any]:
    """Describe where rows come from, for ``data_manifest.json``.

    Args:
        sources: what was given to ``load_many``.
        rows: the rows that it returned.
        split: as given to ``load_many``.

    Returns:
        ``source`` (a string, or a list for several; of a path outside the current folder the file name alone),
        ``sha256`` and ``rows``. The digest is that of the file; of ``sha256sum``'s output lines for several files;
        of the rows themselves for a Hub data set.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    digests: list[tuple[str, str]] = []
    for source in listed:
        files = source_files(source, split=split)
        if files is None:
            content = json.dumps([[r.id, r.instruction, r.input, r.references, r.messages] for r in rows])
            digests.append((hashlib.sha256(content.encode()).hexdigest(), str(source)))
        else:
            digests += [(file_sha256(file), file.name) for file in files]
    lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
    return {
        "source": _public_name(listed[0]) if len(listed) == 1 else [_public_name(source) for source in listed],
        "sha256": digests[0][0] if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        "rows": len(rows),
    }


def _public_name(source: str | Path) -> str:
    """Shorten a path that would show the folders of this machine in a published model card."""
    path = Path(os.path.expanduser(source))
    if not path.is_absolute() and ".." not in path.parts:
        return str(source)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path.name
