"""What each process of test_alignment.py runs, strategy after strategy: a teacher with another tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.training.trainer import DistillationTrainer
from tests.support.alignment import instruction_rows, tokenizer_of
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer

#: By name: embeddings are tied, the teacher is sharded where there are several processes, rows are packed.
CASES = {"tied": (True, False, False), "untied": (False, True, False), "packed": (True, False, True)}


def run(strategy: str, name: str, out: Path) -> dict[str, Any]:
    tie, sharded, packing = CASES[name]
    world, other = process()[1], tokenizer_of("byte_level", 900)
    args = training_arguments(
        strategy, output_dir=str(out / name), per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
        max_steps=3, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7, train_sampling_strategy="sequential",
    )  # fmt: skip
    teacher = tiny_llama(vocab=len(other), seed=1, layers=3, tie=tie)
    trainer = DistillationTrainer(
        tiny_llama(seed=0, tie=tie), teacher, {"name": "dts", "rule": "gap"}, args=args, train_dataset=instruction_rows(21),
        eval_dataset=instruction_rows(5), processing_class=tiny_tokenizer(), teacher_tokenizer=other, alignment="overlap",
        packing=packing, teacher_placement="sharded" if sharded and world > 1 else "replicated",
    )  # fmt: skip
    assert is_sharded(teacher) == (sharded and world > 1)
    trainer.train()
    held_out = trainer.evaluate()
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = torch.cat([whole[name].flatten().float() for name in sorted(whole)]) if whole else torch.zeros(0)
    lines = [line for line in trainer.state.log_history if "kl" in line]
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "world": world,
        "lines": [{k: v for k, v in line.items() if "per_second" not in k} for line in lines],
        "held_out": {k: v for k, v in held_out.items() if "per_second" not in k and "runtime" not in k},
        "weights": weights.tolist(),
    }


def main(strategies: list[str], out: Path) -> None:
    for strategy in strategies:
        for name in CASES:
            record = run(strategy, name, out)
            (out / f"{strategy} {name} {process()[0]}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    training_arguments("ddp", output_dir=sys.argv[1])  # joins the processes
    main(sys.argv[2:], Path(sys.argv[1]))
    leave()
