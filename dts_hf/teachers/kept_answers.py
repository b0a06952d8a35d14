"""Answers of a teacher elsewhere that are kept as training goes, so that no row is asked twice.

They lie in the folder of a cache of states, as long as it is unfinished: ``answers.json`` says whose they are, and each
process appends to a file ``answers-HEX.rows`` of its own, which it has made. A record is one row: its key
(``layout.row_key``), its label log-probabilities and its states, with a checksum over all of them. What a kill has cut off
is no record. Rows come in the order of training, so these are no shards: ``dts-hf cache-teacher`` writes the shards out of
them, asks for the rows that were never trained on, and removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.files import CHECKSUM, is_sealed, naming, write_sealed
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.batch_rows import Row
from dts_hf.teachers.cached.layout import MANIFEST, check_regular, row_checksum, row_key
from dts_hf.teachers.cached.manifest_form import ANSWERS, answers_name, is_answers_name
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.description import Description
from dts_hf.teachers.identity import TeacherIdentity, differences
from dts_hf.teachers.remote_states import RemoteStates
from dts_hf.teachers.wire import Answer

FORMAT = 1
#: Before each record: a mark, labels, the row's key, and the checksum.
_HEADER = struct.Struct("<4sI16sQ")
_MARK = b"row\n"


class _Place(NamedTuple):
    """Where a record is: its file, the first byte behind its header, and how many labels it has."""

    path: Path
    offset: int
    labels: int
    checksum: int


class KeptAnswers:
    """``RemoteStates`` that asks for a row once: what it has been answered is in a folder, for later epochs and runs.

    Any number of processes may use the folder together, and threads of a process. A record that is not as it was written is
    asked for again. A finished cache in the folder is read as well.

    Args:
        server: whom it asks.
        folder: of the cache; need not be there.

    Raises:
        UserError: the folder has answers or a cache of another teacher, or one that has lost something of the states.
    """

    def __init__(self, server: RemoteStates, folder: str | Path) -> None:
        self.server, self.folder = server, Path(folder).expanduser().absolute()
        self._cache = self._finished()
        self._open()
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the files yet, and none is this process's own."""
        self._places: dict[bytes, tuple[_Place, ...]] = {}
        self._read: dict[Path, int] = {}
        self._own: BinaryIO | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned
        return {"server": self.server, "folder": self.folder, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def description(self) -> Description:
        """See ``RemoteStates``."""
        return self.server.description

    @property
    def dtype(self) -> torch.dtype:
        """See ``RemoteStates``."""
        return self.server.dtype

    @property
    def url(self) -> str:
        """Of the server."""
        return self.server.url

    def check_length(self, tokens: int) -> None:
        """See ``RemoteStates.check_length``."""
        self.server.check_length(tokens)

    def ask(self, rows: Sequence[Row]) -> Answer:
        """See ``RemoteStates.ask``; of rows that were asked before, what was answered then.

        Args:
            rows: see ``batch_rows.labelled_rows``.

        Raises:
            RunError: see ``RemoteStates.ask``.
            OSError: an answer cannot be written, as on a full disk.
        """
        if self._pid != os.getpid():  # forked: the file is the parent's
            self._forget()
        keys = [_key(row) for row in rows]
        labels = {key: int(row[1].sum()) for key, row in zip(keys, rows, strict=True)}
        with self._lock:
            found = {key: self._kept(key, count) for key, count in labels.items()}
            if any(answer is None for answer in found.values()):
                self._look_again()  # another process may have been answered since
                found = {key: answer or self._kept(key, labels[key]) for key, answer in found.items()}
        new = {key: row for key, row in zip(keys, rows, strict=True) if found[key] is None}
        if new:
            answer, counts = self.server.ask([*new.values()]), [labels[key] for key in new]
            parts = zip(answer.states.split(counts), answer.label_logprob.split(counts), strict=True)
            with self._lock:
                for key, (states, logprobs) in zip(new, parts, strict=True):
                    found[key] = Answer(states, logprobs)
                    self._append(key, states, logprobs)
        answers = [self._nothing(), *(part for key in keys if (part := found[key]) is not None)]
        return Answer(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def _nothing(self) -> Answer:
        return Answer(torch.empty(0, self.server.hidden_size, dtype=self.dtype), torch.empty(0))

    # ------------------------------------------------------------------------------------------------------- reading

    @property
    def _label_bytes(self) -> int:
        return 4 + self.server.hidden_size * self.dtype.itemsize

    def _kept(self, key: bytes, labels: int) -> Answer | None:
        """What was answered for a row; None: nothing, or it is not as it was written."""
        for place in self._places.get(key, ()):
            if place.labels == labels and (answer := self._record(key, place)) is not None:
                return answer
        if self._cache is None or (row := self._cache.find(key)) is None or self._cache.labels(row) != labels:
            return None
        return Answer(self._cache.row(row), self._cache.label_logprobs(row))

    def _record(self, key: bytes, place: _Place) -> Answer | None:
        size = place.labels * self._label_bytes
        with contextlib.suppress(OSError), _opened(place.path) as file:
            content = bytearray(os.pread(file.fileno(), size, place.offset))
            if len(content) == size:
                bits = torch.frombuffer(content, dtype=torch.uint8)
                logprobs = bits[: 4 * place.labels].view(torch.float32)
                states = bits[4 * place.labels :].view(self.dtype).reshape(place.labels, -1)
                if row_checksum(key, [logprobs, states]) == place.checksum:
                    return Answer(states, logprobs)
        return None

    def _look_again(self) -> None:
        """Take in the records that were written since the last look."""
        for path in sorted(self.folder.iterdir()):
            if not is_answers_name(path.name) or path.is_symlink():
                continue
            with contextlib.suppress(OSError), _opened(path) as file:
                end = os.fstat(file.fileno()).st_size
                for key, place in self._records(file, path, self._read.get(path, 0), end):
                    self._places[key] = (*self._places.get(key, ()), place)

    def _records(self, file: BinaryIO, path: Path, start: int, end: int) -> Iterator[tuple[bytes, _Place]]:
        """Whole records between two bytes of a file; ``_read`` is then behind the last of them."""
        while start + _HEADER.size <= end:
            mark, labels, key, checksum = _HEADER.unpack(os.pread(file.fileno(), _HEADER.size, start))
            behind = start + _HEADER.size + labels * self._label_bytes
            if mark != _MARK or behind > end:
                return
            yield key, _Place(path, start + _HEADER.size, labels, checksum)
            self._read[path] = start = behind

    # ------------------------------------------------------------------------------------------------------- writing

    def _append(self, key: bytes, states: Tensor, logprobs: Tensor) -> None:
        if self._own is None:
            path = self.folder / answers_name(secrets.token_hex(8))
            with naming(path):
                self._own = path.open("xb", buffering=0)
        parts = [logprobs.contiguous(), states.contiguous()]
        checksum = row_checksum(key, parts)
        header = _HEADER.pack(_MARK, len(logprobs), key, checksum)
        content = memoryview(b"".join([header, *(part.view(torch.uint8).numpy().tobytes() for part in parts)]))
        path, start = Path(self._own.name), self._own.tell()
        try:
            with naming(path):
                while content:
                    content = content[self._own.write(content) :]
        except OSError:
            self._own.truncate(start)  # records behind half a one would never be found
            self._own.seek(start)
            raise
        self._read[path] = self._own.tell()
        self._places[key] = (_Place(path, start + _HEADER.size, len(logprobs), checksum),)

    # ------------------------------------------------------------------------------------------------------- whose it is

    def _open(self) -> None:
        """Write whose answers these are, or refuse those of another teacher."""
        identity, path = self.description.identity, self.folder / ANSWERS
        if not path.exists():
            if self.folder.is_dir() and any(is_answers_name(one.name) for one in self.folder.iterdir()):
                raise UserError(f"teacher.cache: {path} is missing, and it alone says whose the answers beside it are")
            with naming(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_sealed(path, {"format": FORMAT, "identity": identity.as_json()})
            return
        self._refuse_other(read_answers(path), "the kept answers", path)

    def _finished(self) -> StateCache | None:
        """The cache that is in the folder already."""
        if not (self.folder / MANIFEST).is_file():
            return None
        cache, own = StateCache(self.folder), self.description.identity
        self._refuse_other(cache.identity, "the cache", cache.folder)
        if cache.manifest.form is not None or cache.manifest.dtype != own.dtype:
            what = "is compact" if cache.manifest.form is not None else f"has states in {cache.manifest.dtype}"
            raise UserError(
                f"teacher.cache: {cache.folder} {what}, and the server gives them in {own.dtype}: one run would mix both. "
                "Use kind: cached, or another folder"
            )
        return cache

    def _refuse_other(self, kept: TeacherIdentity, whose: str, path: Path) -> None:
        # A server does not know the template of the rows, nor need it; they are found by their tokens
        now = {key: value for key, value in self.description.identity.as_json().items() if key != "template"}
        if lines := differences(kept, now, whose):
            raise UserError(
                f"teacher.cache: {path} is of another teacher than the one at {self.url}: {'; '.join(lines)}. Choose "
                "another folder, or serve that teacher"
            )


def read_answers(path: Path) -> TeacherIdentity:
    """Whose answers are kept in a folder.

    Args:
        path: the file ``answers.json``.

    Raises:
        UserError: it is not as it was written.
    """
    check_regular(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: does not say whose answers these are: {error}. Remove the folder") from None
    known = isinstance(values, dict) and {*values} == {"format", "identity", CHECKSUM}
    if not known or values["format"] != FORMAT or not is_sealed(values) or not isinstance(values["identity"], dict):
        raise UserError(f"{path}: is not as it was written, or by another version of dts_hf. Remove the folder")
    return TeacherIdentity.from_json(values["identity"], str(path))


def remove_answers(folder: Path) -> None:
    """Remove the answers that a finished cache was made of; who says whose they are goes last.

    Args:
        folder: of the cache.
    """
    for path in [*filter(lambda one: is_answers_name(one.name), folder.iterdir()), folder / ANSWERS]:
        path.unlink(missing_ok=True)


def _key(row: Row) -> bytes:
    ids, marked = row
    return row_key(ids.tolist(), torch.where(marked.bool(), ids, IGNORE_INDEX).tolist())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        yield file
