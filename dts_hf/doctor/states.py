"""What the teacher's final states take on a disk, once for all epochs and temperatures, beside what top-k would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dts_hf.alignment.batch import as_read
from dts_hf.console import duration, gb
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.doctor.diagnosis import Check
from dts_hf.doctor.tokens import spaced
from dts_hf.teachers.cached.layout import bytes_per_label
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.compact import ErrorAt
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher

#: Rows that the teacher is timed on.
TIMED_ROWS = 4
#: From so many bytes on the disks of a cache cost more than running the teacher again.
TOO_LARGE = 5e11
#: Bytes of an entry of top-k: a token's id and its logit, both halved.
TOP_K_ENTRY = 4


def check_states(check: Check, teacher: LiveTeacher, data: EncodedDataset, share: float) -> None:
    """Size and seconds of ``dts-hf cache-teacher``, and below which k top-k would be smaller.

    Args:
        check: takes what is found.
        teacher: placed.
        data: a sample of the rows, tokenised.
        share: all rows, as a multiple of those that ``data`` was made of.
    """
    head = teacher.head
    hidden, own = head.weight.shape[1], str(head.weight.dtype).removeprefix("torch.")
    aligned = data.aligned
    counts = data.target_counts if aligned is None else [len(row.labels) for row in aligned]
    labels = round(sum(counts) * share)
    each, small = bytes_per_label(hidden, own), bytes_per_label(hidden, "int8")
    per_token = _seconds_per_token(teacher, data)
    seconds = per_token * sum(data.teacher_lengths) * share
    break_even = each // TOP_K_ENTRY
    check.values = {
        "labels": labels, "bytes_per_label": each, "bytes": labels * each, "seconds": seconds, "break_even_k": break_even
    }  # fmt: skip
    check.summary = (
        f"kept by dts-hf cache-teacher: {gb(labels * each)} for {labels:,} labels in {own} ({gb(labels * small)} in int8), "
        f"about {duration(seconds)} once; top-k is smaller below k = {break_even:,}, and wrong above T = 1"
    )
    if labels * each > TOO_LARGE:
        check.summary += "; so large a cache costs more than running the teacher again"


def _seconds_per_token(teacher: LiveTeacher, data: EncodedDataset) -> float:
    batch = _read_batch(data, spaced(range(len(data)), TIMED_ROWS))
    device = teacher.head.weight.device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    labels, seconds = batch["labels"].to(device), []
    for _ in range(2):  # the first call warms up
        began = time.perf_counter()
        teacher.states(inputs, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds) / int(batch["attention_mask"].sum())


def _read_batch(data: EncodedDataset, rows: Sequence[int]) -> dict[str, Tensor]:
    """Some rows as the teacher reads them."""
    read: Any = [as_read(data[row]) for row in rows]
    return PaddedCollator(0)(read)


def describe_server(check: Check, teacher: RemoteTeacher, data: EncodedDataset) -> None:
    """What answers at the recipe's address, and in what time; that its states fit the head has been tested.

    Args:
        check: takes what is found.
        teacher: met.
        data: a sample of the rows, tokenised.
    """
    identity, limits = teacher.description.identity, teacher.description.limits
    batch = _read_batch(data, spaced(range(len(data)), TIMED_ROWS))
    labels = batch["labels"].to(teacher.head.weight.device)
    inputs = {name: batch[name].to(labels.device) for name in ("input_ids", "attention_mask")}
    began = time.perf_counter()
    states = teacher.states(inputs, labels)
    seconds = time.perf_counter() - began
    size = len(states) * bytes_per_label(identity.hidden_size, identity.dtype)
    check.values = {"url": teacher.url, "teacher_hash": teacher.description.teacher_hash, "labels": len(states),
                    "bytes": size, "seconds": seconds, "limits": limits._asdict()}  # fmt: skip
    check.summary = (
        f"from {teacher.url}: {identity.model} in {identity.dtype}, rows of at most {limits.length:,} tokens; "
        f"{len(states):,} labels ({gb(size)}) in {duration(seconds)}"
    )


def describe_cache(check: Check, cache: StateCache) -> None:
    """What the recipe's cache is; whether its rows and its head are the recipe's, the trainer has looked at.

    Args:
        check: takes what is found.
        cache: opened.
    """
    manifest = cache.manifest
    check.values = {"labels": manifest.labels, "rows": manifest.rows, "bytes": manifest.size, "dtype": manifest.dtype}
    check.summary = (
        f"{manifest.labels:,} labels of {manifest.rows:,} rows in {manifest.dtype}, {gb(manifest.size)}; teacher "
        f"{manifest.nll:.2f} nats per label"
    )
    if manifest.form is not None and manifest.compact is not None:
        errors = [ErrorAt(**error) for error in manifest.compact["errors"]]
        worst = min(errors, key=lambda error: error.mass, default=None)
        check.values |= {"compact": dict(manifest.compact)}
        check.summary += f"; compact: {manifest.form.top_k:,} of {manifest.form.vocab_size:,} logits a label"
        check.summary += "" if worst is None else f"; at worst, as it was written, {' '.join(str(worst).split())}"
