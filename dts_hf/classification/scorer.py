"""Scores of a classifier and its teacher on the held-out sets, collected into ``metrics.json`` of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dts_hf.classification.data import separates
from dts_hf.classification.glue_tasks import GlueTask, LabelledRow, get_task
from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.console import say
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.rows import Row
from dts_hf.distributed.sharding import parameter_count
from dts_hf.evaluation.fingerprint import rows_digest
from dts_hf.evaluation.glue_metrics import TASK_METRICS, headline
from dts_hf.loss.statistics import CE, KL, TEACHER_CE, TOP1_AGREEMENT
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.schema import Task as TaskSettings
from dts_hf.runs.directory import BEFORE, RunDirectory
from dts_hf.task import Data, Entries, Models, Rows


class ClassificationScorer:
    """Scores student and teacher on the held-out sets, and collects what goes into ``metrics.json``.

    Args:
        recipe: what is scored.
        run: takes predictions and ``metrics.json``.
        trainer: runs the models and computes the metrics.
        models: student, teacher and tokenizer.
        rows: the held-out rows.
        data: the same as tokens.
        kept: entries that an earlier attempt of the run made, by model; these models are not scored again.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        trainer: ClassificationDistillationTrainer,
        models: Models,
        rows: Rows,
        data: Data,
        kept: Entries,
    ) -> None:
        self.recipe, self.glue, self.run, self.trainer = recipe, trainer.task, run, trainer
        self.teacher, self.tokenizer = models.teacher, models.tokenizer
        self.sets: dict[str, EncodedDataset] = {} if data.validation is None else {"validation": data.validation}
        self.sets |= data.sets
        self.rows: dict[str, Sequence[LabelledRow]] = {"validation": rows.validation, **rows.sets}
        self.entries = dict(kept)

    def callbacks(self) -> list[TrainerCallback]:
        """The metrics as a line for people whenever the held-out rows were scored."""
        return [ScoreCallback(self.glue)]

    def score(self, name: str, model: nn.Module) -> None:
        """Score the student as it is now; its first pass scores the teacher, too, whose answers come out of it anyway."""
        if name == "teacher":
            return
        asked_for = self.recipe.evaluation.models
        models: dict[str, tuple[str, nn.Module]] = {}
        if name in asked_for and name not in self.entries:
            models["student"] = (name, model)
        if self.teacher is not None and "teacher" in asked_for and "teacher" not in self.entries:
            models["teacher"] = ("teacher", self.teacher)
        predictions: dict[str, list[dict[str, Any]]] = {role: [] for role in models}
        for set_name, dataset in self.sets.items() if models else ():
            values = self._evaluate(name, set_name, dataset)
            for role, (label, scored) in models.items():
                self._add(label, scored, set_name, values, "" if role == "student" else "teacher_")
                predictions[role] += self._predictions(set_name, self.trainer.predicted[role])
        for role, (label, _) in models.items():
            if self.sets and self.trainer.is_world_process_zero():
                self.run.write_predictions(label, predictions[role])
        if self.trainer.is_world_process_zero() and name in BEFORE:
            self.run.write_scores(self.entries)

    def finish(self, training: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; it says which weights were scored, the last ones or those of the best evaluation."""
        args, best = self.trainer.args, best_step(self.trainer)
        settings = self.recipe.task
        assert settings is not None
        facts = {**training, "seed": args.seed}
        if best is not None:
            facts["best_step"] = best
            epochs = [line["epoch"] for line in self.trainer.state.log_history if line["step"] == best]
            facts |= {"best_epoch": round(epochs[0], 2)} if epochs else {}
        checkpoint = describe_checkpoint(self.trainer, best)
        task = {
            "name": settings.name, "subset": self.glue.subset, "labels": list(self.glue.labels),
            "metrics": list(TASK_METRICS[self.glue.subset]), "headline": headline(self.glue.subset),
        }  # fmt: skip
        protocol = protocol_fingerprint(settings, self.tokenizer, args, checkpoint)
        metrics = {"task": task, "protocol": protocol, "models": self.entries, "training": facts}
        self.run.write_metrics({"format": 1, **metrics})

    def _evaluate(self, name: str, set_name: str, dataset: EncodedDataset) -> dict[str, float]:
        # The log has one set over the steps of training; the best epoch's weights, put back, are not of the last step.
        if set_name == "validation" and best_step(self.trainer) is None:
            return dict(self.trainer.evaluate(dataset))
        values: dict[str, float] = self.trainer.predict(dataset, metric_key_prefix="eval").metrics or {}
        scores = format_scores(self.glue, values)
        if self.trainer.is_world_process_zero():
            say(f"{name.replace('_', ' ')} on {set_name}: {scores} (x 100)")
        return values

    def _add(self, name: str, model: nn.Module, set_name: str, values: dict[str, float], of: str) -> None:
        entry = self.entries.setdefault(name, {"parameters": parameter_count(model), "sets": {}})
        measures = {metric: values[f"eval_{of}{metric}"] for metric in TASK_METRICS[self.glue.subset]}
        if self.glue.regression:
            measures["label_mse"] = values[f"eval_{(TEACHER_CE if of else CE).regression}"]
        else:
            measures["label_ce"] = values[(TEACHER_CE if of else CE).held_out_log]
        if KL.held_out_log in values:
            measures["teacher_kl"] = 0.0 if of else values[KL.held_out_log]
            measures["teacher_agreement"] = 1.0 if of else values[TOP1_AGREEMENT.held_out_log]
        rows = self.rows[set_name]
        scores = {key: {"mean": value} for key, value in measures.items()}
        entry["sets"][set_name] = {"n": len(rows), "rows_sha256": rows_digest(as_plain_rows(rows)), **scores}

    def _predictions(self, set_name: str, by_row: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
        predictions = []
        for index, row in enumerate(self.rows[set_name]):
            logits = list(by_row[index])
            chosen: Any = logits[0] if self.glue.regression else max(range(len(logits)), key=logits.__getitem__)
            texts, rounded = dict(zip(self.glue.fields, row.texts, strict=True)), [round(value, 5) for value in logits]
            answer = {"label": row.label, "predicted": chosen, "logits": rounded}
            predictions.append({"id": row.id, "set": set_name, **texts, **answer})
        return predictions


class ScoreCallback(TrainerCallback):
    """Prints the task's metrics whenever the held-out rows were scored."""

    def __init__(self, glue: GlueTask) -> None:
        self.glue = glue

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs.get("metrics") or {}
        scores = format_scores(self.glue, metrics)
        if state.is_world_process_zero and scores:
            say(f"step {state.global_step}: {scores} (x 100), loss {metrics['eval_loss']:.3f}")


def as_plain_rows(rows: Sequence[LabelledRow]) -> list[Row]:
    """The rows as those of language models, for their digests."""
    return [Row(row.id, row.texts[0], " ".join(row.texts[1:]), (str(row.label),)) for row in rows]


def format_scores(glue: GlueTask, values: Mapping[str, float]) -> str:
    """The task's metrics as they are printed: ``accuracy 91.20, f1 88.10``."""
    names = TASK_METRICS[glue.subset]
    return ", ".join(f"{name} {100 * values[f'eval_{name}']:.2f}" for name in names if f"eval_{name}" in values)


def best_step(trainer: ClassificationDistillationTrainer) -> int | None:
    """The step whose weights were put back at the end; None where the last ones stayed.

    ``state.best_global_step`` may be another one: that of an evaluation whose weights were not saved.
    """
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(best.rpartition("-")[2]) if best else None


def describe_checkpoint(trainer: ClassificationDistillationTrainer, step: int | None) -> str:
    """Which weights were scored. Readers go by the first word.

    Args:
        trainer: has trained.
        step: from ``best_step``.
    """
    if step is None:
        return "end of training"
    saved = "" if step == trainer.state.best_global_step else "saved "
    return f"best {saved}evaluation by {trainer.args.metric_for_best_model}"


def protocol_fingerprint(
    settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, checkpoint: str
) -> dict[str, Any]:
    """All that a score depends on besides model and rows: scores of equal ``fingerprint`` can be compared.

    Args:
        settings: the recipe's ``task:`` section.
        tokenizer: its vocabulary counts, and how it parts the texts of a pair.
        args: say what was computed in lower precision.
        checkpoint: which weights were scored, in words.
    """
    glue = get_task(settings.subset)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    protocol: dict[str, Any] = {
        "task": f"{settings.name}/{glue.subset}",
        "metrics": list(TASK_METRICS[glue.subset]),
        "max_length": settings.max_length,
        "pair": None if len(glue.fields) == 1 else "special tokens" if separates(tokenizer) else "line break",
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "checkpoint": checkpoint,
        "autocast": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
    }
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    return {"fingerprint": digest, **protocol}
