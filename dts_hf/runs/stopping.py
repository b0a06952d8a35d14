"""What SIGTERM, SIGUSR1 and Ctrl-C ask of this process, from the first line of ``dts-hf`` to the end of Python.

It loads next to nothing: a signal may come while anything else is being loaded, and has to find a handler. What a signal
does depends on the ``Stage`` at which it comes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from enum import Enum, auto
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dts_hf.errors import Interrupted

#: SLURM's ``--signal=USR1@300``, Kubernetes, torchrun and most others (SIGTERM), and Ctrl-C (SIGINT).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
#: srun and torchrun both hand the same signal to a process: what follows so soon is not a second request, seconds.
SAME_REQUEST_SECONDS = 3.0
#: Those of ``errors.ExitCode``, which may be half loaded when a signal comes.
INTERRUPTED, CTRL_C = 75, 130
GO_ON = "Go on with the same command and --resume"


class Stage(Enum):
    """Where this process is, which says what the first signal does; the second one always ends it at once."""

    BEGINS = auto()  # a command of ours loads its modules: the process ends
    COMMAND = auto()  # a command of ours works: Interrupted is raised; for Ctrl-C KeyboardInterrupt
    RUN = auto()  # a run, before and after training: Interrupted is raised
    STEP = auto()  # training: the loop asks for it when the step has ended
    ENDS = auto()  # all is done and Python ends: nothing, for the exit status is known


class Request:
    """What was asked of this process; there is one, as there is one handler for each signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.asked_at = 0.0  # seconds of the monotonic clock
        self.stage = Stage.ENDS
        self.process = 0  # whose handlers these are; a fork inherits them
        self.ours = False  # the process is a command of ours and nothing else: it may be ended at any place
        self.status: int | None = None  # with which it ends, once that is known

    @property
    def in_run(self) -> bool:
        """Whether a run has the handlers: ``stops_on_signal`` is at work."""
        return self.stage in (Stage.RUN, Stage.STEP)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of ``SIGNALS``.

        Raises:
            Interrupted: the first signal, where the work can be left at once.
            KeyboardInterrupt: Ctrl-C in a command that trains nothing.
        """
        if os.getpid() != self.process:  # asked to end before _forked was called
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.signal is not None:
            if time.monotonic() - self.asked_at > (0.0 if _by_hand(number) else SAME_REQUEST_SECONDS):
                again = f"{name} for the second time: stopped at once."
                if self.in_run:
                    again += f" {GO_ON}: from the last checkpoint, if there is one"
                self.end_now(number, "" if self.stage is Stage.ENDS else again)
            return
        self.signal, self.asked_at = name, time.monotonic()
        if self.stage is Stage.STEP:
            say_first(f"{name}: this optimizer step and a checkpoint, then the run stops (once more: it ends unsaved)")
        elif self.stage is not Stage.ENDS:
            # An import may swallow any exception, or make another one of it.
            if self.ours and (self.stage is Stage.BEGINS or _in_import(frame)):
                self.end_now(number, f"Stopped: {self.outside_of_training()}")
            if self.stage is Stage.COMMAND and number == signal.SIGINT:
                raise KeyboardInterrupt
            raise self.interrupted(self.outside_of_training())

    def outside_of_training(self) -> str:
        """What to say where nothing is saved."""
        trains = self.in_run or sys.argv[1:2] == ["train"]
        return f"{self.signal} outside of training. {GO_ON}" if trains else f"{self.signal}."

    def interrupted(self, message: str, *, everywhere: bool = False) -> Interrupted:
        """The exception of a run that was asked to stop, with the exit status of what asked."""
        from dts_hf.errors import Interrupted

        error = Interrupted(message, everywhere=everywhere)
        if self.signal == "Ctrl-C":
            error.code = CTRL_C
        return error

    def end_now(self, number: int, text: str) -> NoReturn:
        """End the process without a farewell; no more is lost than by a kill, from which every run goes on."""
        if text:
            say_first(text)
        end_at_once(self.status if self.status is not None else CTRL_C if number == signal.SIGINT else INTERRUPTED)


request = Request()


def _forked() -> None:
    """In a process that a library has just forked (a pool of datasets, say): it ends on a signal as if none was caught.

    A handler would not do: it waits for Python, so a worker in a long call into a library outlives ``Pool.terminate``,
    and one that is about to sleep sleeps on.
    """
    for number in SIGNALS:
        if signal.getsignal(number) == request.handle:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def free_signals() -> list[signal.Signals]:
    """Those of ``SIGNALS`` that are ours to take.

    One that is ignored from outside (``nohup``, ``trap "" INT``, a job that a script has put into the background) stays
    so. One with a handler in C (``faulthandler.register``, a profiler) keeps it: Python cannot give it back afterwards.
    """
    caught = _caught()
    free = []
    for number in SIGNALS:
        handler = signal.getsignal(number)
        # None: of before Python began. Default, and caught all the same: set without Python's knowledge
        foreign = handler is None or (handler is signal.SIG_DFL and bool(caught >> (number - 1) & 1))
        if not foreign and handler is not signal.SIG_IGN:
            free.append(number)
    return free


def _caught() -> int:
    """A bit for each signal that the process has a handler for, as Linux says; elsewhere 0."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", "rb") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith(b"SigCgt:")), 0)
    return 0


def catch_signals() -> None:
    """Take the signals of this process, which is a command of ours, until it is gone. The first thing that it does."""
    request.process, request.ours, request.stage = os.getpid(), True, Stage.BEGINS
    request.signal = request.status = None
    for number in free_signals():
        signal.signal(number, request.handle)
    sys.unraisablehook = _unraisable
    # Registered first, so done last. Behind it Python takes its handlers down and unloads its libraries, which takes a
    # while: a signal would give a run that is finished the exit status of one that was killed.
    atexit.register(_ignore_signals)


def ends(status: int) -> None:
    """From here on the exit ``status`` of this command is known, and a signal does not change it."""
    if request.ours:
        request.stage, request.status = Stage.ENDS, status


def leave_group(status: int) -> None:
    """End a process of several as Python does, but for taking its libraries down; does nothing in one that is alone.

    A thread of gloo may outlive its group, and the destructor of it ends the process with an abort (seen three times). The
    launcher then kills the others, and the first one may still be writing the student.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ends(status)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that have work of their own
    atexit._run_exitfuncs()
    end_at_once(status)


def end_at_once(status: int) -> NoReturn:
    """End the process with what it has printed, and without any farewell."""
    with contextlib.suppress(
        Exception
    ):  # nobody reads it any more, or a signal has come in the middle of another flush
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def stage(value: Stage) -> Iterator[None]:
    """Within it the process is at the stage ``value``."""
    before, request.stage = request.stage, value
    try:
        yield
    finally:
        request.stage = before


def say_first(text: str) -> None:
    """Print ``text`` on stderr; of several processes the first one does. A handler may call it."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text, file=sys.stderr, flush=True)
        except RuntimeError:  # the signal has come in the middle of another print
            os.write(2, f"{text}\n".encode())


def _by_hand(number: int) -> bool:
    """Whether a signal comes from a person alone: a launcher gets Ctrl-C as well, and hands it on."""
    return number == signal.SIGINT and "LOCAL_RANK" not in os.environ


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """The exception of a signal that came while Python called ``__del__`` or the like, which would only print it."""
    if request.signal is not None and issubclass(lost.exc_type, (KeyboardInterrupt, SystemExit)):
        by_hand = request.signal == "Ctrl-C"
        request.end_now(signal.SIGINT if by_hand else signal.SIGTERM, f"Stopped: {request.outside_of_training()}")
    sys.__unraisablehook__(lost)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
