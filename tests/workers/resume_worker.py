"""What each process of test_resume.py runs: one life of a run, ended by itself or by a kill -9.

Lives are children of the warm fork server, so that they start in no time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from dts_hf.distill import distill
from dts_hf.errors import Interrupted, UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.training.temperature_callback import TemperatureCallback
from tests.support.launching import fsdp_on_cpu, strategy_arguments
from tests.support.tiny import tiny_gpt2, tiny_tokenizer
from tests.support.warm import fork_server, free_port

ROOT = Path(__file__).resolve().parents[2]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def prepare(folder: Path, rows: int = 24) -> None:
    """Models (a student with dropout) and rows."""
    student = tiny_gpt2(seed=3, layers=2)
    student.config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    student.save_pretrained(folder / "student")
    tiny_gpt2(seed=0, layers=3).save_pretrained(folder / "teacher")
    for name in ("student", "teacher"):
        tiny_tokenizer().save_pretrained(folder / name)
    words = ["apples", "and pears", "grow on trees", "in the past", "two horses"]
    made = [
        {"id": f"r{i}", "instruction": "Name" + " it" * (i % 4), "input": "", "output": " ".join(words[: 1 + i % 5])}
        for i in range(rows + 4)
    ]
    for name, part in (("train", made[:rows]), ("valid", made[rows:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def recipe(output: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Ten steps, less than two epochs; log lines, evaluations and checkpoints come at different steps."""
    values: dict[str, Any] = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "plain", "max_length": 48,
                 "max_prompt_length": 24},
        "temperature": {"name": "ctkd", "ramp": 0.1, "learning_rate": 0.3},
        "training": {"use_cpu": True, "max_steps": 10, "logging_steps": 3, "per_device_train_batch_size": 2,
                     "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "warmup_steps": 2, "save_strategy": "steps",
                     "save_steps": 5, "save_total_limit": 2, "eval_strategy": "epoch", "disable_tqdm": True},
        "evaluation": {"rows": 2, "max_new_tokens": 3, "every_steps": 4},
        "output": {"dir": output, "report": False},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


# ------------------------------------------------------------------------------------------------------ in the parent


class Life:
    """One start of a run on ``world`` processes."""

    def __init__(
        self, folder: Path, values: dict[str, Any], world: int = 1, strategy: str = "single", **how: Any
    ) -> None:
        context = fork_server()
        port = free_port()
        self.output = folder / f"{Path(values['output']['dir']).name}.out"
        self.processes = [
            context.Process(target=_live, args=(folder, values, rank, world, port, strategy, how), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """kill -9, all of its processes."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit codes, -9 where killed."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0.01))
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def says(self) -> str:
        return "".join(path.read_text() for path in sorted(self.output.parent.glob(f"{self.output.name}.*")))


# --------------------------------------------------------------------------------------------------- in the child


def _live(folder: Path, values: dict[str, Any], rank: int, world: int, port: int, strategy: str, how: dict) -> None:
    os.chdir(folder)
    output = open(f"{Path(values['output']['dir']).name}.out.{rank}", "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if world > 1 or strategy.startswith(("zero", "fsdp")):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
        values["training"] |= strategy_arguments(strategy)
    if strategy.startswith("fsdp2"):
        fsdp_on_cpu()
    _arm(**how)
    try:
        distill(Recipe.from_dict(values), resume=how.get("resume", False))
    except UserError as error:
        print(f"Error: {error}", flush=True)
        os._exit(2)
    except Interrupted as error:
        print(f"Stopped: {error}", flush=True)
        os._exit(75)
    sys.stdout.flush()
    os._exit(0)


def _arm(kill_at_step: int | None = None, kill_at_write: int | None = None, signal_at_step: int | None = None,
         kill_at_end: bool = False, kill_in: str | None = None, **rest: Any) -> None:  # fmt: skip
    """Die when a step begins, while a checkpoint is written or removed, or when training is over; or get a SIGTERM, on
    the last process, as a step ends."""
    if kill_at_end:
        TemperatureCallback.on_train_end = lambda *args, **kwargs: _die()  # type: ignore[method-assign]
    if kill_in is not None:
        _die_in(kill_in)
    if kill_at_step is not None:
        begin = TemperatureCallback.on_step_begin

        def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == kill_at_step:
                _die()
            begin(self, args, state, control, **kwargs)

        TemperatureCallback.on_step_begin = on_step_begin  # type: ignore[method-assign]
    if kill_at_write is not None:
        _count_writes(kill_at_write)
    if signal_at_step is not None:
        end = TemperatureCallback.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == signal_at_step and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            end(self, args, state, control, **kwargs)

        TemperatureCallback.on_step_end = on_step_end  # type: ignore[method-assign]


def _count_writes(kill_at: int) -> None:
    """Inside a checkpoint write, rotation or removal: before the ``kill_at``th change of a file (0 is the first)."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "shutil.rmtree") and "checkpoint-" in str(args[0]):
            if event == "open" and isinstance(args[1], str) and args[1].startswith("r"):
                return
            count += 1
            if count > kill_at:
                _die()

    sys.addaudithook(hook)


def _die_in(call: str) -> None:
    """Leave half of a file of checkpoint 4 (``fsync``) or, when 10 replaces it, of checkpoint 8 (``rmtree``)."""

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "checkpoint-4" in path and path.endswith("model.safetensors"):
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    def rmtree(folder: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(folder):
            next(path for path in sorted(Path(folder).iterdir()) if path.is_file()).unlink()
            _die()
        whole(folder, *args, **kwargs)

    whole = shutil.rmtree
    if call == "fsync":
        os.fsync = fsync
    else:
        shutil.rmtree = rmtree  # type: ignore[assignment]


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
