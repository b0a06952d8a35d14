"""How a run is distributed over processes: its strategy by name, and launches that would not be what they claim."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from dts_hf.errors import UserError

#: Every way in which a run can be distributed over processes.
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# Who says how many processes belong together, the best informed first: torchrun, Open MPI, MPICH, MVAPICH, srun.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LAUNCH = "torchrun --nproc_per_node {processes} -m dts_hf train RECIPE.yaml"


def strategy_of(accelerator: Any) -> str:
    """One of ``STRATEGIES`` for the ``accelerator`` of a Trainer (``check_launch`` has refused everything else)."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"zero{stage}" if stage else "ddp"
    if kind == "FSDP":
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def check_launch(args: TrainingArguments) -> None:
    """Refuse a launch that got fewer processes than it asked for, or another wrapper. Call it before models are loaded.

    ``accelerate launch --cpu --num_processes 2`` runs one process and says nothing; ``srun python -m dts_hf`` runs
    several that do not know each other and write into one folder; on a CPU accelerate takes an FSDP config and runs DDP.

    Raises:
        UserError: with the line that launches it right.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel cannot carry this loss. Launch one "
            f"process per GPU: accelerate launch --num_processes {args.n_gpu} -m dts_hf train RECIPE.yaml; or show this one "
            "a single GPU: CUDA_VISIBLE_DEVICES=0, set before torch is imported"
        )
    got, (asked, variable) = args.world_size, _asked_for()
    if got < asked:
        hint = f"Start it with: {_LAUNCH.format(processes=asked)}"
        if "LOCAL_RANK" in os.environ and not args.use_cpu and not torch.accelerator.is_available():
            hint = "There is no GPU here: add training.use_cpu=true"
        raise UserError(f"launch: {variable} asks for {asked} processes, but this one runs alone. {hint}")
    if asked == 0 and got == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "launch: accelerate launch was asked for several processes (it set MASTER_ADDR) and started one, as it does "
            f"on a CPU. Start them with: {_LAUNCH.format(processes='N')}; if one is what you want: dts-hf train RECIPE.yaml"
        )
    if getattr(args, "deepspeed_plugin", None) is not None and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"launch: DeepSpeed needs a launcher, also for one process. Start it with: {_LAUNCH.format(processes=1)}"
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _check_fsdp(args)


def _check_fsdp(args: TrainingArguments) -> None:
    if args.distributed_state is not None and args.distributed_state.distributed_type.value == "MULTI_CPU":
        raise UserError(
            "launch: FSDP was asked for, but on a CPU accelerate runs DDP instead; expected GPUs, or ZeRO-3 "
            "(recipes/accelerate/zero3.yaml), which works on both"
        )
    version = (args.fsdp_plugin_args or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
    if str(version) != "2":
        raise UserError(
            f"launch: fsdp_version: got {version}, expected 2 (recipes/accelerate/fsdp2.yaml): version 1 flattens the "
            "weights, so the loss could not read the head"
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError(
            "launch: fsdp_cpu_ram_efficient_loading: got true, expected false: models are read in full on every process, "
            "checked there, and then sharded"
        )
    form = (args.fsdp_plugin_args or {}).get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", "")
    if form == "FULL_STATE_DICT" and args.optim == OptimizerNames.SGD and args.save_strategy != SaveStrategy.NO:
        raise UserError(
            "launch: fsdp_state_dict_type: got FULL_STATE_DICT with training.optim sgd, which has no state: torch cannot "
            "read such a checkpoint back; expected SHARDED_STATE_DICT, another optimizer, or training.save_strategy: 'no'"
        )


def watch_collectives(folder: str | os.PathLike[str]) -> None:
    """Have a collective of NCCL that hangs ended and written down. Call it before the processes are joined.

    Torch's defaults of today, some of which were off in the versions before; what the environment says counts.

    Args:
        folder: gets the file of each process that its flight recorder writes, ``collectives.rank0`` and so on.
    """
    if _asked_for()[0] < 2:
        return
    new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)  # torch warns of the other name
    size, file = (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
        if new
        else ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    )
    for name, value in {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # the watchdog ends a process whose collective is not done in time ...
        "TORCH_NCCL_ENABLE_MONITORING": "1",  # ... a monitor one whose watchdog hangs itself ...
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # ... and the last collectives are written to a file before
        size: "2000",
        file: os.path.join(os.path.abspath(folder), "collectives.rank"),
    }.items():
        os.environ.setdefault(name, value)


def limit_joining(seconds: float) -> None:
    """Let no process wait for longer than ``seconds`` for the others to join it: on a CPU transformers leaves it at 1800.

    Call it before the processes are joined.
    """
    if _asked_for()[0] > 1 and torch.distributed.is_available():
        collectives: Any = torch.distributed.distributed_c10d
        collectives.default_pg_timeout = timedelta(seconds=seconds)


def limit_waiting(args: TrainingArguments) -> None:
    """Let no collective on a CPU wait for longer than ``args.ddp_timeout``: transformers hands it on for GPUs alone."""
    if args.world_size > 1 and args.device.type == "cpu" and torch.distributed.is_initialized():
        collectives: Any = torch.distributed.distributed_c10d
        collectives._set_pg_timeout(args.ddp_timeout_delta)
        collectives.default_pg_timeout = args.ddp_timeout_delta  # of groups that are made later, as DeepSpeed's


def _asked_for() -> tuple[int, str]:
    """(processes, the variable that says so); (0, "") where nothing does."""
    for name in _WORLD_SIZES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]), name
    return 0, ""


def prepare_deepspeed(args: TrainingArguments, model: nn.Module) -> None:
    """Make DeepSpeed fit ``model``, quiet, and free of a compiler on a CPU. Call it before ``Trainer()``.

    Accelerate imports DeepSpeed wherever it is installed, used or not, and its log and its prints would go into
    ``--json``. Its shared-memory collectives for CPUs take a C++ compiler and a minute; only tensor-parallel inference
    calls them.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return
    with contextlib.redirect_stdout(sys.stderr):  # its logger keeps the stream that is stdout while it is imported
        # ``import deepspeed.comm.torch as x`` would give torch itself: the package has an attribute of that name.
        collectives = importlib.import_module("deepspeed.comm.torch")
    if args.device.type == "cpu":
        collectives.build_shm_op = lambda: None  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        config = plugin.hf_ds_config.config
        config["zero_optimization"] = zero_options(model, plugin.zero_stage) | config.get("zero_optimization", {})


def zero_options(model: nn.Module, stage: int) -> dict[str, Any]:
    """What DeepSpeed's configuration leaves out, made for ``model``; "auto" is filled from its hidden size by transformers.

    DeepSpeed's own numbers are meant for 100 billion weights: with them a student of a billion stays unsharded on every
    process under ZeRO-3, and a bucket takes 2 GB.
    """
    if stage < 3:
        return {"reduce_bucket_size": "auto"}
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        # How many weights may stay gathered after use: a tenth of the student.
        "stage3_max_live_parameters": parameters // 10,
        "stage3_max_reuse_distance": parameters // 10,
    }
