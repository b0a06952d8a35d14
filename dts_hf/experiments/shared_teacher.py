"""``dts-hf sweep --share-teacher K``: runs of the same batches go side by side, and each batch has one teacher forward.

A group are processes of their own, as without it, beside a folder in which the first to need the states of a batch leaves
them for the others (``teachers.shared_answers``). So a run is the same run, killed and resumed as ever, and one that fails
takes no other with it. What is found in the folder is found by its bytes: the groups decide what is spared, never a result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dts_hf.experiments.identity import contents, is_under, settings_of
from dts_hf.experiments.sweep import Planned, Study
from dts_hf.recipe.effective import effective
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.teachers.shared_answers import VARIABLE, counts, has_students

FOLDER = ".sweep/shared"
#: What students of one group may differ in: neither the teacher's states nor the batches and their order depend on it.
MAY_DIFFER = (
    "temperature", "loss", "student.lora", "evaluation",
    "training.learning_rate", "training.weight_decay", "training.lr_scheduler_type", "training.lr_scheduler_kwargs",
    "training.warmup_steps", "training.warmup_ratio", "training.optim", "training.optim_args", "training.adam_beta1",
    "training.adam_beta2", "training.adam_epsilon", "training.max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that go side by side.

    Attributes:
        runs: one: it shares with nobody.
        folder: of what they share.
        alone: why a run shares with nobody; empty where it may.
    """

    runs: Sequence[Planned]
    folder: Path
    alone: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What tells the processes of the group where the others are; of one run nothing."""
        return {VARIABLE: f"{len(self.runs)}:{self.folder.resolve()}"} if len(self.runs) > 1 else {}

    @property
    def said(self) -> str:
        """The runs, and how they share."""
        labels = "; ".join(run.label for run in self.runs)
        if len(self.runs) > 1:
            return f"one teacher for {len(self.runs)}: {labels}"
        return f"alone: {labels} ({self.alone or 'no other run has its batches'})"

    def open(self) -> None:
        """Forget what an earlier attempt has left, unless students of it are still at work."""
        if not has_students(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> str:
        """Remove the folder, and say what was spared; empty where nothing was shared."""
        computed, taken = counts(self.folder)
        self.open()
        if not computed + taken:
            return ""
        return f"shared teacher: {computed:,} forwards for {computed + taken:,} batches of {len(self.runs)} runs"


def groups_of(study: Study, runs: Sequence[Planned], most: int) -> list[Group]:
    """Runs that may share a teacher, at most ``most`` each, in the order of the first run of each group.

    Args:
        study: theirs.
        runs: that are left to do.
        most: students of one teacher.
    """
    by_key: dict[str, list[Planned]] = {}
    why: dict[str, str] = {}
    for run in runs:
        recipe = load_recipe(study.recipe, [*run.overrides, "sweep=null"])
        reason = cannot_share(recipe)
        key = f"alone-{run.id}" if reason else _key(recipe)
        why[key] = reason
        by_key.setdefault(key, []).append(run)
    return [
        Group(some[start : start + most], study.folder / FOLDER / f"{key}-{start // most}", why[key])
        for key, some in by_key.items()
        for start in range(0, len(some), most)
    ]


def cannot_share(recipe: Recipe) -> str:
    """Why a run cannot share the forwards of its teacher; empty where it can."""
    if recipe.task is not None:
        return "a task's teacher gives no states of tokens"
    if recipe.teacher is None:
        return "several teachers" if recipe.teachers else "no teacher"
    if recipe.teacher.kind != "live":
        return f"teacher.kind is {recipe.teacher.kind}"
    return "data.on_policy: each student says a text of its own" if recipe.data.on_policy is not None else ""


def _key(recipe: Recipe) -> str:
    values: dict[str, Any] = settings_of(effective(recipe, training_arguments(recipe, ".")))
    same = {key: value for key, value in values.items() if not is_under(key, MAY_DIFFER)}
    seeds = {name: recipe.training.get(name) for name in ("seed", "data_seed")}
    of_files = {key: value for key, value in contents(recipe).items() if not is_under(key, MAY_DIFFER)}
    return sha256(json.dumps([same, seeds, of_files], sort_keys=True, default=str).encode()).hexdigest()[:10]
