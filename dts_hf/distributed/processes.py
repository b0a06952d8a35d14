"""Several processes: which one this is, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from dts_hf.errors import RunError, UserError

Result = TypeVar("Result")
#: How long a process whose collective has failed waits for the others to say the same, seconds.
SECONDS_TO_ANSWER = 5.0


def join_processes() -> torch.device:
    """Join the processes of a launcher (``torchrun``, ``accelerate launch``), if there are any, and take a device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        return torch.device(PartialState(cpu=not torch.cuda.is_available()).device)  # type: ignore[arg-type]
    return default_device()


def default_device() -> torch.device:
    """Of a process that is alone: the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def process() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def on_first_process(work: Callable[[], Result], rank: int, world: int) -> Result:
    """Do ``work`` on the first process alone. Its result is that of all, and if it fails, all fail: none waits for ever.

    The place for what may fail on input: a process that raised a ``UserError`` alone would leave the others in their next
    collective, until the launcher ends them.

    Args:
        work: what it returns can be pickled.
        rank: of this process, as ``process`` tells.
        world: the number of processes.

    Raises:
        UserError: on every process the ``UserError`` of the first one.
        RunError: on the others, with its words, where the first one has any other exception.
    """
    if world == 1:
        return work()
    outcome: list[Any] = [None, None]  # the result, and what is told of a failure: exceptions may not be picklable
    failure: Exception | None = None
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # whatever it is, the others are waiting
            failure = error
            outcome[1] = (isinstance(error, UserError), str(error), type(error).__name__)
    torch.distributed.broadcast_object_list(outcome)
    if failure is not None:
        if isinstance(failure, (UserError, RunError)):
            failure.everywhere = True
        raise failure
    if outcome[1] is not None:
        is_input, message, kind = outcome[1]
        if is_input:
            raise UserError(message, everywhere=True)
        raise RunError(message if kind == "RunError" else f"{kind}: {message}", everywhere=True)
    return outcome[0]  # type: ignore[no-any-return]


def gathered(value: Result, world: int) -> list[Result]:
    """The ``value`` of every process, in the order of the processes; all call it."""
    values: list[Any] = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def on_any_process(flag: bool, device: torch.device | str) -> bool:
    """Whether ``flag`` is true on any process; all ask at the same time."""
    highest = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return bool(highest)


def silent_processes(look: bool) -> list[int]:
    """The ranks that do not answer, after a collective has failed; empty: nobody can tell. Who finds out so calls it.

    Each that is alive writes a word into the store in which the processes once met: the failure of one closes its
    connections, so the others fail a moment later. The store itself may be with the process that hangs: no launcher has it.

    Args:
        look: wait for the words of the others; False: only leave one.
    """
    rank, world = process()
    if world == 2:
        return [1 - rank]
    silent = []
    with contextlib.suppress(RuntimeError):  # the store is gone
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"dts_hf/alive/{rank}", "yes")
        until = time.monotonic() + SECONDS_TO_ANSWER
        for other in range(world if look else 0):
            try:
                store.wait([f"dts_hf/alive/{other}"], timedelta(seconds=max(until - time.monotonic(), 0.1)))
            except RuntimeError:
                silent.append(other)
    return silent if len(silent) < world - 1 else []
