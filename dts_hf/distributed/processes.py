"""Several processes: which one this is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dts_hf.errors import RunError, UserError

Result = TypeVar("Result")


def process() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def on_first_process(work: Callable[[], Result], rank: int, world: int) -> Result:
    """Do ``work`` on the first process alone. Its result is that of all, and if it fails, all fail: none waits for ever.

    Raises:
        UserError: on every process the ``UserError`` of the first one.
        RunError: on the others, with its words, where the first one has any other exception.
    """
    if world == 1:
        return work()
    held: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            held[0] = work()
        except Exception as error:  # whatever it is, the others are waiting
            failure = error
            held[1] = (isinstance(error, UserError), str(error), type(error).__name__)
    torch.distributed.broadcast_object_list(held)
    if failure is not None:
        if isinstance(failure, (UserError, RunError)):
            failure.everywhere = True
        raise failure
    if held[1] is not None:
        is_input, words, kind = held[1]
        raise (
            UserError(words, everywhere=True)
            if is_input
            else RunError(words if kind == "RunError" else f"{kind}: {words}", everywhere=True)
        )
    return held[0]  # type: ignore[no-any-return]


def gathered(made: Result, world: int) -> list[Result]:
    """What every process has made, in the order of the processes."""
    found: list[Any] = [made] * world
    if world > 1:
        torch.distributed.all_gather_object(found, made)
    return found


def on_any_process(mine: bool, device: torch.device | str) -> bool:
    """Whether ``mine`` is true on any process; all ask at the same time."""
    found = torch.tensor(int(mine), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)
