"""What is uploaded stands in a folder made for it, beside nothing else: never the output directory itself.

Logs, checkpoints and answers to held-out rows lie there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

#: Folder of ``args.output_dir`` that holds what is uploaded, while it is.
UPLOAD = ".hub_upload"


@contextmanager
def staged(args: TrainingArguments, main: bool, wait_for_everyone: Callable[[], None]) -> Iterator[list[Any]]:
    """Within it ``args.output_dir`` is an empty folder inside the real one; it is gone as soon as it is uploaded.

    Args:
        args: of the trainer.
        main: this is the first process, which makes and removes the folder.
        wait_for_everyone: every process calls it.

    Yields:
        a list for the future of an upload that still reads the folder when the context ends.
    """
    real = str(args.output_dir)
    futures: list[Any] = []
    folder = Path(real) / UPLOAD
    if main:
        remove_all_of(folder)  # of a killed process
    wait_for_everyone()
    args.output_dir = str(folder)
    try:
        yield futures
    finally:
        args.output_dir = real
        if main and not futures:
            shutil.rmtree(folder, ignore_errors=True)
        elif main:
            futures[0].add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))


def remove_all_of(folder: Path) -> None:
    """Remove it or fail: what is left there would be uploaded. Of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
