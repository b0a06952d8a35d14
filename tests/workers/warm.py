"""What the fork server imports once (``tests.support.warm``), and what its children do: a script, as a fresh Python would.

A process that is forked from here starts in 0.02 s instead of 5 to 10 s of imports.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

# All that a run, its evaluation and its report load late; the command line itself reads RANK when it is imported.
import evaluate  # noqa: F401
import matplotlib.figure  # noqa: F401
import rich.progress  # noqa: F401
import torch
import torch.distributed.fsdp  # noqa: F401
import transformers.trainer  # noqa: F401
import typer  # noqa: F401

import dts_hf.classification.trainer  # noqa: F401
import dts_hf.distill  # noqa: F401
import dts_hf.evaluation.evaluate  # noqa: F401
import dts_hf.training.trainer  # noqa: F401
from dts_hf.recipe.problems import training_fields
from dts_hf.recipe.schema import recipe_json_schema

if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed  # noqa: F401

training_fields(), recipe_json_schema()  # pydantic builds its models at their first use
torch.set_num_threads(1)
# A child that collects garbage, as every training does, would copy, page by page, all that is imported here.
gc.collect()
gc.freeze()


def script(path: str, words: list[str], variables: dict[str, str], folder: str, out: str) -> None:
    """``python PATH WORDS`` with ``variables`` in its environment; what it prints goes to ``OUT.out`` and ``OUT.err``."""
    if os.getsid(0) != os.getpid():
        os.setpgid(0, 0)  # a signal to the tests is not meant for it, nor one of its own for them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of data loaders: that of the tests would stay in force
    # A forked torch makes its pool of threads anew when it is first used: two threads that load a model would race for it.
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, sys.path[0:0] = [path, *words], [str(Path(path).parent)]
    runpy.run_path(path, run_name="__main__")
