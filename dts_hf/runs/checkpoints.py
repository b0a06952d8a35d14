"""Checkpoint folders of a run: which are complete, which is the newest, which may go.

    checkpoint-STEP/               what the recipe asks for (training.save_strategy, save_steps)
    interrupted/checkpoint-STEP/   what a signal asked for, at any step; gone once training is past it

Every process writes its part of a checkpoint. ``complete.json`` is written last, by the first process, after all of
them are done; a folder without it, or whose files are not those that it lists, is what a killed process left. Older
checkpoints are removed only after that, so at any moment there is a complete one if there ever was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dts_hf.errors import RunError
from dts_hf.files import check_no_link, write_json_atomic
from dts_hf.runs.links import remove_files

COMPLETE = "complete.json"
INTERRUPTED = "interrupted"
FORMAT = 1
PROGRESS = "progress.json"  # where log.jsonl stood, and what the step still had to do
TRAINER_STATE = "trainer_state.json"  # of transformers, which writes it last


def mark_complete(folder: str | Path, **values: Any) -> None:
    """Write ``complete.json``, on the first process after all have written; everything is on the disk before it.

    Args:
        folder: the checkpoint; every file in it is listed with its size in bytes.
        values: ``step``, ``processes``, ``strategy``, ``resumable`` (false: the weights alone) and whatever else a
            resume compares.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in paths:  # else a power cut could keep the list and lose what it lists
        _flush(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json_atomic(folder / COMPLETE, {"format": FORMAT, **values, "files": files})
    _flush(folder / COMPLETE)
    _flush(folder)


def read_complete(folder: str | Path) -> dict[str, Any]:
    """Return ``complete.json`` of ``folder``; empty where there is none that can be read."""
    try:
        values = json.loads((Path(folder) / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(values, dict) and values.get("format") == FORMAT and isinstance(values.get("files"), dict)
    return values if whole else {}


def why_incomplete(folder: str | Path) -> str | None:
    """Why nothing can go on from ``folder``, as the end of a sentence; None where it is complete."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / COMPLETE).is_file():
        if (folder / TRAINER_STATE).is_file() and not any(folder.glob("rank_*.json")):  # ours are written first
            return f"it was not written by dts_hf: it has no {COMPLETE}, nor any other file but those of transformers"
        return f"it has no {COMPLETE}, which is written last: the save was interrupted"
    record = read_complete(folder)
    if not record:
        return f"its {COMPLETE} cannot be read"
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def why_not_resumable(folder: str | Path) -> str | None:
    """Why no training can go on from ``folder``, as the end of a sentence; None where it can."""
    why = why_incomplete(folder)
    if why is None and not read_complete(folder).get("resumable"):
        return "it holds the weights alone (training.save_only_model)"
    return why


def step_of(folder: str | Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(Path(folder).name.rpartition("-")[2])


def checkpoints(run: str | Path) -> list[Path]:
    """All checkpoint folders of the run directory, complete or not, the oldest step first."""
    folders = [*_interrupted(Path(run)), *_folders(Path(run))]
    return sorted(folders, key=step_of)  # at one step the recipe's own comes last: it was written later


def newest_complete(run: str | Path) -> Path | None:
    """The checkpoint to go on from; None where no complete one is there. Nothing is changed."""
    return next((folder for folder in reversed(checkpoints(run)) if why_not_resumable(folder) is None), None)


def remove(folder: str | Path) -> None:
    """Remove a checkpoint, its ``complete.json`` first: what a kill leaves of it is no checkpoint.

    Raises:
        RunError: a link stands there.
    """
    check_no_link(Path(folder))
    remove_files(Path(folder), COMPLETE)
    shutil.rmtree(folder)


def rotate(run: str | Path, step: int, limit: int | None, keep: Iterable[str | Path | None] = ()) -> None:
    """Remove what the complete checkpoint of ``step`` makes useless.

    That is every interrupted one of an earlier step and, where ``limit`` is given, the oldest of the others until
    ``limit`` are left, among them those in ``keep``. Checkpoints of later steps (of an attempt that ended) are not touched.

    Args:
        run: the run directory.
        step: of the checkpoint that has just become complete.
        limit: ``training.save_total_limit``; None or 0: keep all.
        keep: checkpoints that stay whatever their age, such as that of the best evaluation.
    """
    regular = [folder for folder in _folders(Path(run)) if step_of(folder) <= step]  # the oldest step first
    complete = [folder for folder in regular if why_incomplete(folder) is None]
    kept = {Path(folder).resolve() for folder in keep if folder is not None}
    useless = [folder for folder in _interrupted(Path(run)) if step_of(folder) < step]
    if limit is not None and limit > 0:
        kept |= {folder.resolve() for folder in complete[-1:]}  # to go on from
        surplus = len(complete) - max(limit, len(kept))
        old = [folder for folder in complete if folder.resolve() not in kept]
        useless += old[: max(surplus, 0)]
        useless += [folder for folder in regular if folder not in complete and folder.resolve() not in kept]
    for folder in useless:
        _remove_if_possible(folder)


def _interrupted(run: Path) -> list[Path]:
    return [] if (run / INTERRUPTED).is_symlink() else _folders(run / INTERRUPTED)


def _folders(parent: Path) -> list[Path]:
    """The checkpoints in ``parent``. None of them is a link: what is no longer needed is removed, and that is not ours."""
    if not parent.is_dir():
        return []
    named = [path for path in parent.iterdir() if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def _remove_if_possible(folder: Path) -> None:
    try:
        remove(folder)
    except (OSError, RunError):  # a file of it is open (NFS), or somebody removed it as well: no reason to end a run
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
