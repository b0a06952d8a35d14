"""One process at a time works on a run directory: ``--resume`` typed twice, or a job that starts before the old one ends.

A POSIX record lock on ``.lock``. The system drops it when its process ends, however that happens, and child processes
do not inherit it, so a killed run never stands in its own way. The same process may take it again.

The order of every start is: make the folder, lock it, then look, decide and clean. Who looks before it holds the lock may
refuse on what it sees, but changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.runs.links import open_nofollow, refuse_links

LOCK = ".lock"
#: How often the folder, or the lock file in it, may vanish under a start: their last owner removes them when it leaves.
ATTEMPTS = 100


@dataclass
class _Held:
    """What this process has of a run directory.

    Attributes:
        descriptor: of the lock file, opened once: closing any descriptor of it would drop the lock. None: no locks there.
        made: the folders that were not there before, the outermost first.
    """

    descriptor: int | None = None
    made: list[Path] = field(default_factory=list)


_held: dict[Path, _Held] = {}  # by the folder


def lock(folder: str | Path) -> None:
    """Make the run directory ``folder`` where it is not there, and take it until ``unlock`` or the end of this process.

    Where the file system has no locks (some network drives) the run goes on without.

    Raises:
        UserError: another process has it, it cannot be made, or its lock file is a link.
    """
    path = Path(folder).resolve()
    if holds(path):
        return
    _let_go(path)  # somebody has removed the lock file: what this process had is worth nothing
    made: list[Path] = []
    try:
        for _ in range(ATTEMPTS):
            made += _make(path)
            try:
                descriptor = _locked(path / LOCK, folder)
            except FileNotFoundError:  # whoever had made the folder had no use for it, and has removed it
                continue
            if descriptor is None or _is_at(descriptor, path / LOCK):
                _held[path] = _Held(descriptor, made)
                return
            os.close(descriptor)  # its last owner removed it in between
        parent = next(place for place in path.parents if place.is_dir())
        raise UserError(f"output.dir: cannot write in {parent} (no folder lasts there). Choose another folder")
    except BaseException:
        _remove_empty(made)
        raise


def holds(folder: str | Path) -> bool:
    """Whether this process has ``folder``, by the lock file that is in it now."""
    path = Path(folder).resolve()
    held = _held.get(path)
    return held is not None and (path.is_dir() if held.descriptor is None else _is_at(held.descriptor, path / LOCK))


def unlock() -> None:
    """Give back all that this process holds. Lock files are removed, and folders that it made and put nothing into."""
    while _held:
        _let_go(next(iter(_held)))


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
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def _make(path: Path) -> list[Path]:
    """Make ``path`` and what is missing above it; returns what was not there, the outermost first."""
    missing = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    made = []
    for place in reversed(missing):
        try:
            place.mkdir()
            made.append(place)
        except FileExistsError:  # another start has been quicker
            pass
        except FileNotFoundError:  # ... or has removed what was above it: the caller tries again
            return made
        except OSError as error:
            _remove_empty(made)
            raise UserError(
                f"output.dir: cannot write in {place.parent} ({error.strerror or error}). Choose another folder"
            ) from None
    return made


def _locked(path: Path, folder: str | Path) -> int | None:
    """The open, locked lock file; None where that is not possible, and no reason to refuse.

    Raises:
        UserError: another process has it.
        FileNotFoundError: its folder is gone.
    """
    refuse_links(path.parent, (), written_in_place=[LOCK])
    try:
        descriptor = open_nofollow(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        raise
    except OSError:  # a folder that takes no file is reported by what needs to write there
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:  # else it is somebody else's, or removed by now
            os.truncate(descriptor, 0)
            with contextlib.suppress(OSError):  # the disk is full: the lock holds without a name in it
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return descriptor
    except OSError as error:
        owner = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise UserError(
            f"output.dir: another process is working on this run, {folder} ({owner or 'just started'}). Wait for its "
            "end or stop it, or choose another folder"
        ) from None


def _let_go(path: Path) -> None:
    held = _held.pop(path, None)
    if held is None:
        return
    if held.descriptor is None or _is_at(held.descriptor, path / LOCK):
        if held.descriptor is not None:
            (path / LOCK).unlink(missing_ok=True)
        # Under the lock still: who comes now finds no folder and makes it, or has put a lock file of its own into it
        _remove_empty(held.made)
    if held.descriptor is not None:
        os.close(held.descriptor)


def _remove_empty(made: list[Path]) -> None:
    for place in sorted({*made}, key=lambda place: len(place.parts), reverse=True):
        with contextlib.suppress(OSError):  # something is in it
            place.rmdir()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
