"""What each process of tests/test_distributed.py runs: several small trainings, results written as JSON and safetensors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainingArguments

from dts_hf.trainer import DistillationTrainer

ROWS = [
    {
        "id": f"r{i}",
        "instruction": "Count" + " up" * (i % 5),
        "input": "",
        "output": "one " * (1 + 4 * (i % 4)) + "two",
    }
    for i in range(40)
]
POLICIES = {
    "gap": {"name": "dts", "rule": "gap"},
    "paper": {"name": "dts", "rule": "paper"},
    "code": {"name": "dts", "rule": "code"},
    # What else travels from rows to the policy's state: row gaps, features of rows, the slope of the loss in T.
    "sequence": {"name": "dts", "granularity": "sequence"},
    "auto": {"name": "dts", "range": "auto"},
    "dtkd": {"name": "dtkd", "w_kd": 0.5},
    "ctkd": {"name": "ctkd", "ramp": 0.1},
    "adakd": {"name": "adakd"},
    "silent": {"name": "adakd"},  # of two ranks, the second never has a label
}
SEVERAL_WAYS = ("gap", "paper", "code")


def rows_of(policy: str) -> list[dict[str, object]]:
    if policy != "silent":
        return list(ROWS)
    ids = [[5 + (7 * row + 3 * place) % 50 for place in range(6 + row % 3)] for row in range(40)]
    return [{"input_ids": row, "labels": row if k % 8 < 4 else [-100] * len(row)} for k, row in enumerate(ids)]


def main(out: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    for policy, spec in POLICIES.items():
        for tie in (True, False) if policy in SEVERAL_WAYS else (True,):
            for accumulation, packing in ((1, False), (2, False), (2, True)):
                if policy != "gap" and (accumulation, packing) != (1, False):
                    continue
                args = TrainingArguments(
                    output_dir=str(out / "trainer"), use_cpu=True, report_to="none",
                    ddp_backend="gloo" if world > 1 else None,
                    per_device_train_batch_size=8 // world // accumulation, gradient_accumulation_steps=accumulation,
                    per_device_eval_batch_size=3, max_steps=5, logging_steps=1, save_strategy="no", disable_tqdm=True,
                    train_sampling_strategy="sequential", optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
                    max_grad_norm=1.0,
                )  # fmt: skip
                trainer = DistillationTrainer(
                    tiny_llama(seed=0, tie=tie), tiny_llama(seed=1, layers=3), spec, args=args,
                    train_dataset=rows_of(policy), eval_dataset=ROWS[:7], processing_class=tiny_tokenizer(), packing=packing,
                )  # fmt: skip
                trainer.train()
                held_out = trainer.evaluate()
                name = f"{policy}-{'tied' if tie else 'untied'}-{accumulation}-{'packed' if packing else 'padded'}"
                logs = [log for log in trainer.state.log_history if "kl" in log]
                result = {
                    "wrapper": type(trainer.model_wrapped).__name__,
                    "world": trainer.accelerator.num_processes,
                    "loss": [log["loss"] for log in logs],
                    "temperature": [log["temperature"] for log in logs],
                    "state": trainer.temperature.state(),
                    "eval_loss": held_out["eval_loss"],
                    "eval_rows": held_out["eval_rows"],
                }
                (out / f"{name}.{rank}.json").write_text(json.dumps(result))
                weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
                save_file(weights, str(out / f"{name}.{rank}.safetensors"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
