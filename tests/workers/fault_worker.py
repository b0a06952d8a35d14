"""One life of a run for test_faults.py: the real command line on tiny models, in a process forked from a warm one.

Faults are timed by *gates*: at a given moment the process writes a file ``reached.RANK`` and waits until ``go`` is there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from dts_hf.errors import UserError
from dts_hf.language_modeling import scorer
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.runs import stopping
from dts_hf.temperature.constant import Constant
from dts_hf.training.trainer import DistillationTrainer


def life(folder: str, argv: list[str], variables: dict[str, str], faults: dict[str, Any]) -> None:
    """``dts-hf ARGV`` in ``folder``; what it prints goes to ``err.RANK`` and ``out.RANK``.

    Args:
        variables: of the environment, such as RANK and WORLD_SIZE.
        faults: see ``_provoke``.
    """
    if os.getsid(0) != os.getpid():
        os.setpgid(0, 0)  # a signal to the group of this run must not reach the tests
    # A shell that starts the tests in the background hands SIGINT down as ignored, and torchrun's agent its own handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # for data loaders: that of the tests would stay in force
    os.chdir(folder)
    os.environ.update(variables)
    rank = os.environ.get("RANK", "0")
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    _provoke(faults, rank)
    from dts_hf.__main__ import main  # loads what reads RANK when it is imported

    sys.argv = ["dts-hf", *argv]
    main()


def _provoke(faults: dict[str, Any], rank: str) -> None:
    """Plant what ``faults`` asks for: name -> value, for this rank."""
    stopping.SAME_REQUEST_SECONDS = faults.get("same_request", stopping.SAME_REQUEST_SECONDS)
    if "fsdp2" in faults:  # accelerate makes DDP of it on a CPU, although fully_shard works there
        _before(importlib.import_module("dts_hf.runs.start"), "check_launch", lambda *_: True, _as_on_gpus)
    if "only" in faults and faults["only"] != rank:
        return
    if "wrong" in faults:  # input that cannot be used, found so many seconds after the processes are joined
        line = importlib.import_module("dts_hf.distill")  # the attribute of the package is the function
        _before(line, "load_tokenizers", lambda *_: True, lambda *_: _refuse(faults["wrong"]))
    if "step" in faults:  # a gate in the forward pass after so many steps
        _before(DistillationTrainer, "training_step", lambda self: self.state.global_step == faults["step"], _gate)
    if "scoring" in faults:  # a gate before the answers of `scoring`, counted from 1
        calls: list[None] = []
        _before(scorer, "evaluate_instruct", lambda *_: calls.append(None) or len(calls) == faults["scoring"], _gate)
    if "bug" in faults:  # a bug that only this process meets, in the step after so many
        _before(DistillationTrainer, "training_step", lambda self: self.state.global_step == faults["bug"], _fail)
    if "deaf_step" in faults:  # blocked in C, as in a collective on a GPU: no Python runs in the main thread
        _before(
            DistillationTrainer, "training_step", lambda self: self.state.global_step == faults["deaf_step"], _block
        )
    if "weights" in faults:  # no number from this step on
        _before(DistillationTrainer, "training_step", lambda self: self.state.global_step >= faults["weights"], _break)
    if "update" in faults:  # the update of this step breaks the weights, its loss is finite
        _before(
            DistillationTrainer, "_maybe_log_save_evaluate", lambda self: self.state.global_step == faults["update"], _break
        )  # fmt: skip
    if "file_size" in faults:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_size"], resource.RLIM_INFINITY))


def _before(owner: Any, name: str, when: Callable[..., bool], action: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if when(*args[:1]):
            action(*args[:1])
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _as_on_gpus(args: TrainingArguments) -> None:
    assert args.distributed_state is not None
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU


def _refuse(seconds: dict[str, float]) -> None:
    time.sleep(seconds[os.environ["RANK"]])
    raise UserError("teacher.model: not here")


def _fail(*_: Any) -> None:
    _gate()
    raise ZeroDivisionError("a bug")


def _gate(*_: Any) -> None:
    _reached()
    while not Path("go").exists():
        time.sleep(0.01)


def _block(*_: Any) -> None:
    import ctypes

    _reached()
    libc = ctypes.CDLL(None)
    until = time.monotonic() + 300
    while time.monotonic() < until:
        libc.sleep(300)


def _reached() -> None:
    Path(f"reached.{os.environ.get('RANK', '0')}").touch()


def _break(trainer: DistillationTrainer) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(float("nan"))


def starved(folder: str) -> None:
    """The loss of 2,048 rows and 32,000 tokens, where 150 MB are left for logits of 524 MB; writes ``starved.json``."""
    os.chdir(folder)
    os.dup2(os.open("err.0", os.O_WRONLY | os.O_CREAT), 2)
    torch.manual_seed(0)
    states, teacher = torch.randn(2048, 8, requires_grad=True), torch.randn(2048, 8)
    head, targets = Head(torch.randn(32_000, 8)), torch.randint(32_000, (2048,))

    def loss_of(budget: float) -> tuple[DistillationLoss, torch.Tensor, torch.Tensor]:
        loss_fn = DistillationLoss("forward_kl", temperature=Constant(2.0), logits_budget_mb=budget)
        loss = loss_fn(states, head, teacher, head, targets, 2048.0).loss
        (gradient,) = torch.autograd.grad(loss, states)
        return loss_fn, loss.detach(), gradient

    _, wanted, wanted_gradient = loss_of(32)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (150 << 20), resource.RLIM_INFINITY))
    loss_fn, loss, gradient = loss_of(512)
    error = float((gradient - wanted_gradient).norm() / wanted_gradient.norm())
    found = {"budget": loss_fn.logits_budget_mb, "loss": float(loss), "wanted": float(wanted), "gradient_error": error}
    Path("starved.json").write_text(json.dumps(found))


def agent(folder: str, world: int, argv: list[str], faults: dict[str, Any]) -> None:
    """What torchrun and ``accelerate launch`` are: torch's agent, here over processes forked from this warm one.

    It starts ``world`` of them, looks after them, and ends them all when one fails. What it says goes to ``err.agent``.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setpgid(0, 0)
    os.dup2(os.open(f"{folder}/err.agent", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world, run_id=Path(folder).name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, launched)(folder, json.dumps(argv), json.dumps(faults))


def launched(folder: str, argv: str, faults: str) -> None:
    """One process of several under a launcher: it also writes ``pid.RANK`` and, at the end, ``status.RANK``."""
    rank = os.environ["RANK"]
    Path(folder, f"pid.{rank}").write_text(str(os.getpid()))
    leave = os._exit

    def exits(status: int) -> None:
        Path(folder, f"status.{rank}").write_text(str(int(status)))
        leave(status)

    os._exit = exits  # type: ignore[assignment]
    life(folder, json.loads(argv), {}, json.loads(faults))


if __name__ == "__main__":
    launched(*sys.argv[1:])
