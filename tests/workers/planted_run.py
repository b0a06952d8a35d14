"""A run that trains nothing: it locks its folder, works a little, goes on where it was killed, and counts its ends."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.files import write_json_atomic
from dts_hf.runs.lock import lock, unlock

folder, seconds, fails = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fails"
ended, progress = folder / "metrics.json", folder / "progress.json"
try:
    lock(folder)
except UserError as error:
    print(error)
    sys.exit(2)
if ended.is_file():
    sys.exit(0)
(folder / "recipe.yaml").touch()
if fails:
    print("RuntimeError: this run always fails")
    sys.exit(1)
steps = json.loads(progress.read_text())["steps"] if progress.is_file() else 0
for step in range(steps, 5):
    time.sleep(seconds / 5)
    write_json_atomic(progress, {"steps": step + 1})
with (folder.parent / "ends.txt").open("a") as file:  # before metrics.json: a run that ended twice has two lines
    file.write(f"{folder.name}\n")
write_json_atomic(ended, {"models": {"student": {"teacher_forced": {"kl": 1.0}}}, "format": 1})
unlock()
