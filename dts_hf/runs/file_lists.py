"""Lists of files with their sizes and checksums, which tell whether a folder is as it was written.

Such a list is the section ``files`` of a JSON file with a checksum of its own (``write_sealed``): a list that is damaged
itself must accuse nobody. The checksums are there against accidents (a bit that flips, a block that a power cut took),
not against forgers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dts_hf.files import digest, flush


def flushed(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """``paths`` below ``folder``, each on the disk from here on, with its size and checksum: ``{name: {size, digest}}``.

    The folders that they lie in are flushed as well: else a power cut could take a file away with its name.
    """
    files, folders = {}, {folder}
    for path in paths:
        flush(path)
        # Read right behind the writing: from memory, as a rule
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "digest": digest(path)}
        folders |= {parent for parent in path.parents if parent.is_relative_to(folder)}
    for parent in sorted(folders, reverse=True):  # what is inside first
        flush(parent)
    return files


def why_differs(folder: Path, files: Mapping[str, Mapping[str, Any]], *, contents: bool) -> str | None:
    """What of ``files`` is not as it was listed, as the end of a sentence; None: all is.

    Args:
        folder: where they lie.
        files: as ``flushed`` gives it; those of version 0.1 have no ``digest``.
        contents: read them all, once, as fast as the disk can; else sizes alone are compared.
    """
    for name, known in files.items():  # sizes first: they cost nothing
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != known["size"]:
            return f"{name} has {size:,} of {known['size']:,} bytes"
    for name, known in files.items() if contents else ():
        try:
            found = digest(folder / name) if "digest" in known else None
        except OSError as error:  # a sector that cannot be read
            return f"{name} cannot be read: {error.strerror or error}"
        if found != known.get("digest"):
            return f"{name} is damaged (its checksum is {found}, and was {known['digest']})"
    return None
