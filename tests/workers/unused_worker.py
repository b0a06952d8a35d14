"""What each process of test_unused_parameters.py runs under DDP: trainings whose stderr goes into a file each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.workers.distributed_worker import ROWS

#: name: (the student has a weight that no forward meets, ``ddp_find_unused_parameters``)
CASES: dict[str, tuple[bool, bool | None]] = {
    "as_it_is": (False, None),
    "searched": (False, True),
    "idle_weight": (True, None),
    "idle_weight_denied": (True, False),
}


def with_idle_weight(student: Any) -> Any:
    student.model.layers[0].idle = torch.nn.Linear(4, 4)
    return student


def run(name: str, out: Path, rank: int) -> None:
    idle, find_unused = CASES[name]
    os.dup2(os.open(out / f"{name}.{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    student = tiny_llama(seed=0)
    args = training_arguments(
        "ddp", output_dir=str(out / "trainer"), per_device_train_batch_size=2, max_steps=3, learning_rate=0.1,
        optim="sgd", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        ddp_find_unused_parameters=find_unused,
    )  # fmt: skip
    trainer = DistillationTrainer(
        with_idle_weight(student) if idle else student, tiny_llama(seed=1), {"name": "dts", "rule": "gap"}, args=args,
        train_dataset=ROWS[:9], processing_class=tiny_tokenizer(),
    )  # fmt: skip
    result: dict[str, Any] = {}
    try:
        trainer.train()
    except RuntimeError as error:
        result["error"] = str(error)
    result["searches"] = getattr(trainer.model_wrapped, "find_unused_parameters", None)
    names = ("loss", "kl", "temperature", "grad_norm")
    result["log"] = [{key: log[key] for key in names} for log in trainer.state.log_history if "kl" in log]
    result["weights"] = [weight.detach().double().sum().item() for weight in trainer.model.parameters()]
    (out / f"{name}.{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.free_memory()


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    for name in CASES:
        run(name, out, rank)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
