"""A script of ``benchmarks/`` whose workers are forked from this warm process, where fresh ones would import everything.

That they may be fresh is for the tests that run the script itself; what they are given is pickled here too.
"""

from __future__ import annotations

import multiprocessing
import pickle
import runpy
import sys
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any


class Forked(ForkContext):
    """What ``benchmarks/harness.py`` asks of the context "spawn"."""

    def Process(self, *, args: tuple[Any, ...], **options: Any) -> Any:  # type: ignore[override]
        pickle.dumps(args[1:])  # the first is a pipe, which only a process that starts can send
        return super().Process(args=args, **options)


if __name__ == "__main__":
    context = Forked()
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
