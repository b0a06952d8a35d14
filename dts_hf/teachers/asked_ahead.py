"""Questions to a teacher elsewhere that are asked while the batch before is still at work.

A collator of ours has the rows of a batch before anybody needs their states. In a worker of a data loader it waits for the
answer, for that is what workers are for, and the batch carries the states. In the training's own process it starts a thread
and goes on: accelerate draws one batch ahead (and the Trainer all micro-batches of a step), so the answer comes during the
step before.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.batch_rows import Row
from dts_hf.teachers.cached.teacher import BITS, LOGPROBS, STATES
from dts_hf.teachers.kept_answers import KeptAnswers
from dts_hf.teachers.remote_states import RemoteStates
from dts_hf.teachers.wire import Answer

#: In a batch: the number ``[1]`` of the question that its rows were asked in; or, beside the states, the
#: log-probabilities ``[N]`` that came with them (``LOGPROBS``).
TICKET = "teacher_ticket"
#: Answers that nobody has fetched, as of batches that a resume skips.
MOST_KEPT = 64
#: Whom rows are asked of.
Asking: TypeAlias = RemoteStates | KeptAnswers


class AskedAhead:
    """Asks for the rows of a batch as its collator makes it.

    Args:
        asking: whom.

    Attributes:
        keeps: whether answers are looked for and kept where ``asking`` keeps them, or asked of its server alone.
        most_kept: so many of the last questions are known. The Trainer draws all micro-batches of a step before the first
            forward, so fewer than two steps have of them would drop answers and ask again.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking, self.keeps, self.most_kept = asking, True, MOST_KEPT
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Answer]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_asked": {}}  # for workers that are spawned

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What the collator puts into the batch: the states, or the number of the question.

        Args:
            examples: ``input_ids`` and unshifted ``labels`` of each row.
        """
        rows = [row for row in map(_row, examples) if row[1].any()]
        asking = self._asking if self.keeps or isinstance(self._asking, RemoteStates) else self._asking.server
        if get_worker_info() is not None:
            states, logprobs = asking.ask(rows)
            return {STATES: states.view(BITS[states.dtype.itemsize]), LOGPROBS: logprobs.view(torch.int32)}
        number = next(self._numbers)
        found: Future[Answer] = Future()
        self._asked[number] = found
        # Not a pool: its threads are waited for when Python ends, and a server that is gone may take minutes
        threading.Thread(target=_answer, args=(found, asking, rows), name="teacher", daemon=True).start()
        while len(self._asked) > self.most_kept:
            del self._asked[min(self._asked)]
        return {TICKET: torch.tensor([number])}

    def fetch(self, number: int) -> Answer | None:
        """The answer to a question, waited for; None: it is not known here, and has to be asked again.

        Raises:
            RunError: what asking raised.
        """
        found = self._asked.pop(number, None)
        return None if found is None else found.result()

    def forget(self, number: int) -> None:
        """Let the answer to a question go that nobody will fetch, come or not."""
        self._asked.pop(number, None)


def _row(example: Mapping[str, Any]) -> Row:
    marked = torch.tensor(list(example["labels"])) != IGNORE_INDEX
    marked[0] = False  # nothing predicts it
    return torch.tensor(list(example["input_ids"])), marked


def _answer(found: Future[Answer], asking: Asking, rows: Sequence[Row]) -> None:
    try:
        found.set_result(asking.ask(rows))
    except BaseException as error:
        found.set_exception(error)
