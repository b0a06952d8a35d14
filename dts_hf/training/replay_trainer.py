"""``ReplayTrainer``: mixed data whose share follows the held-out loss, and whose texts are learned from again (DistiLLM)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.routes import TEACHER
from dts_hf.data.teacher_context import TEACHER_IDS, TEACHER_LABELS
from dts_hf.distributed.launch import strategy_of
from dts_hf.distributed.processes import on_any_process
from dts_hf.errors import UserError
from dts_hf.loss.selection import sequence_numbers
from dts_hf.loss.statistics import REPLAYED_TEXTS
from dts_hf.on_policy.adaptive import AdaptiveFraction, Branch
from dts_hf.on_policy.coin import coin
from dts_hf.on_policy.replay import ReplayBuffer, ReplayRow, most_bytes, share_of_capacity
from dts_hf.on_policy.rollout import Row, prompt_length
from dts_hf.on_policy.vllm_rollouts import VllmRollouts, check_installed
from dts_hf.on_policy.vllm_server import VllmServer
from dts_hf.on_policy.whole_weights import check_has_whole_weights
from dts_hf.runs.checkpoints import read_complete
from dts_hf.teachers.several import SeveralTeachers, Share, blank_shares, shares_of
from dts_hf.training.exact_resume import ExtraState, Progress
from dts_hf.training.on_policy_trainer import OnPolicyTrainer

logger = logging.getLogger(__name__)
#: In a batch of generated or replayed rows: their numbers in the buffer, one for each row; -1: it is not in it.
REPLAY = "replay_numbers"


class ReplayTrainer(OnPolicyTrainer):
    """An ``OnPolicyTrainer`` with ``on_policy.adaptive`` and ``on_policy.backend``.

    Args:
        model: the student.
        args: of the trainer.
        positional: what else ``EvenBatchesTrainer`` takes by its place.
        kwargs: everything else that ``OnPolicyTrainer`` takes.

    Attributes:
        adaptive: the share of the student's steps; None: ``fraction`` and ``schedule`` have it.
        replay: rows that this process has generated; None: nothing is replayed.

    Raises:
        UserError: there is no held-out loss to follow, or no vLLM.
    """

    teacher: Any

    def __init__(self, model: nn.Module, args: TrainingArguments, *positional: Any, **kwargs: Any) -> None:
        self.adaptive: AdaptiveFraction | None = None
        self.replay: ReplayBuffer | None = None
        self._branch: Branch = "data"
        super().__init__(model, args, *positional, **kwargs)
        if self.on_policy is None or self.rollout is None:
            return
        if (chosen := self.on_policy.adaptive) is not None:
            self._check_evaluates()
            self.adaptive = AdaptiveFraction(self.on_policy.first_fraction, eps=chosen.eps, step=chosen.step)
            if chosen.replay != "none":
                keeps = chosen.replay == "states" and all(map(_would_say_it_again, self._teachers()))
                capacity = share_of_capacity(chosen.capacity, self.args.world_size)
                self.replay = ReplayBuffer(capacity, keeps_states=keeps)
                logger.info("%s", self._memory_note(chosen.capacity, keeps))
        if self.on_policy.backend == "vllm":
            if self.rollout.vocab_size is not None:
                raise UserError(
                    "on_policy.backend: vllm draws from all rows of the student's head, and the teacher knows the first "
                    f"{self.rollout.vocab_size:,} of them alone; expected backend: own, which says no others"
                )
            check_has_whole_weights(model, sharded=strategy_of(self.accelerator) in ("zero3", "fsdp2"))
            self.rollout.answer = self._vllm(model)

    def _vllm(self, model: nn.Module) -> VllmRollouts | VllmServer:
        """What answers in the place of our engine, ready to do so."""
        assert self.on_policy is not None
        chosen = self.on_policy
        if chosen.vllm_url is None or chosen.vllm_folder is None:
            check_installed()
            return VllmRollouts(chosen.vllm_memory, self._longest())
        server = VllmServer(
            chosen.vllm_url, chosen.vllm_folder, token_env=chosen.vllm_token_env, at_once=chosen.batch_size
        )
        server.check(model, self._longest_asked())
        return server

    def _longest(self) -> int | None:
        """Tokens of the longest prompt and answer, at most; None: nobody knows how long the rows are."""
        assert self.on_policy is not None
        lengths: Sequence[int] = getattr(self.train_dataset, "lengths", ())
        return max(lengths) + self.on_policy.max_new_tokens if lengths else None

    def _longest_asked(self) -> int | None:
        """As ``_longest``, without the answers of the data, which nobody generates."""
        assert self.on_policy is not None
        data: Any = self.train_dataset
        if not isinstance(data, EncodedDataset):
            return self._longest()
        return max(data.spans(row)[-1][0] for row in range(len(data))) + self.on_policy.max_new_tokens

    def _longest_read(self) -> int:
        """As ``_longest``, of a row as its teacher reads it; 0: it reads what the student does."""
        assert self.on_policy is not None
        data: Any = self.train_dataset
        if getattr(data, "for_teacher", None) is None:
            return 0
        return int(max(data.teacher_lengths)) + self.on_policy.max_new_tokens

    def _memory_note(self, capacity: int, keeps: bool) -> str:
        """How much memory the buffer may take, in words."""
        assert self.on_policy is not None
        widths = [one.head.weight.shape[1] * one.head.weight.element_size() for one in self._teachers() if keeps]
        routed = isinstance(self.teacher, SeveralTeachers) and self.teacher.weights is None
        of_label = (max(widths) if routed else sum(widths)) if widths else 0
        longest = self._longest()
        if longest is None:
            return (
                f"on_policy.adaptive: the replay buffer takes {of_label:,} bytes for each label, and 8 for each token"
            )
        if not keeps:
            longest += self._longest_read()
        most = most_bytes(capacity, longest, self.on_policy.max_new_tokens, of_label) / 2**20
        return f"on_policy.adaptive: the replay buffer takes at most {most:,.0f} MiB, of all processes together"

    def _teachers(self) -> list[Any]:
        several = isinstance(self.teacher, SeveralTeachers)
        return [*self.teacher.by_name.values()] if several else [self.teacher]

    def _check_evaluates(self) -> None:
        """Refuse an adaptive share without the one held-out loss that it follows."""
        found = None
        if self.args.eval_strategy == IntervalStrategy.NO:
            found = "training.eval_strategy is 'no', expected steps or epoch"
        elif self.eval_dataset is None:
            found = "there are no held-out rows, expected data.validation (eval_dataset)"
        elif isinstance(self.eval_dataset, dict):
            found = f"eval_dataset is {len(self.eval_dataset)} sets by name, expected one"
        if found is not None:
            raise UserError(f"on_policy.adaptive: the share of its steps follows the held-out loss, but {found}")

    # ---------------------------------------------------------------------------------------------------------- a step

    def generates(self, step: int, steps: int) -> bool:
        if self.adaptive is None or self.rollout is None:
            return super().generates(step, steps)
        is_full = None if self.replay is None else self._is_full_everywhere
        self._branch = self.adaptive.branch(coin(self.rollout.seed, step), step / max(steps, 1), is_full)
        return self._branch != "data"

    def _is_full_everywhere(self) -> bool:
        assert self.replay is not None
        if self.args.world_size == 1:
            return self.replay.is_full
        return not on_any_process(not self.replay.is_full, self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, count = super().get_batch_samples(*args, **kwargs)
        if self.replay is not None and self._sums_of_texts:
            self._sums_of_texts.setdefault(REPLAYED_TEXTS, 0.0)
        return samples, count

    def _answered(self, batches: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of a step with answers of now, which are kept; or as many of those that were kept before."""
        if self.replay is None:
            return super()._answered(batches)
        if self._branch == "replay":
            return self._drawn(batches)
        made = super()._answered(batches)
        for before, rows in zip(batches, made, strict=True):
            for place, row in enumerate(rows):
                if prompt_length(before[place]) is not None:
                    rows[place] = {**row, REPLAY: self.replay.add(_kept(row, self.replay.keeps_states))}
        return made

    def _drawn(self, batches: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of a step out of the buffer; what has nothing to answer stays where it is.

        With states nobody asks the teacher: no row of a batch has a side of its own then.
        """
        assert self.replay is not None and self.rollout is not None
        wanted = sum(prompt_length(row) is not None for rows in batches for row in rows)
        step, rank = self.state.global_step, self.args.process_index
        drawn = iter(self.replay.draw(wanted, seed=self.rollout.seed, step=step, rank=rank))
        self._sums_of_texts[REPLAYED_TEXTS] = float(wanted)
        return [
            [
                self._left(row) if prompt_length(row) is None else _as_row(number := next(drawn), self.replay[number])
                for row in rows
            ]
            for rows in batches
        ]

    def _left(self, row: Row) -> Row:
        unread = (TEACHER_IDS, TEACHER_LABELS) if self._answers_itself else ()
        return {name: value for name, value in row.items() if name not in unread}

    def rebuilt(self, batches: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
        collator: Any = self.data_collator
        with _asking_nobody(collator) if self._answers_itself else nullcontext():
            made = super().rebuilt(batches)
        if self.replay is not None:
            for batch, rows in zip(made, batches, strict=True):
                # No tensor: on a device it would have to be waited for
                batch[REPLAY] = tuple(-1 if (number := row.get(REPLAY)) is None else number for row in rows)
        return made

    @property
    def _answers_itself(self) -> bool:
        """Whether the step's rows come with what the teacher has said of them."""
        return self._branch == "replay" and self.replay is not None and self.replay.keeps_states

    def shares(
        self, inputs: Mapping[str, Any], batch: dict[str, Any], labels: Tensor, positions: Tensor
    ) -> list[Share]:
        """What the teacher, or each of several, says of a batch; of replayed rows what it has said before.

        Args:
            inputs: the batch as the collator made it.
            batch: what the student sees of it, and what is there for the teacher.
            labels: ``[B, T]`` unshifted.
            positions: ``[N]``, ``selection.response_positions(labels)``.
        """
        numbers = inputs.get(REPLAY)
        if numbers is not None and self.replay is not None and self._answers_itself:
            kept = [number for number in numbers if number >= 0]
            return self.replay.shares(kept, blank_shares(self.teacher), labels.device)
        found = shares_of(self.teacher, batch, labels, positions, inputs.get(TEACHER))
        if numbers is not None and self._branch == "generate" and self.replay is not None:
            of_row = sequence_numbers(labels, batch.get("position_ids"), positions)
            counts = of_row.bincount(minlength=len(numbers)).tolist() if self.replay.keeps_states else []
            self.replay.keep_states(numbers, found, counts)
        return found

    # ------------------------------------------------------------------------------------ the held-out loss, and the log

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        values = super().evaluate(eval_dataset, *args, **kwargs)
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        if self.adaptive is not None and self.is_in_train and own and "eval_loss" in values:
            self.adaptive.observe(float(values["eval_loss"]))
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.adaptive is not None:
            logs["on_policy_fraction"] = self.adaptive.fraction
            if self.replay is not None:
                logs |= {"replay_rows": len(self.replay), "replay_mb": round(self.replay.nbytes / 2**20, 3)}
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _prepare_run(self, step: int, steps: int) -> None:
        super()._prepare_run(step, steps)
        if step == 0:
            if self.adaptive is not None:
                self.adaptive.reset()
            if self.replay is not None:
                self.replay.clear()

    def scheduled_over_run(self) -> list[str]:
        scheduled = super().scheduled_over_run()
        return scheduled if self.replay is None else [*scheduled, "the share of replayed steps (on_policy.adaptive)"]

    def extra_state(self) -> ExtraState:
        extra = super().extra_state()
        if self.adaptive is not None:
            extra.shared["adaptive"] = self.adaptive.state()
        return extra

    def save_progress(self, folder: Path) -> None:
        super().save_progress(folder)
        if self.replay is not None:
            self.replay.save(folder, self.args.process_index)

    def load_extra_state(self, folder: Path, progress: Progress) -> None:
        super().load_extra_state(folder, progress)
        if self.adaptive is not None:
            self.adaptive.load_state(progress.shared["adaptive"])
        if self.replay is not None:
            self.replay.load(folder, self.args.process_index)

    def check_resumable(self, folder: Path) -> None:
        super().check_resumable(folder)
        was, now = read_complete(folder).get("processes"), self.args.world_size
        if self.replay is not None and was != now:
            raise UserError(
                f"{folder}: written by {was} processes, each of which keeps the rows that it has generated "
                f"(on_policy.adaptive); this is {now}. Start it as it was"
            )


def _would_say_it_again(teacher: Any) -> bool:
    """Whether states of a teacher can be kept: they are states (those of a compact cache are not), and it is frozen."""
    moves = getattr(teacher, "mean", None) is not None  # a running mean of the student's weights
    return not getattr(teacher, "compact", False) and not moves


@contextmanager
def _asking_nobody(collator: Any) -> Iterator[None]:
    """Within it our collator asks no teacher elsewhere for the rows of its batches."""
    given, collator.of_rows = collator.of_rows, None
    try:
        yield
    finally:
        collator.of_rows = given


def _kept(row: Row, with_states: bool) -> ReplayRow:
    ids, labels = (torch.tensor(row[name], dtype=torch.int32) for name in ("input_ids", "labels"))
    asks_again = TEACHER_IDS in row and not with_states
    side = torch.tensor([row[TEACHER_IDS], row[TEACHER_LABELS]], dtype=torch.int32) if asks_again else None
    return ReplayRow(ids, labels, row["row_id"], row.get(TEACHER), side=side)


def _as_row(number: int, kept: ReplayRow) -> Row:
    row: Row = {"input_ids": kept.input_ids.tolist(), "labels": kept.labels.tolist(), "row_id": kept.row_id}
    row[REPLAY] = number
    if kept.teacher is not None:
        row[TEACHER] = kept.teacher
    if kept.side is not None:
        row[TEACHER_IDS], row[TEACHER_LABELS] = kept.side.tolist()
    return row
