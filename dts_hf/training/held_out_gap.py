"""The gap on held-out rows, for a temperature that asks for it: ``gap_source: held_out``.

On rows that training has seen before, student CE - teacher CE says how well the student knows them by heart: it turns
negative, and a rule that follows it is left with its schedule. Rows that are held out keep the sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from dts_hf.data.samplers import SomeRows
from dts_hf.data.streams import RowStream
from dts_hf.errors import UserError
from dts_hf.temperature.base import Probe


class HeldOutGapCallback(TrainerCallback):
    """Has the gap measured before the first optimizer step and after every ``every``-th, on all ranks alike.

    It is measured before the checkpoint of that step is written, so a resume has it from there. The last step is no
    occasion: no temperature would follow.

    Args:
        probe: what the policy wants now; None: nothing.
        measure: measures it, and tells the policy; every rank calls it.
    """

    def __init__(self, probe: Callable[[], Probe | None], measure: Callable[[Probe], None]) -> None:
        self.probe, self.measure = probe, measure

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and (probe := self.probe()) is not None:
            self.measure(probe)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        probe = self.probe()
        if probe is not None and state.global_step % probe.every == 0 and state.global_step < state.max_steps:
            self.measure(probe)


def rows_of_probe(held_out: Any, probe: Probe) -> SomeRows:
    """The rows on which the gap is measured, the same ones in every run and on every rank.

    Args:
        held_out: the trainer's ``eval_dataset``, as its data loaders take it.
        probe: how many.

    Raises:
        UserError: there are none, or none that can be chosen from.
    """
    found = "none"
    if isinstance(held_out, dict):
        found = f"several sets of them ({', '.join(map(str, held_out))})"
    elif isinstance(held_out, RowStream):
        found = "a stream of them, which has no number"
    elif held_out is not None and len(held_out):
        return SomeRows(held_out, probe.rows)
    raise UserError(
        f"temperature.gap_source: got held_out, but of held-out rows there are {found}; expected one set of rows that can "
        "be counted (data.validation in a recipe, eval_dataset of a trainer), or gap_source measured"
    )
