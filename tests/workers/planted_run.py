"""A run that trains nothing: it locks its folder, works a little, goes on where it was killed, and notes what it does.

What lies under its name in ``.planted/`` beside its folder becomes its recipe and its scores, where there is something.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from dts_hf.errors import ExitCode, UserError
from dts_hf.files import write_bytes_atomic, write_json_atomic
from dts_hf.runs.lock import lock, unlock

folder, seconds, fails = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fails"
ended, progress = folder / "metrics.json", folder / "progress.json"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(ExitCode.INTERRUPTED)))
try:
    lock(folder)
except UserError as error:
    print(error)
    sys.exit(2)
if ended.is_file():
    sys.exit(0)


def planted(name: str, otherwise: bytes) -> bytes:
    file = folder.parent / ".planted" / folder.name / name
    return file.read_bytes() if file.is_file() else otherwise


def note(what: str) -> None:
    with (folder.parent / f"{what}.txt").open("a") as file:
        file.write(f"{folder.name}\n")


write_bytes_atomic(folder / "recipe.yaml", planted("recipe.yaml", b""))
if fails:
    print("RuntimeError: this run always fails")
    sys.exit(1)
steps = json.loads(progress.read_text())["steps"] if progress.is_file() else 0
for step in range(steps, 5):
    time.sleep(seconds / 5)
    note("steps")
    with (folder / "log.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "train", "step": step + 1, "epoch": (step + 1) / 5, "loss": 2.5, "kl": 0.75}) + "\n"
        )
    write_json_atomic(progress, {"steps": step + 1})
note("ends")  # before metrics.json: a run that ended twice has two lines
scores = b'{"models": {"student": {"teacher_forced": {"kl": 1.0}}}, "format": 1}'
write_bytes_atomic(ended, planted("metrics.json", scores))
unlock()
