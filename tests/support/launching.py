"""Start a script on several CPU processes (gloo) the way people do: DDP, ZeRO-1/2/3, FSDP2, or one plain one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
#: Tells the script which strategy it runs under; see ``strategy_arguments``.
STRATEGY_VARIABLE = "DTS_TEST_STRATEGY"


def deepspeed_config(stage: int, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for ZeRO ``stage`` on CPU whose numbers all come from ``TrainingArguments``.

    Its thresholds are made for large models: with the usual ones every weight of a tiny model stays whole on every
    process, and one bucket takes all gradients.
    """
    options: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 20_000}
    if stage == 3:
        options |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                    "stage3_gather_16bit_weights_on_model_save": True}  # fmt: skip
    return {
        "zero_optimization": options | zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


def strategy_arguments(strategy: str | None = None) -> dict[str, Any]:
    """What ``TrainingArguments`` need for ``strategy``, by default the one that this process was launched with.

    One process can train under several strategies, one after the other. ``fsdp2`` needs ``training_arguments``.
    """
    for left_behind in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # by the Accelerator of an earlier run
        os.environ.pop(left_behind, None)
    strategy = strategy or os.environ.get(STRATEGY_VARIABLE, "single")
    if strategy == "single":
        return {"use_cpu": True}
    if strategy == "ddp":
        return {"use_cpu": True, "ddp_backend": "gloo"}
    if strategy.startswith("fsdp2"):  # "fsdp2-sharded": checkpoints in pieces
        form = "SHARDED_STATE_DICT" if strategy.endswith("-sharded") else "FULL_STATE_DICT"
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True,
                  "state_dict_type": form}  # fmt: skip
        return {"use_cpu": True, "ddp_backend": "gloo", "fsdp": True, "fsdp_config": config}
    return {"use_cpu": True, "deepspeed": deepspeed_config(int(strategy.removeprefix("zero")))}


def training_arguments(strategy: str | None = None, **values: Any) -> TrainingArguments:
    """``TrainingArguments`` for ``strategy``, FSDP2 on CPU included.

    Accelerate turns FSDP into DDP on a CPU, although ``fully_shard`` works there: it looks at the kind of device alone.
    """
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    strategy = strategy or os.environ.get(STRATEGY_VARIABLE, "single")
    args = TrainingArguments(**values, **strategy_arguments(strategy))
    if strategy == "fsdp2":
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def fsdp_on_cpu() -> None:
    """From now on this process's ``TrainingArguments`` with FSDP get it on a CPU too: see ``training_arguments``."""
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    finish = TrainingArguments.__post_init__

    def post_init(self: TrainingArguments) -> None:
        finish(self)
        if self.fsdp:
            self.distributed_state.distributed_type = DistributedType.MULTI_GPU

    TrainingArguments.__post_init__ = post_init  # type: ignore[method-assign]


def command(
    script: str | Path | Sequence[str], world: int, args: Sequence[str] = (), strategy: str = "single"
) -> list[str]:
    """``script`` is a file, or ``("-m", "dts_hf", "train")``. DeepSpeed needs a launcher even for one process."""
    start = [sys.executable]
    if world > 1 or strategy.startswith(("zero", "fsdp")):
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    return [*start, *([str(script)] if isinstance(script, (str, Path)) else script), *map(str, args)]


def environment(strategy: str = "single", extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a launched process: one thread each, the repository importable, CPU only."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    values = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
              "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", STRATEGY_VARIABLE: strategy}  # fmt: skip
    return values | dict(extra or {})


def leave() -> NoReturn:
    """End a process of several when all is written. Their group is not taken down, and neither is the interpreter.

    Seen twice: a thread of gloo outlived the group, and the interpreter's end became an abort.
    """
    import torch

    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(
    script: str | Path | Sequence[str],
    world: int = 1,
    args: Sequence[str] = (),
    strategy: str = "single",
    env: Mapping[str, str] | None = None,
    timeout: float = 280,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on ``world`` processes (torchrun where there are several) and wait; never raises on a failure.

    Args:
        script: a file, or the words after ``python`` such as ``("-m", "dts_hf", "train")``.
        strategy: one of ``STRATEGIES``; the script asks ``training_arguments()`` for it.
        env: more environment variables.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; no process is left behind.
    """
    process = subprocess.Popen(
        command(script, world, args, strategy), env=environment(strategy, env), cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun gives its workers sessions of their own, and ends them when it is asked to
        process.terminate()
        try:
            process.wait(40)
        finally:
            process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
