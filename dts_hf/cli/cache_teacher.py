"""``dts-hf cache-teacher``: the teacher runs once over the rows of a recipe, and its states are kept."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dts_hf.cli.printing import AsJson, Overrides, RecipeFile, is_main_process, print_json
from dts_hf.console import gb, show

if TYPE_CHECKING:
    from dts_hf.teachers.cached.layout import Manifest

EPILOG = (
    "Example: [bold]dts-hf cache-teacher recipe.yaml --output caches/mine[/bold], then "
    "dts-hf train recipe.yaml teacher.kind=cached teacher.cache=caches/mine"
)


class StatesDtype(str, Enum):
    """What states can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the cache; default: the recipe's teacher.cache. Of several teachers each has DIR/NAME.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several teachers; --output is then its folder.")
    ] = None,
    dtype: Annotated[
        StatesDtype | None,
        typer.Option(help="What states are stored in; default: the teacher's own, which loses nothing."),
    ] = None,
    shard_mb: Annotated[
        int, typer.Option(min=1, max=4096, help="Size of a shard, MiB; a kill costs a process one of them at most.")
    ] = 128,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens that the teacher is given at once.")] = 4096,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the cache that is in that folder.")] = False,
    compact: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Keep K logits of each label and what the others weigh, in the place of states: smaller, and exact only "
            "for the kept tokens. Refused where they have less than 0.95 of the teacher at a temperature of the recipe.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write a compact cache that keeps less than that.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Run no teacher: read all of a finished cache, check every file, and make the self-test."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the teacher once over all rows and keep its final states; a killed one goes on where it was."""
    from dts_hf.recipe.loading import load_recipe

    checked = load_recipe(recipe, list(overrides or []))
    from dts_hf.language_modeling.caching import CacheOptions, cache_teacher, folders_of, verify_cache

    stored = None if dtype is None else dtype.value
    options = CacheOptions(stored, shard_mb << 20, batch_tokens, overwrite, compact, force)
    found: dict[str, Any] = {}
    for name, folder in folders_of(checked, output, teacher).items():
        which = name or None
        manifest = verify_cache(folder, checked, which) if verify else cache_teacher(checked, folder, options, which)
        found[name] = _facts(folder, manifest)
        if is_main_process() and not as_json:
            done = "whole" if verify else "complete"
            show(f"{folder}: {done}, {manifest.labels:,} labels of {manifest.rows:,} rows, {gb(manifest.size)}")
    if is_main_process() and as_json:
        print_json({"teachers": found} if checked.teachers else found[""])


def _facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    facts = {"folder": str(folder), "rows": manifest.rows, "labels": manifest.labels, "dtype": manifest.dtype}
    facts |= {} if manifest.compact is None else {"compact": dict(manifest.compact)}
    return {**facts, "bytes": manifest.size, "teacher_ce": manifest.nll, "plan": manifest.plan}
