"""Final states that one process computes and the others beside it take: students of the same batches at about one time.

What is shared is found by the bytes of the batch, so a student that sees another batch, is late, or comes back after a kill
computes what it does not find, and no result depends on who was first. Nothing waits without an end: a claim is a lock of
the system's, which a killed process gives back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dts_hf.files import try_lock

#: Where a process finds the others: ``COUNT:FOLDER``. It changes how long a run takes, not what it is.
VARIABLE = "DTS_HF_SHARED_TEACHER"
#: States that are kept for those who come later, bytes; the oldest are dropped beyond it.
MOST_BYTES = 1 << 30
#: How long the first batch waits for students that are still loading, seconds.
FIRST_PATIENCE = 120.0
#: How long an answer that another process computes is waited for before it is computed here, seconds.
PATIENCE = 60.0
_PAUSE = 0.002
_COMPUTED, _TAKEN, _STUDENT, _STATES = "computed", "taken", "student-", ".safetensors"


class SharedAnswers:
    """States by batch, in a folder that students of one teacher have in common.

    Args:
        folder: of this group of students, which have the same teacher in the same type; made where it is missing.
        students: how many are expected; the first batch waits for them, for a while.
        most_bytes: of kept states.
        first_patience: for the others to come, seconds.
        patience: for an answer that another computes, seconds.
    """

    def __init__(
        self, folder: Path, students: int, *, most_bytes: int = MOST_BYTES, first_patience: float = FIRST_PATIENCE,
        patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.folder, self.students, self.most_bytes, self.patience = folder, students, most_bytes, patience
        self._until = time.monotonic() + first_patience
        self._waited = False
        folder.mkdir(parents=True, exist_ok=True)
        self._name = secrets.token_hex(8)
        self._here = (folder / f"{_STUDENT}{self._name}").open("wb")
        try_lock(self._here.fileno())  # for as long as this process lives

    def close(self) -> None:
        """Be no longer waited for."""
        self._here.close()

    def get(self, batch: Mapping[str, Any], labels: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """States of a batch: another's where they are kept, else those of ``compute``, kept for the others.

        Args:
            batch: what the teacher sees.
            labels: ``[B, T]`` unshifted.
            compute: the forward; its result is on the device of ``labels``.
        """
        if (key := batch_key(batch, labels)) is None:
            return compute()
        self._wait_for_others()
        path, end = self.folder / f"{key}{_STATES}", time.monotonic() + self.patience
        while True:
            if (found := self._take(path)) is not None:
                return found.to(labels.device)
            with _claimed(self.folder / f"claim-{key[:2]}") as mine:
                if mine and not path.exists():
                    states = compute()
                    self._count(_COMPUTED)
                    self._keep(path, states)
                    return states
            if time.monotonic() > end:
                self._count(_COMPUTED)
                return compute()
            time.sleep(_PAUSE)

    def _wait_for_others(self) -> None:
        # Those that have come and gone count as well: a student that is tried again waits for nobody
        while not self._waited and len(list(self.folder.glob(f"{_STUDENT}*"))) < self.students:
            if time.monotonic() > self._until:
                break
            time.sleep(10 * _PAUSE)
        self._waited = True

    def _others(self) -> set[str]:
        """Names of the other students that live."""
        found = set()
        for path in self.folder.glob(f"{_STUDENT}*"):
            name = path.name.removeprefix(_STUDENT)
            if name != self._name and _is_held(path):
                found.add(name)
        return found

    def _take(self, path: Path) -> Tensor | None:
        try:
            states = load_file(path)["states"]
        except FileNotFoundError:
            return None
        except (OSError, KeyError, SafetensorError):  # not as it was written: computed again
            path.unlink(missing_ok=True)
            return None
        self._count(_TAKEN)
        with contextlib.suppress(OSError):
            self._mark(path)
            had = {mark.suffix[1:] for mark in self.folder.glob(f"{path.stem}.had.*")}
            if self._others() <= had:
                _drop(path)
        return states

    def _keep(self, path: Path, states: Tensor) -> None:
        if not self._others():
            return
        # A disk that is full costs the others a forward, not the run its end
        with contextlib.suppress(OSError, SafetensorError):
            self._make_room(states.numel() * states.element_size())
            temporary = self.folder / f"{path.stem}.{self._name}.part"
            try:
                save_file({"states": states.detach().cpu().contiguous()}, temporary)
                self._mark(path)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        kept = []
        for path in self.folder.glob(f"*{_STATES}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total <= self.most_bytes:
                break
            _drop(path)
            total -= bytes_

    def _mark(self, path: Path) -> None:
        (self.folder / f"{path.stem}.had.{self._name}").touch()

    def _count(self, what: str) -> None:
        with contextlib.suppress(OSError), (self.folder / what).open("ab", buffering=0) as file:
            file.write(b".")


def shared_answers() -> SharedAnswers | None:
    """What ``VARIABLE`` says; None: this process shares with nobody."""
    count, _, folder = os.environ.get(VARIABLE, "").partition(":")
    return SharedAnswers(Path(folder), int(count)) if count.isdecimal() and folder else None


def counts(folder: Path) -> tuple[int, int]:
    """How many forwards the students of a folder have run, and how many they were spared."""
    sizes = [path.stat().st_size if (path := folder / name).is_file() else 0 for name in (_COMPUTED, _TAKEN)]
    return sizes[0], sizes[1]


def has_students(folder: Path) -> bool:
    """Whether a student of the folder lives."""
    return any(_is_held(path) for path in folder.glob(f"{_STUDENT}*"))


def batch_key(batch: Mapping[str, Any], labels: Tensor) -> str | None:
    """SHA-256 over names, types, shapes and bytes of a batch; None: something in it is no tensor."""
    whole = hashlib.sha256()
    for name, value in sorted({**batch, "labels": labels}.items()):
        if value is None:
            continue
        if type(value) is not Tensor:
            return None
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has ``path`` now."""
    with path.open("wb") as file:
        yield try_lock(file.fileno())


def _is_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return not try_lock(file.fileno(), shared=True)
    return False


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    for mark in path.parent.glob(f"{path.stem}.had.*"):
        mark.unlink(missing_ok=True)
