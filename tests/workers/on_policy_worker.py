"""What each process of test_on_policy.py trains, strategy after strategy: kinds of steps, texts, temperatures, weights.

Results go to ``OUT/STRATEGY/RANK.json``, the student's whole weights to ``OUT/STRATEGY/CASE.safetensors``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import RunError
from dts_hf.models.adapters import add_lora
from dts_hf.on_policy.vllm_server import VllmServer
from dts_hf.recipe.schema import Lora
from tests.support.launching import leave, training_arguments
from tests.support.on_policy import ENDS, recording
from tests.support.tiny import tiny_llama
from tests.support.trainers import plain

#: Rows of a step, however many processes share them.
BATCH = 8
SETTINGS = {"fraction": 0.5, "max_new_tokens": 20, "seed": 3}
CASES: dict[str, dict[str, Any]] = {
    "mixed": {"accumulation": 2},
    "packed": {"packing": True},
    # Of two processes the first answers 40 tokens for each of its rows, and the second has nothing to answer.
    "uneven": {"uneven": True, "settings": {"fraction": 1.0, "max_new_tokens": 40}, "ends": [2], "steps": 2},
    "lora": {"lora": True},
    # Several processes ask a server, whose address stands in OUT/server, and one our engine. Without noise both say the same
    "server": {"server": True, "settings": {**SETTINGS, "fraction": 1.0, "temperature": 1e-6}, "steps": 3},
}
OF_STRATEGY = {
    "single": tuple(CASES),
    "ddp": ("mixed", "uneven", "lora", "server"),
    "zero2": ("mixed",),
    "zero3": ("mixed", "packed", "uneven", "lora", "server"),
    "fsdp2": ("mixed", "uneven", "server"),
}


def silent_half() -> list[dict[str, Any]]:
    """Sixteen rows; of each eight the last four have no label."""
    rows = plain()
    return [
        row if number % 8 < 4 else {**row, "labels": [-100] * len(row["labels"])} for number, row in enumerate(rows)
    ]


def trainer_of(strategy: str, name: str, out: Path) -> Any:
    case, world = CASES[name], process()[1]
    accumulation = case.get("accumulation", 1)
    args = training_arguments(
        strategy, output_dir=str(out / "trainer"), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=BATCH // world // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=case.get("steps", 4), train_sampling_strategy="sequential", optim="sgd", learning_rate=0.3,
        lr_scheduler_type="constant", max_grad_norm=1.0, seed=7,
    )  # fmt: skip
    settings = case.get("settings", SETTINGS)
    if case.get("server") and strategy != "single":
        url = (out.parent / "server").read_text()
        settings = {**settings, "backend": "vllm", "vllm_url": url, "vllm_folder": str(out / "weights")}
    student: Any = tiny_llama(seed=0, tie=False)
    if case.get("lora"):
        torch.manual_seed(0)
        student = add_lora(student, Lora(r=4))
    return recording(
        args, student, rows=silent_half() if case.get("uneven") else plain(), packing=case.get("packing", False),
        on_policy=settings, temperature={"name": "dts", "rule": "gap"}, ends=case.get("ends", ENDS),
    )  # fmt: skip


def refused(strategy: str, out: Path) -> str:
    """What ends a training whose server keeps its own weights (its address stands in OUT/deaf_server)."""
    trainer = trainer_of(strategy, "server", out)
    trainer.rollout.answer = VllmServer((out.parent / "deaf_server").read_text(), str(out / "weights"))
    try:
        trainer.train()
    except RunError as error:
        return f"{error} everywhere={error.everywhere}"
    return ""


def train(strategy: str, name: str, out: Path) -> dict[str, Any]:
    trainer = trainer_of(strategy, name, out)
    args = trainer.args
    trainer.train()
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if args.process_index == 0:
        save_file({key: value.clone().contiguous() for key, value in whole.items()}, out / f"{name}.safetensors")
    logs = [log for log in trainer.state.log_history if "kd_loss" in log]
    return {
        "world": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": is_sharded(trainer.model),
        "kinds": trainer.kinds,
        "texts": [{str(row): ids for row, (ids, _) in step.items()} for step in trainer.texts],
        "labels": [sum(label != -100 for _, labels in step.values() for label in labels) for step in trainer.texts],
        "temperature": [log["temperature"] for log in logs],
        "loss": [log["loss"] for log in logs],
        "logs": [{key: value for key, value in log.items() if key.startswith("generated_")} for log in logs],
    }


def main(strategies: list[str], out: Path) -> None:
    for strategy in strategies:
        folder = out / strategy
        folder.mkdir(exist_ok=True)
        found = {name: train(strategy, name, folder) for name in OF_STRATEGY[strategy]}
        if strategy != "single" and "server" in found:
            found["refused"] = {"words": refused(strategy, folder)}
        (folder / f"{process()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    training_arguments("ddp", output_dir=sys.argv[1])  # joins the processes
    main(sys.argv[2:], Path(sys.argv[1]))
    leave()
