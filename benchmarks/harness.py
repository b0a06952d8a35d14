"""What all benchmarks share: workers that take turns, medians, peak memory, the command line.

A benchmark names its variants and gives ``build(variant, options) -> Task``, a function of its module. Workers are fresh
processes, and only one step runs at a time, in an order that rotates from round to round: a machine that slows down slows
all of them. Seconds are medians over rounds. Peak memory is what a warm step adds to the resident memory: gradients are
counted, weights and inputs are not.

On a GPU a turn builds the variant, takes a few warm-up steps and a few steps between CUDA events, and drops all of it: the
variants never share the device's memory. The memory is then the caching allocator's. A variant that does not fit, fails or
dies is a row that says so, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from render import OUT_OF_MEMORY

CUDA_WARM_UP, CUDA_STEPS = 3, 7
#: A turn that answers this much later than the benchmark's limit is ended.
GRACE_SECONDS = 45.0
MEMORY_NOTE = "peak memory needs Linux's /proc/self/clear_refs"


class Task(NamedTuple):
    """One variant, ready to run.

    Attributes:
        step: forward and backward once; returns ``kl`` (nats per label, where there is one) and other numbers. On a GPU a
            0-d tensor may stand for a number: it is read when the clock has stopped.
        clean: drops the gradients; outside the clock.
        timed_inside: the step returns ``seconds`` of its own; it is called once a turn.
    """

    step: Callable[[], dict[str, Any]]
    clean: Callable[[], None] = lambda: None
    timed_inside: bool = False


class Missing(Exception):
    """A variant cannot run here; the text says why."""


@contextlib.contextmanager
def needs(requirement: str) -> Iterator[None]:
    """Turn a failed import of a peer into ``Missing``: TRL's lazy imports raise either of the two."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise Missing(f"{error} (pip install {requirement})") from error


needs_trl = functools.partial(needs, "trl==1.16.0")
needs_liger = functools.partial(needs, "liger-kernel==0.8.5")


def device_at_hand() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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


def _read(found: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in found.items()}


def _cpu_turn(task: Task, with_memory: bool) -> dict[str, float]:
    before = None
    if with_memory:
        give_memory_back()
        before = resident_bytes("VmRSS") if reset_high_water_mark() else None
    began = time.perf_counter()
    found = task.step()
    seconds = time.perf_counter() - began
    answer = {"seconds": seconds, **_read(found)}
    if before is not None:
        answer["peak_bytes"] = resident_bytes("VmHWM") - before
    task.clean()
    return answer


def _cuda_turn(task: Task, with_memory: bool) -> dict[str, float]:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    seconds = []
    for number in range(1 if task.timed_inside else CUDA_WARM_UP + CUDA_STEPS):
        if (
            number == CUDA_WARM_UP
        ):  # a warm step counts: while kernels are chosen and compiled, more memory may be taken
            torch.cuda.reset_peak_memory_stats()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        found = task.step()
        end.record()
        end.synchronize()
        if number >= CUDA_WARM_UP or task.timed_inside:
            seconds.append(start.elapsed_time(end) / 1000)
        task.clean()
    answer = {"seconds": statistics.median(seconds), **_read(found)}
    if with_memory:
        answer.setdefault("peak_bytes", torch.cuda.max_memory_allocated() - before)
    return answer


def _worker(pipe: Connection, build: Callable[[str, Any], Task], options: Any, threads: int, device: str) -> None:
    """Answers every ``(name, with_memory)`` with one turn, or with why there is none."""
    os.dup2(2, 1)  # trainers print; what the parent prints must stay JSON
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # trainers would spread a batch over all cards
    import torch

    torch.set_num_threads(threads)
    turn = _cuda_turn if device == "cuda" else _cpu_turn
    tasks: dict[str, Task] = {}
    while (order := pipe.recv()) is not None:
        name, with_memory = order
        answer: dict[str, Any]
        try:
            if name not in tasks:
                tasks[name] = build(name, options)
            answer = turn(tasks[name], with_memory)
        except Missing as error:
            answer = {"missing": str(error)}
        except torch.OutOfMemoryError:
            answer = {"failed": OUT_OF_MEMORY}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"failed": f"{type(error).__name__}: {first[:120]}"}
        if device == "cuda":  # outside the handlers, whose traceback holds on to the tensors; the others need the room
            tasks.clear()
            gc.collect()
            with contextlib.suppress(RuntimeError):  # after an error of the device nothing works any more
                torch.cuda.empty_cache()
        pipe.send(answer)


# --------------------------------------------------------------------------------------------------------- the parent


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, build: Callable[[str, Any], Task], names: list[str], *arguments: Any) -> None:
        # A fresh interpreter, not a fork: a fork would start with the parent's memory.
        context = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = context.Pipe()
        self.process = context.Process(target=_worker, args=(self.theirs, build, *arguments), daemon=True)
        self.names = names

    def ask(self, name: str, with_memory: bool, timeout: float | None = None) -> dict[str, Any]:
        """One turn; a worker that died or is too slow answers ``failed``, to this and to all further questions."""
        try:
            if self.process.pid is None:  # not before: processes that wait would hold memory
                self.process.start()
                self.theirs.close()  # so that a worker that dies shows as the end of its pipe
            self.pipe.send((name, with_memory))
            if not self.pipe.poll(timeout):
                self.process.kill()
                return {"failed": "no answer in time"}
            answer: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            return {"failed": "the process died"}
        return answer

    def stop(self) -> None:
        if self.process.pid is not None:
            with contextlib.suppress(OSError):  # it may be gone already
                self.pipe.send(None)
            self.process.join()


class Measured(NamedTuple):
    """``numbers``: per variant the medians of what its turns returned, and ``seconds_per_round``; or why it ``failed``."""

    numbers: dict[str, dict[str, Any]]
    notes: list[str]


class Clock:
    """The time that a benchmark may take; None: as long as it wants."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self.end is None else max(self.end - time.monotonic(), 0.0)

    @property
    def over(self) -> bool:
        return self.left() == 0.0

    def timeout(self) -> float | None:
        left = self.left()
        return None if left is None else left + GRACE_SECONDS


def measure(
    build: Callable[[str, Any], Task],
    variants: Sequence[str],
    options: Any,
    *,
    rounds: int,
    threads: int,
    device: str = "cpu",
    processes: Sequence[Sequence[str]] | None = None,
    limit: float | None = None,
) -> Measured:
    """Run ``rounds`` interleaved rounds; on a CPU after one warm-up turn of each process.

    Args:
        build: a function of a module (it is sent to the workers by name).
        variants: their names; those that raise ``Missing`` are left out with a note.
        options: given to ``build``; anything that can be pickled.
        rounds: timed turns of every variant.
        threads: of every worker.
        device: where the variants run; a worker counts time and memory accordingly.
        processes: variants that share a process; by default each has its own, which is the strictest for memory.
        limit: seconds after which no new turn begins; the rounds until then count.
    """
    clock = Clock(limit)
    workers = [Worker(build, list(group), options, threads, device) for group in processes or [[n] for n in variants]]
    owner = {name: worker for worker in workers for name in worker.names}
    running, notes, numbers = list(variants), [], {}
    turns: dict[str, list[dict[str, Any]]] = {}

    def turn(name: str, with_memory: bool) -> dict[str, Any]:
        """One turn, ``{}`` where there is none; the variant has then left ``running``."""
        answer = owner[name].ask(name, with_memory, clock.timeout())
        if "missing" in answer:
            notes.append(f"{name} is left out: {answer['missing']}")
        elif "failed" in answer:
            numbers[name] = answer
        else:
            return answer
        running.remove(name)
        return {}

    try:
        if device == "cpu":  # one after the other also here: together they would not fit into a small machine
            for worker in workers:
                any(turn(name, False) for name in worker.names)  # until one answers
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}: {len(running)} variants")
            shift = number % max(len(running), 1)  # nobody always follows the same one
            order = running[shift:] + running[:shift]
            for place, name in enumerate(order):
                if clock.over:
                    break
                # Memory in the first round alone: giving memory back before a step could make it slower.
                if answer := turn(name, number == 0):
                    turns.setdefault(name, []).append(answer)
                if number == rounds - 1 and not set(owner[name].names) & set(order[place + 1 :]):
                    owner[name].stop()  # its room is for the others
    finally:
        for worker in workers:
            worker.stop()
    numbers |= {name: _summary(turns[name]) if name in turns else {"failed": "not reached"} for name in running}
    if clock.over:
        notes.append(f"The limit of {limit:g} s was reached: some variants have fewer rounds than {rounds}.")
    if any("peak_bytes" not in found and "failed" not in found for found in numbers.values()):
        notes.append(MEMORY_NOTE)
    return Measured({name: numbers[name] for name in variants if name in numbers}, notes)


def _summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for turn in turns for key in turn)
    medians: dict[str, Any] = {key: statistics.median(t[key] for t in turns if key in t) for key in keys}
    return {**medians, "seconds_per_round": [turn["seconds"] for turn in turns]}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the command line


def make_parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=_positive, default=rounds, help=f"timed rounds; medians are reported (default: {rounds})"
    )
    parser.add_argument("--threads", type=_positive, default=2, help="threads of every worker (default: 2)")
    parser.add_argument(
        "--device", type=_device, default="auto", help="cpu, cuda or auto (default: the GPU where there is one)"
    )
    parser.add_argument("--limit", type=float, help="seconds after which no new turn begins (default: none)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one thread, one round: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _device(text: str) -> str:
    if text == "auto":
        return device_at_hand()
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected auto, cpu or cuda")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number
