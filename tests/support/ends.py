"""What a run leaves behind, without what the clock decides, and how its lives ended; for the tests of resuming."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dts_hf.runs.checkpoints import checkpoints
from dts_hf.runs.lock import LOCK
from tests.workers.resume_worker import Life

TIMES = ("tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
         "eval_model_preparation_time", "seconds", "total_seconds", "peak_memory_gb")  # fmt: skip


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def log_of(run: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()]


def end_of(run: Path) -> dict[str, Any]:
    """All that a run leaves behind and that does not depend on the clock; weights as digests of their bytes."""
    last = checkpoints(run)[-1]
    return {
        "files": sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()),
        "final": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "final").iterdir())
        },
        "last": {
            path.relative_to(last).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in last.rglob("*")
            if path.suffix in (".safetensors", ".distcp")  # of FSDP2 in pieces: they are written without a clock, too
        },
        "temperature": json.loads((last / "temperature.json").read_text()),
        "log": log_of(run),
        "metrics": without_times(json.loads((run / "metrics.json").read_text())),
        "predictions": {path.name: path.read_text() for path in sorted((run / "predictions").iterdir())},
    }


def finish(life: Life) -> None:
    codes = life.wait()
    assert set(codes) == {0}, (codes, life.says()[-3000:])


def refused(workplace: Path, values: dict[str, Any], world: int = 1, strategy: str = "single") -> str:
    """The message of a resume that is refused, with nothing changed in the run directory."""
    run = workplace / values["output"]["dir"]

    def content() -> dict[Path, bytes]:  # a killed process leaves its lock file, the next one removes it
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}

    before = content()
    life = Life(workplace, values, world, strategy, resume=True)
    assert set(life.wait()) == {2}, life.says()[-2000:]
    assert content() == before
    return life.says()
