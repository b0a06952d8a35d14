"""What each process of test_on_policy_gap.py runs: data and the student's own text in turns, in float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def main(folder: str, gap_on: str) -> None:
    out = Path(folder)
    out.mkdir(exist_ok=True)
    args = training_arguments(
        output_dir=str(out / "run"), max_steps=6, learning_rate=0.1, optim="sgd", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7,
    )  # fmt: skip
    args.per_device_train_batch_size = 8 // args.world_size
    trainer = DistillationTrainer(
        tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=1).double(), args=args, train_dataset=ROWS,
        processing_class=tiny_tokenizer(), temperature={"name": "dts", "momentum": 0.5},
        on_policy={"fraction": 0.5, "max_new_tokens": 6, "seed": 1, "gap_on": gap_on},
    )  # fmt: skip
    trainer.train()
    lines = [log for log in trainer.state.log_history if "kl" in log]
    record = {
        "world": args.world_size, "state": trainer.temperature.state(),
        "own": ["generated_ce_loss" in line for line in lines],
        "gaps": [line.get("gap", line.get("generated_gap")) for line in lines],
        "temperatures": [line["temperature"] for line in lines],
    }  # fmt: skip
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
