"""The temperature moves: once before and once after every optimizer step, on all ranks alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from dts_hf.errors import UserError
from dts_hf.loss.logged_sums import StepSums, SumMeter, Totals
from dts_hf.loss.statistics import BYTES, CE, KD, ROWS
from dts_hf.temperature.base import TemperaturePolicy
from dts_hf.training.signals import asked_to_stop

logger = logging.getLogger(__name__)
#: In the reduction of a step: how many processes were asked to stop.
STOP_ASKED = "stop_asked"


class TemperatureCallback(TrainerCallback):
    """``begin_step`` before every optimizer step, one reduction over ranks and ``end_step`` after it.

    The statistics are those of all micro-batches of all ranks, so every rank computes the same temperature and the
    schedule does not depend on how a step was split.

    Args:
        policy: the temperature.
        sums: takes the totals of each step.
        totals_of_step: reduces the sums of the step over all ranks; every rank calls it.
        prepare_run: takes the step at which training starts and the steps of the whole run, before the first of them.
        agree_to_stop: takes whether any rank was asked to stop, at the end of each step.
        observe_loss: takes whether the loss of a step with labels is finite, at its end.
        generated_step: whether the rows of the step are text of the student's own.
        own_labels: whether that text is its labels, too: the gap is then another quantity than on data, and a policy that
            is not for ``any_text`` holds.
    """

    def __init__(
        self,
        policy: TemperaturePolicy,
        sums: StepSums,
        *,
        totals_of_step: Callable[[], Totals],
        prepare_run: Callable[[int, int], None],
        agree_to_stop: Callable[[bool], None],
        observe_loss: Callable[[bool], None],
        generated_step: Callable[[], bool] = lambda: False,
        own_labels: Callable[[], bool] = lambda: True,
    ) -> None:
        self.policy, self.sums = policy, sums
        self.totals_of_step, self.prepare_run = totals_of_step, prepare_run
        self.agree_to_stop, self.observe_loss = agree_to_stop, observe_loss
        self.generated_step, self.own_labels = generated_step, own_labels
        self.unlabelled_steps = 0  # since ``train`` was called

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.unlabelled_steps = 0
        self.prepare_run(state.global_step, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.sums.step_meter = SumMeter()  # a step that an exception broke off has left its sums
        self.policy.holding = self.generated_step() and self.own_labels() and not self.policy.any_text
        self.policy.begin_step(state.global_step / max(state.max_steps, 1))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        # 1. One reduction. One signalled process stops all, at this step: what each knows travels with the sums.
        asked = torch.full((), float(asked_to_stop() is not None), device=args.device)
        self.sums.step_meter.add({STOP_ASKED: asked})
        totals = self.totals_of_step()
        self.agree_to_stop(totals.pop(STOP_ASKED) > 0)
        if not totals or not totals[ROWS]:  # no label in the whole step: nothing was learned, nor about the gap
            self.unlabelled_steps += 1
            if self.unlabelled_steps == 1 and state.is_world_process_zero:
                logger.warning("step %d: none of its rows has a label, so it teaches nothing", state.global_step)
            return
        # 2. What was in force in the step that ends here goes into the log, before the policy moves on.
        totals.add_policy_values({"temperature_cosine": self.policy.cosine, **self.policy.log_values()})
        self.sums.mean_log.add(totals.of_generated_text() if self.generated_step() else totals)
        # 3. The policy sees the means of the whole step. One in which a teacher with another tokenizer has no byte in common
        #    has no gap, and the 0 that its sums give would be taken for a student that has caught up.
        if not self.policy.holding and totals.get(BYTES) != 0:
            self.policy.end_step(totals.step_stats())
        self.observe_loss(math.isfinite(totals[CE.sum]) and math.isfinite(totals[KD.sum]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        # An iterable data set is not seen whole before. What a resume goes on from has been trained.
        if 0 < self.unlabelled_steps == state.global_step:
            raise UserError(
                f"train_dataset: none of the rows of {self.unlabelled_steps:,} steps has a label, so nothing was trained; "
                "expected labels other than -100",
                everywhere=True,
            )
