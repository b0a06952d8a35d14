"""``Walk``: the stages of ``distill`` for one recipe, one after the other, with a look at what comes out of each.

What differs between kinds of tasks is in ``language_modeling.py`` and ``classification.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from dts_hf.console import gb
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.samplers import best_fit, total_steps
from dts_hf.distill import task_of
from dts_hf.distributed.sharding import place_teacher
from dts_hf.doctor.diagnosis import Check, Diagnosis, Skipped, need
from dts_hf.doctor.effect import Sample, check_effect, check_schedule
from dts_hf.doctor.hub import check_hub
from dts_hf.doctor.models import check_faithful, check_step_size, describe_weights
from dts_hf.doctor.resources import check_output
from dts_hf.doctor.steps import check_steps, check_training
from dts_hf.doctor.tokens import check_tokenizers, spaced
from dts_hf.errors import UserError
from dts_hf.models.loading import load_tokenizers
from dts_hf.models.quantization import check_quantization
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import Recipe, Teacher
from dts_hf.recipe.training_arguments import check_trackers
from dts_hf.runs.memory import device_of, resident_bytes
from dts_hf.task import Data, Models, Rows, Task
from dts_hf.training.arguments import checked_arguments
from dts_hf.training.distillation_base import DistillationBase
from dts_hf.training.even_batches import check_packs
from dts_hf.training.memory_estimate import BYTES
from dts_hf.training.model_shape import Shapes
from dts_hf.training.workload import Workload

#: So many rows are tokenised at most; they are spread over the whole file.
LOOKED_AT = 5000
#: Labels of the sample that the effect test uses.
EFFECT_LABELS = 128
#: Nats per label below which two models are one.
EQUAL = 1e-5
#: What three steps in a temporary folder need, whatever the recipe says.
TRIAL = {
    "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False,
    "report_to": "none", "disable_tqdm": True, "logging_strategy": "steps", "logging_steps": 1,
}  # fmt: skip
#: What a machine without the right device refuses.
PRECISION = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "optim", "torch_compile")
#: The doctor is one process: how the real run is spread does not concern its steps.
OF_MANY_PROCESSES = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")


class Walk(ABC):
    """One examination. What a stage has made is an attribute; None where it failed, and what needs it is skipped.

    Args:
        diagnosis: takes the checks.
        recipe: what is examined.
        folder: temporary; whatever a stage writes goes there.
        devices: that the memory estimate is for; None: those of this machine.
    """

    def __init__(self, diagnosis: Diagnosis, recipe: Recipe, folder: Path, devices: int | None) -> None:
        self.diagnosis, self.recipe, self.folder, self.devices = diagnosis, recipe, folder, devices
        #: Where it is one of several (``doctor.several``): which rows it has, the others' weights in bytes, how many names.
        self.is_own: Callable[[Any], bool] | None = None
        self.other_teachers, self.teachers = 0.0, 1
        self.before = resident_bytes()
        self.loads = self.trains = True  # whether this machine has the memory for the models, and for three steps
        self.task: Task[Any] = self.trial()
        self.args: TrainingArguments | None = None
        self.rows: Rows | None = None
        self.tokenizers: dict[str, PreTrainedTokenizerBase] | None = None
        self.looked_at: list[Any] = []  # rows that data was made of
        self.data: EncodedDataset | None = None
        self.steps: int | None = None
        self.shapes: Shapes | None = None
        self.teacher: PreTrainedModel | None = None
        self.student: nn.Module | None = None
        self.trainer: DistillationBase | None = None
        self.sample: Sample | None = None

    def walk(self) -> None:
        """Make all checks."""
        self.look_at_arguments()
        self.look_at_rows()
        self.look_at_models()
        self.look_at_loss()
        self.look_at_training()

    def trial(self, **training: Any) -> Task[Any]:
        """The task as one process does it, in ``folder``; ``training`` takes the place of keys of the recipe."""
        return task_of(trial_recipe(self.recipe, self.folder, training))

    # -------------------------------------------------------------------------------------------------- the stages

    def look_at_arguments(self) -> None:
        """``TrainingArguments`` of the real run, for one process.

        Where they are refused, which is reported, the recipe is tried again in fp32, and on the CPU where there is
        nothing else, so that the other checks can be made.
        """
        with self.diagnosis.check("training") as check:
            try:
                check_trackers(self.recipe)
                self.args = arguments_of(self.task)
            except UserError as error:
                check.error("refused", str(error), "Is this the machine that the recipe is meant for?")
                plain = {name: value for name, value in self.recipe.training.items() if name not in PRECISION}
                plain |= TRIAL | {"use_cpu": not torch.accelerator.is_available()}
                self.recipe = self.recipe.model_copy(update={"training": plain})
                self.task = self.trial()
                self.args = arguments_of(self.task)
            self.diagnosis.device = device_of(self.args)
            check_training(check, self.recipe, self.args, self.diagnosis.device["name"])
            checked_arguments(self.args, {})  # the trainer below is given others, that upload nothing
        if self.args is not None and self.args.push_to_hub:
            with self.diagnosis.check("hub") as check:
                check_hub(check, self.recipe, self.args)

    def look_at_rows(self) -> None:
        """Rows, tokenizers, and rows as tokens."""
        with self.diagnosis.check("rows") as check:
            self.rows = self.task.load_rows()
            self.check_rows(check, self.rows)
        with self.diagnosis.check("tokenizers") as check:
            student, teacher = load_tokenizers(self.recipe)
            self.tokenizers = {"student": student, "teacher": teacher}
            check_tokenizers(check, student, teacher, self.alignment)
        with self.diagnosis.check("data") as check:
            rows = need(self.rows, "rows").train
            own = rows if self.is_own is None else [row for row in rows if self.is_own(row)]
            self.looked_at = spaced(need(own or None, "rows of this teacher"), LOOKED_AT)
            self.data = self.task.encode(Rows(self.looked_at), self.tokenizer).train
            self.check_data(check, self.data, len(rows))
            if self.args is not None:
                trained_on = round(len(rows) * len(self.data) / len(self.looked_at))
                packs = self.packs()
                packs = packs and math.ceil(packs * trained_on / len(self.data))
                self.steps = total_steps(self.args, trained_on, self.world, packs)

    def look_at_models(self) -> None:
        """Teacher, then student, which may be cut out of it."""
        seed = 42 if self.args is None else self.args.seed
        set_seed(seed)
        if self.recipe.teacher is not None and self.recipe.loads_teacher:
            with self.diagnosis.check("teacher") as check:
                need(self.loads or None, "enough memory for the models")
                teacher = need(self.task.load_teacher(), "a teacher")
                if self.args is not None:
                    check_quantization(self.recipe.teacher.quantization, self.args.device)
                    place_teacher(teacher, "replicated", self.args.device)
                describe_weights(check, "teacher", teacher)
                self.teacher = teacher
                try:
                    self.task.check_head(teacher, "teacher")
                except UserError as error:
                    check.error("head", str(error))
        with self.diagnosis.check("student") as check:
            need(self.loads or None, "enough memory for the models")
            init, device = self.recipe.student.init, "cpu" if self.args is None else self.args.device
            if init is not None and init.source is None:
                need(self.teacher, "the teacher that it is cut from")
            if init is not None and init.measures:
                need(self.data, "tokenised rows, on which its layers are chosen")
            made = StudentInit(init, self.data, device)
            student = self.task.load_student(self.teacher, seed, made)
            describe_weights(check, "student", student)
            if chosen := made.summary():
                check.summary += f"; {chosen}"
                check.values["init"] = made.values
            self.student = student
            if self.args is not None:
                check_step_size(check, student, self.args.learning_rate)

    def look_at_loss(self) -> None:
        """Teacher and student on the same rows, and what the loss makes of the two.

        Raises:
            Skipped: within a check, which takes it.
        """
        with self.diagnosis.check("cross-entropy") as check:
            self.compare(check)
        if (
            self.recipe.teacher is not None
            and self.recipe.teacher.quantization != "none"
            and self.recipe.keeps_teacher
        ):
            with self.diagnosis.check("quantization") as check:
                self.compare_with_full(check, self.recipe.teacher)
        self.look_at_rounding()
        with self.diagnosis.check("effect") as check:
            if (
                self.teaches_itself
                and self.small_sample().means(need(self.trainer, "a trainer").eval_loss)["kl"] < EQUAL
            ):
                raise Skipped(
                    "before the first step the student and its teacher are one: only the labels pull them apart"
                )
            check_effect(check, need(self.trainer, "a trainer").loss, self.small_sample(), self.use_of_teacher())
        with self.diagnosis.check("temperature") as check:
            loss, steps = need(self.trainer, "a trainer").loss, need(self.steps, "rows")
            check_schedule(check, loss, self.small_sample(), steps, self.classes)
        self.sample = None  # it holds the student's head in fp32, a copy that the run will not have

    def look_at_rounding(self) -> None:
        """What it costs to round the student's weights; a classifier's never are."""
        return

    def look_at_training(self) -> None:
        """Three steps, and the directory that they would be written to."""
        with self.diagnosis.check("steps") as check:
            self.make_steps(check)
        with self.diagnosis.check("output") as check:
            args = need(self.args, "training arguments")
            workload = self.workload()
            work = None if self.shapes is None or workload is None else (self.shapes[0], workload)
            check_output(check, self.recipe, args, work, self.steps or 1, self.world)

    # ------------------------------------------------------------------------------------------------ for the stages

    @property
    def world(self) -> int:
        """How many devices the run is for: those that were named, or those of this machine."""
        return self.devices or int(self.diagnosis.device.get("count", 1))

    @property
    def alignment(self) -> str | None:
        """How a teacher with another tokenizer is compared; None: it has the student's, or there is none."""
        return None if self.recipe.teacher is None else self.recipe.teacher.alignment

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's; it ends a check where there is none."""
        return need(self.tokenizers, "a tokenizer")["student"]

    def make_trainer(self) -> DistillationBase:
        """The trainer of ``distill``; learning rate and temperature begin as they will."""
        steps, tokenizers = need(self.steps, "training arguments and rows"), need(self.tokenizers, "a tokenizer")
        student, data = need(self.student, "the student"), need(self.data, "tokenised rows")
        models = Models(student, self.teacher, tokenizers["student"], tokenizers["teacher"])
        task = self.trial(**TRIAL, max_steps=steps)
        self.trainer = task.make_trainer(arguments_of(task), models, Data(data))
        return self.trainer

    def compare_with_full(self, check: Check, teacher: Teacher) -> None:
        """The quantised teacher beside the one of its files, where there is room for both.

        Raises:
            Skipped: there is none, or no sample of rows.
        """
        sample, args = need(self.sample, "a sample of rows"), need(self.args, "training arguments")
        size = need(self.teacher, "the teacher").num_parameters() * BYTES[teacher.dtype]
        if 1.2 * size > (room := device_of(args)["memory"]):
            raise Skipped(f"the full teacher, {gb(size)}, does not fit beside the models: {gb(room)} are free")
        plain = teacher.model_copy(update={"quantization": "none"})
        full = need(task_of(self.recipe.model_copy(update={"teacher": plain})).load_teacher(), "a teacher")
        place_teacher(full, "replicated", args.device)
        check_faithful(check, self.sample_of(full), sample)
        check.summary = f"{teacher.quantization}: {check.summary}"

    def make_steps(self, check: Check) -> None:
        """Three steps of the real training.

        Raises:
            Skipped: they do not fit, or something that they need is not there.
        """
        if not self.trains:
            raise Skipped("three steps on one device do not fit into its memory")
        trainer, steps = need(self.trainer, "a trainer"), need(self.steps, "rows")
        lengths, args = need(self.data, "tokenised rows").lengths, need(self.args, "training arguments")
        batches = self.packs() or len(lengths) / args.per_device_train_batch_size
        memory = {check.name: check.values for check in self.diagnosis.checks}.get("memory", {})
        check_steps(
            check, trainer, steps, sum(lengths) / batches, self.world,
            before=self.before, estimate=memory.get("alone"), room=self.diagnosis.device["memory"],
        )  # fmt: skip

    def packs(self) -> int | None:
        """Batches that the sample of rows fills, where they are filled to a budget of tokens.

        Raises:
            UserError: a row does not fit into one.
        """
        tokens, data = self.recipe.data.pack_tokens, need(self.data, "tokenised rows")
        if tokens is None:
            return None
        check_packs(need(self.args, "training arguments"), data, tokens)
        return len(best_fit(data.lengths, tokens))

    def small_sample(self) -> Sample:
        """So much of the sample as the effect test can afford."""
        return need(self.sample, "a sample of rows").first(EFFECT_LABELS)

    @property
    def teaches_itself(self) -> bool:
        """Whether the teacher is the student, and labels move the student away from it; else there is nothing to learn."""
        return self.recipe.teacher is not None and self.recipe.teacher.kind == "self" and self.recipe.loss.kd_ratio < 1

    def use_of_teacher(self) -> str | None:
        """What the teacher does beside the loss; None: nothing."""
        if self.recipe.data.responses == "teacher":
            return "the teacher writes the answers, and they are learned like labels"
        if self.recipe.student.init is not None and self.recipe.student.init.from_ == "teacher":
            return "the teacher gives the student its first weights, and no more"
        return None

    # ------------------------------------------------------------------------------------------- what differs in a task

    #: What the loss chooses among, in words.
    classes: str

    @abstractmethod
    def check_rows(self, check: Check, rows: Rows) -> None:
        """Rows that are held out and trained on, and what else is wrong with them as they were read."""

    @abstractmethod
    def check_data(self, check: Check, data: EncodedDataset, rows: int) -> None:
        """``data`` is a sample of ``rows`` rows, tokenised."""

    @abstractmethod
    def compare(self, check: Check) -> None:
        """Take ``sample``, and compare teacher and student on it."""

    @abstractmethod
    def sample_of(self, teacher: PreTrainedModel | None = None) -> Sample:
        """Student and teacher on some rows; ``teacher`` takes the place of the trainer's."""

    def workload(self) -> Workload | None:
        """What one device would work on; None where nothing is known of it."""
        return None


def arguments_of(task: Task[Any]) -> TrainingArguments:
    """A machine with many GPUs runs one process per GPU; the doctor takes the first GPU alone."""
    args = task.training_arguments(task.recipe.output.dir)
    args.n_gpu  # noqa: B018  (sets the device up, and with it the count)
    args._n_gpu = min(args._n_gpu, 1)
    return args


def trial_recipe(recipe: Recipe, folder: Path, training: Mapping[str, Any]) -> Recipe:
    """``recipe`` for one process that writes below ``folder`` alone.

    Args:
        recipe: the real one.
        folder: for the run directory and caches of rows.
        training: takes the place of keys of ``training``.
    """
    # Its steps are too few for held-out rows, whose loss an adaptive share follows
    own = recipe.data.on_policy
    own = None if own is None else own.model_copy(update={"adaptive": None})
    kept = {name: value for name, value in recipe.training.items() if name not in OF_MANY_PROCESSES}
    changes = {
        "teacher": recipe.teacher and recipe.teacher.model_copy(update={"placement": "replicated"}),
        "training": {**kept, **training},
        "output": recipe.output.model_copy(update={"dir": str(folder / "run")}),
        "data": recipe.data.model_copy(update={"cache_dir": str(folder / "cache"), "on_policy": own}),
    }
    return recipe.model_copy(update=changes)
