"""What each process of test_remote_far.py runs: 50 steps with a live teacher, then with the same one behind an address."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.teachers.remote import RemoteTeacher
from tests.support.two_teachers import live_teacher, record_runs


def main(folder: str, url: str, steps: str, only: str = "", cache: str | None = None) -> None:
    teachers = {"live": live_teacher, "remote": lambda: RemoteTeacher(url, cache=cache)}
    names = [only] if only else [*teachers]
    record_runs(Path(folder), teachers, names, max_steps=int(steps), learning_rate=1e-3)


if __name__ == "__main__":
    main(*sys.argv[1:])
