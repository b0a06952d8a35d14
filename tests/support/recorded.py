"""Run directories as a finished run leaves them, as far as a control reads them: the log and the number of steps."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dts_hf.temperature import TemperaturePolicy, build_temperature

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when Python ends


def record(folder: Path, columns: Mapping[str, Sequence[float | None]], every: int = 1) -> str:
    """Write a run whose steps had these values; each line of its log is the mean of ``every`` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = len(next(iter(columns.values())))
    lines: list[dict[str, Any]] = []
    for stop in range(every, steps + 1, every):
        line: dict[str, Any] = {"kind": "train", "step": stop, "loss": 1.0}
        for name, values in columns.items():
            part = values[stop - every : stop]
            line[name] = None if None in part else sum(part) / every  # type: ignore[arg-type]
        lines += [line, {"kind": "eval", "step": stop, "eval_loss": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.json").write_text(json.dumps({"training": {"steps": steps}}))
    return str(folder)


@functools.cache
def a_run(steps: int = 12) -> str:
    """The temperatures fall from 3 (student) and 4 (teacher)."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    student = [3.0 - 1.5 * step / steps for step in range(steps)]
    columns = {"temperature": student, "teacher_temperature": [t + 1 for t in student], "gap": student}
    return record(Path(_FOLDERS[-1].name) / "run", columns)


def options_of(name: str, steps: int = 12) -> dict[str, Any]:
    """The options without which a policy cannot be built."""
    return {"run": a_run(steps)} if name == "replay" else {}


def policy_of(name: str, **options: Any) -> TemperaturePolicy:
    """A policy that has read what it needs."""
    policy = build_temperature(name, **options_of(name), **options)
    policy.begin_run()
    return policy
