"""What a run is going to do, in one line, before it does it: a person should know what the silence is."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import TrainingArguments

from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import scored_before


def outline(recipe: Recipe, args: TrainingArguments) -> str:
    """The parts of a run in their order."""
    return f"plan: {'; '.join(_parts(recipe, args))}"


def _parts(recipe: Recipe, args: TrainingArguments) -> Iterator[str]:
    evaluation, data = recipe.evaluation, recipe.data
    yield "read and encode the rows"
    teachers = len(recipe.loaded_teachers)
    named = "teacher" if teachers == 1 else f"{teachers} teachers"
    yield f"load {named} and student" if recipe.loads_teacher else "load the student"
    for key, teacher in recipe.all_teachers.items():
        if teacher.kind != "live":
            yield f"{'the teacher' if recipe.teacher is not None else key}'s states come {teacher.source}"
    init = recipe.student.init
    if init is not None and init.measures:
        yield f"choose what the student keeps on {init.calibration_rows} training rows ({init.choose})"
    if data.responses == "teacher":
        whose = "its" if recipe.teachers else "the"
        yield (
            f"{whose} teacher answers every prompt (up to {data.teacher_max_new_tokens} tokens each), where no earlier run "
            "has kept its answers"
        )
    answered = recipe.task is None and (data.validation is not None or bool(evaluation.sets))
    before = scored_before(recipe)
    rows = "" if evaluation.rows is None else f" on {evaluation.rows:,} rows"
    if answered and before:
        yield f"score {' and '.join(name.replace('_', ' ') for name in before)}{rows}"
    yield f"train {args.max_steps:,} steps" if args.max_steps > 0 else f"train {args.num_train_epochs:g} epochs"
    if answered and "student" in evaluation.models:
        yield f"score the student{rows}"
    yield f"write {recipe.output.dir}"
