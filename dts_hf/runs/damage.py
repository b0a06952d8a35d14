"""A student that is to be used, or published: is it what its run has written?"""

from __future__ import annotations

from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.runs.checkpoints import COMPLETE, PROGRESS, why_incomplete
from dts_hf.runs.directory import RunDirectory


def refuse_damaged(source: str | Path) -> None:
    """Refuse a run, its ``final/`` or one of its checkpoints whose files are not those that were written.

    The files are read once. Any other folder, and a name on the Hub, has no list to be compared with.

    Args:
        source: what the user has named.

    Raises:
        UserError: names the file.
    """
    folder = Path(source)
    if (folder / COMPLETE).is_file() or (folder / PROGRESS).is_file():
        why = why_incomplete(folder, contents=True)
        if why is not None:
            raise UserError(f"{source}: this checkpoint cannot be used: {why}. Take another one")
    run = RunDirectory(folder.parent if folder.name == "final" else folder)
    if run.recipe_path.is_file() and run.final_list_path.is_file() and (why := run.why_damaged("final/")) is not None:
        raise UserError(
            f"{source}: {why}, so it is not the student that the run has made. Put the file back from a copy, or make it "
            f"again from the run's last checkpoint: dts-hf train {run.recipe_path} --resume"
        )
