"""What each process of test_replay.py trains: an adaptive share with replay, broken off in the middle and gone on with.

Results go to ``OUT/STRATEGY/RANK.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dts_hf.distributed.processes import process
from dts_hf.training.trainer import DistillationTrainer
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS

STRATEGIES = ("ddp", "zero3")
#: The capacity is that of four steps of all processes; phi grows with every evaluation but the first.
SETTINGS = {"fraction": 0.6, "adaptive": {"eps": 0.0, "step": 0.2, "capacity": 8}, "max_new_tokens": 4, "seed": 7}
#: Text that has nothing of ``ROWS``: the more these are learned, the worse it gets.
OTHER = [{"instruction": "Q", "input": "", "output": text} for text in ("zzqx! zzqx!", "#&%;#&%;", "WVWVWV")]
STEPS, SAVED = 12, 6


class Watched(DistillationTrainer):
    """Attributes: ``seen``, of each step its branch and the numbers of this process's rows in its buffer."""

    seen: list[Any]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, count = super().get_batch_samples(*args, **kwargs)
        numbers = [list(batch.get("replay_numbers", ())) for batch in samples]
        self.seen.append([self._branch, numbers])
        return samples, count


def trainer_of(strategy: str, out: Path, world: int, seed: int = 0) -> Watched:
    args = training_arguments(
        strategy, output_dir=str(out), report_to="none", save_strategy="steps", save_steps=SAVED, disable_tqdm=True,
        logging_steps=1, per_device_train_batch_size=2 // world, max_steps=STEPS, learning_rate=0.05, seed=7,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = Watched(
        tiny_llama(seed=seed, tie=False), tiny_llama(seed=1, layers=3), args=args, train_dataset=ROWS, eval_dataset=OTHER,
        processing_class=tiny_tokenizer(), on_policy=SETTINGS, kd_ratio=0.1,
    )  # fmt: skip
    trainer.seen = []
    return trainer


def record(trainer: Watched) -> dict[str, Any]:
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = [] if not whole else torch.cat([value.flatten().float() for value in whole.values()]).tolist()
    assert trainer.replay is not None and trainer.adaptive is not None
    order = trainer.replay.draw(len(trainer.replay), seed=0, step=0)
    return {
        "world": trainer.accelerator.num_processes,
        "seen": trainer.seen,
        "phi": [log["on_policy_fraction"] for log in trainer.state.log_history if "on_policy_fraction" in log],
        "state": trainer.adaptive.state(),
        "rows": {number: trainer.replay[number].input_ids.tolist() for number in order},
        "states": {number: trainer.replay[number].states[""].tolist() for number in order},
        "weights": weights,
    }


def main(strategies: list[str], out: Path) -> None:
    rank, world = process()
    for strategy in strategies:
        straight = trainer_of(strategy, out / strategy, world)
        straight.train()
        found = {"straight": record(straight)}
        resumed = trainer_of(strategy, out / strategy, world, seed=5)
        resumed.train(str(out / strategy / f"checkpoint-{SAVED}"))
        found["resumed"] = record(resumed)
        (out / f"{strategy}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    training_arguments("ddp", output_dir=sys.argv[1])  # joins the processes
    main(sys.argv[2:], Path(sys.argv[1]))
    leave()
