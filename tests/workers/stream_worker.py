"""What each process of test_streams.py runs under DDP: the same rows as a list and as streams, results written as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.streams import FIT, IN_ORDER, MIXED, Stream, as_function, as_stream, rows_of_steps
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, plain

SAVED = {"save_strategy": "steps", "save_steps": 1}


def trainer_of(folder: Path, rows: Any, held_out: Any = None, seed: int = 0, **settings: Any) -> DistillationTrainer:
    args = training_arguments(
        "ddp", output_dir=str(folder), **{
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "learning_rate": 0.1,
            "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "per_device_eval_batch_size": 3, **settings},
    )  # fmt: skip
    return DistillationTrainer(
        tiny_llama(seed=seed), tiny_llama(seed=1, layers=1), {"name": "dts"}, args=args, train_dataset=rows,
        eval_dataset=held_out, processing_class=tiny_tokenizer(), **FIT,
    )  # fmt: skip


def result_of(trainer: DistillationTrainer, checkpoint: Path | None = None) -> dict[str, Any]:
    seen = rows_of_steps(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    held_out = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    steps = [seen[k] + seen[k + 1] for k in range(0, len(seen), 2)]
    result = {
        "weights": [weight.detach().double().norm().item() for weight in trainer.model.parameters()],
        "losses": [log["loss"] for log in logs],
        "temperature": [log["temperature"] for log in logs],
        "held_out": [held_out[name] for name in ("eval_loss", "eval_kl", "eval_rows", "eval_labels")],
        "rows": steps,
        "report": trainer.encoding_reports["train_dataset"],
    }
    trainer.accelerator.free_memory()
    return result


def message_of(work: Any) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return "nothing was raised"


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {"list": result_of(trainer_of(out / "list", MIXED, MIXED, **IN_ORDER))}
    for name, make in (("torch", Stream), ("datasets", as_stream), ("function", as_function)):
        results[name] = result_of(
            trainer_of(out / name, make(MIXED), make(MIXED), **(SAVED if name == "torch" else {}))
        )
    tokens = plain(ROWS[:13])
    results["tokens"] = result_of(trainer_of(out / "tokens", Stream(tokens), as_stream(tokens)))
    results["workers"] = result_of(trainer_of(out / "workers", Stream(MIXED), Stream(MIXED), dataloader_num_workers=2))
    # The fourth step is the last but one of the second pass
    results["resumed"] = result_of(
        trainer_of(out / "torch", Stream(MIXED), Stream(MIXED), seed=5, **SAVED), out / "torch" / "checkpoint-3"
    )
    report = results["torch"]["report"]
    for result in list(results.values()):
        del result["report"]
    results["report"] = [report.rows, report.kept, report.dropped]
    results["unseeded"] = message_of(lambda: trainer_of(out / "unseeded", Stream(ROWS[rank:])))
    wrong = Stream([*MIXED[:13], {"instruction": "a"}])
    results["wrong"] = message_of(lambda: trainer_of(out / "wrong", wrong).train())
    (out / f"result.{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
