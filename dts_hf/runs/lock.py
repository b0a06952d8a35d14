"""One process at a time works on a run directory: ``--resume`` typed twice, or a job that starts before the old one ends.

A POSIX record lock on ``.lock``. The system drops it when its process ends, however that happens, and child processes
do not inherit it, so a killed run never stands in its own way. The same process may take it again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dts_hf.errors import UserError

LOCK = ".lock"
_held: dict[Path, int] = {}  # closing any descriptor of the file would drop its lock, so it is opened once


def lock(folder: str | Path) -> None:
    """Take the run directory ``folder``, which exists, until ``unlock`` or the end of this process.

    Where the file system has no locks (some network drives) the run goes on without.

    Raises:
        UserError: another process has it.
    """
    path = Path(folder).resolve() / LOCK
    while path not in _held:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # a folder that takes no file is reported by what needs to write there
            return
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            raise UserError(
                f"output.dir: another process is working on this run, {folder} ({owner or 'just started'}). Wait for its "
                "end or stop it, or choose another folder"
            ) from None
        if not _is_at(descriptor, path):  # its last owner removed it in between
            os.close(descriptor)
            continue
        os.truncate(descriptor, 0)
        with contextlib.suppress(OSError):  # the disk is full: the lock holds without a name in it
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held[path] = descriptor


def unlock() -> None:
    """Give back all that this process holds, and remove the files."""
    while _held:
        path, descriptor = _held.popitem()
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def unlocking() -> Iterator[None]:
    """``unlock`` at its end."""
    try:
        yield
    finally:
        unlock()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Mark a temporary folder of ours: while the context lasts, no run takes it for what a killed process has left."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Whether a process, this one or another, is within ``in_use(folder)``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
