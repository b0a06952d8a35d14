"""Memory of the machine and of this process, in bytes, as the system tells it."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path


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
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
