"""What each process of test_held_out_gap.py runs: a temperature that follows the gap of held-out rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def main(folder: str, dtype: str) -> None:
    out = Path(folder)
    out.mkdir(exist_ok=True)
    args = training_arguments(
        output_dir=str(out / "run"), max_steps=6, learning_rate=0.1, optim="sgd", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7, per_device_eval_batch_size=2,
    )  # fmt: skip
    args.per_device_train_batch_size = 8 // args.world_size
    trainer = DistillationTrainer(
        *(tiny_llama(seed=seed).to(getattr(torch, dtype)) for seed in (0, 1)), args=args, train_dataset=ROWS,
        eval_dataset=ROWS[:7], processing_class=tiny_tokenizer(),
        temperature={"name": "dts", "gap_source": {"held_out": {"every": 2, "rows": 5}}, "momentum": 0.5},
    )  # fmt: skip
    trainer.train()
    lines = [log for log in trainer.state.log_history if "kl" in log]
    record = {
        "world": args.world_size, "wrapper": type(trainer.model_wrapped).__name__, "states": trainer.temperature.state(),
        "gaps": [line["held_out_gap"] for line in lines], "temperatures": [line["temperature"] for line in lines],
    }  # fmt: skip
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
