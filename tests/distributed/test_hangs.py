"""What is set and said so that a process that does not answer is found."""

from __future__ import annotations

import os
import re
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from dts_hf.distributed import launch, processes
from dts_hf.distributed.launch import watch_collectives
from dts_hf.distributed.processes import silent_processes
from dts_hf.runs.failures import has_no_answer, lost_peer_sentence
from dts_hf.training.silence import SilenceCallback


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, without what an earlier test or launcher has set."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    monkeypatch.setattr(os, "environ", found)
    return found


@pytest.mark.parametrize(
    ("version", "size", "file"),
    [
        ("2.13.0+cpu", "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
        ("2.6.0", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
    ],
)
def test_ncclls_watchdog_and_flight_recorder_are_on(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, size: str, file: str
) -> None:
    monkeypatch.setattr(launch.torch, "__version__", version)
    variables |= {"WORLD_SIZE": "2", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60"}
    watch_collectives(tmp_path / "run")
    assert {name: value for name, value in variables.items() if name.startswith("TORCH_")} == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60",  # the user's
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        size: "2000",
        file: str(tmp_path / "run" / "collectives.rank"),
    }


def test_one_process_needs_none(variables: dict[str, str], tmp_path: Path) -> None:
    variables["WORLD_SIZE"] = "1"
    watch_collectives(tmp_path)
    assert not [name for name in variables if name.startswith("TORCH_")]


@pytest.mark.parametrize(("alive", "silent"), [([0, 2], [1]), ([0], []), ([0, 1, 2], [])])
def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch, alive: list[int], silent: list[int]) -> None:
    """Where nobody but this process leaves word, the store may be the one that is gone."""
    store: Any = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "process", lambda: (0, 3))
    monkeypatch.setattr(processes, "SECONDS_TO_ANSWER", 0.3)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for rank in alive[1:]:
        monkeypatch.setattr(processes, "process", lambda rank=rank: (rank, 3))
        assert silent_processes(look=False) == []
    monkeypatch.setattr(processes, "process", lambda: (0, 3))
    assert silent_processes(look=True) == silent


def test_of_two_it_is_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "process", lambda: (1, 2))
    assert silent_processes(look=True) == [0]


@pytest.mark.parametrize(
    ("text", "ranks", "said"),
    [
        ("Timed out waiting 6000ms for send operation to complete", [1], "process 1 has not answered for 6 s"),
        ("Timed out waiting 600500ms for recv", [1, 2], "process 1 and process 2 have not answered for 600.5 s"),
        (
            "Watchdog caught collective operation timeout: x",
            [],
            "another process of this run has not answered in time",
        ),
        ("Connection closed by peer [::1]", [3], "process 3 has ended after step 7"),
    ],
)
def test_what_is_said_of_it(text: str, ranks: list[int], said: str) -> None:
    error = RuntimeError(text)
    sentence = lost_peer_sentence(error, ranks, 7)
    assert sentence.startswith(said) and " after step 7, so this one cannot go on" in sentence
    assert has_no_answer(error) == ("not answered" in said)


def test_silence_is_noted_once_and_ends_with_training(capsys: pytest.CaptureFixture[str]) -> None:
    args: Any = SimpleNamespace(ddp_timeout=0.2, process_index=3, ddp_timeout_delta=timedelta(seconds=0.2))
    callback, state, control = SilenceCallback(), TrainerState(), TrainerControl()
    callback.on_step_begin(args, state, control)
    state.global_step = 5
    callback.on_step_end(args, state, control)
    end = time.monotonic() + 10
    said = ""
    while not re.search(
        "process 3: nothing has happened for [0-9]+ s, after step 5; a collective", said
    ):  # a busy machine
        assert time.monotonic() < end, said
        time.sleep(0.02)
        said += capsys.readouterr().err
    time.sleep(0.3)
    assert (said + capsys.readouterr().err).count("after step 5") == 1
    callback.on_train_end(args, state, control)
    (watch,) = [thread for thread in threading.enumerate() if thread.name == "silence"] or [None]
    if watch is not None:
        watch.join(5)
        assert not watch.is_alive()
