"""DistiLLM's adaptive fraction (arXiv 2402.03898, section 3.2): the student's own text only as training needs it.

The share phi of steps that do not take data's answers starts low and grows by ``step`` whenever the loss on held-out rows
has grown by ``eps``. Of these steps a part that falls over the run generates; the others replay what was generated before:

    u uniform in [0, 1)
    u < phi (1 - progress), or u < phi and the buffer is not full:   generate
    u < phi:                                                         replay
    else:                                                            data

This is the rule of the code that the authors released (``finetune.py``, read at commit 17c0f98), where the loss that the
next one is compared with moves **only when phi grows**: falling losses do not lower it, so phi grows when the loss is
``eps`` above where it was at the last growth (at first: at the first evaluation). Differences from that code:

- u is the run's keyed coin, a function of (seed, step) and the same on every process. Theirs is drawn from numpy's global
  generator on each process (seeded with seed + rank), so processes of one step may do different things.
- The held-out loss is ``eval_loss``: the run's own loss at T = 1, a mean over labels. Theirs is the student's
  cross-entropy, a mean of batch means.
- progress = finished steps / all steps, in [0, 1); theirs counts from 1.
- The buffer counts as full when that of every process is.
- The first evaluation is the one before training where ``eval_on_start`` is set; theirs is always made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

Branch = Literal["data", "generate", "replay"]


class AdaptiveFraction:
    """How many of the steps take the student's own text, by what the held-out loss does.

    Args:
        start: phi of the first step, in [0, 1].
        eps: phi grows when the held-out loss is so many nats above the one it is compared with.
        step: by how much; it stays at most 1.

    Attributes:
        fraction: phi.
        compared_with: the held-out loss that the next one is compared with, nats; None before the first evaluation.
    """

    def __init__(self, start: float = 0.0, *, eps: float = 0.1, step: float = 0.1) -> None:
        self.start, self.eps, self.step = start, eps, step
        self.fraction = start
        self.compared_with: float | None = None

    def reset(self) -> None:
        """As before the first step."""
        self.fraction, self.compared_with = self.start, None

    def observe(self, loss: float) -> bool:
        """See a held-out loss, the same on every process; whether phi has grown. One that is non-finite is not seen."""
        if not math.isfinite(loss):
            return False
        if self.compared_with is None:
            self.compared_with = loss
            return False
        if loss < self.compared_with + self.eps:
            return False
        # Rounded, or ten steps of 0.1 would end at 0.9999999999999999
        self.fraction, self.compared_with = min(round(self.fraction + self.step, 12), 1.0), loss
        return True

    def branch(self, coin: float, progress: float, is_full: Callable[[], bool] | None) -> Branch:
        """What the step does whose coin is ``coin``.

        Args:
            coin: u in [0, 1), equal on all processes.
            progress: finished steps of all steps, in [0, 1).
            is_full: whether the buffer of every process is full; it is asked where the answer matters, which is on all
                processes or on none, so it may ask them all. None: there is no buffer, and no step replays.
        """
        if coin >= self.fraction:
            return "data"
        if is_full is None or coin < self.fraction * (1.0 - progress) or not is_full():
            return "generate"
        return "replay"

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"fraction": self.fraction, "compared_with": self.compared_with}

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what ``state`` described."""
        self.fraction, self.compared_with = state["fraction"], state["compared_with"]
