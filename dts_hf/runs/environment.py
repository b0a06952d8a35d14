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

from dts_hf.console import masked

PACKAGES = (
    "dts-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "bitsandbytes", "deepspeed",
    "evaluate", "gguf", "huggingface_hub", "numpy", "pydantic",
    "torchao",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, machine, commit, command. No environment variable, no token."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": _git_commit(),
        "argv": [_public(argument) for argument in sys.argv],
    }


def _version(package: str) -> str | None:
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
