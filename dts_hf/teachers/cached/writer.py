"""Run a teacher over rows once and write its states: shard by shard, so that a kill costs no more than the last one.

What a shard holds depends on the rows and the sizes alone, and so do the batches that the teacher is given for it. Process r
of W writes the shards r, r + W, ...: the bytes are the same for every W, and for every number of kills.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dts_hf.alignment.batch import as_read
from dts_hf.console import working
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import Example
from dts_hf.distributed.processes import gathered, on_first_process
from dts_hf.errors import RunError, UserError
from dts_hf.files import file_sha256, write_bytes_atomic, write_text_atomic
from dts_hf.models.head import Head
from dts_hf.teachers.cached.folder import check_folder, remove_temporary, shard_metadata
from dts_hf.teachers.cached.layout import (
    DTYPES,
    MANIFEST,
    METADATA,
    Manifest,
    Plan,
    as_int64,
    id_hash,
    quantise,
    row_checksum,
    row_key,
    shards_in,
    targets_of,
)
from dts_hf.teachers.cached.manifest_form import HEAD, INDEX, shard_name
from dts_hf.teachers.compact import PARTS, CompactFormat, ErrorAt, described
from dts_hf.teachers.description import encode_head
from dts_hf.teachers.identity import TeacherIdentity
from dts_hf.teachers.kept_answers import remove_answers
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_test import label_logprobs

#: Of a shard, bytes: small enough that a kill costs little, and 10,000 of them (what the Hub likes in a folder) are 1.3 TB.
SHARD_BYTES = 128 << 20
#: Padded tokens that the teacher is given at once.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Rows:
    """Encoded rows in the order in which they are cached.

    Args:
        examples: by number; a data set or a list.
        ids: of the rows.
    """

    examples: Sequence[Example]
    ids: Sequence[str]

    def read(self, number: int) -> Mapping[str, Any]:
        """A row as the teacher reads it."""
        return as_read(self.examples[number])

    def keys_and_counts(self) -> tuple[list[bytes], list[int]]:
        """The key of each row, and how many labels it has."""
        keys, counts = [], []
        for number in range(len(self.ids)):
            example = self.read(number)
            keys.append(row_key(example["input_ids"], example["labels"]))
            counts.append(len(targets_of(example["labels"])))
        return keys, counts


@dataclass(frozen=True)
class Facts:
    """What the manifest says besides; see ``Manifest``, and of a compact cache ``compact.described``."""

    label_rule: Mapping[str, Any]
    data: Mapping[str, str | None]
    shared_tokens: int
    errors: Sequence[ErrorAt] = ()
    forced: bool = False


def make_plan(
    rows: Rows,
    identity: TeacherIdentity,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    batch_tokens: int = BATCH_TOKENS,
    compact: CompactFormat | None = None,
) -> Plan:
    """All that the bytes of the cache will depend on.

    Args:
        rows: that are cached.
        identity: of the teacher.
        dtype: to store states in; None: the teacher's own, in which nothing is lost.
        shard_bytes: see ``SHARD_BYTES``.
        batch_tokens: see ``BATCH_TOKENS``.
        compact: what to keep of logits, in its own type, in the place of states.

    Raises:
        UserError: no row has a label, or float16 would lose what the teacher's type can hold.
    """
    dtype = compact.dtype if compact is not None else dtype or identity.dtype
    if dtype not in DTYPES or (dtype == "float16" and compact is None and identity.dtype != "float16"):
        usual = [name for name in DTYPES if name != "float16"]
        raise UserError(f"dtype: got {dtype!r}, expected one of {', '.join(usual)}")
    keys, counts = rows.keys_and_counts()
    if not sum(counts):
        raise UserError("no row has a label, so there are no states to cache")
    return Plan(identity, dtype, keys, counts, shard_bytes, batch_tokens, compact)


def write_cache(
    folder: Path,
    teacher: LiveTeacher | RemoteTeacher,
    rows: Rows,
    plan: Plan,
    facts: Facts,
    *,
    rank: int = 0,
    world: int = 1,
) -> Manifest:
    """Write what is missing of a cache, and its manifest; all processes call it.

    Args:
        folder: of the cache; shards of the same plan in it are kept.
        teacher: whole, on its device.
        rows: that ``plan`` was made of.
        plan: see ``make_plan``.
        facts: for the manifest.
        rank: of this process.
        world: the number of processes.

    Raises:
        UserError: the folder holds another cache.
        RunError: the teacher gives states that are non-finite.
    """
    digest, ranges = plan.digest(), plan.ranges()
    on_first_process(lambda: _prepare(folder, digest), rank, world)
    mine = range(rank, len(ranges), world)
    left = [number for number in mine if not _is_whole(folder / shard_name(number), digest, number)]
    labels = sum(plan.counts[row] for number in left for row in ranges[number])
    with working("caching the states of labels", labels) as work:
        for number in left:
            tensors = _shard(teacher, rows, plan, ranges[number], work.advance)
            metadata = {METADATA: json.dumps({"plan": digest, "shard": number})}
            write_bytes_atomic(folder / shard_name(number), save(tensors, metadata))
    written = {number: _facts_of(folder / shard_name(number), ranges[number], plan) for number in mine}
    shards = {number: found for part in gathered(written, world) for number, found in part.items()}
    finish = lambda: _finish(folder, teacher, rows, plan, facts, [shards[n] for n in range(len(ranges))])  # noqa: E731
    return on_first_process(finish, rank, world)


def _prepare(folder: Path, digest: str) -> None:
    """Refuse a folder with another cache in it, and remove what a killed process was writing."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    for path in shards_in(folder):
        found = shard_metadata(path)
        if found is not None and found.get("plan") != digest:
            raise UserError(
                f"{folder}: holds shards of another cache (another teacher, other rows or other options). Choose another "
                "folder, or replace it with --overwrite"
            )


def _is_whole(path: Path, digest: str, number: int) -> bool:
    """Whether a shard is there, and every row in it as it was written."""
    if not path.is_file() or shard_metadata(path) != {"plan": digest, "shard": number}:
        return False
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    offsets, keys = tensors["offsets"].tolist(), tensors["keys"].numpy()
    found = [
        row_checksum(keys[row].tobytes(), [tensors[name][offsets[row] : offsets[row + 1]] for name in _parts(tensors)])
        for row in range(len(keys))
    ]
    return bool((as_int64(found) == tensors["checksums"]).all())


def _parts(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in ("states", "scale", *PARTS) if name in tensors]


def _shard(
    teacher: LiveTeacher | RemoteTeacher, rows: Rows, plan: Plan, numbers: range, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """The tensors of a shard, on the CPU."""
    head = teacher.head
    states: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    for batch in _batches(rows, numbers, plan.batch_tokens):
        for row, found, logprob in _answered(teacher, head, rows, batch, plan):
            states[row], logprobs[row] = found, logprob
            advance(len(logprob))
    kept = torch.cat([states.pop(row) for row in numbers])
    tensors = {"states": kept, "label_logprob": torch.cat([logprobs.pop(row) for row in numbers])}
    if plan.compact is not None:
        tensors |= plan.compact.parts(plan.compact.unpack(tensors.pop("states")))
    elif plan.dtype == "int8":
        tensors["states"], tensors["scale"] = quantise(kept)
    offsets = torch.tensor([0, *np.cumsum([plan.counts[row] for row in numbers]).tolist()])
    keys = [plan.keys[row] for row in numbers]
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    sums = [
        row_checksum(key, [tensors[name][start:stop] for name in _parts(tensors)])
        for key, (start, stop) in zip(keys, bounds, strict=True)
    ]
    keys_array = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16).copy())
    return tensors | {"offsets": offsets, "keys": keys_array, "checksums": as_int64(sums)}


def _batches(rows: Rows, numbers: range, tokens: int) -> Iterator[list[int]]:
    """Rows of like length together, up to ``tokens`` with their padding; the same ones however often it is asked."""
    lengths = {row: len(rows.read(row)["input_ids"]) for row in numbers}
    batch: list[int] = []
    for row in sorted(numbers, key=lambda number: (lengths[number], number)):
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _answered(
    teacher: LiveTeacher | RemoteTeacher, head: Head, rows: Rows, batch: Sequence[int], plan: Plan
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, states, label log-probabilities) of a batch, the states as they are stored, of int8 in fp32."""
    examples: Any = [rows.read(row) for row in batch]
    inputs = PaddedCollator(0)(examples)
    labels = inputs.pop("labels").to(head.weight.device)
    inputs.pop("row_id")
    states = teacher.states({key: value.to(labels.device) for key, value in inputs.items()}, labels)
    if not torch.isfinite(states).all():
        ids = ", ".join(rows.ids[row] for row in batch[:5])
        raise RunError(f"the teacher gives states that are non-finite, in one of the rows {ids}")
    targets = [targets_of(example["labels"]) for example in examples]
    all_targets = torch.from_numpy(np.concatenate(targets)).to(states.device)
    if plan.compact is not None:
        stored, logprobs = plan.compact.answer(states, head, all_targets)
    else:
        logprobs = label_logprobs(states, head, all_targets)
        stored = states.to(torch.float32 if plan.dtype == "int8" else DTYPES[plan.dtype]).cpu()
    counts = [len(part) for part in targets]
    yield from zip(batch, stored.split(counts), logprobs.cpu().split(counts), strict=True)


def _facts_of(path: Path, numbers: range, plan: Plan) -> dict[str, Any]:
    labels = sum(plan.counts[row] for row in numbers)
    with safe_open(path, "pt") as file:
        checksums = file.get_tensor("checksums")
        nll = -float(file.get_tensor("label_logprob").double().sum())
    return {
        "file": path.name, "rows": len(numbers), "labels": labels, "bytes": path.stat().st_size,
        "sha256": file_sha256(path), "checksums": checksums, "nll": nll,
    }  # fmt: skip


def _finish(
    folder: Path,
    teacher: LiveTeacher | RemoteTeacher,
    rows: Rows,
    plan: Plan,
    facts: Facts,
    shards: Sequence[dict[str, Any]],
) -> Manifest:
    """Index and head, and the manifest last."""
    head = teacher.head
    if plan.compact is None:
        write_bytes_atomic(folder / HEAD, encode_head(head))
    write_bytes_atomic(folder / INDEX, save(_index(rows, plan, [shard.pop("checksums") for shard in shards])))
    labels = sum(plan.counts)
    config = getattr(getattr(teacher, "model", None), "config", None)  # of a remote one nobody here knows it
    manifest = Manifest(
        identity=plan.identity,
        plan=plan.digest(),
        dtype=plan.dtype,
        rows=len(plan.counts),
        labels=labels,
        nll=sum(shard.pop("nll") for shard in shards) / labels,
        shards=shards,
        files={name: file_sha256(folder / name) for name in (HEAD, INDEX)[plan.compact is not None :]},
        label_rule=facts.label_rule,
        data=facts.data,
        shared_tokens=facts.shared_tokens,
        made_with={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": str(getattr(config, "_attn_implementation", "")),
            "device": _device_name(head.weight.device),
        },
        options={"shard_bytes": plan.shard_bytes, "batch_tokens": plan.batch_tokens},
        compact=None if plan.compact is None else described(plan.compact, facts.errors, facts.forced),
    )
    for path in {*shards_in(folder)} - {folder / str(shard["file"]) for shard in shards}:
        path.unlink()  # of a broken one that no metadata could be read of
    write_text_atomic(folder / MANIFEST, manifest.text())
    remove_answers(folder)
    return manifest


def _index(rows: Rows, plan: Plan, checksums: Sequence[Tensor]) -> dict[str, Tensor]:
    keys = np.frombuffer(b"".join(plan.keys), np.uint8).reshape(-1, 16).copy()
    halves = np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
    order = np.argsort(halves, kind="stable")
    return {
        "keys": torch.from_numpy(keys),
        "sorted": torch.from_numpy(halves[order].view(np.int64)),
        "order": torch.from_numpy(order.astype(np.int64)),
        "ids": as_int64([id_hash(row_id) for row_id in rows.ids]),
        "offsets": torch.tensor(plan.offsets()),
        "checksums": torch.cat(list(checksums)),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
