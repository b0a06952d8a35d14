"""How much memory a command and all its processes take at most, and how long."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.launching import command, environment


class Peak(NamedTuple):
    """Megabytes and seconds.

    Attributes:
        own: memory that belongs to no file, summed over the processes (what they share counted once).
        total: the same with the pages of files that were mapped. A system takes back such pages when it likes, so this may
            be too little; ``own`` and the size of the files together are never.
    """

    own: float
    total: float
    seconds: float


def processes(pid: int) -> Iterator[int]:
    """``pid`` and all that it has started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from processes(int(child))


def memory(pid: int) -> tuple[float, float]:
    """(own, total) of one process now, megabytes; what several share is divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0.0, 0.0
    values = {name: int(rest.split()[0]) / 1000 for name, _, rest in (line.partition(":") for line in lines)}
    return values["Pss_Anon"] + values["Pss_Shmem"], values["Pss"]


def peak_of(words: Sequence[str], folder: Path, world: int = 1) -> Peak:
    """Run ``python words`` on ``world`` processes in ``folder``.

    Raises:
        AssertionError: it failed; the end of what it said.
    """
    said, began, own, total = folder / "said.txt", time.monotonic(), 0.0, 0.0
    extra = {"DTS_HF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        process = subprocess.Popen(
            command(words, world, (), "single"), cwd=folder, env=environment("single", extra), stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while process.poll() is None:
                found = [memory(pid) for pid in processes(process.pid)]
                own, total = max(own, sum(one for one, _ in found)), max(total, sum(one for _, one in found))
                time.sleep(0.1)
        finally:
            process.kill()
    seconds = time.monotonic() - began
    assert process.returncode == 0, said.read_text(errors="replace")[-3000:]
    return Peak(own, total, seconds)


def has_memory_files() -> bool:
    """Whether this system tells the memory of a process."""
    return os.path.exists("/proc/self/smaps_rollup")
