"""Whether the files of a checkpoint can be loaded, found before a model is: what is wrong is then said of a file.

A checksum says that a file is as it was written. This says of the files over which the loaders of transformers and torch
would stumble, each with a traceback of its own, that they are of their kind: a checkpoint of version 0.1 has no checksums.
Tensors are not read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from dts_hf.distributed.checkpoint_reading import asks_for_code

#: What a resume reads of ``complete.json`` and ``progress.json``, and of each process's own file.
_OF_COMPLETE = (
    "step",
    "processes",
    "strategy",
    "rows_per_device",
    "accumulation",
    "rows",
    "length_bucket_size",
    "mixed_precision",
)
_OF_PROGRESS = ("last_logged_step", "grad_norm", "learning_rate", "due", "seconds", "log_bytes")
_DUE = ("generate", "log", "evaluate", "save", "end_epoch", "stop")


def why_unreadable(folder: Path, record: Mapping[str, Any]) -> str | None:
    """What of a checkpoint cannot be loaded, as the end of a sentence; None: nothing that could be found so quickly.

    Args:
        folder: it is complete.
        record: its ``complete.json``.
    """
    try:
        _has(record, _OF_COMPLETE)
    except KeyError as error:
        return f"its complete.json lacks {error}"
    for path, look in _looks(folder, record["files"]):
        try:
            look(path)
        except Exception as error:  # whatever a damaged file makes of its reader
            if not asks_for_code(error):  # planted rather than damaged: whoever loads it refuses it aloud
                said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                return f"{path.relative_to(folder).as_posix()} cannot be read: {said}"
    return None


def _looks(folder: Path, names: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    special = {"trainer_state.json": _state, "progress.json": _progress}
    for name in names:
        path = folder / name
        if name in special or path.suffix == ".json":
            yield path, special.get(name) or (_rank if name.startswith("rank_") else _json)
        elif path.suffix == ".safetensors":
            yield path, _safetensors
        # In the folder itself: DeepSpeed's, and the pieces of FSDP2, are for their own readers
        elif "/" not in name and path.suffix in (".pt", ".pth", ".bin") and name != "training_args.bin":
            yield path, _tensors


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _state(path: Path) -> None:
    state = TrainerState.load_from_json(str(path))
    if not (isinstance(state.global_step, int) and isinstance(state.max_steps, int)):
        raise ValueError("it names no step")


def _progress(path: Path) -> None:
    values = _json(path)
    _has(values, _OF_PROGRESS)
    _has(values["due"], _DUE)


def _rank(path: Path) -> None:
    _has(_json(path), ("unlogged_loss",))


def _has(values: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"it holds a {type(values).__name__}, expected an object")
    for key in keys:
        values[key]


def _safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        file.keys()


def _tensors(path: Path) -> None:
    with safe_globals():
        if zipfile.is_zipfile(path):  # as torch.save writes it
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # for what it asks
        except Exception as error:
            if asks_for_code(error):
                raise
            raise ValueError("torch.save has not written it so") from None
