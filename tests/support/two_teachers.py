"""Runs of a worker with one teacher and then another, of which every process writes down what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def live_teacher() -> Any:
    return tiny_llama(seed=1, layers=3)


def record_runs(
    out: Path,
    teachers: Mapping[str, Callable[[], Any]],
    names: Sequence[str],
    of_trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Train with each of the teachers, padded and packed, and write ``RANK.json``: losses, temperatures, weights.

    Args:
        out: a folder.
        teachers: makes one by name.
        names: which of them.
        of_trainer: options of the trainer.
        options: of the training arguments.
    """
    record: dict[str, Any] = {}
    for packing in (False, True):
        for name in names:
            args = training_arguments(
                output_dir=str(out / "run"), per_device_train_batch_size=3, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, seed=7, **options,
            )  # fmt: skip
            more = {"train_dataset": ROWS, **(of_trainer or {})}
            trainer = DistillationTrainer(
                tiny_llama(seed=0), teachers[name](), args=args, temperature={"name": "dts", "rule": "gap"},
                processing_class=tiny_tokenizer(), packing=packing, **more,
            )  # fmt: skip
            trainer.train()
            logs = [log for log in trainer.state.log_history if "kl" in log]
            weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
            record[f"{name} {packing}"] = {
                "losses": [log["loss"] for log in logs],
                "temperatures": [log["temperature"] for log in logs],
                "weights": weights.tolist(),
            }
    record["world"] = args.world_size
    (out / f"{args.process_index}.json").write_text(json.dumps(record))
    if args.world_size > 1:
        leave()


# ------------------------------------------------------------------------------------- several teachers of one student

NAMES = ("math", "code")
#: Rows that name their teacher; in the order of training a batch of four has one of both, or of one alone.
ROUTED = [{**row, "domain": "code" if k % 3 == 0 or k > 11 else "math"} for k, row in enumerate(ROWS)]


def live_pair() -> dict[str, Any]:
    """Two teachers of other widths and depths."""
    return {"math": tiny_llama(seed=1, layers=3), "code": tiny_llama(seed=2, hidden=48)}
