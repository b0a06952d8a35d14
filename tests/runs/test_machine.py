"""Memory that a machine has to give."""

from __future__ import annotations

import math
from pathlib import Path

from dts_hf.runs.machine import cgroup_room


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
