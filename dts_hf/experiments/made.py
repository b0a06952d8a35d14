"""Runs that ``compare`` makes itself: recipes, each with the same seeds, through the machinery of ``sweep``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.errors import Interrupted, UserError, nearest
from dts_hf.experiments.identity import settings_of
from dts_hf.experiments.kinds import ONE_KIND
from dts_hf.experiments.progress import Progress
from dts_hf.experiments.sweep import Planned, Study, Sweep, plan
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.shipped import shipped_recipes

if TYPE_CHECKING:
    from rich.console import Console

RUNS = "runs"


def is_recipe(name: Path) -> bool:
    """Whether an argument of ``compare`` is a recipe: a file, or the name of a shipped one that is no folder here.

    Raises:
        UserError: nothing is there, and it is no shipped recipe either.
    """
    if name.is_dir():
        return False
    if name.is_file() or str(name) in shipped_recipes():
        return True
    siblings = [path.name for path in name.parent.iterdir()] if name.parent.is_dir() else []
    near = nearest(str(name), [*(str(name.parent / one) for one in siblings), *shipped_recipes()])
    raise UserError(f"{name}: there is no such run directory, recipe file or shipped recipe.{near}")


def plan_runs(recipes: Sequence[Path], seeds: Sequence[int], output: Path | None) -> list[tuple[Path, Study]]:
    """A study for each recipe and seed, seeds outermost: a comparison that is broken off is balanced.

    Args:
        recipes: files or shipped names; one that has a section ``sweep`` is all its runs.
        seeds: of training; empty: those of each recipe.
        output: its folder ``runs`` takes the run directories, a folder for each recipe.

    Raises:
        UserError: there is no ``output``, a recipe is wrong, or two runs would be the same.
    """
    if output is None:
        raise UserError(
            "compare: recipes are trained first; expected --output, the folder for their runs and the report"
        )
    studies = []
    for seed in [[seed] for seed in seeds] or [[]]:
        for recipe in recipes:
            studies.append((recipe, plan(recipe, [], output / RUNS / _folder_of(recipe, recipes), {}, {}, seed)))
    known: dict[str, Path] = {}
    for recipe, study in studies:
        for run in study.runs:
            if run.id in known:
                raise UserError(
                    f"compare: {recipe} and {known[run.id]} are the same run with {run.label} (what differs has no "
                    "effect on it); leave one of them out"
                )
            known[run.id] = recipe
    return studies


def check_kinds(studies: Sequence[tuple[Path, Study]]) -> None:
    """Refuse runs that all differ in their seed alone, before they are trained.

    Raises:
        UserError: they do.
    """
    first: dict[str, Any] | None = None
    for recipe, study in studies:
        for run in study.runs:
            settings = settings_of(load_recipe(recipe, [*run.overrides, "sweep=null"]))
            if settings != (first := settings if first is None else first):
                return
    raise UserError(ONE_KIND)


def _folder_of(recipe: Path, recipes: Sequence[Path]) -> str:
    """The recipe's name; with its number where two files have the same one."""
    alike = [one for one in dict.fromkeys(recipes) if one.stem == recipe.stem]
    return recipe.stem if len(alike) == 1 else f"{recipe.stem}-{alike.index(recipe) + 1}"


def make_runs(
    studies: Sequence[tuple[Path, Study]], say: Callable[[str], Any] = lambda _: None, console: Console | None = None
) -> list[Planned]:
    """Train what is not done, and return the runs that have a directory; what each printed is in its log.

    Args:
        studies: of ``plan_runs``.
        say: takes a line before each study, and one for a run that has failed.
        console: where the runs at work are shown, as ``Progress`` does; None: stderr.

    Raises:
        Interrupted: asked to stop.
    """
    there = []
    for place, (recipe, study) in enumerate(studies, start=1):
        sweep = Sweep(study, study.runs)
        done = [*sweep.states.values()].count("done")
        say(f"compare: {recipe} ({place} of {len(studies)}): {done} of {len(study.runs)} runs done")
        if sweep.waiting:
            try:
                with Progress(sweep, console, "compare"):
                    sweep.run()
            except Interrupted:  # it counts the runs of this study alone
                raise Interrupted(_stopped(studies)) from None
        for run in study.runs:
            if study.state(run) == "failed":
                say(f"compare: {run.path} has failed: {study.why(run)}; see {study.log(run)}")
            # One that did not come as far as its directory has nothing to be shown of
            there += [run] if (run.path / "recipe.yaml").is_file() else []
    return there


def _stopped(studies: Sequence[tuple[Path, Study]]) -> str:
    left = sum(study.state(run) != "done" for _, study in studies for run in study.runs)
    return f"compare: stopped with {left} runs not done; give the same command again to go on"
