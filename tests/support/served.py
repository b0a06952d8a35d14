"""A real server of a tiny teacher on a free port of this machine, in a thread of the test or in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import torch

from dts_hf.data.chat_templates import get_template
from dts_hf.serving.app import Served
from dts_hf.serving.connections import timed_protocol
from dts_hf.serving.serve import ServeOptions, listen, make_server, served_model
from dts_hf.teachers.identity import identity_of
from tests.support.tiny import tiny_llama, tiny_tokenizer

TOKEN = "correct-horse-battery-staple-42"
VARIABLE = "DTS_TEST_TEACHER_TOKEN"


def served_tiny(model=None, name="some/teacher", tokenizer=None, **limits) -> Served:
    """``model`` (by default ``tiny_llama(seed=1, layers=3)``, the teacher of ``support.trainers``), ready to be served."""
    model = tiny_llama(seed=1, layers=3) if model is None else model
    identity = identity_of(model, tokenizer or tiny_tokenizer(), get_template("chat"), name=name)
    return served_model(model, identity, ServeOptions(**limits))


@contextlib.contextmanager
def running(
    served: Served, token: str | None = None, *, port: int = 0, cut_after: float | None = None, **options
) -> Iterator[str]:
    """Serve within the context; yields the URL. ``cut_after``: seconds that a connection may take."""
    chosen = ServeOptions(port=port, **options)
    listening = listen(chosen)
    server = make_server(served, chosen, token)
    if cut_after is not None:
        server.config.http = timed_protocol(cut_after)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


def with_forward(served: Served, forward) -> Served:
    """``served`` with a ``forward`` that is made of its own: ``forward(question, its own)``."""
    own = served.forward
    return dataclasses.replace(served, forward=lambda question: forward(question, own))


def batch_of(rows: list[list[int]], prompt: int = 2, left: bool = False) -> tuple[dict, torch.Tensor]:
    """A padded batch of rows whose tokens from ``prompt`` on are labels."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    for k, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[k, span], mask[k, span] = torch.tensor(row), 1
        labels[k, span] = torch.tensor([-100] * prompt + row[prompt:])
    return {"input_ids": ids, "attention_mask": mask}, labels
