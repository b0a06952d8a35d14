"""What each process of test_self_processes.py runs: students that teach themselves, results written as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dts_hf.distributed.processes import process
from dts_hf.errors import UserError
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS

HINTED = [{**row, "hint": "so " * (k % 3)} for k, row in enumerate(ROWS)]
#: Whose weights, whether there is an adapter, and whether the student answers: then five rows in steps of four, so that a
#: process has one that only fills its batch.
CASES = {
    "base": ("base", False, False), "ema": ("ema", False, False), "base lora": ("base", True, False),
    "ema lora": ("ema", True, False), "base own text": ("base", False, True), "ema lora own text": ("ema", True, True),
}  # fmt: skip


def run(name: str, out: Path, strategy: str) -> dict[str, Any]:
    weights, lora, own = CASES[name]
    world = int(os.environ.get("WORLD_SIZE", "1"))  # there is no process group yet
    args = training_arguments(
        strategy, output_dir=str(out / name), per_device_train_batch_size=4 // world, max_steps=3,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7, train_sampling_strategy="sequential",
    )  # fmt: skip
    torch.manual_seed(5)  # of the adapter
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = DistillationTrainer(
        tiny_llama(seed=0), SelfTeacher(weights, ema_rate=0.3), args=args, train_dataset=HINTED[:5] if own else HINTED,
        temperature=2.0, processing_class=tiny_tokenizer(), teacher_prefix_column="hint", peft_config=config,
        on_policy={"fraction": 1.0, "max_new_tokens": 6} if own else None,
    )  # fmt: skip
    trainer.train()
    mean = trainer.teacher.mean
    values = [] if mean is None else torch.cat([value.flatten() for value in mean.tensors().values()]).tolist()
    logs = [log["loss"] for log in trainer.state.log_history if "kl" in log or "generated_kl" in log]
    return {"losses": logs, "mean": values}


def main(folder: str, strategy: str) -> None:
    found: dict[str, Any] = {}
    for name in CASES:
        try:
            found[name] = run(name, Path(folder), strategy)
        except UserError as error:
            found[name] = str(error)
    rank, world = process()
    (Path(folder) / f"{strategy} {world}-{rank}.json").write_text(json.dumps(found))
    if world > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
