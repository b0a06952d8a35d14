"""Processes of test_answer_data.py. ``kill``: calls that die with SIGKILL at chosen moments or at random, then one that
ends. ``share``: the rows of one process of several."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dts_hf.generation.answers import AnswerSettings
from dts_hf.generation.engine import GenerationSettings
from dts_hf.inference.answer_data import AnswerDataOptions, write_answer_data
from tests.support.launching import leave

SETTINGS = AnswerSettings(
    GenerationSettings(max_new_tokens=8, batch_size=4, do_sample=True, temperature=2.5),
    answers=2,
    cut="keep",
    max_repetition=1.0,
)


def answer(out: str) -> None:
    write_answer_data("model", AnswerDataOptions("rows.jsonl", Path(out), SETTINGS))


def moments(act: Callable[[int], None]) -> Callable[[], int]:
    """Call ``act`` with the number of each moment before and after a file gets its name or goes; returns the count."""
    seen = 0

    def around(work: Callable[..., object]) -> Callable[..., object]:
        def stand_in(*arguments: object, **options: object) -> object:
            nonlocal seen
            for done in (False, True):
                act(seen := seen + 1)
                if not done:
                    result = work(*arguments, **options)
            return result

        return stand_in

    os.replace = around(os.replace)  # type: ignore[assignment]
    Path.unlink = around(Path.unlink)  # type: ignore[method-assign, assignment]
    return lambda: seen


def forked(work: Callable[[], None], seconds: float | None = None) -> int:
    """The signal that ended a forked process, 0 where none did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill(seed: int, chosen: int, at_random: int) -> None:
    """``chosen`` deaths at moments (0: at each there is, in a folder of its own each), ``at_random`` at any time."""
    torch.set_num_threads(1)  # a fork is safe then

    def whole() -> None:
        count = moments(lambda number: None)
        began = time.monotonic()
        answer("whole.jsonl")
        Path("counted.json").write_text(json.dumps([count(), time.monotonic() - began]))

    assert forked(whole) == 0
    count, seconds = json.loads(Path("counted.json").read_text())
    generator = random.Random(seed)
    picked = range(1, count + 1) if chosen == 0 else sorted(generator.sample(range(1, count + 1), chosen))
    for moment in picked:
        out = f"at-{moment}/killed.jsonl" if chosen == 0 else "killed.jsonl"

        def dies(moment: int = moment, out: str = out) -> None:
            moments(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == moment else None)
            answer(out)

        ended = forked(dies)
        assert ended == signal.SIGKILL or chosen, (moment, ended)  # going on has fewer moments than beginning
        if chosen == 0:
            assert forked(lambda out=out: answer(out)) == 0  # type: ignore[misc]
    for _ in range(at_random):
        forked(lambda: answer("killed.jsonl"), generator.uniform(0, seconds / 2))
    if chosen:
        assert forked(lambda: answer("killed.jsonl")) == 0
    print("moments", count, "picked", list(picked))


def share(out: str) -> None:
    torch.set_num_threads(1)
    answer(out)
    leave()


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(*map(int, sys.argv[2:5]))
    else:
        share(sys.argv[2])
