"""What a run is going to do, in one line, before it does it: a person should know what the silence is."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import TrainingArguments

from dts_hf.recipe.schema import Recipe


def outline(recipe: Recipe, args: TrainingArguments) -> str:
    """The parts of a run in their order."""
    return f"plan: {'; '.join(_parts(recipe, args))}"


def _parts(recipe: Recipe, args: TrainingArguments) -> Iterator[str]:
    evaluation, data = recipe.evaluation, recipe.data
    yield "read and encode the rows"
    yield "load teacher and student" if recipe.loads_teacher else "load the student"
    if recipe.teacher is not None and recipe.teacher.kind == "cached":
        yield f"the teacher's states come out of {recipe.teacher.cache}"
    if data.responses == "teacher":
        yield f"the teacher answers every prompt (up to {data.teacher_max_new_tokens} tokens each; cached)"
    answered = recipe.task is None and (data.validation is not None or bool(evaluation.sets))
    before = [name for name in evaluation.models if name != "student" and (name != "teacher" or recipe.keeps_teacher)]
    rows = "" if evaluation.rows is None else f" on {evaluation.rows:,} rows"
    if answered and before:
        yield f"score {' and '.join(name.replace('_', ' ') for name in before)}{rows}"
    yield f"train {args.max_steps:,} steps" if args.max_steps > 0 else f"train {args.num_train_epochs:g} epochs"
    if answered and "student" in evaluation.models:
        yield f"score the student{rows}"
    yield f"write {recipe.output.dir}"
