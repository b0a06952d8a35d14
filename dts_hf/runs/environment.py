"""What a run was made with: versions, machine, commit, command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dts_hf.console import gb, masked

PACKAGES = (
    "dts-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "bitsandbytes", "deepspeed",
    "evaluate", "gguf", "huggingface_hub", "numpy", "pydantic",
    "torchao",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, machine, commit, command. No environment variable, no token.

    Args:
        device: of the run.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "device": device_name(device),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": installed_packages(),
        "git_commit": _git_commit(),
        "argv": [_public(argument) for argument in sys.argv],
    }


def installed_packages() -> dict[str, str]:
    """The versions of those of ``PACKAGES`` that are there, by name."""
    found = {name: version for name in PACKAGES if (version := installed_version(name))}
    return found | {"torch": str(torch.__version__)}


def device_name(device: torch.device) -> str:
    """What people call ``device``: the card's own name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def where_it_trains(args: TrainingArguments) -> str:
    """One sentence that names the device of the run, and why it is none with a GPU."""
    device, name = args.device, device_name(args.device)
    several = f", {args.world_size} processes with one each" if args.world_size > 1 else ""
    if device.type == "cuda":
        return f"training on {name}, {gb(torch.cuda.get_device_properties(device).total_memory)}{several}"
    if device.type != "cpu":
        return f"training on {name}{several}"
    cards = torch.cuda.device_count()
    if cards:
        why = f"training.use_cpu leaves {torch.cuda.get_device_name(0)} idle"
    elif torch.version.cuda or torch.version.hip:
        why = "no CUDA device is visible"
    else:
        why = f"torch {torch.__version__} is a build without CUDA"
    each = f", {args.world_size} processes" if args.world_size > 1 else ""
    return f"training on the CPU ({torch.get_num_threads()} threads{each}); {why}"


def installed_version(package: str) -> str | None:
    """None where it is not installed, as of a checkout that never was."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the current folder, with ``-dirty`` when tracked files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _public(argument: str) -> str:
    return re.sub(rf"(^|=){re.escape(str(Path.home()))}(?=/)", r"\1~", masked(argument))
