"""``dts-hf sweep``: every run of a grid once, whatever is killed, repeated or started twice.

A run's folder is called by what it is (``identity.run_id``), so the same command finds what is done and does the rest. Each
run is a process of its own, ``dts-hf train --resume``: it goes on where a killed one was, and its lock keeps a second sweep
out. One that fails is tried again, then left as a result: it stays visible in ``compare``.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, TypeAlias

from dts_hf.console import say
from dts_hf.errors import ExitCode, Interrupted, UserError
from dts_hf.experiments import presets
from dts_hf.experiments.estimate import Size
from dts_hf.experiments.grid import Grid, of_grids, overrides_of, short
from dts_hf.experiments.identity import run_id
from dts_hf.files import check_folder, check_output_folder, last_lines, read_sealed, write_sealed
from dts_hf.recipe.loading import load_recipe
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import BUSY, is_locked

State: TypeAlias = Literal["done", "running", "stale", "failed", "missing"]
FAILURES, LOGS = ".sweep/failures", ".sweep/logs"  # hidden: RUNS/* is the runs
PAUSE = 0.2  # seconds between two looks at the processes
MOST_LABEL = 60


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        id: see ``identity.run_id``.
        label: what is varied, and the seed.
        overrides: of the recipe.
        path: its run directory.
        size: how much it trains.
    """

    id: str
    label: str
    overrides: tuple[str, ...]
    path: Path
    size: Size = field(default_factory=Size)


def is_done(path: Path) -> bool:
    """Whether a run directory has its ``metrics.json``, which is written last; a damaged one is none."""
    try:
        return bool(RunDirectory(path).read_metrics())
    except UserError:
        return False


@dataclass(frozen=True)
class Study:
    """A recipe and the runs that it is varied into.

    Attributes:
        recipe: file, or the name of a shipped one.
        folder: holds the run directories, logs, and what is known of failures.
        runs: in the order in which they are started.
    """

    recipe: str
    folder: Path
    runs: Sequence[Planned]

    def state(self, run: Planned) -> State:
        """What has become of ``run``: done, in the hands of a process, left by a killed one, given up, or not begun."""
        if is_done(run.path):
            return "done"
        if is_locked(run.path):
            return "running"
        if self.failures(run):
            return "failed"
        return "stale" if (run.path / "recipe.yaml").is_file() else "missing"

    def states(self, runs: Iterable[Planned]) -> dict[Planned, State]:
        """``state`` of each of ``runs``, read once."""
        return {run: self.state(run) for run in runs}

    def failures(self, run: Planned) -> int:
        """How often ``run`` has failed since it was last begun anew."""
        return int(read_sealed(self._failure(run)).get("failures", 0))

    def add_failure(self, run: Planned, why: str) -> None:
        """Note that ``run`` has failed once more, and the last thing it said."""
        self._failure(run).parent.mkdir(parents=True, exist_ok=True)
        write_sealed(self._failure(run), {"failures": self.failures(run) + 1, "label": run.label, "last": why})

    def forgive(self, run: Planned) -> None:
        """Let ``run`` be tried again as if it had never failed."""
        self._failure(run).unlink(missing_ok=True)

    def why(self, run: Planned) -> str:
        """The last thing that ``run`` said before it failed."""
        return str(read_sealed(self._failure(run)).get("last", ""))

    def _failure(self, run: Planned) -> Path:
        return self.folder / FAILURES / f"{run.id}.json"

    def log(self, run: Planned) -> Path:
        """What the process of ``run`` prints."""
        return self.folder / LOGS / f"{run.path.name}.log"

    def command(self, run: Planned) -> list[str]:
        """What starts ``run``, or goes on with it."""
        return [
            sys.executable, "-m", "dts_hf", "train", self.recipe, *run.overrides, "sweep=null", "--output", str(run.path),
            "--resume",
        ]  # fmt: skip


def plan(
    recipe: str | Path,
    overrides: Sequence[str],
    folder: Path,
    product: Mapping[str, Sequence[Any]],
    together: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    preset: str | None = None,
) -> Study:
    """Check the recipe of every run, and name it.

    Args:
        recipe: file, or the name of a shipped one.
        overrides: of all runs.
        folder: for their directories.
        product: values by dotted key, each with each; beside those of the recipe's section ``sweep``.
        together: values by dotted key that go together.
        seeds: of training; empty: those of the recipe's section, with a preset 1, 2 and 3, else its own seed.
        preset: name of one, in the place of the section's; None: that.

    Raises:
        UserError: a recipe is wrong (the first wrong one is shown), two runs of a grid would be the same, the preset is not
            for this recipe, or ``folder`` can be none.
    """
    check_folder(folder, "--output")
    if any(ord(letter) < 32 for letter in str(folder)):
        raise UserError(f"--output: got {str(folder)!r}, expected a name without control characters")
    base = load_recipe(recipe, overrides)
    section = base.sweep
    if section is not None:
        product, together = {**section.set, **product}, {**section.zip, **together}
        seeds, preset = seeds or section.seeds, preset or section.preset
    grids = [Grid(product, together)]
    if preset is not None:
        grids, seeds = presets.grids_of(preset, base, product, together), seeds or presets.SEEDS
        for title, axis in presets.left_out(preset, product).items():
            say(f"preset {preset}: without its axis {title} ({axis.about}), which needs {axis.example}")
    runs: dict[str, Planned] = {}
    grid_of: dict[str, int] = {}
    for number, values, seed in of_grids(grids, seeds or [base.seed]):
        own = [*overrides, *overrides_of(values, seed)]
        label = ", ".join([*(f"{key}={short(value)}" for key, value in values.items()), f"seed {seed}"])
        made = load_recipe(recipe, [*own, "sweep=null"])
        identity = run_id(made)
        if identity in runs and grid_of[identity] != number:
            continue  # where two grids meet
        if identity in runs:
            raise UserError(
                f"sweep: '{label}' and '{runs[identity].label}' are the same run (what differs has no effect on it); leave "
                "one of them out"
            )
        path = folder / f"{_file_name(label)}-{identity}"
        runs[identity], grid_of[identity] = Planned(identity, label, tuple(own), path, Size.of(made)), number
    return Study(str(recipe), folder, list(runs.values()))


def shard(runs: Sequence[Planned], part: str | None) -> list[Planned]:
    """The runs of machine i of n.

    Args:
        runs: all of them.
        part: ``i/n`` from ``1/n`` to ``n/n``; None: all.

    Raises:
        UserError: ``part`` is of another form.
    """
    if part is None:
        return list(runs)
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"shard: got {part!r}, expected i/n, from 1/n to n/n")
    return list(runs[int(number) - 1 :: int(count)])


def jobs_of(jobs: int, devices: Sequence[str]) -> int:
    """How many runs are at work at the same time: one a device, unless another number is given."""
    return max(jobs, len(devices)) if jobs == 1 else jobs


class Sweep:
    """Starts the runs of a study and waits for them.

    Args:
        study: what there is to do.
        runs: those of it that are done here.
        jobs: processes at the same time.
        devices: numbers of the GPUs; each process has one, by ``CUDA_VISIBLE_DEVICES``. Empty: they see what there is.
        retries: how often a run that fails is tried again.
        environment: what the processes have beside that of this one.

    Attributes:
        on_change: is called whenever a run begins or ends.
        on_look: is called several times a second while runs are at work.
        states: what has become of each run, as far as this process knows: each is read when the sweep is made, before it
            is started and when it has ended, however many there are.
        began: by the clock of ``time.monotonic``, of the runs at work.
        seconds: that each run took which has ended here.
    """

    def __init__(
        self,
        study: Study,
        runs: Sequence[Planned],
        *,
        jobs: int = 1,
        devices: Sequence[str] = (),
        retries: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.study, self.retries = study, retries
        self.states: dict[Planned, State] = study.states(runs)
        self.waiting = [run for run in runs if self._may_start(run)]
        self.on_change: Callable[[], Any] = lambda: None
        self.on_look: Callable[[], Any] = lambda: None
        self.jobs, self.free = jobs_of(jobs, devices), list(devices)
        self.devices, self.environment = bool(devices), environment or {}
        self.at_work: dict[Planned, tuple[subprocess.Popen[bytes], IO[bytes], str]] = {}
        self.seconds: list[float] = []
        self.began: dict[Planned, float] = {}
        self._stop: int | None = None

    def run(self) -> None:
        """Until every run is done, given up, or in the hands of another process.

        Raises:
            Interrupted: asked to stop (SIGINT, SIGTERM): the runs at work were told so, and can be gone on with.
            UserError: nothing can be written in the study's folder.
        """
        if self.waiting:
            check_output_folder(self.study.folder)
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.waiting or self.at_work) and self._stop is None:
                self._start_some()
                self._collect()
                if self.at_work:
                    self.on_look()
                    time.sleep(PAUSE)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop is not None:
            left = len(self.waiting)
            raise Interrupted(f"sweep: stopped with {left} runs left; give the same command again to go on")

    def _may_start(self, run: Planned) -> bool:
        state = self.states[run]
        given_up = state == "failed" and self.study.failures(run) > self.retries
        return state not in ("done", "running") and not given_up

    def _asked(self, number: int, _: FrameType | None) -> None:
        self._stop = number

    def _start_some(self) -> None:
        while self.waiting and len(self.at_work) < self.jobs and (self.free or not self.devices):
            run = self.waiting.pop(0)
            self.states[run] = self.study.state(run)
            if not self._may_start(run):
                continue
            log = self.study.log(run)
            log.parent.mkdir(parents=True, exist_ok=True)
            device = self.free.pop(0) if self.devices else ""
            environment = {**os.environ, **self.environment, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
            file = log.open("ab")
            # A group of its own: Ctrl-C reaches it once, from here, and it writes its checkpoint in peace
            process = subprocess.Popen(
                self.study.command(run), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self.at_work[run], self.began[run] = (process, file, device), time.monotonic()
            self.states[run] = "running"
            self.on_change()

    def _collect(self) -> None:
        for run, (process, file, device) in list(self.at_work.items()):
            if (code := process.poll()) is None:
                continue
            del self.at_work[run]
            file.close()
            self.free += [device] if device else []
            if is_done(run.path):
                self.states[run] = "done"
                self.seconds.append(time.monotonic() - self.began[run])
            elif code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C):  # somebody has told that process alone to stop
                self.states[run] = "stale"
                self.waiting.append(run)
            elif BUSY not in (said := last_words(self.study.log(run))):  # else another sweep was quicker
                self.study.add_failure(run, said)
                self.states[run] = "failed"
                if self.study.failures(run) <= self.retries:
                    self.waiting.append(run)
            self.on_change()

    def _end_all(self) -> None:
        for process, _, _ in self.at_work.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for run, (process, file, _) in self.at_work.items():
            process.wait()
            file.close()
            self.states[run] = self.study.state(run)
            self.waiting += [run] if self.states[run] != "done" else []
        self.at_work.clear()


def last_words(log: Path) -> str:
    """The last line that a process has printed, shortened."""
    return next(reversed(last_lines(log)), "")[:300]


def shell_commands(study: Study, runs: Iterable[Planned]) -> list[str]:
    """A line for each run, for a cluster or for parallel."""
    return [shlex.join(["dts-hf", *study.command(run)[3:]]) for run in runs]


def slurm_script(study: Study, runs: Sequence[Planned]) -> str:
    """A job array of SLURM with a task for each run; what a site needs besides (partition, account, time) is left to it."""
    lines = [f"  {shlex.quote(line)}" for line in shell_commands(study, runs)]
    # B: the script becomes the run by exec and has no job step, which is all that SLURM signals otherwise
    return "\n".join([
        "#!/bin/bash", f"#SBATCH --array=0-{len(runs) - 1}", "#SBATCH --gpus=1", "#SBATCH --signal=B:TERM@120",
        "#SBATCH --requeue", f"#SBATCH --output={shlex.quote(str(study.folder / LOGS).replace('%', '%%'))}/%A_%a.log",
        "# Add what your site asks for: --partition, --account, --time.", "commands=(", *lines, ")",
        'exec bash -c "exec ${commands[$SLURM_ARRAY_TASK_ID]}"', "",
    ])  # fmt: skip


def _file_name(label: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in ".=_" else "-" for letter in label.replace(", ", "_"))
    return kept[:MOST_LABEL].strip("-.") or "run"
