"""``Task``: what ``distill`` and ``dts-hf doctor`` do not know themselves, because it differs between kinds of tasks.

A task supplies rows, models, trainer and scorer of a recipe. Each method is one stage: it takes what it needs and returns
what it made, so that the doctor can call the same stages and look at what comes out of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.mixture import Part
from dts_hf.models.saving import Carried
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs.directory import RunDirectory
from dts_hf.temperature import build_temperature
from dts_hf.training.distillation_base import DistillationBase

TrainerT = TypeVar("TrainerT", bound=DistillationBase)
#: What ``metrics.json`` says of each model, by its name.
Entries = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """Rows as they were read: ``Row`` for language models, ``LabelledRow`` for classifiers.

    Attributes:
        train: those to learn from.
        validation: those held out; empty where the recipe has none.
        sets: further held-out rows for the end of training, by name.
        answers: of sequence-level KD, what ``data_manifest.json`` says of the teacher's answers.
        unanswered: of sequence-level KD, how many rows were left out because the teacher gave no answer.
        train_parts, validation_parts: what each source gave, of language models.
    """

    train: Sequence[Any]
    validation: Sequence[Any] = ()
    sets: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    answers: Mapping[str, Any] | None = None
    unanswered: int = 0
    train_parts: Sequence[Part] = ()
    validation_parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Data:
    """The same rows as tokens; ``report`` of each data set says what became of its rows.

    Attributes:
        sets: of ``Rows.sets`` those that the scorer feeds as data sets (those answered by generation are not encoded).
    """

    train: EncodedDataset
    validation: EncodedDataset | None = None
    sets: Mapping[str, EncodedDataset] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """Student and teacher with their tokenizers; without a teacher, ``teacher_tokenizer`` is the student's.

    Attributes:
        several: of several teachers each by name, in the place of ``teacher``; one may have several names.
        several_tokenizers: theirs.
    """

    student: nn.Module
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    several: Mapping[str, PreTrainedModel] = field(default_factory=dict)
    several_tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)

    @property
    def taught(self) -> bool:
        """Whether a teacher is loaded, or several are."""
        return self.teacher is not None or bool(self.several)

    def for_training(self, recipe: Recipe) -> Models:
        """The same without the teachers whose states are elsewhere: they have given their weights or their answers."""
        kept = recipe.kept_teachers
        several = {name: model for name, model in self.several.items() if f"teachers.{name}" in kept}
        return replace(self, teacher=self.teacher if "teacher" in kept else None, several=several)

    @property
    def loaded(self) -> list[nn.Module]:
        """Teacher, or each of several once, and student; where there is no teacher, the student alone."""
        teachers = [self.teacher, *{id(model): model for model in self.several.values()}.values()]
        return [model for model in (*teachers, self.student) if model is not None]


class Scorer(Protocol):
    """Scores models on the held-out rows and collects what goes into ``metrics.json``; all processes call it alike."""

    def callbacks(self) -> Iterable[TrainerCallback]:
        """What scores, or shows scores, while training runs."""

    def score(self, name: str, model: nn.Module) -> None:
        """Score ``model`` as it is now, where the recipe asks for it.

        Args:
            name: ``teacher``, ``student_before`` (training) or ``student``.
            model: in the wrapper that trains it, if there is one.
        """

    def finish(self, training: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; the first process alone calls it.

        Args:
            training: steps, seconds, tokens and memory of the training itself.
        """


class Task(ABC, Generic[TrainerT]):
    """One kind of task, for one recipe. The methods stand in the order in which ``distill`` calls them.

    Args:
        recipe: what to do.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def training_arguments(self, output_dir: str | Path) -> TrainingArguments:
        """``TrainingArguments`` of the recipe, with the task's defaults for the keys that it does not give.

        Raises:
            UserError: ``TrainingArguments`` refuses a value or a combination.
        """
        return training_arguments(self.recipe, output_dir)

    @abstractmethod
    def load_rows(self) -> Rows:
        """Read and check all rows of the recipe.

        Raises:
            UserError: nothing there, or a row that is wrong, with file and line.
        """

    @abstractmethod
    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Data:
        """Tokenise rows; the doctor gives a sample of them.

        Raises:
            UserError: limits that contradict each other, or no row left under them.
        """

    @abstractmethod
    def load_teacher(self) -> PreTrainedModel | None:
        """The teacher, frozen and in evaluation mode; None where the recipe has none.

        Raises:
            UserError: it cannot be loaded.
        """

    def load_several(self) -> dict[str, PreTrainedModel]:
        """Several teachers by name, in the place of ``load_teacher``; empty where there are not several.

        Raises:
            UserError: one cannot be loaded.
        """
        return {}

    def teacher_records(self) -> dict[str, dict[str, Any]]:
        """What a resume compares of the teachers that are no models of this process, by the key of their section.

        Raises:
            UserError: a cache or a server is not what the recipe says.
        """
        return {}

    def check_head(self, model: nn.Module, role: str) -> None:
        """Refuse a model whose outputs the loss cannot represent. The model is whole: this comes before it is placed.

        Args:
            model: teacher or student; ``load_student`` has checked what it returns.
            role: ``teacher`` or ``student``, for messages.

        Raises:
            UserError: names the model and what it does.
        """

    @abstractmethod
    def load_student(self, teacher: PreTrainedModel | None, seed: int, made: StudentInit | None = None) -> nn.Module:
        """The student: loaded, or cut out of ``teacher``; with LoRA where the recipe asks for it.

        Args:
            teacher: whole.
            seed: of weights that are drawn anew.
            made: for ``student.init``: has the rows that decide what is kept, and takes what they decided.

        Raises:
            UserError: it cannot be loaded, cut or given adapters, or the loss cannot represent its outputs.
        """

    def check_context_length(
        self, models: Sequence[nn.Module], tokenizer: PreTrainedTokenizerBase, rows: Rows
    ) -> None:
        """Refuse what scoring would refuse as well, but only once the run directory is there.

        Raises:
            UserError: a model has too few positions for the held-out rows, or cannot be scored.
        """

    def answer(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Rows:
        """Sequence-level KD: the same rows with the teacher's answers, for ``data.responses: teacher``.

        Raises:
            UserError: the teacher gave none.
            NotImplementedError: this kind of task has no answers to learn from, which the recipe has been refused for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no answers")

    def answer_by_several(
        self, teachers: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, rows: Rows
    ) -> Rows:
        """The same where each row has one of several teachers, which answers it.

        Args:
            teachers: by name.
            tokenizer: the student's, which is theirs.
            rows: each names its teacher.

        Raises:
            UserError: the teachers gave no answer.
            NotImplementedError: this kind of task has no answers to learn from, which the recipe has been refused for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no answers")

    @abstractmethod
    def make_trainer(self, args: TrainingArguments, models: Models, data: Data) -> TrainerT:
        """The trainer with teacher, student, temperature and loss of the recipe.

        Raises:
            UserError: anything that does not fit together.
        """

    def trainer_options(self, models: Models, data: Data) -> dict[str, Any]:
        """What the trainers of all kinds of tasks take, by name."""
        temperature, loss = self.recipe.temperature, self.recipe.loss
        return {
            "model": models.student, "teacher": models.teacher, "train_dataset": data.train, "eval_dataset": data.validation,
            "processing_class": models.tokenizer, "teacher_tokenizer": models.teacher_tokenizer,
            "temperature": build_temperature(temperature.name, **temperature.options), "kd_ratio": loss.kd_ratio,
            "divergence": loss.divergence.model_dump(), "temperature_scaling": loss.temperature_scaling,
            "kernels": loss.kernels, "logits_dtype": loss.logits_dtype,
        }  # fmt: skip

    def carried(self, tokenizer: PreTrainedTokenizerBase) -> Carried:  # noqa: ARG002 (for language models)
        """What goes into the student's folder beside its weights and ``tokenizer``."""
        return Carried()

    @abstractmethod
    def manifest(self, rows: Rows, data: Data) -> dict[str, Any]:
        """What ``data_manifest.json`` says: sources with their sha256, and what became of the rows."""

    @abstractmethod
    def notes(self, rows: Rows, data: Data) -> Iterable[str]:
        """What became of the rows, as lines for the terminal."""

    @abstractmethod
    def make_scorer(
        self, run: RunDirectory, trainer: TrainerT, models: Models, rows: Rows, data: Data, kept: Entries
    ) -> Scorer:
        """The scorer of a run.

        Args:
            run: takes scores and predictions.
            trainer: gives the teacher-forced loss and the state of training.
            models: that are scored.
            rows: held-out rows and sets.
            data: the same as tokens.
            kept: scores that an earlier attempt of the run made, by model; these models are not scored again.
        """
