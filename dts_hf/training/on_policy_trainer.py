"""``OnPolicyTrainer``: a distillation in some of whose steps the student answers the prompts itself (GKD, 2306.13649)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainingArguments

from dts_hf.data.collators import Collator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.distributed.processes import gathered
from dts_hf.errors import UserError
from dts_hf.generation.engine import cache_argument, stop_token_ids
from dts_hf.loss.statistics import GENERATED_TEXTS, OF_TEACHER, TEXTS
from dts_hf.models.checks import positions_of
from dts_hf.models.head import head_of
from dts_hf.on_policy.coin import coin
from dts_hf.on_policy.gap import check_gap
from dts_hf.on_policy.rollout import Rollout, Row, prompt_length, rows_of_batch, teacher_prompt_length, texts_of_batch
from dts_hf.on_policy.settings import OnPolicySettings, on_policy_settings
from dts_hf.teachers.asked_ahead import TICKET
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.none import NoTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_teacher import SharedTeacher
from dts_hf.teachers.several import SeveralTeachers
from dts_hf.training.generating_trainer import GeneratingTrainer

#: A shorter one is no prompt: plain text is learned from its second token on.
LEAST_PROMPT = 2


class OnPolicyTrainer(GeneratingTrainer):
    """A ``GeneratingTrainer`` with mixed data.

    What decides is asked in the order of ``get_batch_samples``: ``generates`` (a coin of seed and step), ``rollout`` (rows
    to rows), and ``rebuilt`` (rows to batches). A subclass changes one of them.

    Args:
        model: the student.
        args: of the trainer.
        positional: what else ``EvenBatchesTrainer`` takes by its place.
        on_policy: ``OnPolicySettings``, or a mapping of its options; None: training is on the data alone.
        kwargs: everything else that ``GeneratingTrainer`` takes.

    Attributes:
        on_policy: the settings.
        rollout: what answers the rows of a step.
        generated_step: whether the rows of the step that runs are answered by the student.
        generation_seconds: that this process has spent on answers since the last log line.

    Raises:
        UserError: an option that there is not, or something that mixed data does not go with.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *positional: Any,
        on_policy: OnPolicySettings | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.on_policy = on_policy_settings(on_policy)
        self.rollout: Rollout | None = None
        self.generation_seconds = 0.0
        self._sums_of_texts: dict[str, float | Tensor] = {}
        if self.on_policy is not None:
            kwargs["facts"] = {**(kwargs.get("facts") or {}), **self.on_policy.facts}
        super().__init__(model, args, *positional, **kwargs)
        if self.on_policy is not None:
            check_gap(self.temperature, self.loss.divergence, self.on_policy)
            seed = args.seed if self.on_policy.seed is None else self.on_policy.seed
            shared = getattr(self, "vocab_size", None)
            wider = shared is not None and head_of(cast(nn.Module, self.model)).vocab_size > shared
            self.rollout = Rollout(self.on_policy, seed, shared if wider else None)
            self._check_on_policy()

    def check_loss_of_trial(self) -> None:
        super().check_loss_of_trial()
        if self.on_policy is not None:
            check_gap(self.temperature, self.loss.divergence, self.on_policy)

    @property
    def pseudo_labels(self) -> bool:  # type: ignore[override]
        return self.generated_step and self.on_policy is not None and self.on_policy.gap_on == "teacher_argmax"

    def describe_objective(self) -> dict[str, Any]:
        described = super().describe_objective()
        return described if self.on_policy is None else {**described, "on_policy": self.on_policy.objective}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the seconds that this process has spent on answers since the last line."""
        if "loss" in logs and self.on_policy is not None:
            logs["generation_seconds"] = self.generation_seconds
            self.generation_seconds = 0.0
        super().log(logs, start_time)

    def scheduled_over_run(self) -> list[str]:
        own = self.on_policy is not None and self.on_policy.schedule != "constant"
        scheduled = super().scheduled_over_run()
        return [*scheduled, "the share of steps on the student's own text (on_policy.schedule)"] if own else scheduled

    @property
    def row_facts(self) -> Mapping[str, Any]:
        own = {} if self.on_policy is None else {"on_policy": self.on_policy.objective}
        return {**super().row_facts, **own}

    # ------------------------------------------------------------------------------------------- before the first step

    def _check_on_policy(self) -> None:
        """Refuse what has no answers to learn from, or nobody to judge them."""
        teacher: Any = getattr(self, "teacher", None)
        if isinstance(teacher, NoTeacher):
            raise UserError(
                "on_policy: there is no teacher, and the student's own text has no labels; expected a teacher"
            )
        for key, one in self._teachers_by_key().items():
            if isinstance(one, CachedTeacher) and one.live is None:
                raise UserError(
                    f"on_policy: the cached {key} knows the rows of the data alone, and the student's answers are others; "
                    f"expected {key}.missing: live (CachedTeacher(cache, live)), which has the teacher answer them, or "
                    f"{key}.kind: live"
                )
        rows: Any = self.rows
        if getattr(rows, "aligner", None) is not None:
            raise UserError(
                "on_policy: the teacher has another tokenizer (alignment), and reads no text of the student's"
            )
        if not isinstance(self.data_collator, Collator):
            raise UserError(
                f"data_collator: got {type(self.data_collator).__name__} beside on_policy, whose rows only our collators "
                "put together again; leave it out"
            )
        cache_argument(cast(nn.Module, self.model))
        dataset: Any = self.train_dataset
        if hasattr(dataset, "__len__"):
            self._check_prompts(dataset)

    def _teachers_by_key(self) -> dict[str, Any]:
        """The teacher, or each of several, by what errors call it."""
        teacher: Any = getattr(self, "teacher", None)
        if isinstance(teacher, SeveralTeachers):
            return {f"teachers.{name}": one for name, one in teacher.by_name.items()}
        return {"teacher": teacher}

    def _check_prompts(self, dataset: Any) -> None:
        """The rows' prompts: of tokens from elsewhere some of them, for reading a row may cost as much as training on it."""
        limits, names = self.length_limits(), getattr(dataset, "row_ids", None)
        encoded = isinstance(dataset, EncodedDataset)
        for number in range(0, len(dataset), 1 if encoded else max(1, len(dataset) // 256)):
            if encoded:
                lengths = dataset.spans(number)[-1][0], dataset.teacher_spans(number)[-1][0]
            else:
                lengths = _prompt_lengths(dataset[number])
            if problem := self._prompt_problem(lengths, limits):
                name = number if names is None else f"'{names[number]}'"
                raise UserError(f"train_dataset: row {name} {problem}")

    def length_limits(self) -> list[tuple[int, str, bool]]:
        """How many tokens each model has positions for in one row, what errors call it, and whether it teaches."""
        pair: Any = getattr(self, "pair", None)
        teacher: Any = getattr(self, "teacher", None)
        models = [] if pair is None else pair.models()
        limits = [
            (positions_of(one), f"{role} ({type(one).__name__})", place > 0)
            for place, (one, role) in enumerate(models)
        ]
        if isinstance(teacher, SharedTeacher):
            limits.append((positions_of(teacher.model), "the student, which teaches itself", True))
        for one in self._teachers_by_key().values():
            if isinstance(one, RemoteTeacher):
                limits.append((one.description.limits.length, f"the teacher at {one.url}", True))
        return [(limit, role, teaches) for limit, role, teaches in limits if limit is not None]

    def _prompt_problem(self, lengths: tuple[int | None, int | None], limits: Sequence[tuple[int, str, bool]]) -> str:
        """Why a prompt cannot be answered; empty where it can, or there is nothing to answer.

        Args:
            lengths: tokens of the prompt (None: there is nothing to answer), and of what the teacher reads in its place
                (None: the same).
            limits: of ``length_limits``.
        """
        assert self.on_policy is not None
        length, read = lengths
        if length is None:
            return ""
        if length < LEAST_PROMPT:
            return (
                "has no prompt that the student could answer (on_policy): its labels begin with its first tokens, as those "
                "of plain text do; expected rows with a prompt and an answer"
            )
        for limit, role, teaches in limits:
            asked = read if teaches and read is not None else length
            if asked + self.on_policy.max_new_tokens > limit:
                return (
                    f"has a prompt of {asked:,} tokens, which with on_policy.max_new_tokens = "
                    f"{self.on_policy.max_new_tokens} is more than the {limit:,} positions of {role}; lower one of them"
                )
        return ""

    # ---------------------------------------------------------------------------------------------------------- a step

    def _prepare_run(self, step: int, steps: int) -> None:
        super()._prepare_run(step, steps)
        if self.on_policy is not None and self.rollout is not None and self.on_policy.seed is None:
            self.rollout.seed = self.args.seed  # that of a search's trial

    def generates(self, step: int, steps: int) -> bool:
        """Whether the student answers the rows of optimizer step ``step`` (from 0) of ``steps``: the same on every rank."""
        if self.on_policy is None or self.rollout is None:
            return False
        return coin(self.rollout.seed, step) < self.on_policy.fraction_at(step / max(steps, 1))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of an optimizer step; in a step of the student's own text with its answers, in one call for all."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        self.generated_step, self._sums_of_texts = False, {}
        if self.on_policy is None or not samples:
            return samples, count
        self._sums_of_texts = {TEXTS: sum(texts_of_batch(batch) for batch in samples), GENERATED_TEXTS: 0.0}
        self.generated_step = self.generates(self.state.global_step, self.state.max_steps)
        if self.generated_step:
            self._forget_questions(samples)
            samples = self.rebuilt(self._answered([rows_of_batch(batch) for batch in samples]))
            count = self.count_of_step(samples)
        return samples, count

    def _forget_questions(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A teacher elsewhere was asked about the rows of the data as their batches were made: nobody waits for that."""
        for key, one in self._teachers_by_key().items():
            name = key.partition(".")[2]
            ticket = f"{TICKET}{OF_TEACHER}{name}" if name else TICKET
            for batch in samples if isinstance(one, RemoteTeacher) else ():
                if ticket in batch:
                    one.of_rows.forget(int(batch[ticket]))

    def _answered(self, batches: Sequence[Sequence[Row]]) -> list[list[Row]]:
        assert self.rollout is not None
        limits = self.length_limits()
        problems = (self._prompt_problem(_prompt_lengths(row), limits) for rows in batches for row in rows)
        found = next((problem for problem in problems if problem), "")
        # A process that raised alone would leave the others in their next collective
        if problem := next(filter(None, gathered(found, self.args.world_size)), ""):
            raise UserError(f"train_dataset: a row {problem}", everywhere=True)
        tokenizer: Any = self.processing_class
        model = self.accelerator.unwrap_model(self.model_wrapped)
        started = time.perf_counter()
        ends = stop_token_ids(model, tokenizer, self.end_token_ids())
        pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0  # never attended to: any id does
        made, sums = self.rollout.rows(model, batches, self.state.global_step, ends=ends, pad=pad)
        self.generation_seconds += time.perf_counter() - started
        self._sums_of_texts |= sums
        return made

    def rebuilt(self, batches: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
        """Batches of other rows, made by the collator of the data and as the data loader gives them.

        As many as before, with the same rows: every process runs the same number of forwards. A batch may have more tokens
        than that of the data, and than ``pack_tokens``: at most ``max_new_tokens`` for each of its prompts.

        Args:
            batches: the rows of each.
        """
        with self._keeping_no_answer():
            return [send_to_device(self.collate(list(rows)), self.args.device) for rows in batches]

    def means_on(self, rows: Any) -> dict[str, float]:
        """What an evaluation of held-out ``rows`` would log (``statistics``), without its line in the log.

        Every process calls it with the same rows, and gets the same means. Servers keep no answer about them.

        Args:
            rows: a data set of tokenised rows with their ``lengths``.
        """
        prefix = "means"
        with self._keeping_no_answer():
            loader = self._held_out_loader(rows, None)
            found = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True, metric_key_prefix=prefix)
        return {name.removeprefix(f"{prefix}_"): value for name, value in found.metrics.items()}

    @contextmanager
    def _keeping_no_answer(self) -> Iterator[None]:
        """Within it servers are asked without the folder of kept answers: the student never says the same again."""
        remote = [one for one in self._teachers_by_key().values() if isinstance(one, RemoteTeacher)]
        for one in remote:
            one.of_rows.keeps = False
        try:
            yield
        finally:
            for one in remote:
                one.of_rows.keeps = True

    def take_sums_of_texts(self) -> dict[str, Tensor]:
        """The sums of the step's texts ``[]``, once: the first micro-batch of the step adds them to its own."""
        sums, self._sums_of_texts = self._sums_of_texts, {}
        precise = torch.float32 if self.args.device.type == "mps" else torch.float64
        return {name: torch.as_tensor(value, dtype=precise, device=self.args.device) for name, value in sums.items()}


def _prompt_lengths(row: Row) -> tuple[int | None, int | None]:
    return prompt_length(row), teacher_prompt_length(row)
