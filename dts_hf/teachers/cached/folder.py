"""The folder of a cache: whether it may be written into, by one process at a time, and which of its files are a cache's own.

Files of somebody else are neither replaced nor removed, with ``--overwrite`` neither: a folder with anything else in it,
such as a run directory, is refused by name before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dts_hf.errors import UserError
from dts_hf.files import check_can_write, check_name, try_lock
from dts_hf.teachers.cached.layout import MANIFEST, METADATA, shards_in
from dts_hf.teachers.cached.manifest_form import ANSWERS, HEAD, INDEX, is_answers_name, is_shard_name
from dts_hf.teachers.kept_answers import read_answers

#: What ``pull-cache`` brings as well; left as it is, as hidden files are.
CARD = "README.md"
ELSEWHERE = "Choose a folder that is new, empty, or a cache"


def check_folder(folder: Path) -> None:
    """Refuse a place where no cache can be written, or where something else lies.

    Args:
        folder: need not be there.

    Raises:
        UserError: names what is in the way.
    """
    check_name(folder, "--output")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() else "a file"
        raise UserError(f"--output: {there} is {what}, expected a folder. {ELSEWHERE}")
    check_can_write(there, "--output")
    if there != folder:
        return
    for path in sorted(folder.iterdir()):
        if path.name == CARD or (path.name.startswith(".") and not _is_temporary(path.name)):
            continue
        if not (_is_own_name(path.name) or _is_kept(path.name) or _is_temporary(path.name)):
            raise UserError(f"--output: {path} is not of a cache. {ELSEWHERE}")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"--output: {path} is no plain file, expected one of a cache. {ELSEWHERE}")
    _check_ours(folder)


def _check_ours(folder: Path) -> None:
    """Files with a cache's names are a cache's if a shard or the manifest says so."""
    if any(_is_kept(path.name) for path in folder.iterdir()):
        read_answers(folder / ANSWERS)
    named = [path for path in sorted(folder.iterdir()) if _is_own_name(path.name)]
    shards = {path: shard_metadata(path) for path in shards_in(folder)}
    for path, found in shards.items():
        if found == {}:
            raise UserError(f"--output: {path} is not of a cache. {ELSEWHERE}")
    if named and not any(shards.values()) and not _is_manifest(folder / MANIFEST):
        raise UserError(f"--output: {named[0]} is not of a cache, or damaged. {ELSEWHERE}, or remove it")
    if (folder / MANIFEST).is_file() and not _is_manifest(folder / MANIFEST, may_be_broken=any(shards.values())):
        raise UserError(f"--output: {folder / MANIFEST} is not of a cache. {ELSEWHERE}")


def _is_manifest(path: Path, may_be_broken: bool = False) -> bool:
    """Whether a file is a cache's manifest, of whatever version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return may_be_broken
    return isinstance(values, dict) and {"format", "identity", "plan", "shards"} <= {*values}


def shard_metadata(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself, empty where it says nothing that a cache's would; None: it is broken."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else {}


def _is_own_name(name: str) -> bool:
    return name in (MANIFEST, INDEX, HEAD) or is_shard_name(name)


def _is_kept(name: str) -> bool:
    """Whether it is of the answers that a run has kept there, which a cache is made of."""
    return name == ANSWERS or is_answers_name(name)


def _is_temporary(name: str) -> bool:
    """Whether ``files.write_bytes_atomic`` makes it of a file of a cache."""
    found = re.fullmatch(r"\.(.+)\.[0-9]+-[0-9a-f]+\.tmp", name)
    return found is not None and (_is_own_name(found.group(1)) or found.group(1) == ANSWERS)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in list(folder.iterdir()):
        if _is_temporary(path.name):
            path.unlink(missing_ok=True)


def remove_cache(folder: Path) -> None:
    """Remove the files of a cache, and no others; the manifest first, so that what is left is unfinished.

    Args:
        folder: of the cache, or of what a killed process has left of one; it need not be there.

    Raises:
        UserError: see ``check_folder``.
    """
    check_folder(folder)
    for path in [folder / MANIFEST, folder / INDEX, folder / HEAD, *shards_in(folder)]:
        path.unlink(missing_ok=True)


def own_bytes(folder: Path) -> int:
    """Of the cache's files that are in a folder now."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if _is_own_name(path.name))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other writers out of it; one that was made and got no file is removed again.

    The lock is on the folder itself and ends with the process; where the file system has none, there is none.

    Raises:
        UserError: see ``check_folder``; or another process writes into it.
    """
    check_folder(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not try_lock(descriptor):
            raise UserError(
                f"--output: another process is writing the cache {folder}. Wait for its end or stop it, or choose "
                "another folder"
            )
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for place in missing:
                place.rmdir()
        os.close(descriptor)
