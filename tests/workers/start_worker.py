"""One start of a run for test_starts.py: the real beginning and end of a run, with three log lines in place of the training.

It stops at *gates*, before everything that matters to another start of the same directory: it sends their names and goes
on when it is told to.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.runs import lock as locks
from dts_hf.runs import start as starts
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import unlocking

STEPS = 3
ARGS: Any = SimpleNamespace(
    resume_from_checkpoint=None, load_best_model_at_end=False, device="cpu", process_index=0, world_size=1
)


def recipe(folder: str, overwrite: bool) -> Recipe:
    values = {
        "student": {"model": "small"}, "teacher": {"model": "large"}, "data": {"train": "rows.jsonl"},
        "temperature": {"name": "constant", "value": 2}, "output": {"dir": folder, "overwrite": overwrite},
    }  # fmt: skip
    return Recipe.from_dict(values, deep=False)


def start(folder: str, how: str, gates: Connection) -> None:
    """A process that starts the run in ``folder`` and sends how it ends, as ``(None, outcome)``.

    Args:
        folder: of the run.
        how: ``plain``, ``resume``, ``overwrite``, or ``wrong``: plain, with rows that are refused.
        gates: takes ``(gate, None)`` and gives one word for each.
    """

    def gate(name: str) -> None:
        gates.send((name, None))
        gates.recv()

    def at(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            gate(name)
            return original(*args, **kwargs)

        setattr(owner, name, staticmethod(replaced) if inspect.ismethod(original) else replaced)

    starts.environment = lambda device: {}
    starts.effective = lambda recipe, args: recipe
    starts.say = lambda *_: None
    for owner, name in ((RunDirectory, "check_content"), (locks, "_make"), (locks, "open_nofollow"), (locks, "_take"),
                        (RunDirectory, "create"), (RunDirectory, "_leftovers"), (locks, "_remove_empty")):  # fmt: skip
        at(owner, name)
    gate("begin")
    try:
        outcome = _life(recipe(folder, how == "overwrite"), how, gate)
    except UserError as error:
        outcome = f"refused: {error}"
    except BaseException:  # whatever it is, the test has to see it
        outcome = traceback.format_exc()
    gates.send((None, outcome))


def _life(recipe: Recipe, how: str, gate: Callable[[str], None]) -> str:
    with unlocking():
        begun = starts.find_start(recipe, ARGS, how == "resume")
        if begun.finished:
            RunDirectory(recipe.output.dir).clean_up()
            return "finished"
        gate("load")
        if how == "wrong":
            raise UserError("the rows are wrong")
        run = starts.open_run(recipe, begun, {}, ARGS)
        for step in range(STEPS):
            gate("step")
            run.append_log({"step": step, "process": os.getpid()})
        unfinished = run.path / ".final.unfinished"  # as save_student does it
        unfinished.mkdir()
        gate("save")
        Path(unfinished / "weights").write_text(str(os.getpid()))
        os.replace(unfinished, run.final_path)
        run.write_metrics({"process": os.getpid()})
        run.clean_up()
    return "trained"
