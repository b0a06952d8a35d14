"""``Classification``: labelled texts, sequence classifiers (and STS-B's regression), the best epoch kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from dts_hf.classification.data import LabelledDataset, encode_labelled
from dts_hf.classification.glue_tasks import LabelledRow, get_task, load_labelled
from dts_hf.classification.models import load_task_student, load_task_teacher
from dts_hf.classification.scorer import ClassificationScorer, as_plain_rows
from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.data.manifest import manifest
from dts_hf.data.sources import Sources, as_sources
from dts_hf.data.subset import drawn
from dts_hf.evaluation.glue_metrics import headline
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs.directory import RunDirectory
from dts_hf.task import Data, Entries, Models, Rows, Task

#: The second validation set of MNLI.
MISMATCHED = "validation_mismatched"


class Classification(Task[ClassificationDistillationTrainer]):
    """The kind of task of a recipe with a ``task:`` section."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert recipe.task is not None  # task_of has looked
        self.settings = recipe.task
        self.glue = get_task(recipe.task.subset)

    def training_arguments(self, output_dir: str | Path) -> TrainingArguments:
        """The dev-set protocol as defaults: score the validation rows each epoch, keep the best epoch by the headline.

        Scoring and saving go together, whichever of the two the recipe speaks of: only what was saved can be kept.

        Raises:
            UserError: ``TrainingArguments`` refuses a value or a combination.
        """
        defaults: dict[str, Any] = {}
        given = self.recipe.training
        if self.recipe.data.validation is not None and given.get("save_strategy") != "no":
            saved = given.get("save_strategy")
            scored = given.get("eval_strategy", saved if saved in ("epoch", "steps") else "epoch")
            defaults = {
                "eval_strategy": scored, "save_strategy": scored, "save_total_limit": 1, "greater_is_better": True,
                "load_best_model_at_end": scored != "no", "metric_for_best_model": headline(self.glue.subset),
            }  # fmt: skip
            if scored == "steps":
                steps = (given.get(key) for key in ("eval_steps", "save_steps", "logging_steps"))
                defaults["eval_steps"] = defaults["save_steps"] = next((n for n in steps if n is not None), 10)
        return training_arguments(self.recipe, output_dir, **defaults)

    def load_rows(self) -> Rows:
        data = self.recipe.data
        train = load_labelled(_names(data.train), self.glue, split=data.train_split, limit=data.max_train_rows)
        if data.train_share < 1.0:
            train = [train[place] for place in drawn([row.id for row in train], data.train_share, self.recipe.seed)]
        validation = [] if data.validation is None else self._held_out(str(data.validation))
        mismatched = self.settings.mismatched
        return Rows(train, validation, {} if mismatched is None else {MISMATCHED: self._held_out(mismatched)})

    def _held_out(self, sources: Sources) -> list[LabelledRow]:
        data = self.recipe.data
        return load_labelled(_names(sources), self.glue, split=data.validation_split, limit=data.max_validation_rows)

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Data:
        validation = self._encode(rows.validation, tokenizer) if rows.validation else None
        sets = {name: self._encode(of_set, tokenizer) for name, of_set in rows.sets.items()}
        return Data(self._encode(rows.train, tokenizer), validation, sets)

    def _encode(self, rows: Sequence[LabelledRow], tokenizer: PreTrainedTokenizerBase) -> LabelledDataset:
        # Whether the models tell the texts of a pair apart is not known yet: those that do not never see the type ids.
        return encode_labelled(rows, tokenizer, max_length=self.settings.max_length, type_ids=True)

    def load_teacher(self) -> PreTrainedModel | None:
        return None if self.recipe.teacher is None else load_task_teacher(self.recipe.teacher, self.glue)

    def load_student(
        self,
        teacher: PreTrainedModel | None,
        seed: int,
        made: StudentInit | None = None,  # no row of a task decides what is kept
    ) -> nn.Module:
        set_seed(seed)  # a new head is the seed's, whatever was loaded before
        return load_task_student(self.recipe.student, teacher, self.glue, seed)

    def make_trainer(self, args: TrainingArguments, models: Models, data: Data) -> ClassificationDistillationTrainer:
        return ClassificationDistillationTrainer(task=self.glue, args=args, **self.trainer_options(models, data))

    def manifest(self, rows: Rows, data: Data) -> dict[str, Any]:
        asked = self.recipe.data
        sources = {"train": asked.train, "validation": asked.validation, MISMATCHED: self.settings.mismatched}
        all_rows = _by_name(rows.train, rows.validation, rows.sets)
        splits = {}
        for name, dataset in _by_name(data.train, data.validation, data.sets).items():
            split = asked.train_split if name == "train" else asked.validation_split
            source = manifest(sources[name], as_plain_rows(all_rows[name]), split=split)  # type: ignore[arg-type]
            splits[name] = {**source, "kept": len(dataset), "cut": _cut(dataset), "tokens": sum(dataset.lengths)}
            splits[name]["token_digest"] = dataset.digest
        return {"splits": splits}

    def notes(self, rows: Rows, data: Data) -> Iterator[str]:
        for name, dataset in _by_name(data.train, data.validation, data.sets).items():
            if cut := _cut(dataset):
                yield f"{name}: {cut:,} of {len(dataset):,} rows shortened to task.max_length"

    def make_scorer(
        self,
        run: RunDirectory,
        trainer: ClassificationDistillationTrainer,
        models: Models,
        rows: Rows,
        data: Data,
        kept: Entries,
    ) -> ClassificationScorer:
        return ClassificationScorer(self.recipe, run, trainer, models, rows, data, kept)


def _names(sources: Sources) -> list[str]:
    """The recipe refuses weights and columns for a task, so that a source is its name."""
    return [source.source for source in as_sources(sources)]


def _by_name(train: Any, validation: Any, sets: Mapping[str, Any]) -> dict[str, Any]:
    """Rows or data sets by the name of their split, those that are there."""
    return {"train": train, **({"validation": validation} if validation else {}), **sets}


def _cut(dataset: Any) -> int:
    """How many rows were shortened to ``task.max_length``."""
    return int(dataset.report.prompts_cut)
