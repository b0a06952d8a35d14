"""Checkpoints with a part on each machine (``training.save_on_each_node``): each judges its own, and all decide alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from dts_hf.distributed.processes import gathered
from dts_hf.runs.checkpoints import checkpoints, why_not_resumable


def judged_elsewhere(run: Path, given: Path | None, args: TrainingArguments) -> Callable[[Path], str | None]:
    """What the other machines say of a checkpoint: why nothing can go on from their part of it, or None.

    All processes call it; the first one of each machine but the first reads what is there, at the speed of its disk. Where
    all machines share a disk, the first process alone reads the checkpoints, and this asks nobody.

    Args:
        run: the run directory.
        given: a checkpoint that was asked for; None: those of the run.
        args: tell which processes there are, and whether each machine has saved its own part.
    """
    if args.world_size == 1 or not args.save_on_each_node:
        return lambda folder: None
    mine = None
    if args.process_index > 0 and args.local_process_index == 0:
        folders = checkpoints(run) if given is None else [given]
        mine = {str(folder): why_not_resumable(folder, contents=True) for folder in folders}
    verdicts = gathered(mine, args.world_size)

    def why(folder: Path) -> str | None:
        for number, verdict in enumerate(verdicts):
            found = None if verdict is None else verdict.get(str(folder), "there is no such folder")
            if found is not None:
                return f"on the machine of process {number}: {found}"
        return None

    return why
