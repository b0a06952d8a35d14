"""A loss or a weight that is non-finite (NaN or Inf): no checkpoint is made of it, and training ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dts_hf.errors import RunError
from dts_hf.files import write_json_atomic
from dts_hf.runs.failures import writing

#: A run ends after so many steps in a row whose loss is non-finite.
BROKEN_STEPS = 3


class NonFiniteCallback(TrainerCallback):
    """Counts the steps in a row whose loss is non-finite: nothing is saved after one, and some of them end the run.

    Args:
        stop: takes the step and the numbers of its rows on this rank, and ends the run with an exception; every rank calls
            it at the same step.

    Attributes:
        broken_steps: so many steps in a row were broken, up to now.
        rows_of_step: ``row_id`` of the micro-batches of the step that runs, this rank's; the trainer adds them.
    """

    def __init__(self, stop: Callable[[int, list[int]], None]) -> None:
        self.stop = stop
        self.broken_steps = 0
        self.rows_of_step: list[Tensor] = []

    def observe(self, finite: bool) -> None:
        """Take whether the loss of the step that ends is finite, on all ranks; before ``on_step_end``."""
        self.broken_steps = 0 if finite else self.broken_steps + 1

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.broken_steps = 0

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.rows_of_step.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._do_not_save(control)
        if self.broken_steps >= BROKEN_STEPS:
            self.stop(state.global_step, torch.cat(self.rows_of_step).tolist() if self.rows_of_step else [])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._do_not_save(control)  # save_strategy epoch asks again, after on_step_end

    def _do_not_save(self, control: TrainerControl) -> None:
        if self.broken_steps:  # the weights may be broken: the last good checkpoint stays the newest
            control.should_save = False


def stop_non_finite_run(folder: Path, step: int, rank: int, rows: Sequence[int], names: Sequence[str] | None) -> None:
    """Write down which rows the step was made of, and end training; every rank calls it at the same step.

    Args:
        folder: the run directory.
        step: the last of the optimizer steps whose loss was non-finite.
        rank: of this process, which writes a file of its own.
        rows: numbers of its rows in that step; those below 0 are no rows of the data.
        names: the id of each row of the data; None: they have none.

    Raises:
        RunError: always.
    """
    listed = [{"row": row, "id": names[row] if names else None} for row in rows if row >= 0]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # of a machine whose processes write nothing else
        write_json_atomic(folder / f"broken_step-{step}.rank{rank}.json", {"step": step, "rows": listed})
    raise RunError(
        f"step {step}: the loss has been non-finite (NaN or Inf) for {BROKEN_STEPS} steps in a row, so training stops; "
        f"its rows are in {folder / f'broken_step-{step}.rank*.json'}. The newest checkpoint is from before. Usual "
        "causes: a learning rate too high, fp16 without a loss scale, broken rows, -inf logits (a masked vocabulary "
        "entry, a bias of -inf)",
        everywhere=True,
    )


def check_weights(model: nn.Module, accelerator: Any, step: int) -> None:
    """A finite loss can have a gradient that is not; such weights are no good checkpoint. All ranks call it.

    Raises:
        RunError: a weight that is trained is non-finite, on any rank.
    """
    # A sum over a weight is non-finite where one of its numbers is: one number a weight, and no mask of its size.
    sums = [local_shard(p).detach().sum(dtype=torch.float32) for p in model.parameters() if p.requires_grad]
    finite = torch.stack(sums).isfinite().all() if sums else torch.ones((), dtype=torch.bool)
    if not bool(accelerator.gather(finite.reshape(1).to(accelerator.device)).all()):
        raise RunError(
            f"step {step}: the student has non-finite weights, so it is not saved and "
            "training stops. The newest checkpoint is from before. Usual causes: a learning rate too high, fp16 "
            "without a loss scale",
            everywhere=True,
        )


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a weight that ZeRO-3 or FSDP2 has split, else all of it."""
    if hasattr(parameter, "ds_tensor"):
        part: Tensor = parameter.ds_tensor
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        # Parts are of one size; what the last one has too much was never written to.
        return part[: max(0, parameter.ds_numel - rank * part.numel())]  # type: ignore[attr-defined]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
