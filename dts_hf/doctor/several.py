"""The doctor's walk for a recipe with several teachers: one walk for each, on the rows that it has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dts_hf.console import quiet
from dts_hf.data.rows import Row
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.language_modeling import LanguageModelWalk
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.recipe.schema import Recipe
from dts_hf.training.memory_estimate import teacher_weights
from dts_hf.training.model_shape import shapes_from_configs

#: Checks that are the same whichever teacher there is: they stand there once.
OF_ALL = ("training", "hub", "rows", "output")


def examine_several(diagnosis: Diagnosis, recipe: Recipe, devices: int | None) -> None:
    """Examine each teacher with the student; the checks of one are called ``CHECK/TEACHER``.

    Two names of one model are examined as one. Three steps of all teachers together are not made: the memory estimate adds
    the weights of the others, and ``steps/TEACHER`` are those of a run with this teacher alone.

    Args:
        diagnosis: takes the checks.
        recipe: has ``teachers``.
        devices: that the memory estimate is for; None: those of this machine.
    """
    with diagnosis.check("teachers") as check, quiet():
        check.values = rows_of_each(recipe)
        check.summary = describe_rows(check.values)
        for name in [name for name, count in check.values.items() if not count]:
            check.warn(
                "teacher-without-rows", f"no training row has the teacher '{name}'", "Leave it out, or add rows"
            )
    for names in map(recipe.names_of, recipe.distinct_teachers):
        own = Diagnosis(diagnosis.recipe, on_check=partial(_begin, diagnosis.on_check, names[0]))
        with tempfile.TemporaryDirectory(prefix="dts_hf-doctor-") as folder, quiet():
            walk = walk_of(own, recipe, names, Path(folder), devices)
            if (routing := recipe.routing) is not None:
                walk.is_own = partial(_has_one_of, names, routing.default)
            walk.walk()
        known = [check.name for check in diagnosis.checks]
        for check in own.checks:
            if check.name not in OF_ALL:
                diagnosis.checks.append(replace(check, name=f"{check.name}/{names[0]}"))
            elif check.name not in known:
                diagnosis.checks.append(check)
        if not diagnosis.device:
            diagnosis.device, diagnosis.memory = own.device, own.memory
        diagnosis.picture += own.picture


def walk_of(
    diagnosis: Diagnosis, recipe: Recipe, names: list[str], folder: Path, devices: int | None
) -> LanguageModelWalk:
    """The walk with one of several teachers, whose memory estimate has them all.

    Args:
        diagnosis: takes the checks.
        recipe: has ``teachers``.
        names: of the one.
        folder: see ``Walk``.
        devices: see ``Walk``.
    """
    walk = LanguageModelWalk(diagnosis, recipe.with_teacher(names[0]), folder, devices)
    walk.teachers = len(recipe.teachers or ())
    with suppress(Exception):  # a configuration that cannot be read is told of in the walk of its own teacher
        walk.other_teachers = _other_weights(recipe, names, devices or 1)
    return walk


def _has_one_of(names: list[str], default: str | None, row: Row) -> bool:
    return (row.teacher or default) in names


def _begin(on_check: Callable[[str], None], teacher: str, name: str) -> None:
    on_check(f"{name}/{teacher}" if name not in OF_ALL else name)


def rows_of_each(recipe: Recipe) -> dict[str, int]:
    """How many training rows each teacher has.

    Raises:
        UserError: a row names no teacher, or one that there is not.
    """
    rows, routing = LanguageModeling(recipe).load_rows(), recipe.routing
    if routing is None:
        return dict.fromkeys(recipe.teachers or (), len(rows.train))
    parts = {"data.train": (rows.train, rows.train_parts), "data.validation": (rows.validation, rows.validation_parts)}
    numbers = [
        list(routing.numbers(of_part, name, [(part.source, part.used) for part in sources]).values())
        for name, (of_part, sources) in parts.items()
    ]
    return {name: numbers[0].count(number) for number, name in enumerate(routing.names)}


def describe_rows(counts: Mapping[str, int]) -> str:
    """The training rows of each teacher, in words."""
    return "; ".join(f"{name}: {count:,} training rows" for name, count in counts.items())


def _other_weights(recipe: Recipe, names: list[str], devices: int) -> float:
    """Bytes of the weights of the teachers without these ``names``, on one of so many devices."""
    total = 0.0
    for other in recipe.distinct_teachers:
        if other not in names:
            alone = recipe.with_teacher(other)
            shapes = shapes_from_configs(alone)
            if shapes is not None and shapes[1] is not None:
                total += teacher_weights(shapes[1], alone, devices)
    return total
