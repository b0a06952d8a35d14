"""Tells failures of the machine (disk, memory, a lost process) from bugs, and says them in one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dts_hf.errors import RunError, UserError, is_out_of_memory

#: What a collective says when the process at the other end is gone.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "did the remote server shutdown or crash",  # the store of the first process, before they are joined
    "the client socket has timed out",  # there is none (yet)
    "wait timeout after",  # there is one, and somebody has not come there
    "timed out waiting",
    "ncclremoteerror",
    "remote process exited",
    "watchdog caught collective operation timeout",
)
#: What it says when nothing has come from there for ``training.ddp_timeout``.
_NO_ANSWER = re.compile(
    r"(?:timed out waiting|wait timeout after|the client socket has timed out(?: after)?)(?: (\d+)ms)?"
    r"|watchdog caught collective operation timeout",
    re.IGNORECASE,
)
#: The C++ writer behind ``torch.save`` keeps the reason to itself.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
#: What the operating system says of disks; any other OSError (no such file, a closed socket) may be a bug.
_DISK = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EROFS", "EIO", "EFBIG", "ESTALE",
        "EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG",
    )
    if hasattr(errno, name)
}  # fmt: skip
#: The disk is all right, and takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, None)  # None: most likely
FEW_INODES = 1000  # fewer than these are left: it may be they that have run out
GO_ON = "Then go on with the same command and --resume, from the newest complete checkpoint if there is one"


def one_sentence(error: BaseException) -> str | None:
    """What to tell a person where the machine is at fault and not the program; None for anything else.

    Libraries wrap the error of the operating system, or raise another one while they clean up after it: all that
    ``error`` was raised from or during is looked at, too (what ``from None`` has cut off is not).
    """
    chain = list(_chain(error))
    if is_lost_peer(error):
        return lost_peer_sentence(error)
    failure = _disk_failure(error)
    if failure is not None:
        where = f"{failure.name}: " if failure.name else ""
        if failure.number not in _FULL:
            return f"{where}{failure.reason}"
        # Who does not say what was written most likely wrote here, or a temporary file
        places = [failure.name] if failure.name else [".", os.environ.get("TMPDIR", "/tmp")]
        room = " and ".join(_space(Path(place), failure.number) for place in places)
        return f"{where}{failure.reason} ({room}); free some space"
    for link in chain:
        if is_out_of_memory(link):
            return (
                f"out of memory: {_first_line(link)}. Lower training.per_device_train_batch_size (and raise "
                "gradient_accumulation_steps by the same factor: the numbers stay) or data.packing.tokens, or set "
                "training.activation_checkpointing: true"
            )
    return None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within it, an error of the disk becomes a ``RunError`` that names ``path``, the reason and the space left.

    Raises:
        RunError: nothing can be written there (full, read-only, over quota, something in the way, failing hardware).
    """
    try:
        yield
    except Exception as error:
        failure = None if isinstance(error, (RunError, UserError)) else _disk_failure(error)
        if failure is None or is_lost_peer(error):
            raise
        name = failure.name or path
        room, advice = _space(Path(name), failure.number), "Free some space. " if failure.number in _FULL else ""
        raise RunError(f"cannot write {name}: {failure.reason} ({room}). {advice}{GO_ON}") from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because a process at its other end is gone."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or isinstance(error, RunError):
        return False
    return any(
        isinstance(link, RuntimeError) and any(words in str(link).lower() for words in _LOST_PEER)
        for link in _chain(error)
    )


def has_no_answer(error: BaseException) -> bool:
    """Whether that process may still be there: it has not answered for ``training.ddp_timeout``."""
    return any(_NO_ANSWER.search(str(link)) for link in _chain(error))


def lost_peer_sentence(error: BaseException, ranks: Sequence[int] = (), step: int | None = None) -> str:
    """What to say of an ``error`` that ``is_lost_peer``.

    Args:
        error: of a collective.
        ranks: the processes that do not answer, where that is known.
        step: the last optimizer step that was finished.
    """
    who = " and ".join(f"process {rank}" for rank in ranks) or "another process of this run"
    have, after = "have" if len(ranks) > 1 else "has", "" if step is None else f" after step {step}"
    waited = next(filter(None, (_NO_ANSWER.search(str(link)) for link in _chain(error))), None)
    if waited is None:
        what = f"{have} ended{after}"
    else:
        limit = f" for {int(waited[1]) / 1000:g} s" if waited[1] else " in time"
        what = f"{have} not answered{limit} (training.ddp_timeout){after}"
    return f"{who} {what}, so this one cannot go on ({_first_line(error)})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ if error.__suppress_context__ else error.__context__


class _DiskFailure(NamedTuple):
    """Why writing failed: in words, by number (None: the library has lost it), and which file, where it is known."""

    reason: str
    number: int | None
    name: str | None


def _disk_failure(error: BaseException) -> _DiskFailure | None:
    """What a disk has to do with ``error``; None: nothing."""
    found = [(link, reason) for link in _chain(error) if (reason := _disk_reason(link)) is not None]
    if not found:
        return None
    names = [name for link, _ in found if isinstance(name := getattr(link, "filename", None), (str, os.PathLike))]
    reasons = [reason for _, reason in found]
    words, number = next((reason for reason in reasons if reason[1] is not None), reasons[0])
    return _DiskFailure(words, number, os.fspath(names[0]) if names else None)


def _disk_reason(error: BaseException) -> tuple[str, int | None] | None:
    """Why writing failed. Rust libraries put the errno into the text; torch's zip writer loses it."""
    if isinstance(error, OSError) and error.errno is not None and error.errno in _DISK:
        return error.strerror or os.strerror(error.errno), error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and int(number[1]) in _DISK:
        return os.strerror(int(number[1])), int(number[1])
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITER):
        return "torch could not write all of a file, as on a full disk", None
    return None


def _space(path: Path, number: int | None = None) -> str:
    """How much is free where ``path`` would be: a file system may also have no inodes left, or be full for one user."""
    folder = next((parent for parent in (path, *path.absolute().parents) if parent.is_dir()), None)
    if folder is None:
        return "its folder is gone"
    try:
        left = os.statvfs(folder)
    except OSError as error:
        return f"{folder} does not tell its space: {error.strerror}"
    free = left.f_bavail * left.f_frsize
    text = f"{free / 1e9:.2f} GB" if free >= 1e9 else f"{free / 1e6:.1f} MB" if free >= 1e6 else f"{free / 1e3:.0f} kB"
    text = f"{text} free in {folder.absolute()}"
    if left.f_files and left.f_favail < FEW_INODES:
        text += f", and {left.f_favail:,} of {left.f_files:,} inodes: each file and folder takes one"
    return f"{text}, of which a quota holds back the rest" if number == errno.EDQUOT else text


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
