"""A seeded sample of a recipe's own rows, with its teacher and its untrained student, on the way to ``Measured``."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from dts_hf.advice.measured import Measured, Situation, measured
from dts_hf.advice.rules import FEWEST_LABELS
from dts_hf.advice.sums import RowSums, Settings, row_sums
from dts_hf.console import working
from dts_hf.data.encoding import EncodedDataset
from dts_hf.distill import task_of
from dts_hf.distributed.sharding import place_teacher
from dts_hf.divergences import build_divergence
from dts_hf.doctor import classification
from dts_hf.doctor.models import take_sample
from dts_hf.doctor.walk import TRIAL, arguments_of, trial_recipe
from dts_hf.errors import UserError
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.models.loading import load_tokenizers
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import NamedOptions, Recipe
from dts_hf.task import Data, Models, Rows, Task
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.temperature import TemperaturePolicy, build_temperature

#: Temperatures at which language models and classification heads are measured.
LANGUAGE_GRID = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
HEAD_GRID = (1.0, 2.0, 4.0, 8.0, 16.0, 40.0)
#: Rows of a sample, where the user does not say how many, and as far as it grows until it has enough labels.
ROWS, MOST_ROWS = 64, 200
#: Rows that are measured together.
BLOCK = 16
#: A student that was loaded and is no better than this share of guessing has random weights.
GUESSING = 0.95


def check_advisable(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, what has no teacher whose logits could be measured.

    Raises:
        UserError: there is none, there are several, or it is the student itself; or the task is a regression.
    """
    if recipe.teachers:
        names = ", ".join(recipe.teachers)
        raise UserError(
            f"teachers: got several ({names}), and advise looks at one; expected teacher in the place of teachers"
        )
    if recipe.teacher is None:
        raise UserError(
            "teacher: is missing, and advise is about what to learn from it; expected a mapping with model"
        )
    if recipe.teacher.kind == "self":
        raise UserError(
            "teacher.kind: self, a teacher that does not differ from the student yet; expected another model"
        )
    if recipe.task is not None and recipe.task.subset == "stsb":
        raise UserError("task.subset: stsb is a regression, and squared errors know no temperature; expected classes")


def look(recipe: Recipe, folder: Path, count: int | None, seed: int) -> Measured:
    """Measure a sample of the recipe's rows.

    Args:
        recipe: checked.
        folder: empty, for what the stages write.
        count: rows of each of both samples; None: 64, and more, up to 200, where these have fewer than 2,000 labels.
        seed: draws the rows, and the resamples of the bootstrap.

    Raises:
        UserError: the recipe cannot be measured so, or a stage refuses it.
    """
    check_advisable(recipe)
    notes: list[str] = []
    if recipe.temperature.options.get("range") == "auto":
        notes.append(
            "temperature: range: auto is solved in the first step, so its hottest T is not known here; rules take 1"
        )
    plain = recipe.model_copy(update={"temperature": NamedOptions(name="constant")})
    task = task_of(trial_recipe(plain, folder, TRIAL))
    args = arguments_of(task)
    if isinstance(task, LanguageModeling):
        _check_states(task)
    with working("reading the rows"):
        rows = task.load_rows()
        tokenizer, teacher_tokenizer = load_tokenizers(recipe)
    set_seed(args.seed)
    with working("loading the teacher"):
        teacher = task.load_teacher()
        if teacher is not None:
            task.check_head(teacher, "teacher")
    own_answers = recipe.data.responses == "teacher" and teacher is not None
    if own_answers:
        rows, own_answers = _answers(recipe, teacher, tokenizer, rows, notes)
    epochs = _epochs(args, len(rows.train))
    data = task.encode(_drawn(rows, MOST_ROWS if count is None else count, seed), tokenizer)
    with working("loading the student"):
        student = task.load_student(teacher, args.seed, _init(recipe, data, args, notes))
    if teacher is not None:
        place_teacher(teacher, "replicated", args.device)
    models = Models(student, teacher, tokenizer, teacher_tokenizer).for_training(recipe)
    trainer = task.make_trainer(args, models, Data(data.train, data.validation))
    train, held_out, classes = _sums(recipe, task, trainer, data, count)
    situation = dataclasses.replace(
        situation_of(recipe, args),
        classes=classes, own_answers=own_answers, epochs=epochs,
        labels=int(train.labels.sum()), rows=len(train.labels),
        held_out_labels=0 if held_out is None else int(held_out.labels.sum()),
        held_out_rows=0 if held_out is None else len(held_out.labels),
    )  # fmt: skip
    if situation.student == "loaded" and _ce(train) > GUESSING * math.log(classes):
        situation = dataclasses.replace(situation, student="random")
    return measured(situation, train, held_out, seed, notes)


def situation_of(recipe: Recipe, args: TrainingArguments) -> Situation:
    """What a recipe says by itself; what only rows and models know stays as it is.

    Args:
        recipe: checked.
        args: made of it.
    """
    policy, init = build_temperature(recipe.temperature.name, **recipe.temperature.options), recipe.student.init
    return Situation(
        classifier=recipe.task is not None,
        grid=LANGUAGE_GRID if recipe.task is None else HEAD_GRID,
        policy=policy.name,
        rule=str(policy.describe().get("rule", "")),
        moves=policy.name != "constant",
        hottest=hottest(policy),
        divergence=recipe.loss.divergence.name,
        kd_ratio=recipe.loss.kd_ratio,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        student="loaded" if init is None else "random" if init.from_ == "config" else "cut",
    )


def hottest(policy: TemperaturePolicy) -> float:
    """The highest temperature that a policy may visit, as far as its options tell."""
    options = policy.describe()
    named = ("t_max", "t_init", "t_end", "teacher_value", "tau_rest")
    found = [*policy.ends, *(t for t, _ in policy.companions), *(options.get(name) for name in named)]
    if policy.learns and "t_start" in options:  # CTKD moves between these
        found += [options["t_start"], options["t_start"] + options["t_end"]]
    return max(float(t) for t in found if isinstance(t, int | float) and math.isfinite(t))


# ---------------------------------------------------------------------------------------------------------- its pieces


def _check_states(task: LanguageModeling) -> None:
    states = task.elsewhere.get("teacher")
    if isinstance(states, StateCache) and states.manifest.form is not None:
        raise UserError(
            f"teacher.cache: {states.folder} is compact and has lost the tail that advise measures; expected a cache "
            "of states, or kind: live"
        )


def _answers(recipe: Recipe, teacher: Any, tokenizer: Any, rows: Rows, notes: list[str]) -> tuple[Rows, bool]:
    """The teacher's own answers where an earlier run has kept them, else those of the data; and which."""
    kept = LanguageModeling(recipe).kept_answers(teacher, tokenizer, rows)
    notes.append(
        "answers: the teacher's own, which an earlier run has kept"
        if kept is not None
        else "answers: those of the data; the teacher's own (data.responses: teacher) have not been made yet, and "
        "dts-hf train makes them"
    )
    return (rows, False) if kept is None else (kept, True)


def _drawn(rows: Rows, count: int, seed: int) -> Rows:
    """At most ``count`` rows of each, drawn without replacement, in the order in which they were drawn."""
    draw = random.Random(seed)

    def of(given: Sequence[Any]) -> list[Any]:
        return [given[place] for place in draw.sample(range(len(given)), min(count, len(given)))]

    return Rows(of(rows.train), of(rows.validation))


def _chosen(data: EncodedDataset, count: int | None) -> list[int]:
    """The rows that are measured, in the order of their length: ``count``, or as many as have enough labels."""
    if count is None:
        labels = [0, *accumulate(data.target_counts)]
        count = next((n for n in range(ROWS, len(data)) if labels[n] >= FEWEST_LABELS), MOST_ROWS)
    return sorted(range(min(count, len(data))), key=data.lengths.__getitem__)


def _init(recipe: Recipe, data: Data, args: TrainingArguments, notes: list[str]) -> StudentInit:
    init = recipe.student.init
    if init is not None and init.choose != "even":
        notes.append(
            f"student: evenly spaced layers, in the place of student.init.choose: {init.choose}, which alone takes as "
            "long as all of this; so its own numbers (gap, KL, share of the gradient) are those of a worse start"
        )
        init = init.model_copy(update={"choose": "even"})
    return StudentInit(init, data.train if init is not None else None, args.device)


def _epochs(args: TrainingArguments, rows: int) -> float:
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    return args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps / max(rows, 1)


def _ce(rows: RowSums) -> float:
    return float(rows.sums["student_ce"].sum() / rows.labels.sum())


def _sums(
    recipe: Recipe, task: Task[Any], trainer: Any, data: Data, count: int | None
) -> tuple[RowSums, RowSums | None, int]:
    """Sums of training and held-out rows, and among how many classes the loss chooses."""
    grid = LANGUAGE_GRID if recipe.task is None else HEAD_GRID
    divergence = build_divergence(recipe.loss.divergence.model_dump())
    settings = Settings(grid, divergence, recipe.loss.temperature_scaling == "squared")
    sets = [(one, _chosen(one, count)) for one in (data.train, data.validation) if one is not None]
    found, classes = [], 0
    with working("measuring teacher and student", sum(len(order) for _, order in sets)) as work:
        for dataset, order in sets:
            parts = []
            for start in range(0, len(order), BLOCK):
                block = order[start : start + BLOCK]
                if isinstance(task, LanguageModeling):
                    sample = take_sample(trainer, dataset, block)
                else:
                    sample = classification.take_sample(trainer, dataset, trainer.classifier, block)
                parts.append(row_sums(sample, settings))
                classes = sample.student_head.vocab_size
                work.advance(len(block))
            found.append(RowSums.joined(parts))
    return found[0], found[1] if len(found) > 1 else None, classes
