"""Scores by tasks of EleutherAI's ``lm_eval`` on the model as it is in memory (``evaluation.harness``).

The package is no dependency: who wants its tasks installs it. It fetches their rows from the Hub. Its interface, as its
documentation has it: ``lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=...), tasks=[...])``. The tests have
a stand-in for it; by hand it was run once with lm_eval 0.4.13, on a tiny model and a task of three rows.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dts_hf.console import say
from dts_hf.distributed.processes import process
from dts_hf.errors import UserError, nearest
from dts_hf.models.modes import evaluating
from dts_hf.recipe.schema import Harness
from dts_hf.runs.environment import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_harness(harness: Harness | None) -> None:
    """Refuse, before anything is loaded, what would fail after hours of training.

    Args:
        harness: what is asked for; None: nothing.

    Raises:
        UserError: ``lm_eval`` is missing, has no such task, or there are several processes.
    """
    if harness is None:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation.harness: needs the package lm_eval, which is not installed: pip install lm_eval")
    if process()[1] > 1:
        raise UserError(
            f"evaluation.harness: got {process()[1]} processes, and it scores the model of one; leave it out, and score the "
            "finished student: lm_eval --model hf --model_args pretrained=RUN/final --tasks ..."
        )
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in harness.tasks:
        if name not in known:
            raise UserError(
                f"evaluation.harness: lm_eval {installed_version('lm_eval')} has no task {name!r}, expected one of "
                f"`lm_eval ls tasks`.{nearest(name, known)}"
            )


def score_by_harness(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harness: Harness,
    batch_size: int,
    task_manager: Any = None,
) -> dict[str, Any]:
    """Run the tasks on ``model``, which is left as it was; random numbers are too.

    A failure (rows that cannot be fetched, a task that does not suit the model) is said and noted, and ends nothing: the
    student that was trained for hours comes first.

    Args:
        model: causal language model, whole on this process.
        tokenizer: of the model; the harness gets a copy, whose padding it may set.
        harness: which tasks, and how.
        batch_size: where ``harness`` has none.
        task_manager: of ``lm_eval``; None: its own.

    Returns:
        ``lm_eval`` (its version), ``limit``, ``chat_template``, and ``tasks``: for each task (and group) its ``version``,
        ``num_fewshot``, ``samples`` and ``measures`` by the harness's names, such as ``acc,none``; or ``error``.
    """
    found: dict[str, Any] = {
        "lm_eval": installed_version("lm_eval"), "limit": harness.limit, "chat_template": harness.chat_template,
    }  # fmt: skip
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _random_numbers_kept(), evaluating(model):
            wrapped = HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=harness.batch_size or batch_size
            )
            more = {} if task_manager is None else {"task_manager": task_manager}
            results = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(harness.tasks), num_fewshot=harness.num_fewshot, limit=harness.limit,
                apply_chat_template=harness.chat_template, log_samples=False, **more,
            )  # fmt: skip
        found["tasks"] = _tasks_of(results)
    except Exception as error:  # whatever tasks and their rows may raise
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        say(f"evaluation.harness: not scored ({found['error']})")
    return found


def _tasks_of(results: Mapping[str, Any]) -> dict[str, Any]:
    versions, shots, samples = (results.get(key) or {} for key in ("versions", "n-shot", "n-samples"))
    return {
        task: {
            "version": versions.get(task),
            "num_fewshot": shots.get(task),
            "samples": (samples.get(task) or {}).get("effective"),
            # Those have the name of a filter behind a comma; a stderr of one example is no number
            "measures": {key: float(value) for key, value in measures.items() if "," in key and _is_number(value)},
        }
        for task, measures in results["results"].items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Within it the global generators may be seeded, as ``simple_evaluate`` does; afterwards they are as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
