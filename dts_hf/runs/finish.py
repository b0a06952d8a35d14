"""What every kind of run needs besides its models: words for the terminal, its memory, the way to the Hub."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

from dts_hf.console import say
from dts_hf.runs.checkpoints import INTERRUPTED
from dts_hf.runs.directory import BROKEN_STEP_FILES
from dts_hf.runs.environment import peak_memory_gb

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dts_hf.recipe.schema import Recipe
    from dts_hf.runs.directory import RunDirectory
    from dts_hf.training.trainer import DistillationTrainer


def training_facts(trainer: DistillationTrainer, started: float) -> dict[str, Any]:
    """What ``metrics.json`` says of the training itself.

    Args:
        started: monotonic seconds at which this process began.
    """
    return {
        "steps": trainer.state.global_step,
        "seconds": round(trainer.training_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "tokens": int(trainer.tokens_seen),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }


def close_run(recipe: Recipe, run: RunDirectory, trainer: DistillationTrainer) -> RunDirectory:
    """The last things, once ``metrics.json`` and ``final/`` are there: report, card, upload; all processes call it."""
    if trainer.is_world_process_zero():
        clean_up(run)
        if recipe.output.report:
            from dts_hf.reporting.report import write_report

            write_report(run)
    if trainer.args.push_to_hub:
        push(trainer, run)
    return run


def clean_up(run: RunDirectory) -> None:
    """Remove what only an unfinished run needs."""
    run.scores_path.unlink(missing_ok=True)
    for broken in run.path.glob(BROKEN_STEP_FILES):
        broken.unlink(missing_ok=True)
    shutil.rmtree(run.path / INTERRUPTED, ignore_errors=True)


def end_early(recipe: Recipe, args: TrainingArguments) -> RunDirectory:
    """A run that is done already: its report is written where it is still missing. Nothing is uploaded: it says how."""
    from dts_hf.runs.directory import RunDirectory

    run = RunDirectory.open(recipe.output.dir)
    if args.process_index == 0:
        clean_up(run)
    if args.process_index == 0 and recipe.output.report and not run.report_path.is_file():
        from dts_hf.reporting.report import write_report

        write_report(run)
    if args.process_index == 0 and args.push_to_hub:
        repository = args.hub_model_id or run.path.resolve().name
        words = "" if args.hub_private_repo is False else "--private "
        say(
            f"training.push_to_hub: unless it was uploaded, do it with: hf upload {words}{repository} {run.final_path}"
        )
    return run


def push(trainer: DistillationTrainer, run: RunDirectory) -> None:
    """Upload ``final/`` with the card of the run, through the trainer's own ``push_to_hub``."""
    from dts_hf.reporting.model_card import render_model_card

    def save_model(*args: Any, **kwargs: Any) -> None:
        """Instead of saving the student once more: final/ is whole, merged and there."""
        if trainer.is_world_process_zero():
            shutil.copytree(run.final_path, str(trainer.args.output_dir), dirs_exist_ok=True)

    trainer.model_card = lambda: render_model_card(run)
    trainer.save_model = save_model  # type: ignore[method-assign]
    trainer.push_to_hub()
