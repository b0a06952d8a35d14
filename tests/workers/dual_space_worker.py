"""What each process of test_dual_space.py runs: the maps of dual space are trained by all processes together."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.distributed.processes import process
from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.alignment import instruction_rows, tokenizer_of
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer


def run(strategy: str, out: Path) -> dict[str, Any]:
    world, other = int(os.environ.get("WORLD_SIZE", "1")), tokenizer_of("byte_level", 900)
    args = training_arguments(
        strategy, output_dir=str(out / strategy), per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
        max_steps=3, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=7, train_sampling_strategy="sequential", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = DistillationTrainer(
        tiny_llama(seed=0).double(), tiny_llama(vocab=len(other), seed=1, layers=1, hidden=48).double(),
        {"name": "dts", "rule": "gap"}, args=args, train_dataset=instruction_rows(21), processing_class=tiny_tokenizer(),
        teacher_tokenizer=other, alignment="dual_space",
    )  # fmt: skip
    trainer.train()
    assert trainer.projection is not None
    lines = [line for line in trainer.state.log_history if "kl" in line]
    weights = [*trainer.model.parameters(), *trainer.projection.weights]
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "world": trainer.args.world_size,
        "lines": [{k: v for k, v in line.items() if "per_second" not in k} for line in lines],
        "weights": torch.cat([weight.detach().flatten() for weight in weights]).tolist(),
    }


def main(strategies: list[str], out: Path) -> None:
    for strategy in strategies:
        try:
            record = run(strategy, out)
        except UserError as error:
            record = {"refused": str(error)}
        (out / f"{strategy} {process()[0]}.json").write_text(json.dumps(record))
    if process()[1] > 1:
        leave()


if __name__ == "__main__":
    main(sys.argv[2:], Path(sys.argv[1]))
