"""Leaving when somebody asks: SIGTERM, SIGUSR1 and the first Ctrl-C end a run with a checkpoint.

The exit status is 75, after Ctrl-C 130.

transformers has ``enable_jit_checkpoint`` for this. It is not used, because it lets each process act on its own signal
(one of several that is signalled saves alone, and hangs), saves in the middle of gradient accumulation, returns from
``train`` as if training were done (scores and ``final/`` of a half-trained student would follow), and leaves the exit
status 0.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from dts_hf.errors import ExitCode, Interrupted
from dts_hf.runs.failures import is_lost_peer

Work = TypeVar("Work", bound=Callable[..., Any])
#: SLURM's ``--signal=USR1@300``, Kubernetes, torchrun and most others (SIGTERM), and Ctrl-C (SIGINT).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
#: srun and torchrun both hand the same signal to a process: what follows so soon is not a second request, seconds.
SAME_REQUEST_SECONDS = 3.0


class _Request:
    """What was asked of this process; there is one, as there is one handler for each signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.asked_at = 0.0  # seconds of the monotonic clock
        self.caught = False  # the handlers are in place
        self.waits = False  # training ends its step first

    def handle(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.signal is None:
            self.signal, self.asked_at = name, time.monotonic()
            if not self.waits:
                raise _interrupted(f"{name} outside of training. {_GO_ON}")
            _print(f"{name}: this optimizer step and a checkpoint, then the run stops (once more: it ends unsaved)")
        elif time.monotonic() - self.asked_at > (0.0 if _by_hand(number) else SAME_REQUEST_SECONDS):
            _print(f"{name} for the second time: stopped at once. {_GO_ON}: from the last checkpoint, if there is one")
            os._exit(ExitCode.CTRL_C if number == signal.SIGINT else ExitCode.INTERRUPTED)


def _by_hand(number: int) -> bool:
    """Whether a signal comes from a person alone: a launcher gets Ctrl-C as well, and hands it on."""
    return number == signal.SIGINT and "LOCAL_RANK" not in os.environ


def _interrupted(message: str, *, everywhere: bool = False) -> Interrupted:
    """The exception of a run that was asked to stop, with the exit status of what asked."""
    error = Interrupted(message, everywhere=everywhere)
    if _request.signal == "Ctrl-C":
        error.code = int(ExitCode.CTRL_C)
    return error


_request = _Request()
# One byte that forked data-loader workers share with this process: 1 when ``work`` has ended and they obey it again.
# They outlive a signal to their group, but the end of Python sends each SIGTERM and waits for it, for ever if need be; a
# handler is not told who sent the signal.
_leaving = mmap.mmap(-1, 1)
_GO_ON = "Go on with the same command and --resume"


def asked_to_stop() -> str | None:
    """The name of the signal that this process has got; None without one."""
    return _request.signal


def stops_on_signal(work: Work) -> Work:
    """Let SIGTERM, SIGUSR1 and Ctrl-C raise ``Interrupted`` while ``work`` runs.

    During ``at_step_end`` it is raised as soon as the training loop asks, otherwise at once. A second signal ends the
    process. Both act as soon as Python runs again: a call into a library (a collective, a kernel, a long write) comes to
    its end first.

    Signals belong to the main thread; anywhere else ``work`` runs as if nothing was.
    """

    @functools.wraps(work)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if _request.caught or threading.current_thread() is not threading.main_thread():
            return work(*args, **kwargs)
        before = {number: signal.signal(number, _request.handle) for number in SIGNALS}
        _request.caught, _request.signal, _leaving[0] = True, None, 0
        try:
            return work(*args, **kwargs)
        except Exception as error:
            # A launcher signals all; one that left first makes the collectives of the others fail.
            if _request.signal is None or not is_lost_peer(error):
                raise
            raise _interrupted(f"{_request.signal}, and another process has left. {_GO_ON}") from error
        finally:
            _leaving[0] = 1
            for number, handler in before.items():
                signal.signal(number, handler)
            _request.caught, _request.signal = False, None

    return watched  # type: ignore[return-value]


@contextmanager
def at_step_end() -> Iterator[None]:
    """Within it a signal is only noted (``asked_to_stop``); one that nobody has acted on is raised at the end.

    Raises:
        Interrupted: at the end.
    """
    _request.waits = _request.caught
    try:
        yield
    finally:
        _request.waits = False
    if _request.caught and _request.signal is not None:
        raise _interrupted(f"{_request.signal} at the end of training. {_GO_ON}")


@contextmanager
def at_once() -> Iterator[None]:
    """Within it, inside ``at_step_end``, a signal is raised at once again: for work that no checkpoint could keep.

    Raises:
        Interrupted: one had come before.
    """
    waits, _request.waits = _request.waits, False
    try:
        if _request.caught and _request.signal is not None:
            raise _interrupted(f"{_request.signal} before the first step. {_GO_ON}")
        yield
    finally:
        _request.waits = waits


def stopped_at(step: int, checkpoint: object | None) -> Interrupted:
    """The exception to raise once the checkpoint of ``step`` is complete; None: this step could not be saved."""
    name = _request.signal or "another process was asked to stop"
    saved = f"{checkpoint} is complete" if checkpoint is not None else "the newest checkpoint is from before"
    return _interrupted(f"{name}: stopped after step {step}, {saved}. {_GO_ON}", everywhere=True)


def ignore_signals_in_worker(initialise: Callable[[int], None] | None, worker: int) -> None:
    """``worker_init_fn`` of a data loader with forked workers: they do not end before the process that they work for.

    torchrun and SLURM signal whole process groups. A worker that died of SIGTERM would end training with an error
    before its step is done.
    """
    if _request.caught:
        for number in SIGNALS:
            signal.signal(number, _end_with_parent)
    if initialise is not None:
        initialise(worker)


def _end_with_parent(*_: Any) -> None:
    if _leaving[0]:
        os._exit(0)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
