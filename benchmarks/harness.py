"""What all benchmarks share: workers that take turns, medians, peak memory, versions, tables.

A benchmark names its variants and gives ``build(variant, options) -> Task``, a function of its module. Workers are fresh
processes, and only one step runs at a time, in an order that rotates from round to round: a machine that slows down slows
all of them. Seconds are medians over rounds. Peak memory is what a warm step adds to the resident memory: gradients are
counted, weights and inputs are not. On a GPU a turn is a few warm-up steps and a few steps between CUDA events, and the
memory is the caching allocator's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

CUDA_WARM_UP, CUDA_STEPS = 3, 5
MEMORY_NOTE = "peak memory needs Linux's /proc/self/clear_refs"


class Task(NamedTuple):
    """One variant, ready to run.

    Attributes:
        step: forward and backward once; returns ``kl`` (nats per label, where there is one) and other numbers.
        clean: drops the gradients; outside the clock.
    """

    step: Callable[[], dict[str, float]]
    clean: Callable[[], None] = lambda: None


class Missing(Exception):
    """A variant cannot run here; the text says why."""


@contextlib.contextmanager
def needs_trl() -> Iterator[None]:
    """Turn a failed import of TRL into ``Missing``: its lazy imports raise either of the two."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise Missing(f"{error} (pip install trl==1.16.0)") from error


# --------------------------------------------------------------------------------------------------------- the worker


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (high-water mark) of this process."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines[field].split()[0]) * 1024


def reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return True
    except OSError:
        return False


def give_memory_back() -> None:
    """Freed heap must leave the resident memory, or the next step would reuse it and look smaller than it is."""
    import ctypes

    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _cpu_turn(task: Task, with_memory: bool) -> dict[str, float]:
    before = None
    if with_memory:
        give_memory_back()
        before = resident_bytes("VmRSS") if reset_high_water_mark() else None
    began = time.perf_counter()
    found = {**task.step()}
    found["seconds"] = time.perf_counter() - began
    if before is not None:
        found["peak_bytes"] = resident_bytes("VmHWM") - before
    task.clean()
    return found


def _cuda_turn(task: Task, with_memory: bool) -> dict[str, float]:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, float] = {}
    seconds = []
    for number in range(CUDA_WARM_UP + CUDA_STEPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        found = {**task.step()}
        end.record()
        end.synchronize()
        if number >= CUDA_WARM_UP:
            seconds.append(start.elapsed_time(end) / 1000)
        task.clean()
    found["seconds"] = statistics.median(seconds)
    if with_memory:
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()  # the others' turns need the room
    return found


def _worker(
    pipe: Connection, build: Callable[[str, Any], Task], names: list[str], options: Any, threads: int, device: str
) -> None:
    """Builds its variants, says which are missing, then answers every ``(name, with_memory)`` with one turn."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch

    torch.set_num_threads(threads)
    tasks: dict[str, Task] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            tasks[name] = build(name, options)
        except Missing as error:
            missing[name] = str(error)
    pipe.send(missing)
    turn = _cuda_turn if device == "cuda" else _cpu_turn
    while (order := pipe.recv()) is not None:
        task = tasks[order[0]]
        try:
            answer = turn(task, order[1])
        except torch.cuda.OutOfMemoryError:
            answer = {"out_of_memory": 1.0}
        if "out_of_memory" in answer:  # outside the handler, whose traceback holds on to the tensors
            task.clean()
            gc.collect()
            torch.cuda.empty_cache()
        pipe.send(answer)


# --------------------------------------------------------------------------------------------------------- the parent


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, build: Callable[[str, Any], Task], names: list[str], *arguments: Any) -> None:
        # A fresh interpreter, not a fork: a fork would start with the parent's memory.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_worker, args=(theirs, build, names, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies shows as the end of its pipe
        self.names = names

    def receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"the worker of {', '.join(self.names)} died; its own message stands above") from None
        return answer

    def ask(self, name: str, with_memory: bool) -> dict[str, Any]:
        self.pipe.send((name, with_memory))
        return self.receive()

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it may be gone already
            self.pipe.send(None)
        self.process.join()


class Measured(NamedTuple):
    """``numbers``: per variant the medians of what its turns returned, and ``seconds_per_round``."""

    numbers: dict[str, dict[str, Any]]
    notes: list[str]


def measure(
    build: Callable[[str, Any], Task],
    variants: Sequence[str],
    options: Any,
    *,
    rounds: int,
    threads: int,
    device: str = "cpu",
    processes: Sequence[Sequence[str]] | None = None,
) -> Measured:
    """Run ``rounds`` interleaved rounds after one warm-up turn of each process.

    Args:
        build: a function of a module (it is sent to the workers by name).
        variants: their names; those that raise ``Missing`` are left out with a note.
        options: given to ``build``; anything that can be pickled.
        processes: variants that share a process; by default each has its own, which is the strictest for memory.
    """
    groups = processes or [[name] for name in variants]
    workers = [Worker(build, list(group), options, threads, device) for group in groups]
    turns: dict[str, list[dict[str, Any]]] = {}
    try:
        missing: dict[str, str] = {}
        for worker in workers:
            missing.update(worker.receive())
        notes = [f"{name} is left out: {why}" for name, why in missing.items()]
        owner = {name: worker for worker in workers for name in worker.names}
        running = {name: owner[name] for name in variants if name not in missing}
        # One after the other also here: together they would not fit into a small machine.
        for worker in workers:
            for name in [name for name in worker.names if name in running][:1]:
                worker.ask(name, with_memory=False)
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}: {len(running)} variants")
            order = list(running)
            shift = number % max(len(order), 1)  # nobody always follows the same one
            for name in order[shift:] + order[:shift]:
                # Memory in the first round alone: giving memory back before a step could make it slower.
                answer = running[name].ask(name, with_memory=number == 0)
                if "out_of_memory" in answer:
                    notes.append(f"{name} is left out: the device's memory does not hold it")
                    del running[name]
                else:
                    turns.setdefault(name, []).append(answer)
    finally:
        for worker in workers:
            worker.stop()
    numbers = {name: _summary(turns[name]) for name in running}
    if any("peak_bytes" not in found for found in numbers.values()):
        notes.append(MEMORY_NOTE)
    return Measured(numbers, notes)


def _summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for turn in turns for key in turn)
    medians: dict[str, Any] = {key: statistics.median(t[key] for t in turns if key in t) for key in keys}
    return {**medians, "seconds_per_round": [turn["seconds"] for turn in turns]}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- the report


class Column(NamedTuple):
    """One column of a table: key of the row, heading, digits after the point (None: text)."""

    key: str
    heading: str
    digits: int | None


def make_table(title: str, columns: Sequence[Column], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A table as it stands in the JSON; a row may hold more than its columns show."""
    return {"title": title, "columns": [list(column) for column in columns], "rows": rows}


def make_report(
    benchmark: str, setting: dict[str, Any], tables: list[dict[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    """What a benchmark writes: its setting, where and with what it ran, tables and notes."""
    return {
        "benchmark": benchmark,
        "setting": setting,
        "environment": environment(setting.get("device", "cpu")),
        "tables": tables,
        "notes": list(dict.fromkeys(notes)),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as it is printed and as it stands in the documents."""
    where, setting = report["environment"], report["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"Measured on {where['date']} on {where['machine']}, commit {where['commit']}; {versions}.",
        f"Setting: {', '.join(f'{key} {_plain(value)}' for key, value in setting.items())}.",
    ]
    for table in report["tables"]:
        columns = [Column(*column) for column in table["columns"]]
        lines = [f"| {' | '.join(column.heading for column in columns)} |"]
        lines.append("|" + "|".join("---" if column.digits is None else "---:" for column in columns) + "|")
        lines += [f"| {' | '.join(_cell(row.get(c.key), c.digits) for c in columns)} |" for row in table["rows"]]
        parts += [*([f"**{table['title']}**"] if table["title"] else []), "\n".join(lines)]
    return "\n\n".join([*parts, *report["notes"]])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(value: Any, digits: int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if digits is None or isinstance(value, str):
        return str(value)
    small = isinstance(value, float) and 0.0 < abs(value) < 0.1
    return f"{value:,.{max(digits, 4) if small and digits else digits}f}"


def ratio(numbers: dict[str, dict[str, Any]], name: str, to: str, key: str = "seconds") -> float | None:
    """``key`` of one variant over that of another; None where either was not measured."""
    upper, lower = numbers.get(name, {}).get(key), numbers.get(to, {}).get(key)
    return upper / lower if upper is not None and lower else None


def gigabytes(found: dict[str, Any]) -> float | None:
    """Peak memory in 10^9 bytes."""
    return found["peak_bytes"] / 1e9 if "peak_bytes" in found else None


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, machine, commit and versions: without them a table says nothing."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": _machine(device),
        "commit": _commit(),
        "versions": versions,
    }


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = fields.get("model name", name)
        flags = "".join(
            f", {word}" for word in ("avx512f", "avx512_bf16", "amx_bf16") if word in fields.get("flags", "")
        )
    return f"{os.cpu_count()} cores of {name}{flags}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../dts_hf")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------- the command line


def make_parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=_positive, default=rounds, help=f"timed rounds; medians are reported (default: {rounds})"
    )
    parser.add_argument("--threads", type=_positive, default=2, help="threads of every worker (default: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one thread, one round: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def show(report: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(report, indent=2) if as_json else markdown(report))
