"""The straight line: ``distill(recipe)`` goes from a recipe to a finished run directory. Start reading here.

recipe -> rows -> tokens -> teacher -> student -> (the teacher's own answers) -> trainer -> scores -> report.
It is one line for every kind of task: what differs between them is a ``Task`` (``task.py``), whose stages are called here
and, with a look at each result, by ``dts-hf doctor``. Everything that can be wrong with the input is found before the run
directory is made.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from dts_hf.classification.task import Classification
from dts_hf.console import say, working
from dts_hf.distributed.processes import on_first_process
from dts_hf.distributed.sharding import place_teacher
from dts_hf.errors import UploadError, UserError
from dts_hf.files import naming
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.models.loading import load_tokenizers, tokenizers_of_several
from dts_hf.models.saving import save_student
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import QUANTIZED_BY, Recipe
from dts_hf.recipe.training_arguments import check_trackers
from dts_hf.runs.comparison import ModelRecord, check_same_rows
from dts_hf.runs.directory import ONE_TEACHER, RunDirectory
from dts_hf.runs.failures import writing
from dts_hf.runs.lock import unlocking
from dts_hf.runs.memory import peak_memory_gb
from dts_hf.runs.start import Start, begin, open_run
from dts_hf.task import Data, Models, Rows, Scorer, Task
from dts_hf.training.callbacks import BeforeTrainingCallback, RunLogCallback
from dts_hf.training.distillation_base import DistillationBase
from dts_hf.training.signals import stops_on_signal


def task_of(recipe: Recipe) -> Task[Any]:
    """The kind of task that ``recipe`` describes."""
    return LanguageModeling(recipe) if recipe.task is None else Classification(recipe)


@stops_on_signal
@unlocking()
def distill(recipe: Recipe, resume: bool = False) -> RunDirectory:
    """Run ``recipe`` from start to finish and return its run directory.

    Args:
        recipe: what to do.
        resume: go on with the killed or interrupted run in ``output.dir``, from its newest complete checkpoint; the end is
            the one it would have had.

    Raises:
        UserError: wrong input, named by key, row or file; nothing has been written then.
        UploadError: all is done and written, but ``training.push_to_hub`` failed; its ``result`` is the run directory.
    """
    started, task = time.monotonic(), task_of(recipe)

    # 1. What can be refused without loading anything; and where the run starts: this may be its second attempt, or done.
    check_trackers(recipe)
    args = task.training_arguments(recipe.output.dir)
    start = begin(recipe, args, resume)
    if start.finished:
        return end_early(recipe, args)
    check_hub(recipe, args)
    set_seed(args.seed)
    transformers_logging.disable_progress_bar()

    # 2. Rows, and their tokens. They come before the models because they are cheap to check.
    record = ModelRecord(recipe, args, goes_on=start.keep)
    rows, (tokenizer, teacher_tokenizer), data = read_rows(task, record)

    # 3. Teacher and student. What generation would refuse later is refused now, and what a resume finds changed.
    made = student_init(recipe, args, data, start)
    models = load_models(task, args, record, made, tokenizer, teacher_tokenizer)
    task.check_context_length(models.loaded, tokenizer, rows)

    # 4. Sequence-level KD: train on what the teacher itself would say.
    if models.taught and recipe.data.responses == "teacher":
        rows, data = answered(task, models, rows)
    models = models.for_training(recipe)

    # From here on the training rows are needed as tokens alone; their text would stay in memory as long as training runs.
    made_from = {**task.manifest(rows, data), "models": record.values}
    rows = dataclasses.replace(rows, train=())

    # 5. The trainer, where teacher, student, temperature and loss meet. It checks that they fit together.
    trainer = task.make_trainer(args, models, data)
    trainer.models_record = record.values

    # 6. The run directory: from here on things are written. A resume is refused where rows or launch have changed.
    check_start(recipe, start, trainer, made_from)
    run = open_run(recipe, start, made_from, args, made.values)
    trainer.add_callback(RunLogCallback(run))
    if trainer.is_world_process_zero():
        for note in (*teacher_notes(recipe), *task.notes(rows, data)):
            say(note)

    # 7. Scores, training, scores. Before training the student has no wrapper yet, which scoring needs: hence the callback.
    scorer = task.make_scorer(run, trainer, models, rows, data, start.scores)
    for callback in scorer.callbacks():
        trainer.add_callback(callback)
    score_untrained(scorer, trainer, models, start)
    trainer.train(resume_from_checkpoint=start.checkpoint)
    scorer.score("student", models.student)

    # 8. The student as from_pretrained reads it. Then metrics.json, which marks the run as finished; report and upload.
    save(task, models.student, tokenizer, run)
    if trainer.is_world_process_zero():
        with naming(run.path):
            scorer.finish(training_facts(trainer, started))
        run.clean_up()
        report(recipe, run)
    push(args, run)
    return run


# ------------------------------------------------------------------------------------------------------- its pieces


def read_rows(
    task: Task[Any], record: ModelRecord
) -> tuple[Rows, tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], Data]:
    """The rows, the tokenizers of student and teacher, and the rows as tokens.

    Raises:
        UserError: a row, a tokenizer or a limit is wrong; or a resume finds other tokenizers.
    """
    with working("reading and encoding the rows"):
        rows = task.load_rows()
        tokenizers = load_tokenizers(task.recipe)
        record.add_tokenizers(*tokenizers)  # before rows are missing because of them
        return rows, tokenizers, task.encode(rows, tokenizers[0])


def check_hub(recipe: Recipe, args: TrainingArguments) -> None:
    """Look at the login before anything is loaded, where ``training.push_to_hub`` will need it; one process does it.

    Raises:
        UserError: it is missing, wrong, or may only read; or the Hub cannot be asked.
    """

    def look() -> None:
        from dts_hf.hub import push as hub

        hub.check_login(
            hub.Destination(args.hub_model_id or Path(recipe.output.dir).resolve().name, token=args.hub_token)
        )

    if args.push_to_hub:
        on_first_process(look, args.process_index, args.world_size)


def student_init(recipe: Recipe, args: TrainingArguments, data: Data, start: Start) -> StudentInit:
    """What ``student.init`` will be decided by: the rows, or what an earlier attempt at the run has decided.

    Args:
        recipe: with the section.
        args: the device, and this process among the others.
        data: the rows as tokens.
        start: whether there was an earlier attempt, and where it is gone on from.

    Raises:
        UserError: a checkpoint is gone on from, and what was decided is lost.
    """
    init, run = recipe.student.init, RunDirectory(recipe.output.dir)
    recorded = on_first_process(run.read_student_init, args.process_index, args.world_size) if start.keep else {}
    ours = start.checkpoint is not None and start.checkpoint.resolve().is_relative_to(run.path.resolve())
    if ours and init is not None and init.measures and not recorded:
        raise UserError(
            f"{run.student_init_path}: missing or damaged, and it alone knows which layers and channels the student of this "
            "run has. Put the file back, or start again with --overwrite"
        )
    return StudentInit(init, data.train if init is not None else None, args.device, recorded)


def load_models(
    task: Task[Any],
    args: TrainingArguments,
    record: ModelRecord,
    made: StudentInit,
    *tokenizers: PreTrainedTokenizerBase,
) -> Models:
    """The teacher, checked and where the recipe wants it, and the student.

    Args:
        task: loads both.
        args: the device, and the seed of weights that are drawn anew.
        record: takes what they are.
        made: for ``student.init``.
        tokenizers: the student's and the teacher's.

    Raises:
        UserError: one of them cannot be loaded, the loss cannot represent its outputs, or a resume finds another one.
    """
    with working("loading the models"):
        teacher, several = task.load_teacher(), task.load_several()
        teachers = {f"teachers.{name}": model for name, model in several.items()}
        teachers |= {} if teacher is None else {"teacher": teacher}
        for key, model in teachers.items():
            task.check_head(model, key)
        student = task.load_student(teacher, args.seed, made)
        record.add_models(student, teachers, task.teacher_records())
    # Not before: the student may be cut out of the teacher, which may be sharded over the processes from here on.
    for key, model in teachers.items():
        place_teacher(model, task.recipe.all_teachers[key].placement, args.device)
    of_several = tokenizers_of_several(task.recipe) if several else {}
    return Models(student, teacher, tokenizers[0], tokenizers[1], several, of_several)


def answered(task: Task[Any], models: Models, rows: Rows) -> tuple[Rows, Data]:
    """The same rows with answers of the teacher, or of each row's own where there are several; and these as tokens.

    Raises:
        UserError: there are none.
    """
    if models.teacher is None:
        rows = task.answer_by_several(models.several, models.tokenizer, rows)
    else:
        rows = task.answer(models.teacher, models.tokenizer, rows)
    return rows, task.encode(rows, models.tokenizer)


def teacher_notes(recipe: Recipe) -> Iterator[str]:
    """What a person should know of each teacher, as lines for the terminal."""
    if recipe.teacher is not None and recipe.teacher.kind == "self":
        yield f"teacher: {recipe.teacher.itself}; it is not scored apart from the student"
        return
    for key, teacher in recipe.all_teachers.items():
        if not teacher.is_kept:
            yield f"{key}: its states come {teacher.source}; it is not in memory, and is not scored"
            continue
        if (kind := teacher.quantization) == "none":
            continue
        yield (
            f"{key}: quantised to {kind} by {QUANTIZED_BY[kind]}, so its probabilities are slightly others than those of "
            "its files (dts-hf doctor measures by how much)"
        )


def check_start(recipe: Recipe, start: Start, trainer: DistillationBase, made_from: Mapping[str, Any]) -> None:
    """The last checks: they need rows, launch and length of the run. All processes call it.

    Args:
        recipe: names the run directory.
        start: where the run starts.
        trainer: knows how the rows of a step are shared out.
        made_from: what would be its ``data_manifest.json``.

    Raises:
        UserError: rows or launch have changed since an earlier attempt, or a recorded run that the temperature needs has
            another length.
    """
    if start.keep:
        check_same_rows(RunDirectory(recipe.output.dir), made_from)
    if start.checkpoint is not None:
        trainer.check_resumable(start.checkpoint)
        trainer.whole.add(start.checkpoint.resolve())  # ``begin`` has read it
    else:
        trainer.prepare_temperature(trainer.planned_steps())


def score_untrained(scorer: Scorer, trainer: DistillationBase, models: Models, start: Start) -> None:
    """Score the teacher, and have the student scored once the trainer has placed it and before its first step.

    A resume scores a teacher whose scores are lost. The student of a checkpoint is trained.

    Args:
        scorer: of the task.
        trainer: has not trained yet.
        models: the student as it was made.
        start: knows the scores that an earlier attempt made.
    """
    if models.teacher is not None and "teacher" not in start.scores:
        scorer.score("teacher", models.teacher)
    for name, teacher in models.several.items():
        if f"{ONE_TEACHER}{name}" not in start.scores:
            scorer.score(f"{ONE_TEACHER}{name}", teacher)
    if start.checkpoint is not None:
        return
    score_before = partial(scorer.score, "student_before", models.student)
    trainer.add_callback(BeforeTrainingCallback(score_before, trainer.exclude_from_timing))


def save(task: Task[Any], student: nn.Module, tokenizer: PreTrainedTokenizerBase, run: RunDirectory) -> None:
    """The student into ``final/``, with what says how it is asked; all processes call it.

    Args:
        task: knows its recipe and its template.
        student: trained.
        tokenizer: the student's.
        run: takes it.
    """
    lora = task.recipe.student.lora
    merge = lora is None or lora.save == "merged"
    with writing(run.final_path):  # safetensors names neither path nor space
        save_student(student, tokenizer, run.final_path, merge_lora=merge, carried=task.carried(tokenizer))


def training_facts(trainer: DistillationBase, started: float) -> dict[str, Any]:
    """What ``metrics.json`` says of the training itself.

    Args:
        trainer: has trained.
        started: monotonic seconds at which this attempt began.
    """
    return {
        "steps": trainer.state.global_step,
        "seconds": round(trainer.clock.seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "tokens": int(trainer.tokens_seen),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }


def report(recipe: Recipe, run: RunDirectory) -> None:
    """Figures, card and page of a finished run, where the recipe wants them."""
    if recipe.output.report:
        from dts_hf.reporting.report import write_report  # matplotlib takes seconds to load

        with naming(run.path):
            write_report(run)


def push(args: TrainingArguments, run: RunDirectory) -> None:
    """Upload the student with the card of the run, where ``training.push_to_hub`` asks for it; one process does it.

    Raises:
        UploadError: the run is complete, and its student was not uploaded; ``result`` is the run.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    from dts_hf.hub import push as hub

    try:
        hub.push(
            run.path,
            args.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
    except (UploadError, UserError) as error:
        what = (
            str(error) if isinstance(error, UploadError) else f"upload refused: {error}; then: dts-hf push {run.path}"
        )
        raise UploadError(f"run complete, {what}", run) from error


def end_early(recipe: Recipe, args: TrainingArguments) -> RunDirectory:
    """A run that is done already: its report is written where it is missing, and what the recipe uploads is uploaded.

    That costs a few requests where it was uploaded before: the Hub has the files by then.

    Raises:
        UploadError: see ``push``.
    """
    run = RunDirectory.open(recipe.output.dir)
    if args.process_index != 0:
        return run
    run.clean_up()
    if not run.report_path.is_file():
        report(recipe, run)
    push(args, run)
    return run
