"""The straight line: ``distill(recipe)`` goes from a recipe to a finished run directory. Start reading here.

recipe -> tokenizer -> rows -> teacher -> (the teacher's own answers) -> student -> trainer -> scores -> report.
Everything that can be wrong with the input is found before the run directory is made.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from dts_hf.console import say
from dts_hf.data.encoding import EncodedDataset, EncodingReport, encode_rows
from dts_hf.data.prompt_templates import Template, encode_prompts, get_template
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_many, load_rows, manifest
from dts_hf.distributed.sharding import place_teacher
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import resolve_set
from dts_hf.evaluation.scorer import VALIDATION, Scorer, load_sets
from dts_hf.generation.engine import cache_argument
from dts_hf.models.checks import check_positions
from dts_hf.models.loading import load_student, load_teacher, load_tokenizers
from dts_hf.models.saving import save_student
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.finish import close_run, end_early, training_facts
from dts_hf.runs.lock import unlocks
from dts_hf.runs.start import begin, open_run
from dts_hf.teachers.answers import answer_rows
from dts_hf.temperature import build_temperature
from dts_hf.training.callbacks import BeforeTrainingCallback, GenerationEvalCallback
from dts_hf.training.signals import stops_on_signal
from dts_hf.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


@stops_on_signal
@unlocks
def distill(recipe: Recipe, resume: bool = False) -> RunDirectory:
    """Run ``recipe`` from start to finish and return its run directory.

    Args:
        recipe: what to do.
        resume: go on with the killed or interrupted run in ``output.dir``, from its newest complete checkpoint; the end is
            the one it would have had.

    Raises:
        UserError: wrong input, named by key, row or file; nothing has been written then.
    """
    if recipe.task is not None:
        from dts_hf.classification.run import distill_classification

        return distill_classification(recipe, resume)
    started = time.monotonic()
    args = training_arguments(recipe, recipe.output.dir)
    start = begin(recipe, args, resume)
    if start.finished:
        return end_early(recipe, args)
    set_seed(args.seed)
    transformers_logging.disable_progress_bar()

    # Rows and models. Rows come first because they are cheap to check.
    template = get_template(recipe.data.prompt_template)
    train_rows = load_many(recipe.data.train, split=recipe.data.train_split, limit=recipe.data.max_train_rows)
    validation_rows = _load_validation(recipe)
    final_sets = load_sets(recipe.evaluation.sets, recipe.evaluation.set_rows)
    if VALIDATION in final_sets:
        raise UserError(f"evaluation.sets: {VALIDATION!r} is the name of the validation rows; rename the file")
    tokenizer, teacher_tokenizer = load_tokenizers(recipe)
    train_data, train_report = encode(recipe, train_rows, tokenizer, template, "data.train")
    teacher = None if recipe.teacher is None else load_teacher(recipe.teacher)
    student = load_student(recipe.student, teacher)
    if recipe.teacher is not None and teacher is not None:  # whole until here: the student may be cut out of it
        place_teacher(teacher, recipe.teacher.placement, args.device)
    answered_rows = [
        *validation_rows[: recipe.evaluation.rows],
        *(row for rows in final_sets.values() for row in rows),
    ]
    check_context_length(
        recipe, [model for model in (teacher, student) if model is not None], tokenizer, template, answered_rows
    )

    answers: dict[str, Any] | None = None
    unanswered = 0
    # Sequence-level KD: train on what the teacher itself would say.
    if teacher is not None and recipe.data.responses == "teacher":
        rows = [*train_rows, *validation_rows]
        answered, answers = answer_rows(recipe, teacher, tokenizer, template, rows)
        unanswered = sum(row is None for row in answered)
        train_rows = [row for row in answered[: len(train_rows)] if row is not None]
        if not train_rows:
            raise UserError("data.responses: teacher, but the teacher answered none of the training prompts")
        validation_rows = [row for row in answered[len(rows) - len(validation_rows) :] if row is not None]
        train_data, train_report = encode(recipe, train_rows, tokenizer, template, "data.train")
    validation_data, validation_report = (
        encode(recipe, validation_rows, tokenizer, template, "data.validation") if validation_rows else (None, None)
    )

    trainer = make_trainer(recipe, args, student, teacher, tokenizer, teacher_tokenizer, train_data, validation_data)

    made_from = _manifest(recipe, train_report, validation_report, train_rows, validation_rows, answers, final_sets)
    # From here on things are written.
    run = open_run(recipe, start, trainer, made_from)
    main = trainer.is_world_process_zero()
    if main:
        if unanswered:
            say(f"data.responses: teacher: left out {unanswered:,} rows that it did not answer")
        say(f"train: {train_report.summary()}")
        if validation_report is not None:
            say(f"validation: {validation_report.summary()}")
    scorer = Scorer(recipe, run, trainer, tokenizer, validation_rows, final_sets, made=start.scores)
    if recipe.evaluation.every_steps is not None:
        trainer.add_callback(GenerationEvalCallback(scorer.during, recipe.evaluation.every_steps, scorer.record))
    if start.checkpoint is None:
        if teacher is not None:
            scorer.score("teacher", teacher)
        score_before = partial(scorer.score, "student_before", student, held_out=True)
        trainer.add_callback(BeforeTrainingCallback(score_before, trainer.exclude_from_timing))
    trainer.train(resume_from_checkpoint=start.checkpoint)
    scorer.score("student", student, held_out=True)

    merge = recipe.student.lora is None or recipe.student.lora.save == "merged"
    save_student(student, tokenizer, run.final_path, merge_lora=merge)
    if main:
        scorer.finish({**training_facts(trainer, started), "vocabulary_note": trainer.vocab_note})
    return close_run(recipe, run, trainer)


# ------------------------------------------------------------------------------------------------------- its pieces


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    train_data: EncodedDataset,
    validation_data: EncodedDataset | None,
) -> DistillationTrainer:
    """The trainer of ``recipe``, for ``distill`` and for the three steps that ``dts-hf doctor`` takes.

    Raises:
        UserError: see ``DistillationTrainer``.
    """
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        temperature=build_temperature(recipe.temperature.name, **recipe.temperature.options),
        divergence=recipe.loss.divergence.model_dump(),
        kd_ratio=recipe.loss.kd_ratio,
        args=args,
        train_dataset=train_data,
        eval_dataset=validation_data,
        processing_class=tokenizer,
        temperature_scaling=recipe.loss.temperature_scaling,
        logits_budget_mb=recipe.loss.logits_budget_mb,
        router_aux_loss=recipe.loss.router_aux_loss,
        packing=recipe.data.packing,
        vocab_alignment="strict" if recipe.teacher is None else recipe.teacher.vocab_alignment,
        teacher_tokenizer=teacher_tokenizer,
    )


def _load_validation(recipe: Recipe) -> list[Row]:
    if recipe.data.validation is None:
        return []
    limit = recipe.data.max_validation_rows
    return load_rows(recipe.data.validation, split=recipe.data.validation_split, limit=limit)


def encode(
    recipe: Recipe, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, name: str
) -> tuple[EncodedDataset, EncodingReport]:
    return encode_rows(
        rows,
        tokenizer,
        template,
        max_length=recipe.data.max_length,
        max_prompt_length=recipe.data.max_prompt_length,
        long_rows=recipe.data.long_rows,
        name=name,
    )


def check_context_length(
    recipe: Recipe,
    models: Sequence[nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> None:
    """Generation would refuse such models and prompts as well, but only once the run directory is there."""
    wanted = recipe.evaluation
    prompts = encode_prompts(list(rows), tokenizer, template, recipe.data.max_prompt_length)
    longest = max((len(prompt.ids) for prompt in prompts if prompt is not None), default=0)
    for model in models:
        if rows:
            cache_argument(model)
        advice = f"Lower evaluation.max_new_tokens ({wanted.max_new_tokens}) or data.max_prompt_length"
        check_positions(model, "evaluation: the model", longest + wanted.max_new_tokens, advice)  # type: ignore[arg-type]


def _manifest(
    recipe: Recipe,
    train_report: EncodingReport,
    validation_report: EncodingReport | None,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    answers: dict[str, Any] | None,
    final_sets: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """What was trained and measured on: sources with their sha256, and what became of the rows."""
    train_source = manifest(recipe.data.train, train_rows, split=recipe.data.train_split)
    splits = {"train": {**train_source, **dataclasses.asdict(train_report)}}
    if recipe.data.validation is not None and validation_report is not None:
        source = manifest(recipe.data.validation, validation_rows, split=recipe.data.validation_split)
        splits["validation"] = {**source, **dataclasses.asdict(validation_report)}
    # The names of final_sets are in the order of the recipe
    evaluated = zip(recipe.evaluation.sets, final_sets.items(), strict=True)
    return {
        "splits": splits,
        "evaluation_sets": {name: manifest(resolve_set(wanted).path, rows) for wanted, (name, rows) in evaluated},
        "template": recipe.data.prompt_template,
        "responses": recipe.data.responses,
        "teacher_answers": answers,
    }
