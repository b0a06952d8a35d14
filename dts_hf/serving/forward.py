"""The one worker of a server: questions one after the other through a frozen teacher, in a queue that has an end."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_test import label_logprobs
from dts_hf.teachers.wire import Answer, Question


class QueueFull(Exception):
    """As many questions wait as may."""


class TooLate(Exception):
    """The answer was not ready when it was due."""


class TeacherForward:
    """Answers questions with a model's backbone.

    Rows are padded on the right in batches of at most ``batch_tokens``, in their order: which rows share a batch depends
    on the question alone, so that the same question gets the same bits below fp32, too.

    Args:
        teacher: on its device.
        batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.
    """

    def __init__(self, teacher: LiveTeacher, batch_tokens: int) -> None:
        self.teacher, self.batch_tokens = teacher, batch_tokens

    def __call__(self, question: Question) -> Answer:
        """States and log-probabilities of the labels, on the CPU."""
        answers = [self._answer(rows) for rows in self._batches(question)]
        return Answer(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def _batches(self, question: Question) -> Iterator[list[tuple[Tensor, Tensor]]]:
        batch: list[tuple[Tensor, Tensor]] = []
        width = 0
        for row in question.rows():
            if batch and (len(batch) + 1) * max(width, len(row[0])) > self.batch_tokens:
                yield batch
                batch, width = [], 0
            batch.append(row)
            width = max(width, len(row[0]))
        yield batch

    @torch.inference_mode()
    def _answer(self, rows: list[tuple[Tensor, Tensor]]) -> Answer:
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids, attention_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for k, (ids, mask) in enumerate(rows):
            input_ids[k, : len(ids)], attention_mask[k, : len(ids)] = ids, 1
            labels[k, : len(ids)] = torch.where(mask.bool(), ids.long(), IGNORE_INDEX)
        head = self.teacher.head
        device = head.weight.device
        batch = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        labels = labels.to(device)
        states = self.teacher.states(batch, labels)
        targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        return Answer(states.cpu(), label_logprobs(states, head, targets).float().cpu())


class ForwardQueue:
    """Runs a function on one thread, for callers of an event loop.

    Args:
        run: takes a question, returns the bytes of the answer.
        longest: how many questions may be here at once, the one at work included.
        seconds: after which an answer is too late.
    """

    def __init__(self, run: Callable[[Question], bytes], longest: int, seconds: float) -> None:
        self.run, self.longest, self.seconds = run, longest, seconds
        self.here = 0
        #: How long the thread has been at work, seconds.
        self.busy = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    async def ask(self, question: Question) -> bytes:
        """The answer.

        Raises:
            QueueFull: too many questions are here already.
            TooLate: it was not ready in time; a question that had not begun by then is never run.
        """
        if self.here >= self.longest:
            raise QueueFull
        self.here += 1
        loop = asyncio.get_running_loop()
        work = self._thread.submit(self._timed, question)
        work.add_done_callback(functools.partial(self._leave, loop))
        try:
            # A question that runs is left to end: its thread cannot be stopped, and its place is taken until then
            return await asyncio.wait_for(asyncio.wrap_future(work), self.seconds)
        except asyncio.TimeoutError:
            raise TooLate from None

    def _timed(self, question: Question) -> bytes:
        began = time.monotonic()
        try:
            return self.run(question)
        finally:
            self.busy += time.monotonic() - began

    def _leave(self, loop: asyncio.AbstractEventLoop, work: Future[bytes]) -> None:
        def count() -> None:
            self.here -= 1

        if not loop.is_closed():
            loop.call_soon_threadsafe(count)

    def close(self) -> None:
        """Forget what waits and let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
