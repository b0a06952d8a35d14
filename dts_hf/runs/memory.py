"""Memory in bytes: what this machine has to give, and what this process, or a part of a run, takes of it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dts_hf.runs.environment import device_name

#: By version of control groups: their folder, the names of limit and use, and of the page cache in ``memory.stat``.
CGROUP_FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


def total_bytes() -> int:
    """Memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that may be taken now without swapping; outside Linux, which alone tells it, all that the machine has."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return total_bytes()
    available = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return int(available[1]) * 1024 if available else total_bytes()


def resident_bytes() -> int:
    """Memory that this process holds now; outside Linux the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _most_resident_bytes()


def _most_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_resident() -> None:
    """Forget the high-water mark of this process's resident memory, where the system (Linux) lets one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int | None:
    """High-water mark of this process's resident memory, since ``reset_peak_resident``; None outside Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    mark = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return None if mark is None else int(mark[1]) * 1024


def peak_memory_gb() -> float:
    """High-water mark of this process: resident memory, plus the GPU's where there is one, in GB (1e9 bytes)."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return ((peak_resident_bytes() or _most_resident_bytes()) + on_gpu) / 1e9


def device_of(args: TrainingArguments) -> dict[str, Any]:
    """Name of the device that the run will use, and the memory in bytes that is free there now."""
    host = min(available_bytes(), cgroup_room())
    kind, name = args.device.type, device_name(args.device)
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info(args.device)
        count = torch.cuda.device_count()
        return {"type": kind, "name": name, "memory": free, "total": total, "count": count, "host": host}
    return {"type": kind, "name": name, "memory": host, "total": total_bytes(), "count": 1}


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
