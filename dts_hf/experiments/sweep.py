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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, TypeAlias

from dts_hf.errors import ExitCode, Interrupted, UserError
from dts_hf.experiments.grid import combinations, overrides_of
from dts_hf.experiments.identity import run_id
from dts_hf.experiments.runs import seed_of
from dts_hf.files import check_name, read_sealed, write_sealed
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
    """

    id: str
    label: str
    overrides: tuple[str, ...]
    path: Path


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
) -> Study:
    """Check the recipe of every run, and name it.

    Args:
        recipe: file, or the name of a shipped one.
        overrides: of all runs.
        folder: for their directories.
        product: values by dotted key, each with each; beside those of the recipe's section ``sweep``.
        together: values by dotted key that go together.
        seeds: of training; empty: those of the recipe's section, or its own seed.

    Raises:
        UserError: a recipe is wrong (the first wrong one is shown), two runs would be the same, or ``folder`` can be none.
    """
    check_name(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file, expected a folder")
    if any(ord(letter) < 32 for letter in str(folder)):
        raise UserError(f"--output: got {str(folder)!r}, expected a name without control characters")
    base = load_recipe(recipe, overrides)
    section = base.sweep
    if section is not None:
        product, together = {**section.set, **product}, {**section.zip, **together}
        seeds = seeds or section.seeds
    runs: dict[str, Planned] = {}
    for values, seed in combinations(product, together, seeds or [seed_of(base)]):
        own = [*overrides, *overrides_of(values, seed)]
        label = ", ".join([*(f"{key}={_short(value)}" for key, value in values.items()), f"seed {seed}"])
        identity = run_id(load_recipe(recipe, [*own, "sweep=null"]))
        if identity in runs:
            raise UserError(
                f"sweep: '{label}' and '{runs[identity].label}' are the same run (what differs has no effect on it); leave "
                "one of them out"
            )
        runs[identity] = Planned(identity, label, tuple(own), folder / f"{_file_name(label)}-{identity}")
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
        self.study, self.waiting, self.retries = study, list(runs), retries
        self.on_change: Callable[[], Any] = lambda: None
        self.jobs, self.free = max(jobs, len(devices)) if jobs == 1 else jobs, list(devices)
        self.devices, self.environment = bool(devices), environment or {}
        self.at_work: dict[Planned, tuple[subprocess.Popen[bytes], IO[bytes], str]] = {}
        self.seconds: list[float] = []
        self._began: dict[Planned, float] = {}
        self._stop: int | None = None

    def run(self) -> None:
        """Until every run is done, given up, or in the hands of another process.

        Raises:
            Interrupted: asked to stop (SIGINT, SIGTERM): the runs at work were told so, and can be gone on with.
        """
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.waiting or self.at_work) and self._stop is None:
                self._start_some()
                self._collect()
                if self.at_work:
                    time.sleep(PAUSE)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop is not None:
            left = len(self.waiting) + len(self.at_work)
            raise Interrupted(f"sweep: stopped with {left} runs left; give the same command again to go on")

    def _asked(self, number: int, _: FrameType | None) -> None:
        self._stop = number

    def _start_some(self) -> None:
        while self.waiting and len(self.at_work) < self.jobs and (self.free or not self.devices):
            run = self.waiting.pop(0)
            state = self.study.state(run)
            if state in ("done", "running") or (state == "failed" and self.study.failures(run) > self.retries):
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
            self.at_work[run], self._began[run] = (process, file, device), time.monotonic()
            self.on_change()

    def _collect(self) -> None:
        for run, (process, file, device) in list(self.at_work.items()):
            if (code := process.poll()) is None:
                continue
            del self.at_work[run]
            file.close()
            self.free += [device] if device else []
            if is_done(run.path):
                self.seconds.append(time.monotonic() - self._began[run])
            elif code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C):  # somebody has told that process alone to stop
                self.waiting.append(run)
            elif BUSY not in (said := last_words(self.study.log(run))):  # else another sweep was quicker
                self.study.add_failure(run, said)
                if self.study.failures(run) <= self.retries:
                    self.waiting.append(run)
            self.on_change()

    def _end_all(self) -> None:
        for process, _, _ in self.at_work.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process, file, _ in self.at_work.values():
            process.wait()
            file.close()
        self.at_work.clear()


def last_words(log: Path) -> str:
    """The last line that a process has printed, shortened."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def shell_commands(study: Study, runs: Iterable[Planned]) -> list[str]:
    """A line for each run, for a cluster or for parallel."""
    return [shlex.join(["dts-hf", *study.command(run)[3:]]) for run in runs]


def slurm_script(study: Study, runs: Sequence[Planned]) -> str:
    """A job array of SLURM with a task for each run; what a site needs besides (partition, account, time) is left to it."""
    lines = [f"  {shlex.quote(line)}" for line in shell_commands(study, runs)]
    return "\n".join([
        "#!/bin/bash", f"#SBATCH --array=0-{len(runs) - 1}", "#SBATCH --gpus=1", "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue", f"#SBATCH --output={shlex.quote(str(study.folder / LOGS).replace('%', '%%'))}/%A_%a.log",
        "# Add what your site asks for: --partition, --account, --time.", "commands=(", *lines, ")",
        'exec bash -c "exec ${commands[$SLURM_ARRAY_TASK_ID]}"', "",
    ])  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"])
    return str(value)


def _file_name(label: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in ".=_" else "-" for letter in label.replace(", ", "_"))
    return kept[:MOST_LABEL].strip("-.") or "run"
