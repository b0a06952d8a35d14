"""``dts-hf compare``: runs of several kinds side by side, finished ones or those of recipes that are trained first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import AsJson, complete_recipe, print_json, print_table, whole_numbers
from dts_hf.console import printable, say, show
from dts_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

EPILOG = (
    "Example: [bold]dts-hf compare runs/*/ --baseline runs/constant-1 --output comparison[/bold]; or "
    "[bold]dts-hf compare fixed.yaml moving.yaml --seeds 1,2,3 --output comparison[/bold]"
)


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|RECIPE...", autocompletion=complete_recipe,
            help="Run directories, or recipes that are trained first; of two kinds or more.",
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="A run directory or recipe, or words of a kind's name; default: the kind of the first run."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Largest difference in ROUGE-L or a classifier's scores that would not matter, in points; default: 0.5. "
            "Set it before."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, comparison.md and comparison.csv, and for the runs of recipes."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Seeds of training of recipes; default: their own.")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare runs that differ in more than their seed: means, intervals, and what can be said of each difference."""
    from dts_hf.experiments import tables as written
    from dts_hf.experiments.compare import check_margin, compare_kinds
    from dts_hf.experiments.kinds import baseline_of, read_kinds
    from dts_hf.experiments.report import render_page
    from dts_hf.files import check_output_folder, write_text_atomic

    # Before recipes are trained, which may take days
    check_margin(margin)
    if output is not None:
        check_output_folder(output)
    _check_baseline(baseline, runs)
    paths, names = _runs_of(runs, seeds, output)
    kinds = read_kinds(paths)
    wanted = baseline and names.get(os.path.realpath(baseline), baseline)
    tables = compare_kinds(kinds, baseline_of(kinds, wanted), margin)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output / "report.html", render_page(kinds, tables))
        write_text_atomic(output / "comparison.md", written.markdown(tables))
        write_text_atomic(output / "comparison.csv", written.as_csv(tables))
    if as_json:
        print_json({"lines": written.as_json(tables)})
        return
    for table in tables:
        rows = [written.cells(table, line) for line in table.lines]
        print_table(written.title(table), [{column: row[column] for column in written.SHOWN} for row in rows])
        for note in written.footnotes(table):
            show(note)
        show("")
    if output is not None:
        show(output / "report.html")


def _check_baseline(wanted: str | None, given: Sequence[Path]) -> None:
    """Refuse a recipe that is not among those given; words of a kind's name are known only when the runs are there.

    Raises:
        UserError: it is none of them.
    """
    if wanted is None or not wanted.endswith((".yaml", ".yml")):
        return
    if os.path.realpath(wanted) not in map(os.path.realpath, given):
        names = [str(path) for path in given]
        raise UserError(
            f"baseline: {wanted!r} is none of the recipes given, expected one of {', '.join(names)}.{nearest(wanted, names)}"
        )


def _runs_of(given: Sequence[Path], seeds: str | None, output: Path | None) -> tuple[list[Path], dict[str, str]]:
    """The run directories, those of recipes after they were trained, and one of each recipe by its real path."""
    from dts_hf.experiments.made import check_kinds, is_recipe, make_runs, plan_runs

    recipes = [name for name in dict.fromkeys(given) if is_recipe(name)]
    if not recipes:
        if seeds is not None:
            raise UserError(
                "seeds: they are of recipes that are trained first, and all that is given are run directories"
            )
        return list(given), {}
    studies = plan_runs(recipes, whole_numbers(seeds, "seeds"), output)
    if len(recipes) == len({*given}):  # else run directories are compared with them
        check_kinds(studies)
    made = make_runs(studies, lambda text: say(printable(text)))
    of_recipe = {
        recipe: [run.path for run in made for other, study in studies if other == recipe and run in study.runs]
        for recipe in recipes
    }
    paths = [path for name in dict.fromkeys(given) for path in of_recipe.get(name, [name])]
    return paths, {os.path.realpath(recipe): str(of_run[0]) for recipe, of_run in of_recipe.items() if of_run}
