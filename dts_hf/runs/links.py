"""A run follows no link inside its directory, and replaces none: not to write, not to remove, not to go on from it.

Whoever may put a file there could otherwise choose what a run overwrites or deletes elsewhere; and people who keep
``final`` on another drive by a link would lose what else lies behind it. The run directory itself may be a link. What is
there at the start is refused by name; at the moment of writing it is looked at once more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase, translate
from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.files import LINK, check_no_link


def refuse_links(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse a directory where something that a run makes is a link, or holds one; what is not ours may be anything.

    Args:
        folder: where a run writes; it may itself be a link, or not be there.
        names: patterns of what a run makes in it, as of ``is_named``; folders are looked through.

    Raises:
        UserError: names the link.
    """
    patterns = tuple(names)
    for path in _entries(Path(folder)):
        if not any(is_named(path.name, pattern) for pattern in patterns):
            continue
        for found in _tree(path):
            what = _what_is_wrong(found)
            if what is not None:
                raise UserError(f"{found} {what}")


def is_named(name: str, pattern: str) -> bool:
    """As ``fnmatchcase``, with ``#`` for a whole number: ``checkpoint-best`` is somebody's own."""
    return re.fullmatch(translate(pattern).replace(r"\#", "[0-9]+"), name) is not None


def open_nofollow(path: Path, flags: int, mode: int = 0o666) -> int:
    """``os.open``, but not through a link, and without waiting for the other end of a pipe.

    Raises:
        RunError: ``path`` is a link.
        OSError: as of ``os.open``.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            check_no_link(path)  # says so; else the loop is somewhere above, which is the user's own affair
        raise


def make_folder(path: Path) -> None:
    """Make a folder of the run directory, where it is not there.

    Raises:
        RunError: a link stands there.
    """
    check_no_link(path)
    path.mkdir(exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, or a link and not what it leads to. It may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)  # refuses a link, should one stand there by now


def remove_files(folder: Path, pattern: str) -> None:
    """Remove the files in ``folder`` whose names match; none where it is a link."""
    try:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:  # by the open folder, for its name may lead elsewhere by now
        for name in os.listdir(inside):
            if fnmatchcase(name, pattern):
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    os.unlink(name, dir_fd=inside)
    finally:
        os.close(inside)


def matching(folder: Path, pattern: str) -> list[Path]:
    """As ``sorted(folder.glob(pattern))`` by ``is_named``, but a link, where there is one, is the end of the way."""
    first, _, rest = pattern.partition("/")
    found = [path for path in _entries(folder) if is_named(path.name, first)]
    return found if not rest else [inner for path in found if _is_folder(path) for inner in matching(path, rest)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not there, or closed to us: what needs it says so
        return []


def _tree(path: Path) -> Iterator[Path]:
    yield path
    if _is_folder(path):
        for inner in _entries(path):
            yield from _tree(inner)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _what_is_wrong(path: Path) -> str | None:
    try:
        found = path.lstat()
    except OSError:  # gone since
        return None
    if stat.S_ISLNK(found.st_mode):
        return f"is a link to {os.readlink(path)}. {LINK}"
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return "is neither a file nor a folder. Remove it, or choose another folder"
    return None
