"""Scripts in processes that are forked from one that has everything imported: for many starts, none of which is a test of
the launcher. ``tests.support.launching`` starts them as people do."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.support.launching import ROOT, environment

#: Below those that the kernel gives to outgoing connections, so that nobody takes one between its choice and its use.
_PORTS = range(15_000, 32_000)
_next_port = itertools.count(os.getpid() * 97)  # other processes of the tests begin elsewhere


def free_port() -> int:
    """A port that nobody listens on, and that no other test of this process has been given."""
    for number in itertools.islice(_next_port, len(_PORTS)):
        port = _PORTS[number % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


@cache
def fork_server() -> ForkServerContext:
    """The context whose processes are forked from the warm one.

    Python has one server in each process, of whoever asks first: all tests take this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.workers.warm"])
    before = dict(os.environ)
    # The server keeps the environment in which it starts, whatever a test has patched by then. Without the path the
    # preload fails, silently: before Python 3.13 the server does not get our sys.path.
    os.environ.update(environment())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    first = context.Process(target=int)  # it starts when the server has imported everything
    first.start()
    first.join()
    return context


def run_warm(
    script: str | Path,
    world: int = 1,
    args: Sequence[str | Path] = (),
    strategy: str = "single",
    env: Mapping[str, str] | None = None,
    timeout: float = 280,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """As ``launching.launch``, but warm: when one of the processes fails, the others are ended.

    Args:
        script: a file; its environment and its ``__main__`` are those of a fresh start.
        strategy: one of ``launching.STRATEGIES``.
        env: more environment variables. What a library reads while it is imported it has read already.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; no process is left behind.
    """
    context, port, words = fork_server(), str(free_port()), [str(word) for word in args]
    processes, codes = [], [None]
    with tempfile.TemporaryDirectory() as folder:
        for rank in map(str, range(world)):
            variables = environment(strategy, env)
            if world > 1 or strategy.startswith(("zero", "fsdp")):
                variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                              "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
            where = (str(cwd or ROOT), f"{folder}/{rank}")
            processes.append(context.Process(target=_script, args=(str(script), words, variables, *where)))
            processes[-1].start()
        until = time.monotonic() + timeout
        try:
            while None in codes and not any(codes) and time.monotonic() < until:
                time.sleep(0.02)
                codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = ["".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob(f"*.{name}")))
                 for name in ("out", "err")]  # fmt: skip
    if None in codes and not any(codes):
        raise subprocess.TimeoutExpired([str(script), *words], timeout, *texts)
    return subprocess.CompletedProcess([str(script), *words], next(filter(None, codes), 0), *texts)


def _script(*arguments: object) -> None:
    from tests.workers import warm  # not here: it imports everything

    warm.script(*arguments)  # type: ignore[arg-type]
