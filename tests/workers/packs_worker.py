"""What each process of test_packs.py runs: three epochs of batches that are filled to a budget of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def main(folder: str, accumulation: str, resume: str = "") -> None:
    out = Path(folder)
    args = training_arguments(
        output_dir=str(out / "run"), gradient_accumulation_steps=int(accumulation), num_train_epochs=3, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="linear", logging_steps=1, save_strategy="steps", save_steps=3, report_to="none",
        disable_tqdm=True, seed=7,
    )  # fmt: skip
    trainer = DistillationTrainer(
        tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=1).double(), args=args, packing={"tokens": 170},
        train_dataset=ROWS, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    rows: list[list[int]] = []
    step = trainer.training_step

    def note(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        rows.append(inputs["row_id"].tolist())
        return step(model, inputs, *rest, **more)

    trainer.training_step = note  # type: ignore[method-assign]
    planned = trainer.planned_steps()
    trainer.train(resume or None)
    weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
    record = {
        "rows": rows, "losses": [log["loss"] for log in trainer.state.log_history if "kl" in log], "planned": planned,
        "steps": trainer.state.global_step, "weights": weights.tolist(), "tokens": trainer.tokens_seen,
    }  # fmt: skip
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
