"""A file of rows that takes hours to make, in blocks that a kill cannot damage: OUT, OUT's manifest, ``OUT.unfinished/``.

A block is written under a temporary name, flushed and renamed, so a killed process loses the blocks it was at. The file
itself appears once all blocks are there, then its manifest, and then the folder goes. What the rows depend on (their
*identity*) lies in the folder from before the first block until the end, and a digest of it in every block: rows of two
jobs never meet in one file. One call at a time works in the folder, which it locks; the system drops the lock of one that
is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash

from dts_hf.distributed.processes import gathered, on_first_process
from dts_hf.errors import UserError
from dts_hf.files import (
    file_sha256,
    flush,
    json_digest,
    jsonable,
    naming,
    read_sealed,
    try_lock,
    write_bytes_atomic,
    write_sealed,
)

IDENTITY_FILE, ASSEMBLED = "settings.json", "assembled.tmp"
#: How often the folder may vanish under a start: whoever has finished removes it.
ATTEMPTS = 100


class AnswerBlocks:
    """Every process calls every method, but ``write``; the first one decides.

    Args:
        path: the finished file.
        rank: number of this process.
        world: number of processes. Each may have a folder of its own: the first one asks for what it does not see.
        folder: of the blocks; None: ``OUT.unfinished`` beside the file.
        key: what the user calls the file, for messages.
        private: nobody else may read what is written.
    """

    def __init__(
        self,
        path: Path,
        rank: int = 0,
        world: int = 1,
        *,
        folder: Path | None = None,
        key: str = "--output",
        private: bool = False,
    ) -> None:
        self.path, self.rank, self.world, self.key, self.private = path, rank, world, key, private
        self.folder = path.with_name(f"{path.name}.unfinished") if folder is None else folder
        self.manifest_path = path.with_name(f"{path.name.removesuffix('.jsonl')}.manifest.json")
        self._digest = ""  # of the identity, from ``begin`` on
        self._lock: int | None = None  # the open folder

    def check(self, identity: Mapping[str, Any], overwrite: bool = False) -> Literal["new", "unfinished", "finished"]:
        """What is there of these rows. Writes nothing.

        Args:
            identity: all that the rows depend on, or as much of it as is known before a model is loaded; JSON's values.
            overwrite: other rows may be replaced.

        Raises:
            UserError: the file, or the folder, is of other rows or no rows of ours, or another call works in it.
        """
        return on_first_process(lambda: self._check(identity, overwrite), self.rank, self.world)

    def begin(self, identity: Mapping[str, Any], overwrite: bool = False) -> set[int]:
        """Make the folder, or go on in it, and lock it until ``close``.

        Args:
            identity: all of it.
            overwrite: other rows may be replaced; blocks of them are removed.

        Returns:
            the numbers of the blocks that are there already, the same on all processes.

        Raises:
            UserError: as ``check``, or the folder cannot be made.
        """
        self._digest = json_digest(identity)
        on_first_process(lambda: self._begin_alone(identity, overwrite), self.rank, self.world)
        if self.rank:  # each machine may have a folder of its own; one that all share is ready
            self._make()
            self._begin(identity)
        return set().union(*gathered(self._whole_blocks(), self.world))

    def write(self, number: int, lines: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
        """Keep one block.

        Args:
            number: of the block, from 0.
            lines: its rows.
            facts: of the block, for the manifest.
        """
        body = b"".join(json_line(line) for line in lines)
        header = {**facts, "identity": self._digest, "digest": xxhash.xxh3_64(body).hexdigest()}
        write_bytes_atomic(self._block(number), json.dumps(header).encode() + b"\n" + body)

    def finish(
        self, count: int, identity: Mapping[str, Any], overwrite: bool, summary: Any = None
    ) -> Mapping[str, Any]:
        """Put the blocks together, in order.

        Args:
            count: number of blocks.
            identity: as given to ``begin``.
            overwrite: as given there.
            summary: ``summary(facts of all blocks) -> values`` of the manifest, beside the identity and the checksum.

        Returns:
            the manifest.

        Raises:
            UserError: a file of other rows has appeared meanwhile, or blocks are gone.
        """
        missing = on_first_process(
            lambda: [number for number in range(count) if self._facts(number) is None], self.rank, self.world
        )
        here = {number: self._block(number).read_bytes() for number in missing if self._facts(number) is not None}
        for part in gathered(here, self.world) if missing else ():
            for number, content in part.items() if self.rank == 0 else ():
                write_bytes_atomic(self._block(number), content)
        made = on_first_process(lambda: self._finish(count, identity, overwrite, summary), self.rank, self.world)
        with contextlib.suppress(FileNotFoundError):  # in a folder that all share another process is faster
            self._remove()
        return made

    def close(self) -> None:
        """Let another call work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_manifest(self) -> dict[str, Any]:
        """That of the finished file; empty where there is none. The empty folder that a kill at the very end left goes."""
        if not self._entries() and not self._is_busy():
            self._remove()
        return read_sealed(self.manifest_path)

    # ------------------------------------------------------------------------------------------------ the first process

    def _check(self, identity: Mapping[str, Any], overwrite: bool) -> Literal["new", "unfinished", "finished"]:
        if self.path.is_dir() or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(f"{self.key}: {self.path} is a folder, or {self.folder} is a file; choose another name")
        if self._lock is None and self._is_busy():
            raise self._busy()
        started = read_sealed(self.folder / IDENTITY_FILE)
        entries = [] if started else self._entries()
        if any(not _is_ours(path) for path in entries):
            raise UserError(f"{self.key}: {self.folder} is not empty and holds no rows of ours; choose another file")
        if entries and not overwrite:
            raise UserError(
                f"{self.key}: {self.folder / IDENTITY_FILE} is gone or damaged, so nobody knows what the unfinished rows "
                "beside it are of. Begin anew with --overwrite, or choose another file"
            )
        goes_on = bool(started) and not differences(started, identity)
        if os.path.lexists(self.path):
            manifest = read_sealed(self.manifest_path)
            before = manifest.get("identity")
            if before and not differences(before, identity) and not self._was_changed(manifest):
                return "unfinished" if goes_on or overwrite else "finished"
            # Killed behind the rename of the file and before its manifest: ``_finish`` compares the two
            if not (overwrite or (goes_on and not before)):
                raise UserError(f"{self.key}: {self._whose(manifest, identity)}. {_ADVICE}")
        if started and not goes_on and not overwrite:
            raise UserError(
                f"{self.key}: {self.folder} holds unfinished rows of other settings "
                f"({'; '.join(differences(started, identity))}). Give those again to go on, or begin anew with --overwrite"
            )
        return "unfinished" if goes_on else "new"

    def _whose(self, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
        if not manifest.get("identity"):
            return f"{self.path} is there already, and {self.manifest_path.name} does not say that its rows are ours"
        other = differences(manifest["identity"], identity)
        if other:
            return f"{self.path} holds rows of other settings ({'; '.join(other)})"
        return (
            f"{self.path} has been changed since it was written (its sha256 is not that of {self.manifest_path.name})"
        )

    def _was_changed(self, manifest: Mapping[str, Any]) -> bool:
        return not self.path.is_file() or file_sha256(self.path) != manifest.get("sha256")

    def _begin_alone(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Look, lock, look again: what was seen without the lock decides nothing that cannot be taken back."""
        self._check(identity, overwrite)
        self._take()
        try:
            self._check(identity, overwrite)
            self._begin(identity)
        except BaseException:
            with contextlib.suppress(OSError):  # something is in it
                self.folder.rmdir()
            self.close()
            raise

    def _begin(self, identity: Mapping[str, Any]) -> None:
        if read_sealed(self.folder / IDENTITY_FILE) == identity:
            for left in self.folder.glob(".*.tmp") if self.rank == 0 else ():  # of a process killed in a write
                left.unlink(missing_ok=True)
            return
        self._clear()
        write_sealed(self.folder / IDENTITY_FILE, identity)

    def _make(self) -> None:
        try:
            self.folder.mkdir(mode=0o700 if self.private else 0o777, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.key}: cannot make the folder {self.folder}: {error.strerror}") from None

    def _take(self) -> None:
        """Make and lock the folder; where the file system has no locks, it is gone on without."""
        for _ in range(ATTEMPTS):
            self._make()
            with contextlib.suppress(FileNotFoundError):  # whoever had it has finished and removed it
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if not try_lock(descriptor):
                        raise self._busy()
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.folder)):
                        self._lock, descriptor = descriptor, -1
                        return
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)
        raise UserError(f"{self.key}: cannot write in {self.folder.parent} (no folder lasts there)")

    def _is_busy(self) -> bool:
        """Whether another call works in the folder."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            return not try_lock(descriptor)
        finally:
            os.close(descriptor)

    def _busy(self) -> UserError:
        return UserError(
            f"{self.key}: another process is writing {self.path}. Wait for its end or stop it, or choose another file"
        )

    def _finish(self, count: int, identity: Mapping[str, Any], overwrite: bool, summary: Any) -> dict[str, Any]:
        assembled, sha256, facts = self.folder / ASSEMBLED, hashlib.sha256(), []
        with assembled.open("wb") as file, naming(assembled):
            for number in range(count):
                header, body = self._read_or_tell(number)
                facts.append(header)
                file.write(body)
                sha256.update(body)
        flush(assembled)
        if os.path.lexists(self.path) and not overwrite and file_sha256(self.path) != sha256.hexdigest():
            raise UserError(f"{self.key}: {self.path} is there now, and is not ours. {_ADVICE}")
        manifest = {
            "format": 1,
            "file": self.path.name,
            "sha256": sha256.hexdigest(),
            **(summary(facts) if summary else {}),
            "identity": identity,
        }
        described = self.folder / "manifest.tmp"
        write_sealed(described, manifest)
        for path in (assembled, described) if self.private else ():
            path.chmod(0o600)
        os.replace(assembled, self.path)
        os.replace(described, self.manifest_path)
        flush(self.path.parent)
        return manifest

    # --------------------------------------------------------------------------------------------------------- the folder

    def _block(self, number: int) -> Path:
        return self.folder / f"{number:08}.block"

    def _read(self, number: int) -> tuple[dict[str, Any], bytes]:
        head, _, body = self._block(number).read_bytes().partition(b"\n")
        header = json.loads(head)
        if header.pop("digest") != xxhash.xxh3_64(body).hexdigest() or header.pop("identity") != self._digest:
            raise ValueError("not as it was written, or of other settings")
        return header, body

    def _read_or_tell(self, number: int) -> tuple[dict[str, Any], bytes]:
        try:
            return self._read(number)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.key}: {self._block(number)} is gone or was changed since it was written ({error}): another program "
                "writes there. Give the same command again: it makes what is missing"
            ) from None

    def _facts(self, number: int) -> dict[str, Any] | None:
        """What the block says of itself; None where it is missing or damaged: then it is made again."""
        try:
            return self._read(number)[0]
        except (OSError, ValueError, KeyError, AttributeError):
            return None

    def _whole_blocks(self) -> set[int]:
        numbers = {int(path.stem) for path in self.folder.glob("*.block") if path.stem.isdecimal()}
        return {number for number in numbers if self._facts(number) is not None}

    def _entries(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if not path.name.endswith(".tmp")]

    def _remove(self) -> None:
        if self.folder.is_dir():
            self._clear()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _clear(self) -> None:
        """Empty the folder, what says whose it is last: a kill in between leaves something that is known."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == IDENTITY_FILE):
            if _is_ours(path):
                path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    return path.suffix in (".block", ".tmp") or path.name == IDENTITY_FILE


_ADVICE = "Choose another file, or replace it with --overwrite"


def json_line(values: Mapping[str, Any]) -> bytes:
    """One object on one line; half of a surrogate pair, which UTF-8 does not know, is escaped."""
    values = jsonable(values)
    try:
        return (json.dumps(values, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(values) + "\n").encode()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two identities differ, in words; keys that ``now`` lacks are no difference."""
    return [text for key in now for text in _apart(key, before.get(key), json.loads(json.dumps(jsonable(now[key]))))]


def _apart(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted({*before, *now}):
            yield from _apart(f"{key}.{inner}", before.get(inner), now.get(inner))
    elif before != now:
        shown = [text if len(text := json.dumps(value)) <= 60 else f"{text[:57]}..." for value in (before, now)]
        yield f"{key}: {shown[0]}, now {shown[1]}"
