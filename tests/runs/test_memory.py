"""Memory of the machine and of this process: the figures of the system's own tools."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dts_hf.runs.memory import available_bytes, cgroup_room, resident_bytes, total_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the others do not tell as much")
def test_memory_that_is_taken_is_counted() -> None:
    before = resident_bytes()
    held = torch.ones(50 << 20, dtype=torch.uint8)
    assert before + 45e6 < resident_bytes() < before + 70e6 and len(held) == 50 << 20
    assert before < available_bytes() < total_bytes()


#: Alone in a process of its own: beside other tests, memory that they give back meanwhile hides what is taken here.
RISES_AND_FALLS = """
from dts_hf.runs.memory import peak_memory_gb, peak_resident_bytes, reset_peak_resident
reset_peak_resident()
before = peak_resident_bytes()
block = b"x" * 400_000_000
high = peak_resident_bytes()
assert high - before > 300_000_000 and peak_memory_gb() >= high / 1e9, (before, high)
del block
reset_peak_resident()
assert peak_resident_bytes() < high - 300_000_000, (high, peak_resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the mark cannot be set back")
def test_the_high_water_mark_of_memory_rises_and_can_be_set_back() -> None:
    subprocess.run([sys.executable, "-c", RISES_AND_FALLS], check=True, timeout=120)


def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise FileNotFoundError

    now = resident_bytes()
    monkeypatch.setattr("dts_hf.runs.memory.Path.read_text", refuse)
    assert available_bytes() == total_bytes() > 0
    assert resident_bytes() > 0.9 * now  # the most that it ever held


def test_room_of_control_groups(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"

    def group(name: str, **files: object) -> None:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in files.items():
            (folder / file.replace("__", ".")).write_text(f"{value}\n")

    # Version 2, as SLURM makes it: the limit is above the task, and most of what is used is page cache
    membership.write_text("0::/system.slice/job_7/step_0/task_0\n")
    stat = "anon 100\ninactive_file 600\nactive_file 5"
    group("system.slice/job_7/step_0/task_0", memory__max="max", memory__current=900)
    group("system.slice/job_7", memory__max=1000, memory__current=900, memory__stat=stat)
    group("system.slice", memory__max=5000, memory__current=1000)
    assert cgroup_room(membership, root) == 700
    # Version 1; the path of the host is not mounted in a container
    membership.write_text("7:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    stat = "cache 300\ntotal_inactive_file 250"
    group("memory", memory__limit_in_bytes=2000, memory__usage_in_bytes=1500, memory__stat=stat)
    assert cgroup_room(membership, root) == 750
    membership.write_text("0::/nowhere\n")
    assert cgroup_room(membership, root) == math.inf
    assert cgroup_room(tmp_path / "none", root) == math.inf
