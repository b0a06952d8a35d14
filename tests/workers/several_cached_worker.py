"""What each process of test_several_elsewhere.py runs: several teachers in memory, and then the same out of their caches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.two_teachers import NAMES, ROUTED, live_pair

WAYS: dict[str, dict[str, Any]] = {
    "routed": {"teacher_column": "domain"},
    "weighted": {"teacher_weights": {"math": 0.3, "code": 0.7}},
}


def main(folder: str, *caches: str) -> None:
    out, record, left = Path(folder), {}, list(caches)
    for way, options in WAYS.items():
        cached = {name: CachedTeacher(left.pop(0)) for name in NAMES}
        for kind, teachers in (("live", live_pair()), ("cached", cached)):
            args = training_arguments(
                output_dir=str(out / "run"), per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, seed=7, max_steps=6, learning_rate=0.05, optim="sgd",
            )  # fmt: skip
            trainer = DistillationTrainer(
                tiny_llama(seed=0), teachers=teachers, args=args, temperature={"name": "dts", "rule": "gap"},
                train_dataset=ROUTED, processing_class=tiny_tokenizer(), temperature_per_teacher=True, **options,
            )  # fmt: skip
            trainer.train()
            logs = [log for log in trainer.state.log_history if "kl" in log]
            record[f"{way} {kind}"] = {
                "losses": [log["loss"] for log in logs],
                "temperatures": [log.get(f"temperature/{name}", -1.0) for log in logs for name in NAMES],
                "weights": torch.cat([value.flatten() for value in trainer.model.state_dict().values()]).tolist(),
            }
    record["world"] = args.world_size
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
