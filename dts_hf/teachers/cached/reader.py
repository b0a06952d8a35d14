"""``StateCache``: rows of states out of a finished cache, memory-mapped, every row checked as it is read.

What it holds in memory is the index: about 40 bytes a row. Shards are mapped when their first row is asked for, in each
process of its own, so that it can be sent to workers of a data loader however they start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dts_hf.console import working
from dts_hf.errors import UserError
from dts_hf.files import file_sha256, text_digest
from dts_hf.loss.compact_rows import TAIL_NUMBERS
from dts_hf.models.head import Head
from dts_hf.teachers.cached.layout import (
    AGAIN,
    DTYPES,
    MANIFEST,
    METADATA,
    Manifest,
    check_regular,
    id_hash,
    read_manifest,
    row_checksum,
)
from dts_hf.teachers.cached.manifest_form import HEAD, INDEX
from dts_hf.teachers.identity import TeacherIdentity, differences, head_facts

#: Types as safetensors writes them.
_SHORT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


class StateCache:
    """A finished cache of states, opened for reading.

    Args:
        folder: the cache.

    Attributes:
        manifest: what it is.

    Raises:
        UserError: it is unfinished or not as it was written; the file is named. The content of shards is checked row by row
            as they are read (``row``), and all of it by ``verify``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.manifest: Manifest = read_manifest(self.folder)
        for shard in self.manifest.shards:
            self._check_size(shard)
        index = self._index()
        self._keys: NDArray[np.uint8] = index["keys"].numpy()
        self._sorted = index["sorted"].numpy().view(np.uint64)  # the first half of each key, in order
        self._order = index["order"].numpy()  # the row of each of them
        self._ids = index["ids"].numpy().view(np.uint64)
        self._offsets = index["offsets"].numpy()
        self._checksums = index["checksums"].numpy().view(np.uint64)
        self._firsts = np.array([0, *np.cumsum([shard["rows"] for shard in self.manifest.shards])])
        labels = self._offsets[self._firsts]
        if labels[0] or [shard["labels"] for shard in self.manifest.shards] != np.diff(labels).tolist():
            raise UserError(f"{self.folder / INDEX}: other labels than those of the shards in {MANIFEST}. {AGAIN}")
        self._open: dict[int, Any] = {}
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return StateCache, (self.folder,)

    @property
    def identity(self) -> TeacherIdentity:
        """Of the teacher that was run."""
        return self.manifest.identity

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.identity.hidden_size

    @property
    def row_shape(self) -> tuple[int, torch.dtype]:
        """How many numbers ``row`` gives of a label, and their type."""
        form = self.manifest.form
        return (self.hidden_size, torch_dtype(self.manifest.dtype)) if form is None else (form.words, torch.int16)

    def __len__(self) -> int:
        return self.manifest.rows

    # ------------------------------------------------------------------------------------------------------- finding

    def find(self, key: bytes) -> int | None:
        """The number of the row with this ``layout.row_key``; None: it is not in the cache."""
        half = np.frombuffer(key[:8], np.uint64)[0]
        place = int(np.searchsorted(self._sorted, half))
        while place < len(self._sorted) and self._sorted[place] == half:
            row = int(self._order[place])
            if self._keys[row].tobytes() == key:
                return row
            place += 1
        return None

    def knows_id(self, row_id: str) -> bool:
        """Whether a row with this id is in the cache, whatever its tokens."""
        return bool((self._ids == np.uint64(id_hash(row_id))).any())

    def labels(self, row: int) -> int:
        """How many labels a row has."""
        return int(self._offsets[row + 1] - self._offsets[row])

    # ------------------------------------------------------------------------------------------------------- reading

    def row(self, row: int) -> Tensor:
        """The states of a row, ``[labels, H]``, in the type that they are stored in; of int8 multiplied out, in float32.

        Of a compact cache what ``CompactFormat.pack`` gives, ``[labels, words]`` int16.

        Args:
            row: its number, as ``find`` gives it.

        Raises:
            UserError: they are not as they were written.
        """
        file, start, stop = self._place(row)
        try:
            parts = {name: file.get_slice(name)[start:stop] for name in self.manifest.parts}
        except SafetensorError as error:
            raise self._damaged(row, str(error)) from None
        if row_checksum(self._keys[row].tobytes(), list(parts.values())) != int(self._checksums[row]):
            raise self._damaged(row, "its checksum is another one")
        if (form := self.manifest.form) is not None:
            return form.pack(parts)
        states: Tensor = parts["states"]
        return states.float() * parts["scale"][:, None] if "scale" in parts else states

    def label_logprobs(self, row: int) -> Tensor:
        """The stored log-probabilities of the labels of a row at T = 1, ``[labels]`` float32."""
        file, start, stop = self._place(row)
        found: Tensor = file.get_slice("label_logprob")[start:stop].clone()
        return found

    def _place(self, row: int) -> tuple[Any, int, int]:
        """The open shard of a row, and where in it the row's labels are."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        start = int(self._offsets[row] - self._offsets[self._firsts[shard]])
        return self._file(shard), start, start + self.labels(row)

    def _file(self, shard: int) -> Any:
        if self._pid != os.getpid():  # forked: a map of one's own
            self._open, self._pid = {}, os.getpid()
        if shard not in self._open:
            self._open[shard] = self._opened(shard)
        return self._open[shard]

    def _opened(self, shard: int) -> Any:
        facts = self.manifest.shards[shard]
        path = self.folder / facts["file"]
        try:
            self._check_size(facts)
            file: Any = safe_open(path, "pt")
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            slices = {name: file.get_slice(name) for name in self._expected(0) if name in file.keys()}  # noqa: SIM118
            found_parts = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: is no shard of a cache of states: {error}. {AGAIN}") from None
        if found != {"plan": self.manifest.plan, "shard": shard}:
            which = f"shard {found.get('shard')}" + (
                "" if found.get("plan") == self.manifest.plan else " of another cache"
            )
            raise UserError(f"{path}: holds {which}, expected shard {shard} of this one. {AGAIN}")
        for name, expected in self._expected(int(facts["labels"])).items():
            if found_parts.get(name) != expected:
                got = found_parts.get(name, "nothing")
                raise UserError(f"{path}: {name}: got {got}, expected {expected}. {AGAIN}")
        return file

    def _expected(self, labels: int) -> dict[str, str]:
        """Type and shape of what is read of a shard, in the words of safetensors."""
        form, dtype = self.manifest.form, _SHORT[self.manifest.dtype]
        common = {"label_logprob": f"F32 {[labels]}"}
        if form is not None:
            kept = {"ids": f"I32 {[labels, form.top_k]}", "logits": f"{dtype} {[labels, form.top_k]}"}
            return {**kept, "tail": f"F32 {[labels, TAIL_NUMBERS]}", **common}
        scale = {"scale": f"F32 {[labels]}"} if self.manifest.dtype == "int8" else {}
        return {"states": f"{dtype} {[labels, self.hidden_size]}", **scale, **common}

    def _damaged(self, row: int, why: str) -> UserError:
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        path = self.folder / self.manifest.shards[shard]["file"]
        return UserError(f"{path}: row {row} of the cache is not as it was written: {why}. {AGAIN}")

    def _check_size(self, shard: Any) -> None:
        path = self.folder / shard["file"]
        check_regular(path)
        if (size := path.stat().st_size) != shard["bytes"]:
            raise UserError(
                f"{path}: has {size:,} bytes, expected {shard['bytes']:,}: it was cut or replaced. {AGAIN}"
            )

    def _load(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        check_regular(path)
        if file_sha256(path) != self.manifest.files[name]:
            raise UserError(f"{path}: is not as it was written, going by its sha256 in {MANIFEST}. {AGAIN}")
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}. {AGAIN}") from None

    def _index(self) -> dict[str, Tensor]:
        """The index, whose tensors must have the rows of the manifest."""
        index, rows = self._load(INDEX), self.manifest.rows
        shapes = {"keys": (rows, 16), "offsets": (rows + 1,)}
        shapes |= dict.fromkeys(("sorted", "order", "ids", "checksums"), (rows,))
        for name, shape in shapes.items():
            dtype = torch.uint8 if name == "keys" else torch.int64
            found = index.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                given = "nothing" if found is None else f"{list(found.shape)} {found.dtype}"
                raise UserError(f"{self.folder / INDEX}: {name}: got {given}, expected {list(shape)} {dtype}. {AGAIN}")
        return index

    # ------------------------------------------------------------------------------------------------- all of it

    def head(self) -> Head:
        """The teacher's head, as it was when it ran; of a compact cache, which has logits, one of V rows and no width.

        Raises:
            UserError: the file is damaged, or holds another head than that of the manifest.
        """
        if (form := self.manifest.form) is not None:
            return Head(torch.empty(form.vocab_size, 0))
        tensors, identity = self._load(HEAD), self.identity
        head = Head(tensors["weight"], tensors.get("bias"), identity.logit_scale, identity.softcap)
        if lines := differences(identity, head_facts(head)):
            raise UserError(
                f"{self.folder / HEAD}: another head than that of the teacher: {'; '.join(lines)}. {AGAIN}"
            )
        return head

    def verify(self) -> Iterator[int]:
        """Check the content of every shard; yields the labels of each one that is whole.

        Raises:
            UserError: names the first file that is not as it was written.
        """
        self.head()
        for number, shard in enumerate(self.manifest.shards):
            self._opened(number)
            path = self.folder / shard["file"]
            if (found := file_sha256(path)) != shard["sha256"]:
                raise UserError(f"{path}: sha256 {found[:12]}..., expected {shard['sha256'][:12]}.... {AGAIN}")
            yield int(shard["labels"])

    def record(self) -> dict[str, Any]:
        """What a run says of it, and a resume compares; it names no place."""
        manifest = self.manifest
        shards = [shard["sha256"] for shard in manifest.shards]
        return {
            "cache": {"plan": manifest.plan, "dtype": manifest.dtype, "rows": manifest.rows, "labels": manifest.labels,
                      "states": shards[0] if len(shards) == 1 else text_digest("\n".join(shards))},
            "cached_teacher": {key: value for key, value in self.identity.as_json().items() if key != "versions"},
        }  # fmt: skip


def verified(folder: Path) -> StateCache:
    """A cache of which all has been read, and is as it was written.

    Args:
        folder: the cache.

    Raises:
        UserError: see ``StateCache.verify``.
    """
    cache = StateCache(folder)
    with working("verifying labels", cache.manifest.labels) as work:
        for labels in cache.verify():
            work.advance(labels)
    return cache


def torch_dtype(dtype: str) -> torch.dtype:
    """What ``StateCache.row`` gives of states that are stored in ``dtype``."""
    return torch.float32 if dtype == "int8" else DTYPES[dtype]
