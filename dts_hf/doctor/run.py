"""``diagnose(path)``: all that ``dts-hf doctor`` does. It goes the way of ``distill`` and looks at each thing it meets.

A check that fails is a line of the result; those after it are made as far as they can be. Nothing is written outside a
temporary folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dts_hf.console import quiet
from dts_hf.doctor.classification import ClassifierWalk
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.language_modeling import LanguageModelWalk
from dts_hf.doctor.several import examine_several
from dts_hf.errors import UserError
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Init, Recipe
from dts_hf.temperature import build_temperature


def diagnose(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    devices: int | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Examine the recipe at ``path``.

    Args:
        path: recipe file.
        overrides: as for ``load_recipe``.
        devices: devices that the memory estimate is for; None: those of this machine.
        on_check: called with the name of each check as it begins.

    Raises:
        UserError: started as one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("dts-hf doctor is one process: start it without accelerate or torchrun, and give --devices")
    started = time.monotonic()
    diagnosis = Diagnosis(str(path), on_check=on_check)
    recipe: Recipe | None = None
    with diagnosis.check("recipe") as check:
        recipe = load_recipe(path, overrides)
        check.summary = describe_recipe(recipe)
        if recipe.all_teachers:
            build_temperature(recipe.temperature.name, **recipe.temperature.options).begin_run()
    if recipe is not None and recipe.teachers:
        examine_several(diagnosis, recipe, devices)
    elif recipe is not None:
        kind = LanguageModelWalk if recipe.task is None else ClassifierWalk
        with tempfile.TemporaryDirectory(prefix="dts_hf-doctor-") as folder, quiet():
            kind(diagnosis, recipe, Path(folder), devices).walk()
    diagnosis.seconds = time.monotonic() - started
    return diagnosis


def describe_init(init: Init) -> str:
    """What ``student.init`` asks for, in a few words."""
    parts = []
    if init.layers is not None:
        parts.append(f"{init.layers if isinstance(init.layers, int) else len(init.layers)} of its layers")
    if init.mlp is not None:
        parts.append(f"MLPs of {init.mlp:,} channels")
    if init.hidden is not None:
        parts.append(f"states of {init.hidden:,} channels")
    if init.parameters is not None:
        parts.append(f"at most {init.parameters:,} weights")
    if init.measures:
        parts.append(f"chosen on its rows ({init.choose})")
    kind = {"teacher": "", "config": "random weights in its shape: "}.get(init.from_, f"of {init.from_[-45:]}: ")
    return kind + (", ".join(parts) or "all layers")


def describe_recipe(recipe: Recipe) -> str:
    """Teacher, student and loss in one line."""

    def short(name: str | None) -> str:  # the end of a long path
        name = str(name).removeprefix("package:")
        return name if len(name) <= 45 else f"…{name[-44:]}"

    student, init = short(recipe.student.model), recipe.student.init
    if init is not None:
        student = describe_init(init)
    task = "" if recipe.task is None else f"{recipe.task.name}/{recipe.task.subset}: "
    if not recipe.all_teachers:
        return f"{task}{student}, from labels alone"
    loss = f"{recipe.loss.divergence.name}, kd_ratio {recipe.loss.kd_ratio:g}, temperature {recipe.temperature.name}"
    sections = recipe.all_teachers.values()
    teachers = " + ".join(one.itself if one.kind == "self" else short(one.model) for one in sections)
    return f"{task}{teachers} → {student}; {loss}"
