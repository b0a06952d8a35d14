"""``dts-hf sweep``: a recipe, varied, every run once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import RecipeFile, print_table
from dts_hf.console import printable, say, show
from dts_hf.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dts_hf.experiments.sweep import Planned, Study, Sweep

EPILOG = "Example: [bold]dts-hf sweep recipe.yaml --set temperature=1,2,4 --seeds 1,2,3 --output studies/mine[/bold]"


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
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Seeds of training; the outermost loop.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    devices: Annotated[
        str | None, typer.Option(metavar="N,N", help="GPUs, one for each run at work; as many runs as these.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="The runs of machine I of N.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that fails is tried again.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try runs again that were given up.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and what has become of each.")] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command for each run that is not done; start none.")
    ] = False,
    slurm: Annotated[Path | None, typer.Option(help="Write a job array of SLURM for them; start none.")] = None,
) -> None:
    """Vary a recipe: every combination and seed is a run of its own; done ones are never repeated."""
    from dts_hf.experiments import sweep as work
    from dts_hf.experiments.grid import varied
    from dts_hf.files import write_text_atomic

    study = work.plan(
        recipe, changes or [], output, varied(set_ or [], "--set"), varied(zip_ or [], "--zip"), _numbers(seeds)
    )
    chosen = work.shard(study.runs, shard)
    left = [run for run in chosen if study.state(run) != "done"]
    for run in chosen if retry_failed and not dry_run else ():
        study.forgive(run)
    if print_commands:
        for line in work.shell_commands(study, left):
            show(line)
    elif slurm is not None and left:
        (study.folder / work.LOGS).mkdir(
            parents=True, exist_ok=True
        )  # SLURM makes none, and starts no task without it
        write_text_atomic(slurm, work.slurm_script(study, left))
        show(f"{slurm}: {len(left)} tasks; sbatch {slurm}")
    elif dry_run:
        _show(study, chosen)
    else:
        numbers = [device.strip() for device in devices.split(",")] if devices is not None else []
        if "" in numbers or len({*numbers}) < len(numbers):
            raise UserError(f"devices: got {devices!r}, expected GPUs that differ, for example 0,1")
        sweep = work.Sweep(study, chosen, jobs=jobs, devices=numbers, retries=retries)
        sweep.on_change = lambda: say(_progress(study, chosen, sweep))
        sweep.run()
        _show(study, chosen)
        if any(study.state(run) == "failed" for run in chosen):
            raise typer.Exit(int(ExitCode.FAILED))


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"seeds: got {text!r}, expected whole numbers, for example 1,2,3") from None


def _progress(study: Study, runs: Sequence[Planned], sweep: Sweep) -> str:
    states = [study.state(run) for run in runs]
    done, failed = states.count("done"), states.count("failed")
    at_work = "; ".join(run.label for run in sweep.at_work)
    text = f"sweep: {done} of {len(runs)} done" + (f", {failed} failed" if failed else "")
    text += f"; at work: {at_work}" if at_work else ""
    if sweep.seconds:
        left = (len(runs) - done - failed) * sum(sweep.seconds) / len(sweep.seconds) / sweep.jobs
        text += f"; about {left / 60:.0f} min left"
    return printable(text)


def _show(study: Study, runs: Sequence[Planned]) -> None:
    rows = []
    for run in runs:
        state = study.state(run)
        row = {"run": run.path.name, "varied": run.label, "state": state}
        row["why"] = study.why(run) if state == "failed" else ""
        rows.append(row)
    if not any(row["why"] for row in rows):
        rows = [{key: value for key, value in row.items() if key != "why"} for row in rows]
    print_table(f"{study.folder}: {len(rows)} runs", rows)
    if all(row["state"] == "done" for row in rows) and len(rows) > 1:
        show(f"next: dts-hf compare {study.folder}/*/")
