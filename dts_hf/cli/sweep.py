"""``dts-hf sweep``: a recipe, varied, every run once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import RecipeFile, print_table
from dts_hf.console import duration, show
from dts_hf.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dts_hf.experiments.sweep import Planned, State, Study

EPILOG = "Example: [bold]dts-hf sweep recipe.yaml --set temperature=1,2,4 --seeds 1,2,3 --output studies/mine[/bold]"


def list_presets(asked: bool) -> None:
    """Print the presets and their axes, and end."""
    if asked:
        from dts_hf.experiments.presets import rows_of_list

        print_table("presets; each axis is crossed with the preset's own values and with nothing else", rows_of_list())
        raise typer.Exit


def command(
    recipe: RecipeFile,
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of all runs.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("sweep"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=A,B", help="Values of a key; several: each with each.")
    ] = None,
    zip_: Annotated[
        list[str] | None, typer.Option("--zip", metavar="KEY=A,B", help="Values of keys that go together.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A sweep by name, with the seeds 1,2,3 unless others are given.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Seeds of training; the outermost loop.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    devices: Annotated[
        str | None, typer.Option(metavar="N,N", help="GPUs, one for each run at work; as many runs as these.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="The runs of machine I of N.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that fails is tried again.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try runs again that were given up.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the runs, what has become of each, and how long the rest will take."),
    ] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command for each run that is not done; start none.")
    ] = False,
    slurm: Annotated[Path | None, typer.Option(help="Write a job array of SLURM for them; start none.")] = None,
    presets: Annotated[  # noqa: ARG001  # it has ended before
        bool, typer.Option("--list-presets", callback=list_presets, is_eager=True, help="Show the presets and exit.")
    ] = False,
) -> None:
    """Vary a recipe: every combination and seed is a run of its own; done ones are never repeated."""
    from dts_hf.experiments import sweep as work
    from dts_hf.experiments.grid import varied
    from dts_hf.experiments.progress import Progress

    product, together = varied(set_ or [], "--set"), varied(zip_ or [], "--zip")
    study = work.plan(recipe, changes or [], output, product, together, _numbers(seeds), preset)
    chosen = work.shard(study.runs, shard)
    for run in chosen if retry_failed and not dry_run else ():
        study.forgive(run)
    numbers = _devices(devices)
    if print_commands or slurm is not None:
        _for_a_cluster(study, chosen, None if print_commands else slurm)
    elif dry_run:
        _show(study, states := study.states(chosen))
        show(_time(states, work.jobs_of(jobs, numbers)))
    else:
        sweep = work.Sweep(study, chosen, jobs=jobs, devices=numbers, retries=retries)
        with Progress(sweep):
            sweep.run()
        _show(study, states := study.states(chosen))
        if "failed" in states.values():
            raise typer.Exit(int(ExitCode.FAILED))


def _for_a_cluster(study: Study, chosen: Sequence[Planned], slurm: Path | None) -> None:
    """Print the commands of the runs that are left, or write them into a job array."""
    from dts_hf.experiments import sweep as work
    from dts_hf.files import write_text_atomic

    left = [run for run, state in study.states(chosen).items() if state != "done"]
    if slurm is None:
        for line in work.shell_commands(study, left):
            show(line)
    elif left:
        # SLURM makes no folder for its logs, and starts no task without it
        (study.folder / work.LOGS).mkdir(parents=True, exist_ok=True)
        write_text_atomic(slurm, work.slurm_script(study, left))
        show(f"{slurm}: {len(left)} tasks; sbatch {slurm}")
    else:
        show(f"{study.folder}: all {len(chosen)} runs are done, and {slurm} is not written")


def _devices(text: str | None) -> list[str]:
    numbers = [device.strip() for device in text.split(",")] if text is not None else []
    if "" in numbers or len({*numbers}) < len(numbers):
        raise UserError(f"devices: got {text!r}, expected GPUs that differ, for example 0,1")
    return numbers


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"seeds: got {text!r}, expected whole numbers, for example 1,2,3") from None


def _time(states: Mapping[Planned, State], jobs: int) -> str:
    """How long the runs that are not done will take."""
    from dts_hf.experiments.estimate import mean_of, measured

    left = [run for run, state in states.items() if state != "done"]
    pace = mean_of(measured(run.path, run.size) for run, state in states.items() if state == "done")
    if pace is None:
        return f"runs left: {len(left)}; how long that takes is unknown until one of this study is done"
    seconds = sum(pace.seconds(run.size) for run in left) / max(min(jobs, len(left)), 1)
    return f"runs left: {len(left)}, about {duration(seconds)} by the steps of {pace.runs} that are done"


def _show(study: Study, states: Mapping[Planned, State]) -> None:
    failed = "failed" in states.values()
    rows = []
    for run, state in states.items():
        row = {"run": run.path.name, "varied": run.label, "state": str(state)}
        rows.append({**row, "why": study.why(run) if state == "failed" else ""} if failed else row)
    print_table(f"{study.folder}: {len(rows)} runs", rows)
    if {*states.values()} == {"done"} and len(rows) > 1:
        show(f"next: dts-hf compare {study.folder}/*/")
