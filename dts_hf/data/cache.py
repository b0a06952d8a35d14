"""Files of the cache: written once, under a lock, and then mapped by all processes of a machine.

They hold the text of a user, as rows or as tokens: nobody else may read them, and none of them is read that somebody else
has written. A cache only saves work: whoever cannot use it has an ``OSError`` and goes on without one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dts_hf.console import duration, say
from dts_hf.files import file_sha256, read_sealed, write_sealed

if TYPE_CHECKING:
    import pyarrow as pa

Opened = TypeVar("Opened")
FORMAT = 2
ROWS, RECORD = "rows.arrow", "record.json"
#: Seconds that a process waits for another one that makes the same file, while that does not grow; then it goes on without.
PATIENCE = 3600.0
SILENCE = 5.0  # seconds of waiting before it is said
_WAIT = {"seconds": PATIENCE}  # of this process


def default_cache() -> Path:
    """``$DTS_HF_CACHE``, else ``$XDG_CACHE_HOME/dts_hf``, else ``~/.cache/dts_hf``."""
    if "DTS_HF_CACHE" in os.environ:
        return Path(os.environ["DTS_HF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dts_hf"


def limit_waiting(seconds: float | None = None) -> None:
    """Wait for no longer than ``seconds`` for a file of the cache (None: ``PATIENCE``), as for anything else in a launch."""
    _WAIT["seconds"] = PATIENCE if seconds is None else min(PATIENCE, seconds)


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
    with _lock(place):
        found = _read(place, opened)
        if found is None:
            _write(place, make)
            found = _read(place, opened)
    if found is None:
        raise OSError(f"{place} does not hold what was written")
    return found


def _write(place: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    unfinished = _unfinished(place)  # nobody else's: the lock is held
    for old in (unfinished, place):
        if os.path.lexists(old):
            shutil.rmtree(old)
    try:
        unfinished.mkdir(mode=0o700)
        facts = make(unfinished / ROWS)
        # The name is the only thing that says what the rows are of: a folder that was moved to another name must not pass
        known = {"format": FORMAT, "key": place.name, "sha256": file_sha256(unfinished / ROWS)}
        write_sealed(unfinished / RECORD, {**facts, **known})
        (unfinished / RECORD).chmod(0o600)
        os.rename(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(place: Path, opened: Callable[[Path, Mapping[str, Any]], Opened]) -> Opened | None:
    """None where it is missing, cut off, changed, of another format or name, or not this user's."""
    try:
        if not _is_own(place):
            return None
        record = read_sealed(place / RECORD)
        if (record.get("format"), record.get("key")) != (FORMAT, place.name):
            return None
        if record["sha256"] != file_sha256(place / ROWS):
            return None
        return opened(place / ROWS, record)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_own(place: Path) -> bool:
    """Whether ``place`` is a folder, and no link, that this user alone may have written."""
    state = os.lstat(place)
    own = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
    return stat.S_ISDIR(state.st_mode) and own and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _unfinished(place: Path) -> Path:
    return place.with_name(f".{place.name}.unfinished")


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Hold the lock of ``place``, which ends with this process at the latest; never through a link.

    Raises:
        OSError: it cannot be had, or another process has held it for as long as ``limit_waiting`` allows.
        NotImplementedError: this system has no such locks.
    """
    path = place.with_name(f".{place.name}.lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _acquire(file, place)
        with suppress(OSError):  # a full disk: it only helps those who wait
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(file)


def _acquire(file: int, place: Path) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise NotImplementedError(str(error)) from None
    began, seen, said = time.monotonic(), -1, False
    end = began + _WAIT["seconds"]
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            now = time.monotonic()
            if (size := _size(_unfinished(place) / ROWS)) != seen:  # whoever makes it is alive
                seen, end = size, now + _WAIT["seconds"]
            if now > end:
                waited = duration(now - began)
                raise TimeoutError(
                    error.errno, f"{_holder(file)} has held its lock for {waited}", str(place)
                ) from None
            if not said and now > began + SILENCE:
                said = True
                limit = duration(_WAIT["seconds"])
                say(f"waiting for {_holder(file)}, which makes {place} (at most {limit} without progress)")
            time.sleep(0.1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _holder(lock: int) -> str:
    """Who holds a lock, as it has written itself."""
    found = os.pread(lock, 200, 0).decode(errors="replace")
    return found if re.fullmatch(r"process \d+ on [\w.-]+", found) else "another process"


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
