"""What each process of test_cached.py runs: live and cached teachers, one and several, strategy after strategy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.two_teachers import ROUTED, live_pair


def wrapper_of(trainer: DistillationTrainer) -> str:
    """What trains: asserted before anything is compared, for a strategy may be dropped without a word."""
    if any(isinstance(weight, DTensor) for weight in trainer.model_wrapped.parameters()):
        return "DTensor"
    stage = getattr(trainer.model_wrapped, "zero_optimization_stage", None)
    return type(trainer.model_wrapped).__name__ + (f" {stage()}" if stage else "")


def main(folder: str, math: str, code: str, *strategies: str) -> None:
    out, record = Path(folder), {}
    for strategy in strategies:
        for kind in ("live", "cached", "several live", "several cached"):
            teachers: dict[str, Any] = live_pair()
            if kind.endswith("cached"):
                teachers = {"math": CachedTeacher(math), "code": CachedTeacher(code)}
            given: dict[str, Any] = {"teachers": teachers, "teacher_column": "domain"}
            if not kind.startswith("several"):
                given = {"teacher": teachers["math"]}
            args = training_arguments(
                strategy, output_dir=str(out / "run"), per_device_train_batch_size=2, logging_steps=1,
                save_strategy="no", report_to="none", disable_tqdm=True, seed=7, max_steps=4, learning_rate=0.05,
                optim="sgd", lr_scheduler_type="constant",
            )  # fmt: skip
            trainer = DistillationTrainer(
                tiny_llama(seed=0), args=args, temperature={"name": "dts", "rule": "gap"}, train_dataset=ROUTED,
                processing_class=tiny_tokenizer(), **given,
            )  # fmt: skip
            trainer.train()
            logs = [log for log in trainer.state.log_history if "kl" in log]
            record[f"{strategy} {kind}"] = {
                "wrapper": wrapper_of(trainer),
                **{key: [log[key] for log in logs] for key in ("loss", "kl", "grad_norm", "temperature")},
            }
    record["world"] = torch.distributed.get_world_size()
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(record))
    leave()


if __name__ == "__main__":
    training_arguments("ddp", output_dir=sys.argv[1])  # joins the processes
    main(*sys.argv[1:])
