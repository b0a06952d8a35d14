"""Copy the shipped recipes, their rows, the accelerate configurations and the SLURM script, to read and to change them.

    dts-hf prepare recipes                      # into ./recipes
    dts-hf prepare recipes --output mine/

A shipped recipe needs no copy to be run: `dts-hf train quickstart` finds it by name. A file that is there with another
content is yours and stays: then nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dts_hf.console import show
from dts_hf.data_prep.arguments import described
from dts_hf.errors import UserError
from dts_hf.files import check_output_folder
from dts_hf.recipe.shipped import shipped_folder


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare recipes``."""
    made = described(__doc__)
    made.add_argument("--output", type=Path, default=Path("recipes"), help="folder (default: %(default)s)")
    return made


def prepare(arguments: argparse.Namespace) -> None:
    """Copy every shipped file to the output folder.

    Raises:
        UserError: a file of another content is in the way, or the folder cannot be written.
    """
    folder, output = shipped_folder(), arguments.output
    check_output_folder(output)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    changed = [
        str(output / file)
        for file in files
        if (output / file).exists() and (output / file).read_bytes() != (folder / file).read_bytes()
    ]
    if changed:
        raise UserError(
            f"{output}: {len(changed)} files differ from the shipped ones, among them {changed[0]}; nothing was copied."
            " Give another folder with --output"
        )
    for file in files:
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, output / file)
    show(f"{output}: {len(files)} files")
