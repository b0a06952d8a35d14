"""One process at a time works on a run directory: ``--resume`` typed twice, or a job that starts before the old one ends.

A lock on the open file ``.lock``. The system drops it when its process ends, however that happens, and child processes
let go of it at once, so a killed run never stands in its own way. The same process may take it again.

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
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dts_hf.console import say
from dts_hf.errors import UserError
from dts_hf.files import try_lock
from dts_hf.runs.links import open_nofollow, refuse_links

LOCK = ".lock"
#: In what is said of a run that another process has.
BUSY = "another process is working on this run"
#: How often the folder, or the lock file in it, may vanish under a start: their last owner removes them when it leaves.
ATTEMPTS = 100
_BUSY = (errno.EACCES, errno.EAGAIN)  # what a lock says that another process has


@dataclass
class _Held:
    """What this process has of a run directory.

    Attributes:
        descriptor: of the lock file. None: no locks there.
        made: the folders that were not there before, the outermost first.
    """

    descriptor: int | None = None
    made: list[Path] = field(default_factory=list)


_held: dict[Path, _Held] = {}  # by the folder


def _forked() -> None:
    """In a forked child: what its parent holds is not the child's to give back, nor to keep when the parent is gone."""
    for held in _held.values():
        if held.descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forked)


def lock(folder: str | Path) -> None:
    """Make the run directory ``folder`` where it is not there, and take it until ``unlock`` or the end of this process.

    Where the file system has no locks (some network drives) the run goes on without, and says so.

    Raises:
        UserError: another process has it, it cannot be made, or its lock file is a link, a folder or another user's.
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


def is_locked(folder: str | Path) -> bool:
    """Whether a process, this one or another, has the run directory ``folder`` (see ``lock``)."""
    try:
        descriptor = open_nofollow(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        _take(descriptor, shared=True)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


def is_in_use(folder: Path) -> bool:
    """Whether a process, this one or another, is within ``in_use(folder)``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


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
        UserError: another process has it, or nobody can tell because the file is not ours to write.
        FileNotFoundError: its folder is gone.
    """
    refuse_links(path.parent, [LOCK])
    try:
        # Whom the umask lets write here may lock, too: people who share a folder share its runs
        descriptor = open_nofollow(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise UserError(f"output.dir: {path} is a folder, expected the lock file of a run. Remove it") from None
    except PermissionError as error:
        if os.path.lexists(path):
            raise _not_ours(path, folder, error) from None
        return None  # a folder that takes no file is reported by what needs to write there
    except OSError as error:
        _say_no_lock(folder, error)
        return None
    try:
        _take(descriptor)
    except OSError as error:
        owner = _owner(descriptor)
        os.close(descriptor)
        if error.errno not in _BUSY:
            _say_no_lock(folder, error)
            return None
        raise _busy(folder, owner) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:  # else it has a second name elsewhere, or none by now
        with contextlib.suppress(OSError):  # the disk is full: the lock holds without a name in it
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _take(descriptor: int, *, shared: bool = False) -> None:
    """Lock a file as a whole, without waiting.

    A POSIX lock of the process would be dropped as soon as this process opens and closes the file once more, as a copy of
    the run directory does; so it is one of the open file (OFD) where the system has them. ``flock`` would do on a local
    disk. On NFS it and POSIX locks are one and the same, and who takes both refuses himself.

    Raises:
        OSError: another process has it (``_BUSY``), or there are no locks here.
    """
    kind, flags = (fcntl.F_RDLCK, fcntl.LOCK_SH) if shared else (fcntl.F_WRLCK, fcntl.LOCK_EX)
    command = getattr(fcntl, "F_OFD_SETLK", None)  # of Linux
    if command is not None:
        try:
            fcntl.fcntl(descriptor, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))  # struct flock
            return
        except OSError as error:
            if error.errno in _BUSY:
                raise
    fcntl.lockf(descriptor, flags | fcntl.LOCK_NB)


def _not_ours(path: Path, folder: str | Path, error: OSError) -> UserError:
    """What to say of a lock file that this user cannot write: it can be seen whether it is locked where it can be read."""
    why = f"output.dir: {path} is not yours to write ({error.strerror})"
    try:
        descriptor = open_nofollow(path, os.O_RDONLY)
    except OSError:
        return UserError(
            f"{why} nor to read, so another process may be working on this run. Choose another folder, or have its owner "
            "remove it when none is"
        )
    try:
        _take(descriptor, shared=True)
    except OSError as found:
        if found.errno in _BUSY:
            return _busy(folder, _owner(descriptor))
        return UserError(f"{why}, and there are no locks here. Remove it if nobody is working on this run")
    finally:
        os.close(descriptor)
    return UserError(f"{why}, and no process is working on this run: a killed one has left it. Remove it")


def _busy(folder: str | Path, owner: str) -> UserError:
    return UserError(
        f"output.dir: {BUSY}, {folder} ({owner or 'just started'}). Wait for its "
        "end or stop it, or choose another folder"
    )


def _owner(descriptor: int) -> str:
    """What the process that has the lock wrote into the file, if it had the time and can be read."""
    with contextlib.suppress(OSError):
        text = os.read(descriptor, 200).decode(errors="replace")
        return text if text.startswith("process ") else ""
    return ""


def _say_no_lock(folder: str | Path, error: OSError) -> None:
    say(f"{folder}: no lock here ({error.strerror or error}): see to it that nobody starts this run a second time")


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
