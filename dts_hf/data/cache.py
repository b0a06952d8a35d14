"""Files of the cache: written once, under a lock, and then mapped by all processes of a machine.

They hold the text of a user, as rows or as tokens: nobody else may read them, and none of them is read that somebody else
has written. A cache only saves work: whoever cannot use it has an ``OSError`` and goes on without one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dts_hf.files import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa

Opened = TypeVar("Opened")
FORMAT = 1
ROWS, RECORD = "rows.arrow", "record.json"
#: Seconds that a process waits for another one that makes the same file; then it goes on without.
PATIENCE = 3600.0


def default_cache() -> Path:
    """``$DTS_HF_CACHE``, else ``$XDG_CACHE_HOME/dts_hf``, else ``~/.cache/dts_hf``."""
    if "DTS_HF_CACHE" in os.environ:
        return Path(os.environ["DTS_HF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dts_hf"


@functools.cache
def code_digest() -> str:
    """Digest of the modules that make rows and tokens: a change that no version number tells makes new files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kept(
    place: Path, make: Callable[[Path], Mapping[str, Any]], opened: Callable[[Path, Mapping[str, Any]], Opened]
) -> Opened:
    """What the folder ``place`` holds; where it is missing or broken, one process makes it while the others wait.

    Args:
        place: its name says what it holds.
        make: writes a file, whose path it gets, and returns facts of it for its record.
        opened: makes something of the file and of its record.

    Raises:
        OSError: no room, no rights, another process that has made it for ``PATIENCE``.
        NotImplementedError: this system has no locks.
        Exception: of ``make``.
    """
    # A name appears when all is written, so reading needs no lock: a cache that is read-only serves as well
    found = _read(place, opened)
    if found is not None:
        return found
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(place.with_name(f".{place.name}.lock")):
        found = _read(place, opened)
        if found is None:
            _write(place, make)
            found = _read(place, opened)
    if found is None:
        raise OSError(f"{place} does not hold what was written")
    return found


def _write(place: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    unfinished = place.with_name(f".{place.name}.unfinished")  # nobody else's: the lock is held
    for old in (unfinished, place):
        if os.path.lexists(old):
            shutil.rmtree(old)
    try:
        unfinished.mkdir(mode=0o700)
        facts = make(unfinished / ROWS)
        record = {**facts, "format": FORMAT, "sha256": file_sha256(unfinished / ROWS)}
        with open(unfinished / RECORD, "w", encoding="utf-8", opener=_private) as file:
            json.dump(record, file)
        os.rename(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(place: Path, opened: Callable[[Path, Mapping[str, Any]], Opened]) -> Opened | None:
    """None where it is missing, cut off, changed, of another format or not this user's."""
    try:
        if not _is_own(place):
            return None
        record = json.loads((place / RECORD).read_bytes())
        if record["format"] != FORMAT or record["sha256"] != file_sha256(place / ROWS):
            return None
        return opened(place / ROWS, record)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_own(place: Path) -> bool:
    """Whether ``place`` is a folder, and no link, that this user alone may have written."""
    state = os.lstat(place)
    own = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
    return stat.S_ISDIR(state.st_mode) and own and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, which ends with this process at the latest; never through a link.

    Raises:
        OSError: it cannot be had, or another process has held it for ``PATIENCE``.
        NotImplementedError: this system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NotImplementedError(str(error)) from None
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield
    finally:
        os.close(file)


def write_table(path: Path, schema: pa.Schema, columns: Iterable[list[pa.Array]]) -> None:
    """Write a stream of Arrow batches that this user alone may read.

    Args:
        path: of a new file.
        schema: of every batch.
        columns: of each batch, in the order of ``schema``.
    """
    import pyarrow as pa

    with open(path, "xb", opener=_private) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in columns:
            writer.write_batch(pa.record_batch(batch, schema=schema))


def read_table(path: Path) -> pa.Table:
    """The batches of ``write_table``, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(path)).data.table


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
