"""Upstream files: JSON, JSON lines, Parquet, and zips, which are read in memory and never unpacked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dts_hf.data.row_files import read_objects
from dts_hf.errors import UserError

MAX_UNZIPPED_BYTES = 4 << 30


def objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, object) of each line of a JSONL file, also gzipped or in a zip, or of each row of a Parquet file.

    Raises:
        UserError: broken JSON, a truncated file; the message names file and line.
    """
    if path.suffix == ".zip":
        yield from _zipped_objects(path)
    else:
        for _, where, obj in read_objects(path):
            yield where, obj


def read_json(path: Path) -> Any:
    """The one JSON value of a file.

    Raises:
        UserError: the file is broken; the message names it and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: broken JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def zip_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in a zip, read in memory: nothing is unpacked to disk.

    Raises:
        UserError: the zip is broken or too large, or a member's name leads out of the folder or is a link.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(path, member)
            if sum(member.file_size for member in members) > MAX_UNZIPPED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNZIPPED_BYTES >> 30} GiB unpacked, expected far less")
            for member in members:
                if not member.is_dir() and not member.filename.startswith("__MACOSX/"):
                    yield member.filename, archive.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: the zip file is broken or cannot be read: {error}") from None


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if is_link or ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise UserError(f"{path}: the member '{name}' leads out of its folder; this zip is not read")


def _zipped_objects(path: Path) -> Iterator[tuple[str, Any]]:
    found = False
    for name, content in zip_texts(path):
        if not name.endswith(".jsonl"):
            continue
        found = True
        for number, line in enumerate(content.split(b"\n"), 1):
            where = f"{path}: {name}: line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: broken JSON: {error}") from None
    if not found:
        raise UserError(f"{path}: there is no .jsonl file in this zip")
