"""What memory this machine has to give, and the most that a part of a run took of it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dts_hf.runs.environment import peak_resident_bytes, reset_peak_resident
from dts_hf.runs.memory import available_bytes, total_bytes

#: By version of control groups: their folder, the names of limit and use, and of the page cache in ``memory.stat``.
CGROUP_FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


def device_of(args: TrainingArguments) -> dict[str, Any]:
    """Name of the device that the run will use, and the memory in bytes that is free there now."""
    host = min(available_bytes(), cgroup_room())
    kind = args.device.type
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info(args.device)
        name, count = torch.cuda.get_device_name(args.device), torch.cuda.device_count()
        return {"type": kind, "name": name, "memory": free, "total": total, "count": count, "host": host}
    return {"type": kind, "name": kind.upper(), "memory": host, "total": total_bytes(), "count": 1}


def cgroup_room(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may still take under Docker, Kubernetes or SLURM; infinite where nothing limits it.

    Each group from the process's own up to the root may have a limit; the page cache that a group could give back counts
    as free.

    Args:
        membership: the groups of the process, as the kernel lists them.
        root: where the groups are mounted.
    """
    room = math.inf
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            below, *names = CGROUP_FILES[1 if controllers else 2]
            base = root / below
            own = base / group.strip("/")
            # In a container the path may be that of the host, which is not mounted: then its own group is the root.
            for folder in (own, *own.parents):
                if folder.is_relative_to(base):
                    room = min(room, _room_in(folder, *names))
    return room


def _room_in(folder: Path, limit: str, used: str, cache: str) -> float:
    """What one control group leaves; infinite where it sets no limit."""
    try:
        room = float((folder / limit).read_text()) - float((folder / used).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
    with contextlib.suppress(OSError, ValueError):
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        room += float(entries.get(cache, 0))
    return max(0.0, room)


class PeakMemory:
    """The highest memory use since it was made: of the GPU, or of this process beyond what it had before.

    Args:
        device: of the run.
        before: bytes of this process before any model was loaded.
    """

    def __init__(self, device: torch.device, before: int) -> None:
        self.device, self.before = device, before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_peak_resident()

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = peak_resident_bytes()
        return None if peak is None else max(0, peak - self.before)
