"""``DistillationBase``: what every distillation has, whatever a batch is and however its models answer it.

A temperature policy that moves once a step, a loss for training and one for held-out rows, sums that become means over
labels, and the state of all that in the checkpoints. ``trainer.DistillationTrainer`` (language models) and
``classification.trainer.ClassificationDistillationTrainer`` add a teacher, rows, and ``compute_loss``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, default_hp_search_backend
from transformers.trainer_utils import BestRun, HPSearchBackend

from dts_hf.data.streams import errors_of_workers
from dts_hf.distributed.processes import on_first_process
from dts_hf.divergences import Divergence
from dts_hf.errors import UserError, nearest
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.logged_sums import LogColumns, StepSums, SumMeter
from dts_hf.loss.statistics import CE, KD, ROWS
from dts_hf.models.description import describe_for_training
from dts_hf.reporting.licences import inherited
from dts_hf.reporting.model_card import Setting, models_of, render_card
from dts_hf.temperature import TemperaturePolicy, build_policy
from dts_hf.temperature.base import Probe
from dts_hf.temperature.constant import Constant
from dts_hf.temperature.parts.per_teacher import PerTeacher
from dts_hf.training.card import facts_of_training, held_out_scores
from dts_hf.training.exact_resume import ExtraState, Progress, number_or_nan
from dts_hf.training.held_out_gap import HeldOutGapCallback, rows_of_probe
from dts_hf.training.hub_upload import UPLOAD, card_metadata
from dts_hf.training.resumable_trainer import ResumableTrainer
from dts_hf.training.temperature_callback import TemperatureCallback
from dts_hf.training.tracking import loss_facts, model_facts, objective_of

TEMPERATURE_STATE = "temperature.json"


class DistillationBase(ResumableTrainer):
    """A ``ResumableTrainer`` whose loss has a temperature.

    Args:
        model: the student.
        args: of the trainer.
        positional: what else ``EvenBatchesTrainer`` takes by its place.
        temperature: see ``build_policy``.
        divergence: ``"forward_kl"``, ``{"name": "jsd", "beta": 0.5}``, ...
        kd_ratio: loss = (1 - kd_ratio) ce_loss + kd_ratio kd_loss.
        classes: of the logits that both models give.
        loss_options: what ``DistillationLoss`` takes besides.
        columns: the statistics that are logged in this kind of run.
        facts: what trackers and callbacks are told of the run besides policy and divergence, such as the teacher's name.
        temperature_per_teacher: each of several teachers (``columns.teachers``) has a state of the policy of its own.
        kwargs: everything else that ``ResumableTrainer`` takes.

    Attributes:
        temperature: the policy.
        loss: of training.
        eval_loss: of held-out rows, at T = 1.
        sums: of the step and of the evaluation that run, and since the last log line.
        generated_step: whether the rows of the step that runs are text of the student's own.
        pseudo_labels: whether the teacher's first choices are the labels of the step that runs.
        facts: policy, divergence, ``kd_ratio``, teacher and student as flat words. Callbacks find them in
            ``args.distillation``, trackers among their parameters.

    Raises:
        UserError: anything that does not fit together.
    """

    generated_step = False
    pseudo_labels = False

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *positional: Any,
        temperature: TemperaturePolicy | Mapping[str, Any] | str | float,
        divergence: Divergence | Mapping[str, Any] | str,
        kd_ratio: float,
        classes: int,
        loss_options: Mapping[str, Any],
        columns: LogColumns,
        facts: Mapping[str, Any] | None = None,
        temperature_per_teacher: bool = False,
        **kwargs: Any,
    ) -> None:
        self._loss_spec: dict[str, Any] = {
            "temperature": temperature, "divergence": divergence, "kd_ratio": kd_ratio, **loss_options
        }  # fmt: skip
        self._per_teacher = columns.teachers if temperature_per_teacher else ()
        if temperature_per_teacher and not columns.teachers:
            raise UserError("temperature_per_teacher: got True without teachers; it is for several of them")
        self._classes, self._facts = classes, {**model_facts("student", model), **(facts or {})}
        self.sums = StepSums(columns)
        self._make_loss(self._loss_spec)
        self._first_state = self._fresh_state
        vars(args)["distillation"] = self.facts
        super().__init__(model, args, *positional, **kwargs)
        self.loss.to(self.args.device)
        self._probe_seconds = 0.0  # since the last line of the log
        self._probe_loader: tuple[Any, Probe, Any] | None = None  # made of these held-out rows, for this probe
        self._check_probe()

    def _check_probe(self) -> None:
        """Refuse now what would be refused at the first step."""
        if self.temperature.probe is not None:
            rows_of_probe(self.eval_dataset, self.temperature.probe)

    def check_loss_of_trial(self) -> None:
        """Refuse a loss or a policy of a search's trial as ``__init__`` refuses one that is given there.

        Raises:
            UserError: see there.
        """
        self._check_probe()

    def _make_loss(self, spec: Mapping[str, Any]) -> None:
        options = {name: value for name, value in spec.items() if name != "temperature"}
        self.temperature = build_policy(spec["temperature"])
        if self._per_teacher:
            self.temperature = PerTeacher(self.temperature, self._per_teacher)
        self.loss = DistillationLoss(temperature=self.temperature, **options)
        # Held-out losses are taken at T = 1: they must not move because the schedule did.
        self.eval_loss = DistillationLoss(temperature=Constant(1.0), held_out=True, **options)
        self.temperature.check_classes(self._classes)
        self._fresh_state = copy.deepcopy(self.temperature.state())
        self._objective = objective_of(self.loss)
        self._budget_asked_for = self.loss.logits_budget_mb  # memory may run out, and the loss then lowers its own

    @property
    def facts(self) -> dict[str, Any]:
        """What makes this run a distillation; see the class."""
        return {**loss_facts(self.loss), **self._facts}

    @property
    def several(self) -> dict[str, Any]:
        """Of several teachers each one's section as a recipe would have it; empty where there are not several."""
        return {}

    @property
    def itself(self) -> dict[str, Any]:
        """Of a student that teaches itself the section as a recipe would have it; empty where it does not."""
        return {}

    def facts_for_trackers(self) -> dict[str, Any]:
        return self.facts

    # --------------------------------------------------------------------------------------------------------- a search

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """The Trainer's; every trial has a fresh student (``model_init``) and a policy that begins anew.

        Args:
            hp_space: takes the trial; with optuna it may give, besides training arguments, ``temperature``, ``divergence``,
                ``kd_ratio`` and the other options of the loss. ``eval_loss`` has another meaning for another ``kd_ratio``
                or divergence: let ``compute_objective`` take ``eval_kl`` or ``eval_ce_loss`` then.
            compute_objective: of the metrics of ``evaluate``; None: ``eval_loss``, or the sum of the other metrics.
            n_trials: how many.
            direction: ``minimize`` or ``maximize``, or a list of them.
            backend: ``optuna``, ``ray`` or ``wandb``.
            hp_name: makes the name of a trial.
            kwargs: for the backend.

        Raises:
            UserError: there is no ``model_init``, no package for the search, or no such argument.
        """
        if self.model_init is None:
            raise UserError("hyperparameter_search: every trial needs a student of its own; expected model_init")
        try:
            backend = HPSearchBackend(backend or default_hp_search_backend())
            ALL_HYPERPARAMETER_SEARCH_BACKENDS[backend]().ensure_available()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"hyperparameter_search: {' '.join(str(error).split())}") from error
        if hp_space is not None and backend == HPSearchBackend.OPTUNA:
            hp_space = self._with_loss_options(hp_space)
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
        )

    def _with_loss_options(self, hp_space: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """``hp_space`` without the options of the loss, which each trial's loss is made of."""

        def of_trainer(trial: Any) -> dict[str, Any]:
            values = hp_space(trial)
            if not isinstance(values, dict):
                raise UserError(f"hp_space: returned {type(values).__name__}, expected a dictionary of values")
            ours = {name: value for name, value in values.items() if name in self._loss_spec}
            unknown = [name for name in values if name not in ours and not hasattr(self.args, name)]
            if unknown:  # the Trainer would warn, and search for nothing
                known = [*self._loss_spec, *type(self.args).__dataclass_fields__]
                raise UserError(f"hp_space: {unknown[0]} is no argument of this trainer.{nearest(unknown[0], known)}")
            given = self._loss_spec["temperature"]
            # An object has moved in the trial before; where each teacher has a copy of it, it has not
            if isinstance(given, TemperaturePolicy) and not self._per_teacher:
                given.load_state(copy.deepcopy(self._first_state))
            self._make_loss({**self._loss_spec, **ours})
            self.loss.to(self.args.device)
            self.check_loss_of_trial()
            self._temperature_callback.policy = self.temperature
            vars(self.args)["distillation"] = self.facts
            return {name: value for name, value in values.items() if name not in ours}

        return of_trainer

    # ------------------------------------------------------------------------------------------------ one batch's sums

    @property
    def tokens_seen(self) -> float:
        """Real tokens (no padding) of all ranks, up to the last log line."""
        return self.sums.tokens_seen

    def loss_and_meter(self, training: bool) -> tuple[DistillationLoss, SumMeter]:
        """The loss for a batch, and what takes its sums."""
        return (self.loss, self.sums.step_meter) if training else (self.eval_loss, self.sums.eval_meter)

    def normalizer(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """num_items_in_batch / num_processes ``[]``; without a count the loss is the mean over the labels of this batch.

        Args:
            labels: ``[B, T]``, or ``[B]`` of classifiers.
            num_items_in_batch: labels of the whole optimizer step, all ranks together.
        """
        if num_items_in_batch is None:
            num_items_in_batch = self.count_items(labels).clamp(min=1) * self.accelerator.num_processes
        precise = torch.float32 if labels.device.type == "mps" else torch.float64
        processes: int = self.accelerator.num_processes
        return torch.as_tensor(num_items_in_batch, dtype=precise) / processes

    # -------------------------------------------------------------------------------------------------- held-out rows

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loop, with its mean of batch means replaced by means over labels of all ranks, at T = 1.

        ``eval_loss`` weighs its parts by the trainer's own ``kd_ratio``, also where the policy has another: it must not
        move because a schedule did. ``eval_rows`` and ``eval_labels`` are how many of them it is the mean of.
        """
        self.sums.eval_meter = SumMeter()  # an evaluation that an exception broke off has left its sums
        # A data loader draws its seed from the global generator: dropout in training must not change because of it.
        with torch.random.fork_rng(devices=[]):
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        totals = self.sums.eval_meter.reduce(self.accelerator)
        if totals:
            loss = (1 - self.loss.kd_ratio) * CE.number(totals) + self.loss.kd_ratio * KD.number(totals)
            values = self.sums.columns.means(totals, held_out=True)
            values.update(loss=loss, labels=int(totals[ROWS]), rows=output.num_samples)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def _measure_held_out(self, probe: Probe) -> None:
        """Tell the policy the means over the rows of ``probe``, at T = 1, as an evaluation would find them now.

        Neither weights nor random numbers of the training move. All ranks call it, and get the same means.

        Raises:
            UserError: see ``rows_of_probe``; or none of these rows has a label.
        """
        began = time.monotonic()
        loader = self._loader_of_probe(probe)
        model = cast(nn.Module, self.model)
        training, self.sums.eval_meter = model.training, SumMeter()
        model.eval()
        with torch.random.fork_rng(devices=[]), errors_of_workers():
            for batch in loader:
                with torch.no_grad(), self.compute_loss_context_manager():
                    self.compute_loss(model, self.on_device(batch))
        model.train(training)
        totals = self.sums.eval_meter.reduce(self.accelerator)
        if not totals.get(ROWS):
            raise UserError(
                f"temperature.gap_source: got held_out, but none of the {len(loader.dataset.order):,} held-out rows that it "
                "looks at has a label; expected labels other than -100",
                everywhere=True,
            )
        self.temperature.take_held_out(totals.step_stats())
        self._probe_seconds += time.monotonic() - began

    def _loader_of_probe(self, probe: Probe) -> Any:
        made = self._probe_loader
        if made is None or made[0] is not self.eval_dataset or made[1] != probe:
            rows: Any = self.eval_dataset
            if not (rows is None or isinstance(rows, dict) or hasattr(rows, "lengths")):  # set from outside since
                rows = self.rows.prepare(rows, "eval_dataset")
            made = self.eval_dataset, probe, self._held_out_loader(rows_of_probe(rows, probe), None)
            self._probe_loader = made
        return made[2]

    # -------------------------------------------------------------------------------------------- the step and its log

    def step_callbacks(self) -> list[TrainerCallback]:
        self._temperature_callback = TemperatureCallback(
            self.temperature,
            self.sums,
            totals_of_step=lambda: self.sums.step_meter.reduce(self.accelerator),
            prepare_run=self._prepare_run,
            agree_to_stop=self.interruption.agree,
            observe_loss=self.non_finite.observe,
            generated_step=lambda: self.generated_step,
            own_labels=lambda: not self.pseudo_labels,
        )
        held_out_gap = HeldOutGapCallback(lambda: self.temperature.probe, self._measure_held_out)
        return [self._temperature_callback, held_out_gap]

    def _prepare_run(self, step: int, steps: int) -> None:
        if step == 0:  # a second train(), or a retry with a smaller batch, is a new run
            self.temperature.load_state(copy.deepcopy(self._fresh_state))
            self.sums.reset()
            self.clock.new_lap()
        self.prepare_temperature(steps)

    def prepare_temperature(self, steps: int | None) -> None:
        """Let the policy read what it needs besides this run; every process calls it and gets what the first one read.

        Args:
            steps: optimizer steps of the whole run; None where they are not known yet.

        Raises:
            UserError: it cannot be read, or does not fit a run of this length.
        """

        def read() -> dict[str, Any]:
            self.temperature.begin_run(steps)
            return self.temperature.state()

        state = on_first_process(read, self.args.process_index, self.args.world_size)
        self.temperature.load_state(state)
        if self.state.global_step == 0:  # a retry needs nothing read again: the other run may be gone by then
            self._fresh_state = state

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over labels since the last log line to the Trainer's own numbers."""
        if "loss" in logs:
            tokens = self.sums.mean_log.totals.get("tokens", 0.0)
            values = self.sums.mean_log.pop()
            if values:
                values["tokens_per_second"] = tokens / max(self.clock.new_lap(), 1e-9)
                if self.temperature.probe is not None:
                    values["probe_seconds"], self._probe_seconds = round(self._probe_seconds, 4), 0.0
                self.sums.tokens_seen += tokens
                logs.update({**values, **{k: n for k, n in self.temperature.counters().items() if n}})
        super().log(logs, start_time)

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher where it is a model of this process: the card tells its name and its size."""
        return None

    @property
    def teacher_models(self) -> dict[str, nn.Module]:
        """The teachers that are models of this process, by the key that a recipe has for them."""
        return {} if self.teacher_model is None else {"teacher": self.teacher_model}

    @property
    def teacher_records(self) -> dict[str, dict[str, Any]]:
        """What a resume compares of teachers that are no models of this process, by the key that a recipe has for them."""
        return {}

    @property
    def answers_with(self) -> str:
        template = getattr(self.rows, "encode_options", {}).get("template")
        return "" if template is None else str(template.name)

    @property
    def row_facts(self) -> Mapping[str, Any]:
        """What the card says of how rows became tokens."""
        return self.rows.for_card()

    def card(self, repository: str | None, note: str = "", **metadata: Any) -> str:
        """``model_card``'s text where it was given, else what a recipe's card says, as far as the trainer knows it."""
        if self.model_card is not None:
            return self.model_card()
        student, saved = cast(nn.Module, self.model), Path(str(self.args.output_dir)) / UPLOAD
        done = {"steps": self.state.global_step, "seconds": self.clock.seconds, "tokens": int(self.tokens_seen)}
        sets = [str(name) for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else []
        facts = facts_of_training(
            student, self.teacher_models, self.loss, self.args,
            taught=self.sums.columns.teacher, several=self.several, itself=self.itself, rows=self.row_facts,
            task=getattr(getattr(self.rows, "task", None), "subset", None),
            log=self.state.log_history, held_out=held_out_scores(self.state.log_history, self.step_of_weights, sets),
            done=done,
        )  # fmt: skip
        if (on_policy := self.describe_objective().get("on_policy")) is not None:
            facts.recipe["data"]["on_policy"] = on_policy
        given = card_metadata(metadata)
        given["tags"] = [*(getattr(student, "model_tags", None) or []), *given.get("tags", [])]
        online = repository is not None
        origins = inherited(models_of(facts.recipe), online=online)
        ends = self.end_token_ids()
        where = Setting(repository, saved, origins, has_recipe=False, end_tokens=ends, note=note, metadata=given)
        return render_card(facts, where)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def describe_models(self) -> dict[str, Any]:
        live = {key: describe_for_training(one, trained=False) for key, one in self.teacher_models.items()}
        return super().describe_models() | live | self.teacher_records

    def describe_objective(self) -> dict[str, Any]:
        return self._objective

    def extra_state(self) -> ExtraState:
        budget = {"logits_budget_mb": self.loss.logits_budget_mb, "logits_budget_mb_asked_for": self._budget_asked_for}
        policy = {"name": self.temperature.name, "state": self.temperature.state()}
        return ExtraState(
            shared={"tokens_seen": self.sums.tokens_seen, "unlogged": self.sums.mean_log.totals},
            process=budget,
            files={TEMPERATURE_STATE: policy},
        )

    def load_extra_state(self, folder: Path, progress: Progress) -> None:
        """Restore policy, sums and, where the same budget is asked for, how much of it memory has left.

        Raises:
            UserError: the checkpoint was written by another temperature policy.
        """
        record = json.loads((folder / TEMPERATURE_STATE).read_text(encoding="utf-8"))
        if record.get("name") != self.temperature.name or "state" not in record:
            raise UserError(
                f"{folder / TEMPERATURE_STATE}: written by another temperature policy, expected '{self.temperature.name}'"
            )
        self.temperature.load_state(record["state"])
        self.sums.tokens_seen = progress.shared["tokens_seen"]
        unlogged = progress.shared["unlogged"]
        self.sums.mean_log.totals = {name: number_or_nan(value) for name, value in unlogged.items()}
        before = progress.process
        if before is not None and before["logits_budget_mb_asked_for"] == self._budget_asked_for:
            self.loss.logits_budget_mb = before["logits_budget_mb"]

    def scheduled_over_run(self) -> list[str]:
        constant = self.temperature.name == Constant.name
        return [] if constant else [f"temperature ({self.temperature.name})"]
