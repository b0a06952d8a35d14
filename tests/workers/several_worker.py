"""What each process of test_several_processes.py runs: trainings with several teachers, results written as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS

#: Rows in the order of training; with one row a process, rank 1 has nothing but "code", and most steps one teacher alone.
ROUTED = [{**row, "domain": "code" if k % 2 or k > 11 else "math"} for k, row in enumerate(ROWS)]
#: What differs from case to case; ``sharded``: the teachers are cut over the processes, where there are several.
CASES: dict[str, dict[str, Any]] = {
    "routed": {"teacher_column": "domain", "temperature_per_teacher": True},
    "one state": {"teacher_column": "domain", "temperature": {"name": "ctkd"}},
    "weighted": {"teacher_weights": {"math": 0.3, "code": 0.7}},
    "sharded": {"teacher_column": "domain", "temperature_per_teacher": True, "teacher_placement": "sharded"},
    "sharded, packed": {"teacher_column": "domain", "teacher_placement": "sharded", "packing": True},
}


def run(name: str, out: Path, strategy: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))  # there is no process group yet
    options = {"temperature": {"name": "dts", "rule": "gap"}, **CASES[name]}
    sharded = options.pop("teacher_placement", "replicated") == "sharded" and world > 1
    args = training_arguments(
        strategy, output_dir=str(out / name), per_device_train_batch_size=2 // world, gradient_accumulation_steps=2,
        max_steps=4, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7, train_sampling_strategy="sequential",
    )  # fmt: skip
    teachers = {"math": tiny_llama(seed=1, layers=3).double(), "code": tiny_gpt2(seed=2).double()}
    trainer = DistillationTrainer(
        tiny_llama(seed=0).double(), teachers=teachers, args=args, train_dataset=ROUTED, eval_dataset=ROUTED[:6],
        processing_class=tiny_tokenizer(), teacher_placement="sharded" if sharded else "replicated", **options,
    )  # fmt: skip
    assert all(is_sharded(one.model) == sharded for one in trainer.teacher.by_name.values())
    trainer.train()
    wrapper = type(trainer.model_wrapped).__name__
    assert wrapper == ("DistributedDataParallel" if world > 1 else "LlamaForCausalLM"), wrapper
    held_out = trainer.evaluate()
    lines = [line for line in trainer.state.log_history if "kl" in line]
    weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
    record = {
        "lines": [{k: v for k, v in line.items() if "per_second" not in k} for line in lines],
        "held_out": {k: v for k, v in held_out.items() if "/" in k or k == "eval_kl"},
        "weights": weights.tolist(), "state": trainer.temperature.state(), "world": world,
    }  # fmt: skip
    (out / f"{name} {world}-{process()[0]}.json").write_text(json.dumps(record))


def main(folder: str, strategy: str) -> None:
    for name in CASES:
        run(name, Path(folder), strategy)
    if process()[1] > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
