"""What each process of tests/distributed/test_quantized.py runs: a student that rounds its weights, saved at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dts_hf.distributed.processes import process
from dts_hf.models.fake_quantization import trained_for
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.quantized import INT4
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def run(out: Path, strategy: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))  # there is no process group yet
    args = training_arguments(
        strategy, output_dir=str(out / strategy), per_device_train_batch_size=8 // world, max_steps=2, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=7, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DistillationTrainer(
        tiny_llama(seed=0), tiny_llama(seed=1), temperature=2.0, args=args, train_dataset=ROWS, quantize=INT4,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    lines = [line["loss"] for line in trainer.state.log_history if "kl" in line]
    record = {
        "losses": lines,
        "wrapper": type(trainer.model_wrapped).__name__,
        "trained_for": trained_for(trainer.model),
    }
    (out / f"{strategy}-{process()[0]}.json").write_text(json.dumps({**record, "world": world}))
    trainer.save_model(str(out / f"{strategy}-saved"))
    trainer.accelerator.free_memory()


def main(folder: str, *strategies: str) -> None:
    for strategy in strategies:
        run(Path(folder), strategy)
    if process()[1] > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
