"""Files of our own: written whole or not at all, and onto the disk; JSON and JSONL; checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dts_hf.errors import RunError, UserError

#: What a file system answers that cannot flush folders, or lets nobody open this one: there is nothing more to do then.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
CHECKSUM = "checksum"  # of the rest of a JSON file, in itself
SHORTER = "Choose a shorter one"
LONGEST_BEGINNING = 200  # bytes of a name, so that the temporary one before it fits into 255


def check_name(path: Path, key: str) -> None:
    """Refuse a path that no file can have, before anything is made on the way to it.

    Args:
        path: need not be there.
        key: of the recipe, or the option, that names it.

    Raises:
        UserError: a part of it, or all of it, is too long for the file system.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    longest = os.pathconf(there, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for part in path.parts:
        if (size := len(part.encode(errors="surrogatepass"))) > longest:
            raise UserError(
                f"{key}: the name {part!r} has {size:,} bytes, and the file system takes {longest}. {SHORTER}"
            )
    try:
        path.lstat()
    except ValueError:  # NUL: no name at all, and whoever opens it says so
        return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            size = len(os.fsencode(path))
            raise UserError(
                f"{key}: {str(path)[:100]} ... has {size:,} bytes, too many for a path. {SHORTER}"
            ) from None


def check_folder(path: Path, key: str) -> None:
    """Refuse a path that can be no folder, before anything is done whose result would lie in it.

    Args:
        path: need not be there.
        key: of the recipe, or the option, that names it.

    Raises:
        UserError: it is a file, or lies in one, or its name is too long.
    """
    check_name(path, key)
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise UserError(f"{key}: {existing} is a file, expected a folder")


def check_can_write(path: Path, key: str) -> None:
    """Refuse a place where nothing can be made, before anything is done whose result would lie there.

    Args:
        path: of a file or a folder; it need not be there, nor what is above it.
        key: of the recipe, or the option, that names it.

    Raises:
        UserError: the folder that is there takes none in it.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    try:  # os.access says yes to root in /proc and on some network drives
        os.rmdir(tempfile.mkdtemp(prefix=".dts_hf-", dir=existing))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{key}: cannot write in {existing} ({reason}). Choose another folder") from None


def check_output_folder(path: Path) -> None:
    """Refuse an ``--output`` that can be no folder to write into.

    Raises:
        UserError: as ``check_folder`` and ``check_can_write``.
    """
    check_folder(path, "--output")
    check_can_write(path, "--output")


def check_new_file(path: Path, key: str, replace: bool = False) -> None:
    """Refuse a file that cannot be written, in a folder that is there, before anything is done whose result it will hold.

    Args:
        path: of the file.
        key: the option that names it.
        replace: a file that is there may be replaced.

    Raises:
        UserError: a folder, something that is there, no folder for it or one that takes no file, or a name that is too long.
    """
    check_name(path, key)
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; expected a file in a folder that is there")
    if os.path.lexists(path) and not (replace and path.is_file()):
        raise UserError(f"{key}: {path} is there already; expected the name of a new file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key}: {path} lies in {path.parent}, which is no folder; expected a folder that is there")
    check_can_write(path, key)


def check_output(path: Path, example: str, overwrite: bool) -> None:
    """Refuse an ``--output`` that cannot hold a new file, or should not; its folder need not be there.

    Args:
        path: the file to be written.
        example: name of such a file, for the message.
        overwrite: a file that is there may be replaced.

    Raises:
        UserError: a folder, or a file that is there, a name that is too long, or a place that takes no file.
    """
    check_name(path, "--output")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder, expected a file, such as {path / example}")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--output: {path} is there already. Choose another file, or replace it with --overwrite")
    if os.path.lexists(path) and not path.is_file():  # replacing /dev/null would take it from the whole machine
        raise UserError(f"--output: {path} is no plain file. Choose another one")
    check_can_write(path, "--output")


#: What is wrong with a link inside a run directory.
LINK = (
    "A run neither follows nor replaces a link inside its directory, which may itself be one. Put there what it leads to, "
    "or remove it"
)


def check_no_link(path: Path) -> None:
    """Refuse to write at ``path`` where a link stands.

    Raises:
        RunError: it does.
    """
    if path.is_symlink():
        raise RunError(f"cannot write {path}: it is a link to {os.readlink(path)}. {LINK}")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new one, even after a power cut."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """As ``write_text_atomic``, of bytes."""
    path = Path(path)
    name = path.name if len(os.fsencode(path.name)) <= LONGEST_BEGINNING else text_digest(path.name)
    # Containers that share a folder may share process numbers; `tempfile` would make the file unreadable for others
    temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with temporary.open("xb") as file:  # x: never through a link
                file.write(content)
            flush(temporary)  # before its name: else a power cut could leave the name and no content
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within it an error of the operating system names ``path``, where it names no file by itself (as of a full disk)."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text is all it says, and a name would hide that
            error.filename = error.filename or str(path)
        raise


def flush(path: str | Path) -> None:
    """Return once the content of a file, or the names in a folder, are on the disk: a power cut cannot take them back."""
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FLUSH:
            error.filename = error.filename or str(path)
            raise


def flush_tree(folder: str | Path) -> None:
    """``flush`` every file below ``folder``, then the folders from the innermost out, and ``folder`` itself.

    The name of ``folder`` is in its parent, which is the caller's to flush once it has its final name.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if os.path.isfile(os.path.join(parent, name)):  # else a socket or a dead link
                flush(os.path.join(parent, name))
        flush(parent)


def digest(path: str | Path, size: int | None = None) -> str:
    """A checksum against rot, not against people: ``xxh3:`` and 16 hexadecimal digits. It is read at the disk's speed.

    Args:
        path: the file.
        size: of the first so many bytes; None: of all.
    """
    xxh3, left = xxhash.xxh3_64(), math.inf if size is None else size
    with open(path, "rb") as file, naming(path):
        while piece := file.read(int(min(left, 1 << 20))):
            xxh3.update(piece)
            left -= len(piece)
    return f"xxh3:{xxh3.hexdigest()}"


def text_digest(text: str) -> str:
    """``digest`` of a file that holds ``text``."""
    return f"xxh3:{xxhash.xxh3_64(text.encode()).hexdigest()}"


def write_json_atomic(path: str | Path, values: Any) -> None:
    """Write ``values`` as indented JSON; tensors and numpy scalars become numbers, paths text, NaN and inf null."""
    write_text_atomic(path, json_text(values))


def json_text(values: Any) -> str:
    """What ``write_json_atomic`` writes."""
    return json.dumps(jsonable(values), indent=2, ensure_ascii=False) + "\n"


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False: another one has it. A file system without locks gives none.

    Args:
        descriptor: of it.
        shared: others may have it so too; to see whether somebody has it alone.
    """
    import fcntl  # not everywhere

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON with a checksum of themselves."""
    write_json_atomic(path, sealed(values))


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON holds them, with a checksum of themselves."""
    plain = {key: value for key, value in jsonable(values).items() if key != CHECKSUM}
    return {**plain, CHECKSUM: json_digest(plain)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether what was read is what ``sealed`` gave."""
    return values.get(CHECKSUM) == json_digest({key: value for key, value in values.items() if key != CHECKSUM})


def read_sealed(path: Path) -> dict[str, Any]:
    """What ``write_sealed`` wrote, or an older version without a checksum; empty where that is not what is there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    seal = values.pop(CHECKSUM, None)
    return values if seal == json_digest(values) or (seal is None and values.get("format", 1) == 1) else {}


def json_digest(values: Any) -> str:
    """``text_digest`` of ``values`` as JSON; the order of keys does not count."""
    return text_digest(json.dumps(values, sort_keys=True))


def write_jsonl_atomic(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; values as in ``write_json_atomic``."""
    write_text_atomic(path, "".join(json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows))


def jsonable(value: Any) -> Any:
    """``value`` as JSON can hold it: a number that is not finite becomes null, numbers of numpy and torch plain ones."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return jsonable(value.item()) if hasattr(value, "item") else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file.

    Raises:
        UserError: it is broken, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_jsonl(path: Path, may_end_early: bool = False, finite: bool = True) -> Iterator[dict[str, Any]]:
    """The objects in a file of lines, none where there is no file.

    Args:
        path: the file.
        may_end_early: a broken last line, as a killed process leaves it, is left out.
        finite: refuse NaN and Infinity, which are no JSON.

    Raises:
        UserError: a line is broken.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line, parse_constant=_no_constant if finite else None)
        except (ValueError, RecursionError) as error:
            if may_end_early and number == len(lines):
                return
            raise UserError(f"{path}: line {number}: broken JSON: {error}") from None


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON, and ``jsonable`` writes none: no sum of such scores means anything."""
    raise ValueError(f"{name} is no number of JSON")


def last_lines(path: Path, size: int = 4096) -> list[str]:
    """The lines in the last ``size`` bytes of a file, without empty ones, the first perhaps cut; none without a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in map(str.strip, text.splitlines()) if line]


def drop_half_line(file: BinaryIO) -> None:
    """Remove what a killed process left after the last newline, so that the next record starts its own line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
