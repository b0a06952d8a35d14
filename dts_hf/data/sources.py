"""Where rows come from: files, folders, patterns, the Hub, a data set in memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from dts_hf.data.columns import Columns
from dts_hf.data.formats import ROW_FORMAT, parse_row
from dts_hf.data.mixture import Mixture, Part, weighted
from dts_hf.data.row_files import DATA_SUFFIXES, read_objects, row_file_stem
from dts_hf.data.rows import Row
from dts_hf.errors import UserError, nearest, not_readable
from dts_hf.files import check_name
from dts_hf.recipe.schema import Source

MOST_FILES = 50_000  # that are looked at to find the row files of a folder
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")
#: What ``data.train`` may be: a source, or several.
Sources: TypeAlias = "str | Path | Source | Sequence[str | Path | Source]"


def load_rows(
    source: str | Path, *, split: str = "train", limit: int | None = None, columns: Columns | None = None
) -> list[Row]:
    """Load and check the rows of one source.

    Args:
        source: a row file (JSON lines, JSON, Parquet, CSV, TSV, Arrow), a folder or a glob of such files, a folder that
            ``datasets`` has saved, or the name of a data set on the Hub (``owner/name`` or
            ``owner/name:configuration``).
        split: the split of a Hub data set or a saved ``DatasetDict``; in a folder whose file names begin with split
            names, the files to take.
        limit: read this many rows at most.
        columns: our names of columns, and theirs; see ``formats.parse_row``.

    Returns:
        At least one row, in file order. A row without an id is called ``<file>-<line>``.

    Raises:
        UserError: nothing there, or a row that is wrong, with file and line.
    """
    return list(_unique(islice(_records(str(source), split, columns, Counter()), limit), source))


def load_many(
    sources: Sources, *, split: str = "train", limit: int | None = None, columns: Columns | None = None
) -> list[Row]:
    """Load several sources one after the other as one data set; see ``load_mixture``.

    Args:
        sources: one source, or a list of them.
        split: as in ``load_rows``, for every source that names none.
        limit: at most this many rows altogether.
        columns: as in ``load_rows``, for every source that has none of its own.

    Raises:
        UserError: as ``load_rows``, or an id that two sources use.
    """
    return list(load_mixture(sources, split=split, limit=limit, columns=columns).rows)


def load_mixture(
    sources: Sources, *, split: str = "train", limit: int | None = None, columns: Columns | None = None
) -> Mixture:
    """Load several sources one after the other as one data set, each as often as its weight says.

    Args:
        sources: one source, or a list of them.
        split: as in ``load_rows``, for every source that names none.
        limit: the first so many rows of them all.
        columns: as in ``load_rows``, for every source that has none of its own.

    Raises:
        UserError: as ``load_rows``, an id that two sources use, or a weight that leaves no row.
    """
    parts: list[Part] = []
    rows = list(read_mixture(sources, parts, split=split, limit=limit, columns=columns))
    return Mixture(rows, tuple(parts))


def read_mixture(
    sources: Sources,
    parts: list[Part],
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Columns | None = None,
) -> Iterator[Row]:
    """The rows of ``load_mixture``, one after the other; only those of a source with a weight are all in memory.

    Args:
        sources: as in ``load_mixture``, and so are the others.
        parts: takes what each source gave, once its rows are read.
        split: see there.
        limit: see there.
        columns: see there.

    Raises:
        UserError: see there.
    """
    return _unique(_mixed(as_sources(sources), parts, split, limit, columns))


def _mixed(
    listed: Sequence[Source], parts: list[Part], split: str, limit: int | None, columns: Columns | None
) -> Iterator[tuple[Row, str]]:
    stems: Counter[str] = Counter()
    taken = 0
    for source in listed:
        remaining = None if limit is None else limit - taken
        if remaining == 0:
            break
        of_source = _records(source.source, split_for(source, split), _columns_of(source, columns), stems)
        # What is taken of a fraction depends on all rows.
        first = remaining if source.weight == 1 else None
        rows: Iterable[Row] = _unique(islice(of_source, first), source.source)
        read = used = 0
        if source.weight != 1:
            whole = list(rows)
            read, rows = len(whole), weighted(whole, source.weight, source.source)[:remaining]
        for row in rows:
            used += 1
            yield row, source.source
        parts.append(Part(public_name(source.source), source.split, source.weight, read or used, used))
        taken += used


def _columns_of(source: Source, columns: Columns | None) -> Columns | None:
    """A source's own columns in the place of those of all; what is for teachers is of all, unless it has its own."""
    if not source.columns:
        return columns
    of_teachers = {field: name for field, name in (columns or {}).items() if field in ("teacher", "teacher_prefix")}
    return {**of_teachers, **source.columns}


def as_sources(sources: Sources) -> list[Source]:
    """Every source with its split, weight and columns.

    Raises:
        UserError: there is none.
    """
    listed = [sources] if isinstance(sources, (str, Path, Source)) else list(sources)
    if not listed:
        raise UserError("no data: the list of sources is empty")
    return [one if isinstance(one, Source) else Source(source=str(one)) for one in listed]


def split_for(source: Source, split: str) -> str:
    """The split of ``source``, ``split`` where it names none.

    Raises:
        UserError: it names one, and is one file.
    """
    if source.split is not None and os.path.isfile(os.path.expanduser(source.source)):
        raise UserError(f"{source.source}: split: got '{source.split}', but one file has no splits; leave it out")
    return split if source.split is None else source.split


def rows_from_dataset(dataset: Iterable[Any], name: str = "dataset", columns: Columns | None = None) -> list[Row]:
    """Check the rows of a ``datasets.Dataset``, a list of dicts, or a list of ``Row``.

    Args:
        dataset: the rows; the row formats are those of files.
        name: the name in errors and in the ids of rows without one.
        columns: our names of columns, and theirs.

    Raises:
        UserError: a row is wrong (the message counts rows from 1), or there are none.
    """

    def records() -> Iterator[tuple[Row, str]]:
        for k, obj in enumerate(dataset, 1):
            where = f"{name}: row {k}"
            yield (obj if isinstance(obj, Row) else parse_row(obj, where, f"{name}-{k}", columns)), where

    return list(_unique(records(), name))


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
        return _saved_files(path, split) or _files_of_split(path, split)
    if os.path.exists(path):
        if not path.name.endswith(DATA_SUFFIXES) or not path.is_file():
            raise UserError(f"{text}: expected a file ending in {', '.join(DATA_SUFFIXES)}")
        return [path]
    if any(mark in text for mark in "*?["):
        root = Path(path.anchor)
        try:
            found = sorted(_few(root.glob(str(path.relative_to(root)) if path.anchor else str(path)), text))
        except (ValueError, OSError) as error:
            raise not_readable(error, f"{text}: this pattern cannot be searched for: {error}") from None
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
    endings = (*DATA_SUFFIXES, ".gz", ".txt", ".feather", ".xlsx")
    return text.endswith(endings) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def _saved_files(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` has written, in order.

    Returns:
        None where the folder is none of these.

    Raises:
        UserError: it is one, and cannot be read, or does not have the split.
    """
    try:
        if os.path.isfile(folder / "dataset_dict.json"):
            splits = sorted(inner.name for inner in folder.iterdir() if (inner / "state.json").is_file())
            if split not in splits:
                found = ", ".join(splits) or "none"
                raise UserError(f"{folder}: no split '{split}'; found {found}.{nearest(split, splits)}")
            folder = folder / split
        if not os.path.isfile(folder / "state.json") or not os.path.isfile(folder / "dataset_info.json"):
            return None
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise not_readable(
            error, f"{folder}: cannot be read as a data set that datasets has saved: {error!r}"
        ) from None
    # Beside them lie files of the cache, with rows that were mapped or filtered; and a name may not lead elsewhere.
    files = [folder / name for name in names if Path(name).name == name and name.endswith(".arrow")]
    if not files or len(files) != len(names) or not all(file.is_file() for file in files):
        raise UserError(f"{folder}: state.json names files that are not here: {', '.join(names)[:200] or 'none'}")
    return files


def _files_of_split(folder: Path, split: str) -> list[Path]:
    try:
        inside = _few(folder.rglob("*"), str(folder))
        files = sorted(file for file in inside if file.name.endswith(DATA_SUFFIXES) and file.is_file())
    except OSError as error:
        raise not_readable(error, f"{folder}: cannot be searched: {error.strerror or error}") from None
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


def _records(source: str, split: str, columns: Columns | None, stems: Counter[str]) -> Iterator[tuple[Row, str]]:
    """(row, place) of one source; ``stems`` are the names that ids of rows without one began with before."""
    for default_id, where, obj in source_objects(source, split, stems):
        yield parse_row(obj, where, default_id, columns), where


def source_objects(
    source: str, split: str = "train", stems: Counter[str] | None = None
) -> Iterator[tuple[str, str, Any]]:
    """Yield (default id, place, object) of every row of one source, unchecked, one row at a time.

    Args:
        source: as in ``load_rows``.
        split: see there.
        stems: the names that ids of rows without one began with before.

    Raises:
        UserError: nothing there, a file without rows, or one that cannot be read.
    """
    stems = Counter() if stems is None else stems
    files = source_files(source, split=split)
    if files is None:
        yield from hub_objects(source, split, stems)
    for file in files or ():
        empty = True
        stem = _own_stem(row_file_stem(file), stems)
        for number, where, obj in read_objects(file):
            empty = False
            yield f"{stem}-{number}", where, obj
        if empty:
            raise UserError(f"{file}: the file holds no rows; expected rows {ROW_FORMAT}")


def _own_stem(stem: str, stems: Counter[str]) -> str:
    """``train``, and ``train.2`` for the second file of that name."""
    stems[stem] += 1
    return stem if stems[stem] == 1 else f"{stem}.{stems[stem]}"


def hub_dataset(name: str, split: str) -> Any:
    """A data set of the Hub, as ``datasets`` loads it.

    Args:
        name: ``owner/name`` or ``owner/name:configuration``.
        split: its split.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    check_name(Path(name), "data")
    path, _, configuration = name.partition(":")
    if path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{path}"):
        # `text` or `json` is no data set, but a reader that would take whatever lies in the current folder.
        raise UserError(f"{name}: no such file here, expected a file, a folder or owner/name of a Hub data set")
    try:
        return datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever readers, network and caches raise; an IndexError for ":"
        raise not_readable(
            error,
            f"{name}: no such file here, and it cannot be loaded as a data set from the Hub, split '{split}': "
            f"{' '.join(str(error).split())[:300]}. Give a local file (.jsonl, .parquet, .csv, ...) instead, "
            f"or load the data set once with network access so that it is cached",
        ) from error


def hub_objects(name: str, split: str, stems: Counter[str] | None = None) -> Iterator[tuple[str, str, Any]]:
    """Yield (default id, place, object) of every row of a Hub data set, unchecked.

    Args:
        name: ``owner/name`` or ``owner/name:configuration``.
        split: its split.
        stems: what default ids of other sources begin with; those of this one are told apart.

    Raises:
        UserError: it cannot be loaded.
    """
    dataset = hub_dataset(name, split)
    stem = _own_stem(name.partition(":")[0].replace("/", "-"), Counter() if stems is None else stems)
    rows, number = iter(dataset), 0
    while True:
        where = f"{name}, split '{split}': row {(number := number + 1)}"
        try:
            obj = next(rows, None)
        except Exception as error:  # whatever a reader of images or sounds raises, or lacks
            raise not_readable(error, f"{where}: cannot be read: {' '.join(str(error).split())[:300]}") from error
        if obj is None:
            return
        yield f"{stem}-{number}", where, obj


def _unique(records: Iterator[tuple[Row, str]], source: object = None) -> Iterator[Row]:
    """The rows; two with one id are an error that names both places, and so are none where ``source`` must have some."""
    places: dict[str, str] = {}
    for row, where in records:
        if row.id in places:
            raise UserError(
                f"{where}: the id '{row.id}' is already used by {places[row.id]}; ids must be unique. Where they are not, "
                "rows are numbered by data.columns: {id: null}"
            )
        places[row.id] = where
        yield row
    if source is not None and not places:
        raise UserError(f"{source}: there are no rows in it; expected rows {ROW_FORMAT}")


def public_name(source: str | Path) -> str:
    """Shorten a path that would show the folders of this machine in a published model card."""
    path = Path(os.path.expanduser(source))
    if not path.is_absolute() and ".." not in path.parts:
        return str(source)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path.name
