"""``dts-hf sweep``: a recipe, varied, every run once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import RecipeFile, print_table, whole_numbers
from dts_hf.console import duration, printable, say, show, working
from dts_hf.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dts_hf.experiments.shared_teacher import Group
    from dts_hf.experiments.sweep import Planned, State, Study, Sweep

EPILOG = "Example: [bold]dts-hf sweep recipe.yaml --set temperature=1,2,4 --seeds 1,2,3 --output studies/mine[/bold]"

ShareTeacher = Annotated[
    int | None,
    typer.Option(min=2, metavar="K", help="One teacher forward for K runs of the same batches."),
]


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
    share_teacher: ShareTeacher = None,
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

    _check_instead({"--dry-run": dry_run, "--print-commands": print_commands, "--slurm": slurm is not None})
    _check_share(share_teacher, jobs, devices, print_commands or slurm is not None)
    product, together = varied(set_ or [], "--set"), varied(zip_ or [], "--zip")
    study = work.plan(recipe, changes or [], output, product, together, whole_numbers(seeds, "seeds"), preset)
    chosen, numbers = work.shard(study.runs, shard), _devices(devices)
    for run in chosen if retry_failed and not dry_run else ():
        study.forgive(run)
    if print_commands or slurm is not None:
        _for_a_cluster(study, chosen, slurm)
    elif dry_run:
        _show(study, states := study.states(chosen))
        show(_time(states, share_teacher or work.jobs_of(jobs, numbers)))
        for group in _groups(study, _left(states), share_teacher) if share_teacher else ():
            show(printable(group.said))
    else:
        if share_teacher is not None:
            _run_groups(study, chosen, share_teacher, numbers, retries)
        else:
            _run(work.Sweep(study, chosen, jobs=jobs, devices=numbers, retries=retries))
        _show(study, states := study.states(chosen))
        if "failed" in states.values():
            raise typer.Exit(int(ExitCode.FAILED))


def _check_instead(options: Mapping[str, bool]) -> None:
    """Refuse several of the ``options`` that do something else than the runs.

    Raises:
        UserError: names those that are given.
    """
    if len(given := [name for name, value in options.items() if value]) > 1:
        raise UserError(f"{', '.join(given)}: each is in the place of the runs, expected one of them")


def _for_a_cluster(study: Study, chosen: Sequence[Planned], slurm: Path | None) -> None:
    """Print the commands of the runs that are left, or write them into a job array.

    Raises:
        UserError: the file of the job array can be none.
    """
    from dts_hf.experiments import sweep as work
    from dts_hf.files import check_new_file, check_output_folder, write_text_atomic

    if slurm is not None:
        check_new_file(slurm, "--slurm", replace=True)
    left = _left(study.states(chosen))
    if slurm is None:
        for line in work.shell_commands(study, left):
            show(line)
    elif left:
        check_output_folder(study.folder)
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


def _run_groups(study: Study, runs: Sequence[Planned], most: int, devices: Sequence[str], retries: int) -> None:
    from dts_hf.experiments.sweep import Sweep as Started

    # The first batch waits for all of a group: none that will not come is in it
    states = study.states(runs).items()
    left = [run for run, state in states if state not in ("done", "running") and study.failures(run) <= retries]
    for group in _groups(study, left, most):
        group.open()
        environment = group.environment | ({"CUDA_VISIBLE_DEVICES": devices[0]} if devices else {})
        say(printable(group.said))
        try:
            _run(Started(study, group.runs, jobs=len(group.runs), retries=retries, environment=environment))
        finally:
            if spared := group.close():
                say(spared)


def _run(sweep: Sweep) -> None:
    """Until it is done, with a table of what it is at."""
    from dts_hf.experiments.progress import Progress

    with Progress(sweep):
        sweep.run()


def _left(states: Mapping[Planned, State]) -> list[Planned]:
    """The runs that are not done."""
    return [run for run, state in states.items() if state != "done"]


def _time(states: Mapping[Planned, State], jobs: int) -> str:
    """How long the runs that are not done will take."""
    from dts_hf.experiments.estimate import mean_of, measured

    left = _left(states)
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
