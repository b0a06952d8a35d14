"""What each process of test_remote_far.py runs: 50 steps with a live teacher, then with the same one behind an address."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def main(folder: str, url: str, steps: str, only: str = "") -> None:
    record, out = {}, Path(folder)
    for packing in (False, True):
        for name in (only,) if only else ("live", "remote"):
            args = training_arguments(
                output_dir=str(out / "run"), max_steps=int(steps), per_device_train_batch_size=3, learning_rate=1e-3,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=7,
            )  # fmt: skip
            teacher = RemoteTeacher(url) if name == "remote" else tiny_llama(seed=1, layers=3)
            trainer = DistillationTrainer(
                tiny_llama(seed=0), teacher, args=args, temperature={"name": "dts", "rule": "gap"}, train_dataset=ROWS,
                processing_class=tiny_tokenizer(), packing=packing,
            )  # fmt: skip
            trainer.train()
            logs = [log for log in trainer.state.log_history if "kl" in log]
            weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
            record[f"{name} {packing}"] = {
                "losses": [log["loss"] for log in logs],
                "temperatures": [log["temperature"] for log in logs],
                "weights": weights.tolist(),
            }
    record["world"] = args.world_size
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
