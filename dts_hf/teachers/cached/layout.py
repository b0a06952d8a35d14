"""The files of a cache of states, and how a row is known in them.

A cache is a folder. ``states-00000.safetensors`` and so on hold a fixed range of rows each, in the order of the rows:
``states [n, H]``, ``label_logprob [n]`` (float32, at T = 1), with int8 ``scale [n]`` (float32), and of each row ``offsets``
(where its states begin, one more than rows), ``keys [rows, 16]`` and ``checksums``. ``index.safetensors`` has what is needed
to find a row, ``head.safetensors`` the teacher's head, and ``manifest.json``, written last, says what all of it is: without
it the cache is unfinished. Neither text nor tokens are in them.

A compact cache (``teachers.compact``) has ``ids [n, K]``, ``logits [n, K]`` and ``tail [n, 21]`` in the place of states, and
no head; all else is the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.files import CHECKSUM, is_sealed, json_digest, json_text, sealed
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.cached.manifest_form import check_form, is_shard_name
from dts_hf.teachers.compact import PARTS, CompactFormat
from dts_hf.teachers.identity import POST_NORM, TeacherIdentity

FORMAT = 1
#: What to do with a cache that is not as it was written.
AGAIN = "Make it again with dts-hf cache-teacher --overwrite, or fetch it again"
MANIFEST = "manifest.json"
#: What states can be stored in. int8 has a scale for each label.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
#: A shard of ours in the metadata of safetensors; one key alone, for several would stand in a random order.
METADATA = "dts_hf"


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """The 16 bytes by which a row is found: its tokens, and which of them are learned.

    Shuffling, batches, packing and the number of processes leave it as it is; another truncation, template, tokenizer or
    label does not.

    Args:
        input_ids: of a row, without padding.
        labels: as many, unshifted.
    """
    targets = np.array(labels, np.int32)
    targets[:1] = IGNORE_INDEX  # nothing predicts the first token
    return xxhash.xxh3_128(np.asarray(input_ids, np.int32).tobytes() + targets.tobytes()).digest()


def id_hash(row_id: str) -> int:
    """Of a row's id, which itself may name a file of this machine."""
    return xxhash.xxh3_64(row_id.encode("utf-8", "surrogatepass")).intdigest()


def targets_of(labels: Sequence[int]) -> NDArray[np.int64]:
    """The labels of a row that a state predicts, in order."""
    found = np.asarray(labels[1:], np.int64)
    targets: NDArray[np.int64] = found[found != IGNORE_INDEX]
    return targets


def bytes_per_label(hidden_size: int, dtype: str) -> int:
    """Of the states alone.

    Args:
        hidden_size: H.
        dtype: of ``DTYPES``.
    """
    return hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0)


def shard_ranges(counts: Sequence[int], label_bytes: int, shard_bytes: int) -> list[range]:
    """Which rows each shard holds: a function of the rows and of the sizes alone, so that a resume finds the same ones.

    Args:
        counts: labels of each row.
        label_bytes: of the states of a label.
        shard_bytes: a shard ends with the row that fills it so far.
    """
    ranges, first, size = [], 0, 0
    for number, count in enumerate(counts):
        size += count * label_bytes
        if size >= shard_bytes or number == len(counts) - 1:
            ranges.append(range(first, number + 1))
            first, size = number + 1, 0
    return ranges


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with a scale for each label.

    Args:
        states: ``[n, H]``.

    Returns:
        whole numbers ``[n, H]`` int8, and the scales ``[n]`` float32 that they are multiplied by.
    """
    whole = states.float()
    scale = (whole.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (whole / scale[:, None]).round().to(torch.int8), scale


def row_checksum(key: bytes, parts: Sequence[Tensor]) -> int:
    """Over all that is read of a row; with its key, so that rows which have changed places are found as well.

    Args:
        key: of the row.
        parts: its states, and its scales where it has some.
    """
    xxh3 = xxhash.xxh3_64(key)
    for part in parts:
        xxh3.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return xxh3.intdigest()


def as_int64(values: Sequence[int]) -> Tensor:
    """Unsigned 64-bit hashes as torch holds them."""
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64))


@dataclass(frozen=True)
class Plan:
    """All that the bytes of a cache depend on.

    Attributes:
        identity: of the teacher.
        dtype: what the states are stored in.
        keys: of the rows, in order.
        counts: labels of each row.
        shard_bytes: see ``shard_ranges``.
        batch_tokens: padded tokens that the teacher is given at once; below fp32 its states depend on it in their last bits.
        compact: what is kept of logits in the place of states; None: states.
    """

    identity: TeacherIdentity
    dtype: str
    keys: Sequence[bytes]
    counts: Sequence[int]
    shard_bytes: int
    batch_tokens: int
    compact: CompactFormat | None = None

    def digest(self) -> str:
        """Of all of it: shards with another one are of another cache."""
        facts = {
            "format": FORMAT,
            "identity": self.identity.as_json(),
            "dtype": self.dtype,
            "rows": xxhash.xxh3_128(b"".join(self.keys)).hexdigest(),
            "shard_bytes": self.shard_bytes,
            "batch_tokens": self.batch_tokens,
            **({} if self.compact is None else {"compact": dataclasses.asdict(self.compact)}),
        }
        return json_digest(facts)

    def ranges(self) -> list[range]:
        """The rows of each shard."""
        return shard_ranges(self.counts, self.label_bytes, self.shard_bytes)

    @property
    def label_bytes(self) -> int:
        """Of a label in a shard, its log-probability aside."""
        if self.compact is not None:
            return self.compact.label_bytes
        return bytes_per_label(self.identity.hidden_size, self.dtype)

    def offsets(self) -> list[int]:
        """Where the labels of each row begin, counted over all rows; one more than rows."""
        return list(accumulate(self.counts, initial=0))


@dataclass(frozen=True)
class Manifest:
    """What a finished cache is.

    Attributes:
        identity: of the teacher.
        plan: digest of the ``Plan``.
        dtype: what the states are stored in.
        rows, labels: how many.
        shards: of each ``file``, ``rows``, ``labels``, ``bytes`` and ``sha256``.
        files: sha256 of index and head.
        label_rule: how the rows were cut and what is learned of them, for people.
        data: digests of the encoded data sets that it was made of, by name.
        shared_tokens: ids that mean the same in the teacher's tokenizer and the one that encoded the rows.
        nll: mean negative log-likelihood of the labels under the teacher, nats.
        made_with: versions, kernel and device, for people.
        options: ``shard_bytes`` and ``batch_tokens``.
        compact: as ``compact.described`` gives it; None: a cache of states.
    """

    identity: TeacherIdentity
    plan: str
    dtype: str
    rows: int
    labels: int
    shards: Sequence[Mapping[str, Any]]
    files: Mapping[str, str]
    label_rule: Mapping[str, Any]
    data: Mapping[str, str | None]
    shared_tokens: int
    nll: float
    made_with: Mapping[str, str]
    options: Mapping[str, int]
    compact: Mapping[str, Any] | None = None

    def text(self) -> str:
        """The file."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return json_text(sealed({"format": FORMAT, **values, "identity": self.identity.as_json()}))

    @property
    def form(self) -> CompactFormat | None:
        """What is kept of each label in a compact cache; None: states."""
        facts = self.compact
        return None if facts is None else CompactFormat(facts["top_k"], facts["vocab_size"], facts["dtype"])

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a shard that hold what is read of a row."""
        if self.compact is not None:
            return PARTS
        return ("states", "scale") if self.dtype == "int8" else ("states",)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(int(shard["bytes"]) for shard in self.shards)


def shards_in(folder: Path) -> list[Path]:
    """Files of a folder with the name of a shard, in order; what only looks like one is somebody's own."""
    return sorted(path for path in folder.iterdir() if is_shard_name(path.name)) if folder.is_dir() else []


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache: every key of its type, every file one of a cache's own.

    Args:
        folder: the cache.

    Raises:
        UserError: there is no cache, it is unfinished, another version wrote it, or it is not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            there = "is a file" if os.path.lexists(folder) else "there is no such folder"
            raise UserError(f"{folder}: {there}, expected a folder, a cache of states: dts-hf cache-teacher makes one")
        shards = len(shards_in(folder))
        what = f"has {shards} shards and no {MANIFEST}, so it is unfinished" if shards else f"has no {MANIFEST}"
        raise UserError(f"{folder}: {what}; dts-hf cache-teacher goes on with it where it was stopped")
    check_regular(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no manifest of a cache of states: {error}") from None
    if not isinstance(values, dict) or "format" not in values:
        raise UserError(f"{path}: is no manifest of a cache of states: it has no format")
    if values["format"] != FORMAT:
        raise UserError(f"{path}: format {values['format']!r}, expected {FORMAT}: another version of dts_hf wrote it")
    whole = is_sealed(values)
    values.pop(CHECKSUM, None)
    check_form(values, str(path))  # first: it names the key
    identity = TeacherIdentity.from_json(values.pop("identity"), str(path))
    if identity.states != POST_NORM:
        raise UserError(
            f"{path}: its states are {identity.states!r}, expected {POST_NORM!r}: the head reads the final states after the "
            "norm"
        )
    if not whole:
        raise UserError(f"{path}: is not as it was written, going by its own {CHECKSUM}. {AGAIN}")
    manifest = Manifest(identity=identity, **{key: value for key, value in values.items() if key != "format"})
    if (form := manifest.form) is not None and form.vocab_size > identity.vocab_size:
        raise UserError(
            f"{path}: compact.vocab_size: got {form.vocab_size:,}, and the head has {identity.vocab_size:,}"
        )
    return manifest


def check_regular(path: Path) -> None:
    """Refuse a link, or anything else that is no file, where a file of a cache belongs.

    Raises:
        UserError: it is one, or nothing is there.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a link, expected a file of the cache. Put there what it leads to")
    if not path.is_file():
        raise UserError(f"{path}: is missing. {AGAIN}")
