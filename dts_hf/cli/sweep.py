"""``dts-hf sweep``: a recipe, varied, every run once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import RecipeFile, print_table
from dts_hf.console import printable, say, show, working
from dts_hf.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dts_hf.experiments.shared_teacher import Group
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
    share_teacher: Annotated[
        int | None, typer.Option(min=2, metavar="K", help="One teacher forward for K runs of the same batches.")
    ] = None,
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

    _check_share(share_teacher, jobs, devices, print_commands or slurm is not None)
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
        # SLURM makes none, and starts no task without it
        (study.folder / work.LOGS).mkdir(parents=True, exist_ok=True)
        write_text_atomic(slurm, work.slurm_script(study, left))
        show(f"{slurm}: {len(left)} tasks; sbatch {slurm}")
    elif dry_run:
        _show(study, chosen)
        _show_groups(study, left, share_teacher)
    else:
        if share_teacher is not None:
            _run_groups(study, chosen, share_teacher, _gpus(devices), retries)
        else:
            sweep = work.Sweep(study, chosen, jobs=jobs, devices=_gpus(devices), retries=retries)
            sweep.on_change = lambda: say(_progress(study, chosen, sweep))
            sweep.run()
        _show(study, chosen)
        if any(study.state(run) == "failed" for run in chosen):
            raise typer.Exit(int(ExitCode.FAILED))


def _gpus(devices: str | None) -> list[str]:
    numbers = [device.strip() for device in devices.split(",")] if devices is not None else []
    if "" in numbers or len({*numbers}) < len(numbers):
        raise UserError(f"devices: got {devices!r}, expected GPUs that differ, for example 0,1")
    return numbers


def _check_share(most: int | None, jobs: int, devices: str | None, for_others: bool) -> None:
    if most is None:
        return
    if jobs > 1:
        raise UserError(f"--share-teacher {most}: starts {most} runs at a time, expected no --jobs beside it")
    if devices is not None and "," in devices:
        raise UserError(
            f"--share-teacher {most}: is for one GPU, got --devices {devices}; give each a sweep with --shard"
        )
    if for_others:
        raise UserError(
            f"--share-teacher {most}: starts its runs itself, expected neither --print-commands nor --slurm; leave it out"
        )


def _groups(study: Study, runs: Sequence[Planned], most: int) -> list[Group]:
    from dts_hf.experiments.shared_teacher import groups_of

    with working("finding the runs that share a teacher"):
        return groups_of(study, runs, most)


def _show_groups(study: Study, runs: Sequence[Planned], most: int | None) -> None:
    for group in _groups(study, runs, most) if most is not None else ():
        show(printable(group.said))


def _run_groups(study: Study, runs: Sequence[Planned], most: int, devices: Sequence[str], retries: int) -> None:
    from dts_hf.experiments.sweep import Sweep

    # The first batch waits for all of a group: none that will not come is in it
    left = [run for run in runs if study.state(run) not in ("done", "running") and study.failures(run) <= retries]
    for group in _groups(study, left, most):
        group.open()
        environment = group.environment | ({"CUDA_VISIBLE_DEVICES": devices[0]} if devices else {})
        sweep = Sweep(study, group.runs, jobs=len(group.runs), retries=retries, environment=environment)
        sweep.on_change = partial(_say_progress, study, runs, sweep)
        say(printable(group.said))
        try:
            sweep.run()
        finally:
            if spared := group.close():
                say(spared)


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


def _say_progress(study: Study, runs: Sequence[Planned], sweep: Sweep) -> None:
    say(_progress(study, runs, sweep))


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
