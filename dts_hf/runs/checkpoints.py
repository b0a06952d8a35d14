"""Checkpoint folders of a run: which are complete, which is the newest, which may go.

    checkpoint-STEP/               what the recipe asks for (training.save_strategy, save_steps)
    interrupted/checkpoint-STEP/   what a signal asked for, at any step; gone once training is past it

Every process writes its part of a checkpoint. ``complete.json`` is written last, by the first process, after all of
them are done; a folder without it, or whose files are not those that it lists, is what a killed process left, or what has
become of a checkpoint on a disk that fails. Older checkpoints are removed only after that, so at any moment there is a
complete one if there ever was.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from dts_hf.console import say
from dts_hf.errors import RunError, UserError
from dts_hf.files import check_no_link, flush, read_json, read_sealed, write_json_atomic, write_sealed
from dts_hf.runs.file_lists import flushed, why_differs
from dts_hf.runs.links import matching, remove_files
from dts_hf.runs.readable import why_unreadable

COMPLETE = "complete.json"
INTERRUPTED = "interrupted"
#: Written into a checkpoint that is whole and could not be loaded: the next start goes on from an older one.
UNREADABLE = "unreadable.json"
FORMAT = 2  # 1 has sizes alone
PROGRESS = "progress.json"  # where log.jsonl stood, and what the step still had to do
TRAINER_STATE = "trainer_state.json"  # of transformers, which writes it last


def mark_complete(folder: str | Path, **values: Any) -> None:
    """Write ``complete.json``, on the first process after all have written; everything is on the disk before it.

    Args:
        folder: the checkpoint; every file in it, whichever process wrote it, is listed with its size and checksum.
        values: ``step``, ``processes``, ``strategy``, ``resumable`` (false: the weights alone) and whatever else a
            resume compares.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    # Flushed before the list is: else a power cut could keep the list and lose what it lists
    write_sealed(folder / COMPLETE, {"format": FORMAT, **values, "files": flushed(folder, paths)})
    flush(folder.parent)


def mark_unreadable(folder: Path, reason: str) -> None:
    """Note that ``folder`` could not be loaded, so that the next start takes an older one; where it can be written to."""
    with suppress(OSError):
        write_json_atomic(folder / UNREADABLE, {"reason": reason})


def read_complete(folder: str | Path) -> dict[str, Any]:
    """Return ``complete.json`` of ``folder``, in the newest format; empty where there is none that can be trusted."""
    values = read_sealed(Path(folder) / COMPLETE)
    files = values.get("files")
    if values.get("format") not in (1, FORMAT) or not isinstance(files, dict):
        return {}
    values["files"] = {name: {"size": of} if isinstance(of, int) else of for name, of in files.items()}
    listed = all(isinstance(of, dict) and isinstance(of.get("size"), int) for of in values["files"].values())
    return values if listed else {}


def why_incomplete(folder: str | Path, *, contents: bool = False) -> str | None:
    """Why nothing can go on from ``folder``, as the end of a sentence; None where it is complete.

    Args:
        folder: a checkpoint.
        contents: read every file, too, as fast as the disk can, and compare its checksum; those of a checkpoint of version
            0.1 are not known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "it is a file, expected a folder" if folder.is_file() else "there is no such folder"
    if not (folder / COMPLETE).is_file():
        if (writer := _other_writer(folder)) is not None:
            return (
                f"it was not written by dts_hf: it has no {COMPLETE}, nor any other file but those of {writer}. Its weights "
                "can begin a new run (student.model), its optimizer and step cannot"
            )
        return f"it has no {COMPLETE}, which is written last: the save was interrupted"
    record = read_complete(folder)
    if not record:
        return f"its {COMPLETE} is damaged"
    return why_differs(folder, record["files"], contents=contents)


def why_not_resumable(folder: str | Path, *, contents: bool = False) -> str | None:
    """Why no training can go on from ``folder``, as the end of a sentence; None where it can.

    Args:
        folder: a checkpoint.
        contents: read every file, too: see ``why_incomplete``; and look whether it can be loaded.
    """
    folder = Path(folder)
    why = why_incomplete(folder, contents=contents)
    if why is None and not read_complete(folder).get("resumable"):
        return "it holds the weights alone (training.save_only_model)"
    if why is None and (folder / UNREADABLE).is_file():
        return f"it could not be loaded ({UNREADABLE} in it says why; remove that file to try again)"
    return why_unreadable(folder, read_complete(folder)) if why is None and contents else why


class Found(NamedTuple):
    """The newest checkpoint that can be resumed, or None; and what is wrong with those that are newer."""

    checkpoint: Path | None
    ignored: list[tuple[Path, str]]

    @property
    def damaged(self) -> list[tuple[Path, str]]:
        """Of ``ignored`` those that were complete once: not what a kill left of a save, nor weights alone."""
        return [
            (folder, why)
            for folder, why in self.ignored
            if (folder / COMPLETE).is_file() and (not (record := read_complete(folder)) or record.get("resumable"))
        ]


def newest_whole(run: str | Path, also: Callable[[Path], str | None] = lambda folder: None) -> Found:
    """The newest checkpoint of ``run`` whose files are those that were written, and can be loaded. Nothing is changed.

    Each that is looked at is read once, the newest first: as a rule one.

    Args:
        run: the run directory.
        also: what else may be wrong with one, as ``why_not_resumable``.
    """
    ignored: list[tuple[Path, str]] = []
    files = [path for path in matching(Path(run), "checkpoint-#") if path.is_file() and not path.is_symlink()]
    ignored += [(path, str(why_incomplete(path))) for path in files]
    for folder in reversed(checkpoints(run)):
        why = why_not_resumable(folder, contents=True) or also(folder)
        if why is None:
            return Found(folder, ignored)
        ignored.append((folder, why))
    return Found(None, ignored)


def why_best_is_lost(folder: Path) -> str | None:
    """Why the end of a run that goes on from ``folder`` cannot put the weights of its best step back; None where it can.

    Only a run with ``load_best_model_at_end`` does so.
    """
    try:
        best = read_json(folder / TRAINER_STATE).get("best_model_checkpoint")
    except (OSError, UserError):  # damaged: ``why_not_resumable`` says so
        return None
    run = folder.parent.parent if folder.parent.name == INTERRUPTED else folder.parent
    if not isinstance(best, str) or run / Path(best).name == folder:
        return None
    why = why_incomplete(run / Path(best).name, contents=True)
    return None if why is None else f"the best checkpoint until then, {Path(best).name}, is lost: {why}"


def step_of(folder: str | Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(Path(folder).name.rpartition("-")[2])


def checkpoints(run: str | Path) -> list[Path]:
    """All checkpoint folders of the run directory, complete or not, the oldest step first."""
    folders = [*_interrupted(Path(run)), *_folders(Path(run))]
    return sorted(folders, key=step_of)  # at one step the recipe's own comes last: it was written later


def newest_complete(run: str | Path) -> Path | None:
    """The checkpoint to go on from, by sizes alone; None where no complete one is there. Nothing is changed."""
    return next((folder for folder in reversed(checkpoints(run)) if why_not_resumable(folder) is None), None)


def make_way(folder: Path) -> None:
    """Clear the place of a checkpoint that is about to be written: what a killed run left there goes, and nothing else.

    What is not of dts_hf (a file, a checkpoint of another program) is renamed, and that is said.

    Raises:
        RunError: a link stands there.
    """
    check_no_link(folder)
    if folder.is_dir() and not _is_others(folder):
        remove(folder)
    elif os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}.other{number or ''}") for number in count())
        aside = next(name for name in names if not os.path.lexists(name))
        os.replace(folder, aside)
        say(f"{folder} was not written by dts_hf and is in the way of a checkpoint: it is {aside.name} now")


def remove(folder: str | Path) -> None:
    """Remove a checkpoint, its ``complete.json`` first: what a kill leaves of it is no checkpoint.

    Raises:
        RunError: a link stands there.
    """
    check_no_link(Path(folder))
    for files in (COMPLETE, "[!r]*", "rng_*"):  # rank_*.json last: they say whose it is, should a kill come
        remove_files(Path(folder), files)
    shutil.rmtree(folder)


def rotate(
    run: str | Path,
    step: int,
    limit: int | None,
    keep: Iterable[str | Path | None] = (),
    whole: set[Path] | None = None,
) -> None:
    """Remove what the complete checkpoint of ``step`` makes useless.

    That is every interrupted one of an earlier step and, where ``limit`` is given, the oldest of the others until
    ``limit`` are left, among them those in ``keep``. Checkpoints of later steps (of an attempt that ended) are not touched.
    A damaged one does not count: it must not take the place of one that is whole.

    Args:
        run: the run directory.
        step: of the checkpoint that has just become complete.
        limit: ``training.save_total_limit``; None or 0: keep all.
        keep: checkpoints that stay whatever their age, such as that of the best evaluation.
        whole: those that this process has written or read; they are not read again. Those that are read now are added.
    """
    whole = set() if whole is None else whole
    regular = [folder for folder in _folders(Path(run)) if step_of(folder) <= step]  # the oldest step first
    complete = [folder for folder in regular if why_incomplete(folder) is None]
    kept = {Path(folder).resolve() for folder in keep if folder is not None}
    useless = [folder for folder in _interrupted(Path(run)) if step_of(folder) < step]
    if limit is not None and limit > 0:
        if len(complete) > limit:  # else none would go
            complete = [folder for folder in complete if _is_whole(folder, whole)]
        kept |= {folder.resolve() for folder in complete[-1:]}  # to go on from
        surplus = len(complete) - max(limit, len(kept))
        old = [folder for folder in complete if folder.resolve() not in kept]
        useless += old[: max(surplus, 0)]
        # Nothing goes before there is one to go on from
        useless += [
            folder
            for folder in regular
            if complete and folder not in complete and folder.resolve() not in kept and not _is_others(folder)
        ]
    for folder in useless:
        whole.discard(folder.resolve())
        _remove_if_possible(folder)


def _is_others(folder: Path) -> bool:
    return not (folder / COMPLETE).is_file() and _other_writer(folder) is not None


def _other_writer(folder: Path) -> str | None:
    """Which program has written a folder without ``complete.json``; None: a killed run of ours, for all we know."""
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    if PROGRESS in names or any(fnmatchcase(name, "rank_*.json") for name in names):  # ours are written first
        return None
    if TRAINER_STATE in names:
        return "transformers (its Trainer, or one of TRL's)"
    return "another program, such as accelerate" if names else None


def _is_whole(folder: Path, known: set[Path]) -> bool:
    if folder.resolve() not in known and why_incomplete(folder, contents=True) is None:
        known.add(folder.resolve())
    return folder.resolve() in known


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
