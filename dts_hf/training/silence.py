"""Several processes: says at which step nothing happens any more, before the timeout of a collective ends this one.

NCCL's watchdog ends the process from within, without a word of Python, and knows nothing of steps.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from dts_hf.console import show

#: After which part of ``ddp_timeout`` without an event it is said.
SHARE = 0.9


class SilenceCallback(TrainerCallback):
    """Looks, in a thread of its own, whether training goes on; a step, a batch of an evaluation, a checkpoint are events."""

    def __init__(self) -> None:
        self.last_event = 0.0  # monotonic seconds
        self.step = 0  # the last one that has ended
        self.over: threading.Event | None = None  # of the training that goes on

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._event(state)
        if self.over is None:  # not when training begins: the scores before the first step may take their time
            self.over = threading.Event()
            watch = (self.over, args.ddp_timeout, args.process_index)
            threading.Thread(target=self._watch, args=watch, name="silence", daemon=True).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._event(state)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """A held-out evaluation may take longer than the timeout."""
        self._event(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._event(state)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Look no longer; also after an error, when there is no ``on_train_end``."""
        if self.over is not None:
            self.over.set()
            self.over = None

    def _event(self, state: TrainerState) -> None:
        self.last_event, self.step = time.monotonic(), state.global_step

    def _watch(self, over: threading.Event, timeout: float, rank: int) -> None:
        said = 0.0
        while not over.wait(SHARE * timeout / 10):
            since, step = self.last_event, self.step
            seconds = time.monotonic() - since
            if seconds > SHARE * timeout and since != said:
                said = since
                show(
                    f"process {rank}: nothing has happened for {seconds:.0f} s, after step {step}; a collective that is not "
                    f"done after {timeout:g} s (training.ddp_timeout) ends the run",
                    error=True,
                )
