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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dts_hf.errors import Interrupted
from dts_hf.runs.failures import is_lost_peer
from dts_hf.runs.stopping import GO_ON, SIGNALS, Stage, free_signals, request, stage

Work = TypeVar("Work", bound=Callable[..., Any])
# One byte that forked data-loader workers share with this process: 1 when ``work`` has ended and they obey it again.
# They outlive a signal to their group, but the end of Python sends each SIGTERM and waits for it, for ever if need be; a
# handler is not told who sent the signal.
_leaving = mmap.mmap(-1, 1)


def asked_to_stop() -> str | None:
    """The name of the signal that this process has got; None without one."""
    return request.signal


def stops_on_signal(work: Work) -> Work:
    """Let SIGTERM, SIGUSR1 and Ctrl-C raise ``Interrupted`` while ``work`` runs.

    During ``at_step_end`` it is raised as soon as the training loop asks, otherwise at once. A second signal ends the
    process. Both act as soon as Python runs again: a call into a library (a collective, a kernel, a long write) comes to
    its end first.

    Signals belong to the main thread; anywhere else ``work`` runs as if nothing was.
    """

    @functools.wraps(work)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if request.in_run or threading.current_thread() is not threading.main_thread():
            return work(*args, **kwargs)
        with _handlers(), stage(Stage.RUN):
            _leaving[0] = 0
            try:
                return work(*args, **kwargs)
            except Exception as error:
                # A launcher signals all; one that left first makes the collectives of the others fail.
                if request.signal is None or not is_lost_peer(error):
                    raise
                raise request.interrupted(f"{request.signal}, and another process has left. {GO_ON}") from error
            finally:
                _leaving[0] = 1

    return watched  # type: ignore[return-value]


@contextmanager
def _handlers() -> Iterator[None]:
    """Those of ``request`` while a run of somebody else's program goes on; a command of ours has them anyway."""
    if request.ours:
        yield
        return
    request.process, request.signal = os.getpid(), None
    before = {number: signal.signal(number, request.handle) for number in free_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request.process, request.signal = 0, None


@contextmanager
def at_step_end() -> Iterator[None]:
    """Within it a signal is only noted (``asked_to_stop``); one that nobody has acted on is raised at the end.

    Raises:
        Interrupted: at the end.
    """
    if request.stage is not Stage.RUN:  # nobody has asked for handlers
        yield
        return
    with stage(Stage.STEP):
        yield
    if request.signal is not None:
        raise request.interrupted(f"{request.signal} at the end of training. {GO_ON}")


@contextmanager
def at_once() -> Iterator[None]:
    """Within it, inside ``at_step_end``, a signal is raised at once again: for work that no checkpoint could keep.

    Raises:
        Interrupted: one had come before.
    """
    if request.stage is not Stage.STEP:
        yield
        return
    with stage(Stage.RUN):
        if request.signal is not None:
            raise request.interrupted(f"{request.signal} before the first step. {GO_ON}")
        yield


def stopped_at(step: int, checkpoint: object | None) -> Interrupted:
    """The exception to raise once the checkpoint of ``step`` is complete; None: this step could not be saved."""
    name = request.signal or "another process was asked to stop"
    saved = f"{checkpoint} is complete" if checkpoint is not None else "the newest checkpoint is from before"
    return request.interrupted(f"{name}: stopped after step {step}, {saved}. {GO_ON}", everywhere=True)


def ignore_signals_in_worker(initialise: Callable[[int], None] | None, worker: int) -> None:
    """``worker_init_fn`` of a data loader with forked workers: they do not end before the process that they work for.

    torchrun and SLURM signal whole process groups. A worker that died of SIGTERM would end training with an error
    before its step is done.
    """
    if request.in_run:
        for number in SIGNALS:  # all of them: torch has just given the worker a handler in C for SIGTERM
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end_with_parent)
    if initialise is not None:
        initialise(worker)


def _end_with_parent(*_: Any) -> None:
    if _leaving[0]:
        os._exit(0)
