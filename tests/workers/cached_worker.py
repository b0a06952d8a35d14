"""What each process of test_cached.py runs: 20 steps with a live teacher, or with a cached one."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.teachers.cached.teacher import CachedTeacher
from tests.support.two_teachers import live_teacher, record_runs


def main(folder: str, cache: str) -> None:
    teachers = {"live": live_teacher, "cached": lambda: CachedTeacher(cache)}
    record_runs(Path(folder), teachers, [*teachers], max_steps=20, learning_rate=0.05, optim="sgd")


if __name__ == "__main__":
    main(*sys.argv[1:])
