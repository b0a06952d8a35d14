"""Two processes of test_controls.py: the second one does not see the recorded run, and has the same state."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dts_hf.errors import UserError
from tests.support.controls import CONTROLS, trainer_for
from tests.support.launching import leave


def main(run: str, folder: str) -> None:
    rank = int(os.environ["RANK"])
    found: dict[str, object] = {}
    seen = run if rank == 0 else "not/on/this/machine"
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    for control, spec in CONTROLS.items():
        trainer = trainer_for(Path(folder) / "out", spec(seen), **options)
        trainer.train()
        found[control] = trainer.temperature.state()
    try:
        trainer_for(Path(folder) / "out", CONTROLS["replay"](seen), max_steps=7, **options).train()
    except UserError as error:
        found["refused"] = str(error)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
