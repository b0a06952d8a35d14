"""Many clients, several processes, and a server that is killed under them: every answer is still the right one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch

from dts_hf.serving.serve import ServeOptions, listen, make_server
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.launching import WORKERS
from tests.support.served import batch_of, running, served_tiny
from tests.support.tiny import tiny_llama
from tests.support.trainers import trainer_for
from tests.support.warm import run_warm


def _supervise(orders, port: int) -> None:
    """In a process without threads: for each order a server in a process of its own, whose id is sent back."""
    torch.set_num_threads(1)
    served = served_tiny()
    while orders.recv() == "start":
        pid = os.fork()
        if pid == 0:
            options = ServeOptions(port=port, queue=4)
            make_server(served, options, None).run([listen(options)])
            os._exit(0)
        orders.send(pid)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


@contextlib.contextmanager
def servers(port: int):
    """A function that starts a server at ``port`` and returns its process id."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_supervise, args=(theirs, port))
    process.start()
    pids: list[int] = []

    def start() -> int:
        ours.send("start")
        pids.append(ours.recv())
        return pids[-1]

    try:
        yield start
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ours.send("end")
        process.join(20)


def _ask_until(teacher: LiveTeacher, url: str, seed: int, end: float, wrong: list[str], counts: list[int]) -> None:
    """A client: random batches, each answer compared with the teacher's own."""
    draw = random.Random(seed)
    try:
        remote, asked = RemoteTeacher(url, first_patience=60), 0
        while time.monotonic() < end or not asked:
            rows = [[draw.randrange(320) for _ in range(draw.randint(3, 40))] for _ in range(draw.randint(1, 6))]
            batch, labels = batch_of(rows, left=draw.random() < 0.5)
            # A left-padded row is compared with itself alone: rotary positions differ by their rounding
            expected = torch.cat([teacher.states(*batch_of([row])) for row in rows])
            if not torch.allclose(remote.states(batch, labels), expected, rtol=0, atol=2e-5):
                wrong.append(f"client {seed}, question {asked}")
            asked += 1
        counts.append(asked)
    except Exception as error:
        wrong.append(f"client {seed}: {type(error).__name__}: {error}")


def campaign(seed: int, seconds: float, clients: int, kills: int, tmp_path, steps: int) -> list[int]:
    """The clients' numbers of questions, while a training run with the same server goes on; raises where one went wrong."""
    options = {"max_steps": steps, "per_device_train_batch_size": 4}
    local = trainer_for(tmp_path / "local", options=options)
    local.train()
    with running(served_tiny()) as url:  # a port that is free
        port = int(url.rsplit(":", 1)[1])
    draw, wrong, counts = random.Random(seed), [], []
    with servers(port) as start:
        pid, end = start(), time.monotonic() + seconds
        teacher = LiveTeacher(tiny_llama(seed=1, layers=3))  # its seed is the global generator's: not in a thread
        told = [(teacher, url, seed + k, end, wrong, counts) for k in range(clients)]
        threads = [threading.Thread(target=_ask_until, args=one) for one in told]
        for thread in threads:
            thread.start()
        trained = trainer_for(tmp_path / "remote", teacher=RemoteTeacher(url, first_patience=60), options=options)
        training = threading.Thread(target=trained.train)
        training.start()
        for _ in range(kills):
            time.sleep(draw.uniform(0.5, 1.0) * seconds / (kills + 1))
            os.kill(pid, signal.SIGKILL)
            time.sleep(draw.uniform(0, 0.5))
            pid = start()
        for thread in (*threads, training):
            thread.join(seconds + 120)
            assert not thread.is_alive()
    assert not wrong, wrong[:5]
    assert len(counts) == clients
    found, expected = ([log["loss"] for log in one.state.log_history if "loss" in log] for one in (trained, local))
    assert found == pytest.approx(expected, rel=1e-6) and len(found) == steps
    return counts


def test_clients_and_a_run_outlive_a_server_that_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dts_hf.teachers.connection._LONGEST_PAUSE", 0.5)
    assert min(campaign(seed=3, seconds=4, clients=3, kills=2, tmp_path=tmp_path, steps=12)) >= 1


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_eight_clients_for_five_minutes(tmp_path, record_property) -> None:
    seed = random.randrange(1 << 30)
    counts = campaign(seed, seconds=300, clients=8, kills=5, tmp_path=tmp_path, steps=50)
    record_property("campaign", f"8 clients, {sum(counts):,} answers, server killed 5 times (seed {seed})")
    assert min(counts) >= 10


@pytest.mark.soak
def test_two_processes_with_a_remote_teacher_train_as_with_a_local_one(tmp_path) -> None:
    with running(served_tiny()) as url:
        done = run_warm(WORKERS / "remote_worker.py", world=2, args=[str(tmp_path), url, "50"], strategy="ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == 2 and first["remote False"]["weights"] == second["remote False"]["weights"]
    for packing in (False, True):
        live, remote = first[f"live {packing}"], first[f"remote {packing}"]
        assert len(live["losses"]) == 50
        assert remote["losses"] == pytest.approx(live["losses"], rel=1e-6)
        assert remote["temperatures"] == pytest.approx(live["temperatures"], rel=1e-6)
        apart = torch.tensor(live["weights"]) - torch.tensor(remote["weights"])
        assert float(apart.abs().max()) < 1e-5
