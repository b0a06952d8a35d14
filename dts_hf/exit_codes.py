"""What the process tells the shell, the launcher or the cluster when it ends."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit statuses of every ``dts-hf`` command; docs/faults.md says what to do about each."""

    DONE = 0
    #: The run failed: disk full, memory, a loss that is no number, a lost process, or a bug (with its traceback).
    FAILED = 1
    #: The recipe, the rows or the command line are wrong; nothing was trained.
    WRONG_INPUT = 2
    #: SIGTERM or SIGUSR1 (pre-emption): nothing is wrong, ``--resume`` goes on. ``EX_TEMPFAIL`` of sysexits.h.
    INTERRUPTED = 75
    #: Ctrl-C (128 + SIGINT).
    CTRL_C = 130
