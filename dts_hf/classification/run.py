"""The straight line for a task: ``distill`` hands a recipe with a ``task:`` section over to ``distill_classification``.

recipe -> tokenizer -> labelled rows -> teacher -> student -> trainer (best epoch kept) -> scores -> report.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from dts_hf.classification.data import LabelledDataset, encode_labelled, separates
from dts_hf.classification.models import load_task_student, load_task_teacher, takes_type_ids
from dts_hf.classification.tasks import GlueTask, LabelledRow, get_task, load_labelled
from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.console import say
from dts_hf.data.rows import Row
from dts_hf.data.sources import manifest
from dts_hf.distributed.sharding import parameter_count, place_teacher
from dts_hf.evaluation.glue import TASK_METRICS, headline
from dts_hf.evaluation.instruct import rows_digest
from dts_hf.loss.statistics import CE, KL, TEACHER_CE, TOP1_AGREEMENT
from dts_hf.models.loading import load_tokenizers
from dts_hf.models.saving import save_student
from dts_hf.recipe.schema import Recipe, Task
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.finish import close_run, end_early, training_facts
from dts_hf.runs.saved_scores import BEFORE, keep_scores
from dts_hf.runs.start import begin, open_run
from dts_hf.temperature import build_temperature
from dts_hf.training.callbacks import BeforeTrainingCallback


def distill_classification(recipe: Recipe, resume: bool = False) -> RunDirectory:
    """Run a recipe that has a task, from start to finish, and return its run directory; ``distill`` says what resumes.

    Raises:
        UserError: wrong input, named by key, row or file; nothing has been written then.
    """
    started = time.monotonic()
    assert recipe.task is not None
    task = get_task(recipe.task.subset)
    args = task_arguments(recipe, task)
    start = begin(recipe, args, resume)
    if start.finished:
        return end_early(recipe, args)
    set_seed(args.seed)
    transformers_logging.disable_progress_bar()

    rows = _load_rows(recipe, task)
    tokenizer, teacher_tokenizer = load_tokenizers(recipe)
    teacher = load_task_teacher(recipe.teacher, task) if recipe.teacher is not None else None
    set_seed(args.seed)  # a new head is the seed's, whatever was loaded before
    student = load_task_student(recipe.student, teacher, task)
    if recipe.teacher is not None and teacher is not None:  # whole until here: the student may be cut out of it
        place_teacher(teacher, recipe.teacher.placement, args.device)
    type_ids = takes_type_ids(student) or takes_type_ids(teacher)
    sets: dict[str, LabelledDataset] = {}
    cut: dict[str, int] = {}
    for name, of_set in rows.items():
        sets[name], cut[name] = encode_labelled(
            of_set, tokenizer, max_length=recipe.task.max_length, type_ids=type_ids
        )

    trainer = make_task_trainer(recipe, task, args, student, teacher, tokenizer, teacher_tokenizer, sets)

    # From here on things are written.
    run = open_run(recipe, start, trainer, _manifest(recipe, rows, sets, cut))
    main = trainer.is_world_process_zero()
    if main:
        for name in (name for name, count in cut.items() if count):
            say(f"{name}: {cut[name]:,} of {len(sets[name]):,} rows shortened to task.max_length")
        trainer.add_callback(ScoreCallback(task))

    scorer = _Scorer(recipe, task, run, trainer, rows, sets, start.scores)
    if start.checkpoint is None:
        score_before = partial(scorer.score, "student_before", student, teacher)
        trainer.add_callback(BeforeTrainingCallback(score_before, trainer.exclude_from_timing))
    trainer.train(resume_from_checkpoint=start.checkpoint)
    best_step = _best_step(trainer)
    scorer.score("student", student, teacher)

    merge = recipe.student.lora is None or recipe.student.lora.save == "merged"
    save_student(student, tokenizer, run.final_path, merge_lora=merge)
    if main:
        training = {**training_facts(trainer, started), "seed": args.seed}
        if best_step is not None:
            training["best_step"] = best_step
            epochs = [line["epoch"] for line in trainer.state.log_history if line["step"] == best_step]
            training.update({"best_epoch": round(epochs[0], 2)} if epochs else {})
        metrics = {
            "format": 1,
            "task": {"name": recipe.task.name, "subset": task.subset, "labels": list(task.labels),
                     "metrics": list(TASK_METRICS[task.subset]), "headline": headline(task.subset)},
            "protocol": protocol_fingerprint(recipe.task, task, tokenizer, args, describe_checkpoint(trainer, best_step)),
            "models": scorer.models,
            "training": training,
        }  # fmt: skip
        run.write_metrics(metrics)
    return close_run(recipe, run, trainer)


def make_task_trainer(
    recipe: Recipe,
    task: GlueTask,
    args: TrainingArguments,
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, LabelledDataset],
) -> ClassificationDistillationTrainer:
    """The trainer of ``recipe``, for the run and for the three steps that ``dts-hf doctor`` takes.

    Raises:
        UserError: see ``ClassificationDistillationTrainer``.
    """
    return ClassificationDistillationTrainer(
        student,
        teacher,
        task,
        build_temperature(recipe.temperature.name, **recipe.temperature.options),
        recipe.loss.divergence.model_dump(),
        recipe.loss.kd_ratio,
        args,
        sets["train"],
        sets.get("validation"),
        tokenizer,
        temperature_scaling=recipe.loss.temperature_scaling,
        teacher_tokenizer=teacher_tokenizer,
    )


class ScoreCallback(TrainerCallback):
    """Prints the task's metrics whenever the held-out rows were scored."""

    def __init__(self, task: GlueTask) -> None:
        self.task = task

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = kwargs.get("metrics") or {}
        words = format_scores(self.task, found)
        if state.is_world_process_zero and words:
            say(f"step {state.global_step}: {words} (x 100), loss {found['eval_loss']:.3f}")


def format_scores(task: GlueTask, values: Mapping[str, float]) -> str:
    """The task's metrics as they are printed: ``accuracy 91.20, f1 88.10``."""
    names = TASK_METRICS[task.subset]
    return ", ".join(f"{name} {100 * values[f'eval_{name}']:.2f}" for name in names if f"eval_{name}" in values)


def task_arguments(recipe: Recipe, task: GlueTask) -> TrainingArguments:
    """The dev-set protocol as defaults: score the validation rows each epoch, keep the best epoch by the headline.

    Scoring and saving go together, whichever of the two the recipe speaks of: only what was saved can be kept.
    """
    defaults: dict[str, Any] = {}
    given = recipe.training
    if recipe.data.validation is not None and given.get("save_strategy") != "no":
        saved = given.get("save_strategy")
        scored = given.get("eval_strategy", saved if saved in ("epoch", "steps") else "epoch")
        defaults = {
            "eval_strategy": scored,
            "save_strategy": scored,
            "load_best_model_at_end": scored != "no",
            "metric_for_best_model": headline(task.subset),
            "greater_is_better": True,
            "save_total_limit": 1,
        }
        if scored == "steps":
            steps = (given.get(key) for key in ("eval_steps", "save_steps", "logging_steps"))
            defaults["eval_steps"] = defaults["save_steps"] = next((n for n in steps if n is not None), 10)
    return training_arguments(recipe, recipe.output.dir, **defaults)


def _best_step(trainer: ClassificationDistillationTrainer) -> int | None:
    """The step whose weights were put back at the end; None where the last ones stayed.

    ``state.best_global_step`` may be another one: that of an evaluation whose weights were not saved.
    """
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(best.rpartition("-")[2]) if best else None


def describe_checkpoint(trainer: ClassificationDistillationTrainer, best_step: int | None) -> str:
    """Which weights were scored. Readers go by the first word."""
    if best_step is None:
        return "end of training"
    saved = "" if best_step == trainer.state.best_global_step else "saved "
    return f"best {saved}evaluation by {trainer.args.metric_for_best_model}"


def protocol_fingerprint(
    wanted: Task, task: GlueTask, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, checkpoint: str
) -> dict[str, Any]:
    """All that a score depends on besides model and rows: scores of equal ``fingerprint`` can be compared."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    protocol: dict[str, Any] = {
        "task": f"{wanted.name}/{task.subset}",
        "metrics": list(TASK_METRICS[task.subset]),
        "max_length": wanted.max_length,
        "pair": None if len(task.fields) == 1 else "special tokens" if separates(tokenizer) else "line break",
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "checkpoint": checkpoint,
        "autocast": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
    }
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    return {"fingerprint": digest, **protocol}


# ------------------------------------------------------------------------------------------------------- its pieces


def _load_rows(recipe: Recipe, task: GlueTask) -> dict[str, list[LabelledRow]]:
    """The rows of ``train`` and, where the recipe has them, ``validation`` and ``validation_mismatched``."""
    data, split = recipe.data, recipe.data.validation_split
    rows = {"train": load_labelled(data.train, task, split=data.train_split, limit=data.max_train_rows)}
    if data.validation is not None:
        rows["validation"] = load_labelled(data.validation, task, split=split, limit=data.max_validation_rows)
    if recipe.task is not None and recipe.task.mismatched is not None:
        limit = data.max_validation_rows
        rows["validation_mismatched"] = load_labelled(recipe.task.mismatched, task, split=split, limit=limit)
    return rows


def _plain(rows: Sequence[LabelledRow]) -> list[Row]:
    """The rows as those of language models, for their digests."""
    return [Row(row.id, row.texts[0], " ".join(row.texts[1:]), (str(row.label),)) for row in rows]


def _manifest(
    recipe: Recipe, rows: dict[str, list[LabelledRow]], sets: dict[str, LabelledDataset], cut: dict[str, int]
) -> dict[str, Any]:
    """What was trained and measured on: sources with their sha256, and what became of the rows."""
    sources: dict[str, Any] = {"train": recipe.data.train, "validation": recipe.data.validation}
    sources["validation_mismatched"] = recipe.task and recipe.task.mismatched
    splits = {}
    for name, of_set in rows.items():
        split = recipe.data.train_split if name == "train" else recipe.data.validation_split
        kept = {"kept": len(sets[name]), "cut": cut[name], "tokens": sum(sets[name].lengths)}
        splits[name] = {**manifest(sources[name], _plain(of_set), split=split), **kept}
    return {"splits": splits}


class _Scorer:
    """Scores student and teacher on the held-out sets, and collects what goes into ``metrics.json``."""

    def __init__(
        self,
        recipe: Recipe,
        task: GlueTask,
        run: RunDirectory,
        trainer: ClassificationDistillationTrainer,
        rows: dict[str, list[LabelledRow]],
        sets: dict[str, LabelledDataset],
        made: Mapping[str, dict[str, Any]],
    ) -> None:
        self.recipe, self.task, self.run, self.trainer, self.rows = recipe, task, run, trainer, rows
        self.wanted = recipe.evaluation.models
        self.sets = {name: dataset for name, dataset in sets.items() if name != "train"}
        self.models: dict[str, dict[str, Any]] = dict(made)

    def score(self, name: str, student: nn.Module, teacher: nn.Module | None) -> None:
        """Score the student as it is now; the first pass scores the teacher, too, whatever it is wanted for."""
        models = {"student": (name, student)} if name in self.wanted and name not in self.models else {}
        if teacher is not None and "teacher" in self.wanted and "teacher" not in self.models:
            models["teacher"] = ("teacher", teacher)
        predictions: dict[str, list[dict[str, Any]]] = {who: [] for who in models}
        for set_name, dataset in self.sets.items() if models else ():
            values = self._evaluate(name, set_name, dataset)
            for who, (label, model) in models.items():
                self._add(label, model, set_name, values, "" if who == "student" else "teacher_")
                predictions[who] += self._predictions(set_name, self.trainer.predicted[who])
        for who, (label, _) in models.items():
            if self.sets and self.trainer.is_world_process_zero():
                self.run.write_predictions(label, predictions[who])
        if self.trainer.is_world_process_zero() and name in BEFORE:
            keep_scores(self.run, self.models)

    def _evaluate(self, name: str, set_name: str, dataset: LabelledDataset) -> dict[str, float]:
        # The log has one set over the steps of training; the best epoch's weights, put back, are not of the last step.
        if set_name == "validation" and _best_step(self.trainer) is None:
            return self.trainer.evaluate(dataset)
        values = self.trainer.predict(dataset, metric_key_prefix="eval").metrics or {}
        words = format_scores(self.task, values)
        if self.trainer.is_world_process_zero():
            say(f"{name.replace('_', ' ')} on {set_name}: {words} (x 100)")
        return values

    def _add(self, name: str, model: nn.Module, set_name: str, values: dict[str, float], of: str) -> None:
        entry = self.models.setdefault(name, {"parameters": parameter_count(model), "sets": {}})
        measures = {metric: values[f"eval_{of}{metric}"] for metric in TASK_METRICS[self.task.subset]}
        if self.task.regression:
            measures["label_mse"] = values[f"eval_{(TEACHER_CE if of else CE).regression}"]
        else:
            measures["label_ce"] = values[(TEACHER_CE if of else CE).held_out_log]
        if KL.held_out_log in values:
            measures["teacher_kl"] = 0.0 if of else values[KL.held_out_log]
            measures["teacher_agreement"] = 1.0 if of else values[TOP1_AGREEMENT.held_out_log]
        rows = self.rows[set_name]
        scores = {key: {"mean": value} for key, value in measures.items()}
        entry["sets"][set_name] = {"n": len(rows), "rows_sha256": rows_digest(_plain(rows)), **scores}

    def _predictions(self, set_name: str, by_row: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
        found = []
        for index, row in enumerate(self.rows[set_name]):
            logits = list(by_row[index])
            chosen: Any = logits[0] if self.task.regression else max(range(len(logits)), key=logits.__getitem__)
            found.append(
                {
                    "id": row.id,
                    "set": set_name,
                    **dict(zip(self.task.fields, row.texts, strict=True)),
                    "label": row.label,
                    "predicted": chosen,
                    "logits": [round(value, 5) for value in logits],
                }
            )
        return found
