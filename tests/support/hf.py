"""What the tests of the Trainer's own behaviours share (``tests/training/test_hf_*.py``).

Their docstrings are rows of the table in docs/trainer.md: ``works: ...``, ``refused: ...`` or ``differs: ...``.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, encoded, plain, trainer_for

__all__ = [
    "ROWS",
    "Recorder",
    "arguments",
    "encoded",
    "events_of",
    "logged",
    "plain",
    "plain_trainer",
    "trainer_for",
]

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """The events of a run in their order."""

    def __init__(self) -> None:
        self.events: list[str] = []


def _recording(name: str) -> Any:
    def record(self: Recorder, *_: Any, **kwargs: Any) -> None:
        self.events.append(name)

    return record


for _name in EVENTS:
    setattr(Recorder, _name, _recording(_name))


def events_of(make: Any) -> list[str]:
    """The events of the trainer that ``make`` builds with a callback."""
    recorder = Recorder()
    make(recorder).train()
    return recorder.events


def plain_trainer(folder: Any, callback: TrainerCallback | None = None, **options: Any) -> Trainer:
    """transformers' own Trainer on the same rows, for comparison."""
    from transformers import DataCollatorForSeq2Seq

    rows = plain()
    return Trainer(
        tiny_llama(seed=0),
        arguments(folder, **options),
        DataCollatorForSeq2Seq(tiny_tokenizer(pad="own")),
        rows,
        rows[:3],
        callbacks=[] if callback is None else [callback],
    )


def logged(trainer: DistillationTrainer, name: str) -> list[Any]:
    """The values of ``name`` in the log, in their order."""
    return [line[name] for line in trainer.state.log_history if name in line]
