"""What every kind of run needs besides its models: words for the terminal, its memory, the way to the Hub."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dts_hf.run_directory import RunDirectory
    from dts_hf.trainer import DistillationTrainer


def say(text: str) -> None:
    """Print to stderr: stdout belongs to what a command returns."""
    print(text, file=sys.stderr, flush=True)


def peak_memory_gb() -> float:
    """High-water mark of this process: resident memory, plus the GPU's where there is one, in GB (1e9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return (resident + on_gpu) / 1e9


def push(trainer: DistillationTrainer, run: RunDirectory) -> None:
    """Upload the student with its card through the Trainer's own ``push_to_hub``, from ``final/``."""
    from dts_hf.reporting.model_card import render_model_card

    trainer.model_card = lambda: render_model_card(run)
    trainer.args.output_dir = str(run.final_path)
    trainer.push_to_hub()
