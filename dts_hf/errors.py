"""Exceptions whose message is all that a person needs, what tells them apart, and the nearest right word for them."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from enum import IntEnum

from dts_hf.console import printable


class ExitCode(IntEnum):
    """Exit statuses of every ``dts-hf`` command; docs/faults.md says what to do about each."""

    DONE = 0
    #: The run failed: disk full, memory, a loss that is non-finite, a lost process, or a bug (with its traceback).
    FAILED = 1
    #: The recipe, the rows or the command line are wrong; nothing was trained.
    WRONG_INPUT = 2
    #: The run is complete and its student was not uploaded: ``dts-hf push`` does it. ``EX_UNAVAILABLE`` of sysexits.h.
    NOT_UPLOADED = 69
    #: SIGTERM or SIGUSR1 (pre-emption): nothing is wrong, ``--resume`` goes on. ``EX_TEMPFAIL`` of sysexits.h.
    INTERRUPTED = 75
    #: Ctrl-C (128 + SIGINT): saved like INTERRUPTED, unless it came twice.
    CTRL_C = 130


class UserError(ValueError):
    """Wrong input. The message names the key, row or file, the value, what was expected and what to do next.

    The command line prints the message alone, without a traceback, and exits with status 2. Words of the user's files
    may be in it, so tokens are masked and control characters written out.

    Args:
        message: see above.
        everywhere: all processes raise it, so that the first one alone has to print it; None: not known (yet).
    """

    def __init__(self, message: object = "", *, everywhere: bool | None = None) -> None:
        super().__init__(printable(str(message)))
        self.everywhere = everywhere


class RunError(RuntimeError):
    """A run that failed although its input was right: the disk is full, the loss is non-finite, a process died.

    The command line prints the message alone, without a traceback, and exits with status 1.

    Args:
        message: what happened and what to do.
        everywhere: all processes raise it, so that the first one alone has to print it.
    """

    def __init__(self, message: object = "", *, everywhere: bool = False) -> None:
        super().__init__(printable(str(message)))
        self.everywhere = everywhere


class UploadError(RunError):
    """Nothing is wrong with the student; it could not be uploaded. The command line exits with status 69.

    Args:
        message: what the Hub said, and the command that uploads.
        result: what was finished before, such as the run directory, for whoever catches it.
    """

    def __init__(self, message: object = "", result: object = None) -> None:
        super().__init__(message)
        self.result = result


class Interrupted(SystemExit):
    """The run was asked to stop and can go on later. Not caught, it ends Python with the exit status 75 (Ctrl-C: 130).

    Args:
        message: what was asked for, what was saved, and how to go on.
        everywhere: all processes raise it, at the same step.
    """

    def __init__(self, message: object = "", *, everywhere: bool = False) -> None:
        super().__init__(int(ExitCode.INTERRUPTED))
        self.message, self.everywhere = str(message), everywhere

    def __str__(self) -> str:
        return self.message


_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host. By name and text: this module does not load torch."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # A CPU's allocator raises a plain RuntimeError
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or bool(_NO_MEMORY.search(str(error)))


#: What the operating system says of itself and not of a file: the same call may succeed in a while, or elsewhere.
_PASSING = {
    getattr(errno, name)
    for name in (
        "ENOMEM", "EIO", "ESTALE", "EAGAIN", "EINTR", "EBUSY", "ENFILE", "EMFILE", "ENOLCK", "ENOSPC", "EDQUOT", "ETIMEDOUT",
        "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN",
        "EHOSTUNREACH", "EREMOTEIO", "ENOBUFS",
    )
    if hasattr(errno, name)
}  # fmt: skip
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


def not_readable(error: BaseException, message: str) -> UserError | RunError:
    """What to raise where a file of the user's cannot be read: wrong input, or a failure of the machine or the network.

    A requeued job tries again what ended with status 1, and never what is wrong input.

    Args:
        error: what a loader raised.
        message: names key or file, and the reason.
    """
    if not is_passing(error):
        return UserError(message)
    return RunError(
        f"{message}. Nothing is known to be wrong with it: the machine or the network failed, so try again"
    )


def is_passing(error: BaseException) -> bool:
    """Whether ``error`` is the machine's or the network's, and no word about the file that was read.

    A library may raise an error of its own over that of the operating system, or keep its number in the text alone.
    """
    links = list(chain(error))
    if any("OfflineModeIsEnabled" in (type(link).__name__, *re.findall(r"\w+", str(link)[-500:])) for link in links):
        return False  # a connection error by its class, and somebody's decision
    return any(map(_is_passing, links))


def _is_passing(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and isinstance(number, int):
        return number in _PASSING
    named = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error)[:2000])
    if named and int(named[1] or named[2]) in _PASSING:
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    return is_out_of_memory(error) or is_connection(error) or status in _PASSING_STATUS


def too_long_name(error: BaseException) -> str | None:
    """The name that no file can have, of which ``error`` tells; None: it tells of something else.

    Names that dts_hf makes are short: a long one is the user's.
    """
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return str(error.filename or "the name of a file")
    return None


def is_connection(error: BaseException) -> bool:
    """Whether the network failed. By name: the client's library is chosen by ``huggingface_hub``."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"}) and "UnsupportedProtocol" not in kinds


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was raised from or during, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice closest to ``word``, or an empty string when none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(word)[:100].lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean '{by_lower[found[0]]}'?" if found else ""
