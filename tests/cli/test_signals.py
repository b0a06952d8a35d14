"""A signal at any moment, from the first line of ``dts-hf`` to the last of Python: real processes, started as people do."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dts_hf.errors import ExitCode
from dts_hf.runs import stopping
from dts_hf.training.signals import stops_on_signal
from tests.support.launching import ROOT, environment


def test_exit_statuses_are_those_of_the_table() -> None:
    assert (stopping.INTERRUPTED, stopping.CTRL_C) == (ExitCode.INTERRUPTED, ExitCode.CTRL_C)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for ``number``: the first line of ours has been run."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@contextmanager
def command(*words: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """``dts-hf WORDS`` at its first line. Ctrl-C is Python's own until then, so SIGTERM tells."""
    start = ["-c", code] if code else ["-m", "dts_hf"]
    process = subprocess.Popen(
        [sys.executable, *start, *words], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not catches(process.pid, signal.SIGTERM):
            assert process.poll() is None, process.communicate()
            time.sleep(0.0005)
        yield process
    finally:
        process.kill()
        process.communicate()


#: A library whose destructor ends the process with an abort, as a thread of gloo's that has outlived its group.
ABORTS = """
import atexit, ctypes, sys, threading, time
import torch
import dts_hf.cli.app
from dts_hf.__main__ import main

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, "farewell")

def work(prog_name):
    if sys.argv[1] == "group":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    threading.Thread(target=lambda: (time.sleep(0.2), print("saved"))).start()
    raise SystemExit(3)

dts_hf.cli.app.app = work
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a name of glibc's")
@pytest.mark.parametrize(("kind", "status"), [("group", 3), ("alone", -signal.SIGABRT)])
def test_a_library_that_aborts_at_the_end_costs_a_process_of_several_nothing(kind: str, status: int) -> None:
    """Threads and farewells of Python have their turn; the libraries below it are not taken down."""
    start = [sys.executable, "-c", ABORTS, kind]
    done = subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.split() == ["saved", "farewell"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "window", "words"),
    [
        (signal.SIGTERM, (0.0, 0.0), ("train", "none.yaml")),  # as soon as it is caught
        (signal.SIGUSR1, (0.05, 0.2), ("train", "recipes/quickstart.yaml")),
        (signal.SIGINT, (0.0, 0.1), ("train", "recipes/quickstart.yaml")),
        (signal.SIGTERM, (0.3, 2.0), ("train", "recipes/quickstart.yaml", "--dry-run")),  # torch is being loaded
        (signal.SIGINT, (0.3, 2.0), ("env",)),  # the same in a command that trains nothing
    ],
)
def test_while_modules_are_loaded(number: int, window: tuple[float, float], words: tuple[str, ...]) -> None:
    after = random.Random(f"{number} {words}").uniform(*window)
    with command(*words) as process:
        time.sleep(after)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    expected = ExitCode.CTRL_C if number == signal.SIGINT else ExitCode.INTERRUPTED
    assert process.returncode in (expected, ExitCode.DONE) and "Traceback" not in err, (process.returncode, out, err)
    if process.returncode:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        assert err.count("\n") == 1 and err.startswith(f"Stopped: {name}"), err
        assert ("--resume" in err) == (words[0] == "train")


SHUTDOWN = """
import atexit, os, signal, sys
from dts_hf.__main__ import main
def again(*_): os.kill(os.getpid(), signal.{name})
class Late:
    def __del__(self): again()  # when Python takes its modules down
late = Late()
atexit.register(again)  # after everything that was registered later
try:
    main()
finally:
    again()
    atexit.register(again)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_python_ends_leaves_the_status(name: str) -> None:
    code = SHUTDOWN.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("dts-hf ") and done.stderr == "", done


SWALLOWS = """
import os, signal, sys, time
from dts_hf.__main__ import main
from dts_hf.cli import schema
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
def command() -> None:
    {how}
    while True:
        time.sleep(0.01)
schema.command = command
main()
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("Swallows()", ExitCode.INTERRUPTED),  # Python prints what __del__ raises, and goes on
        ("os.kill(os.getpid(), signal.SIGTERM)", ExitCode.INTERRUPTED),
        ("os.kill(os.getpid(), signal.SIGINT)", ExitCode.CTRL_C),
    ],
)
def test_a_command_that_trains_nothing_ends(how: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS.format(how=how), "schema"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done
    assert done.stderr == ("Stopped: Ctrl-C.\n" if status == ExitCode.CTRL_C else "Stopped: SIGTERM.\n")


FORKED = """
import ctypes, os, signal
from dts_hf.runs import stopping
stopping.catch_signals()
ready, tell = os.pipe()
child = os.fork()
if not child:
    signal.alarm(20)  # without a handler: its end if nothing else is
    os.write(tell, b"1")
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    lock(mutex), lock(mutex)  # in a library for ever: Python's handlers do not run
os.read(ready, 1)
os.kill(child, signal.{name})
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_forked_worker_is_no_run(name: str) -> None:
    """What a library forks (a pool of datasets, say) ends on a signal as if nobody had ever caught it."""
    code = FORKED.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{-signal.Signals[name]}\n" and done.stderr == "", done


# -------------------------------------------------------------------------------------- signals that are somebody else's


@stops_on_signal
def handlers_of_a_run() -> list[object]:
    return [signal.getsignal(number) for number in stopping.SIGNALS]


def test_a_handler_from_before_python_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python says None of it, and could not put it back: a run that was complete died of a TypeError."""
    original = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else original(number))
    assert stopping.free_signals() == [number for number in stopping.SIGNALS if number != signal.SIGUSR1]
    monkeypatch.undo()
    assert handlers_of_a_run() == [stopping.request.handle] * 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_handler_of_faulthandler_is_let_be() -> None:
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    try:
        assert handlers_of_a_run() == [stopping.request.handle, signal.SIG_DFL, stopping.request.handle]
        assert catches(os.getpid(), signal.SIGUSR1)
    finally:
        faulthandler.unregister(signal.SIGUSR1)


def test_what_is_ignored_from_outside_stays_so() -> None:
    """``nohup``, ``trap "" INT``, ``dts-hf ... &`` in a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = (
        "import signal; from dts_hf.runs import stopping; stopping.catch_signals(); "
        "print([type(signal.getsignal(number)).__name__ for number in stopping.SIGNALS])"
    )
    try:
        assert handlers_of_a_run()[-1] is signal.SIG_IGN and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True, capture_output=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stdout == "['method', 'method', 'Handlers']\n", done.stderr
