"""The values of a first recipe, each with its reason: made of what the teacher and the data are, and of the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from dts_hf.console import gb
from dts_hf.doctor.dry_run import memory_of
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.yaml_files import parse_yaml
from dts_hf.starter.looking import DataLook, TeacherLook, percentile
from dts_hf.starter.writing import Choice, Choices, recipe_text

Preset = Literal["standard", "quick"]
#: A batch of so many rows per optimizer step, made of micro-batches that fit into memory.
ROWS_OF_A_STEP, MICRO_BATCHES = 16, (8, 4, 2, 1)
#: Answers of the evaluation, in tokens.
LONGEST_ANSWER = 256
#: Up to this size a teacher on a CPU is kept in float32, which is faster there.
SMALL = 500e6
#: Of a device's memory; the estimate is good to 20 %.
COMFORTABLE = 0.85


def choose(
    teacher: TeacherLook, data: DataLook, *, student: str | None, layers: int | None, preset: Preset, output: str
) -> tuple[Choices, str]:
    """Every value of the recipe, and the recipe's text.

    Args:
        teacher: as it was looked at.
        data: likewise.
        student: another model that learns; None: a part of the teacher.
        layers: how many of the teacher's layers that part has; None: half of them.
        preset: ``quick`` makes a few steps, to see whether all works; ``standard`` trains.
        output: the run directory.

    Raises:
        UserError: more layers than the teacher has, or rows that fit nowhere.
    """
    kept = _layers(teacher, layers) if student is None else None
    on_gpu = torch.cuda.is_available()
    prompt, total, long_rows = _limits(teacher, data)
    small = 0 < teacher.parameters < SMALL
    dtype = "bfloat16" if on_gpu or not small else "float32"
    learning_rate = _learning_rate(teacher, student)
    choices = Choices(
        student=student,
        layers=kept,
        teacher_dtype=Choice(
            dtype, "half the memory of float32" if dtype == "bfloat16" else "small, and faster so on a CPU"
        ),
        validation=_validation(data),
        template=Choice("auto", _template_reason(teacher)),
        max_length=total,
        max_prompt_length=prompt,
        long_rows=long_rows,
        batch_size=Choice(MICRO_BATCHES[0], "rows at once on each device"),
        accumulation=Choice(
            ROWS_OF_A_STEP // MICRO_BATCHES[0], f"so an optimizer step learns from {ROWS_OF_A_STEP} rows"
        ),
        bf16=Choice(on_gpu, "autocast; the weights stay in float32" if on_gpu else "no GPU here; true on one"),
        learning_rate=learning_rate,
        length=Choice(1 if preset == "quick" else 3, "times through the rows"),
        max_steps=20 if preset == "quick" else None,
        evaluation_rows=Choice(16 if preset == "quick" else 64, "held-out prompts that teacher and student answer"),
        max_new_tokens=_answer(data),
    )
    return _fitted(choices, teacher, data, output)


def _layers(teacher: TeacherLook, layers: int | None) -> Choice:
    if layers is not None and layers > teacher.layers:
        raise UserError(f"--layers: got {layers}, but the teacher has {teacher.layers}")
    if layers is not None:
        return Choice(layers, f"of the teacher's {teacher.layers}")
    return Choice(max(1, (teacher.layers + 1) // 2), f"half of the teacher's {teacher.layers}; fewer: faster")


def _limits(teacher: TeacherLook, data: DataLook) -> tuple[Choice, Choice, Choice | None]:
    """Of the prompt, and of prompt and response together: room for 99 % of the rows, within the teacher's positions.

    The third is what becomes of longer rows, where the positions leave room for less than 99 %.
    """
    prompt = min(_up(percentile(data.prompts, 0.99) + 1, 16), teacher.positions - 16)
    total = min(max(_up(percentile(data.totals, 0.99) + 1, 32), prompt + 16), teacher.positions)
    longest = f"the longest prompt has {data.prompts[-1]:,} tokens" if data.prompts[-1] else "a text has no prompt"
    fitting, limit = len(data.totals), f"the teacher's {teacher.positions:,} positions"
    left_out = data.unfit + sum(length > prompt for length in data.prompts)
    longer = sum(length > total for length in data.totals)
    if left_out > 0.01 * (fitting + data.unfit):
        longest = (
            f"{_percent(left_out, fitting + data.unfit)} of the rows are left out: their prompt is beyond {limit}"
        )
    if longer <= 0.01 * fitting:
        others = "other rows" if data.unfit else "rows"
        words = f"99 % of the {others} are shorter; the longest has {data.totals[-1]:,} tokens"
        return Choice(prompt, longest), Choice(total, words), None
    if longer == fitting and set(data.kinds) != {"text"}:
        raise UserError(
            f"--data: {data.source}: every row is longer than {limit}, so no answer would keep its end, and the student "
            "would never learn to stop: expected shorter rows, or a teacher with more positions"
        )
    cut = Choice("cut", "so that their beginning is learned; drop: they are left out")
    return Choice(prompt, longest), Choice(total, f"{limit}; {_percent(longer, fitting)} of the rows are longer"), cut


def _percent(part: int, whole: int) -> str:
    return f"{max(1, round(100 * part / whole))} %"


def _answer(data: DataLook) -> Choice:
    """How long an answer of the evaluation may be: as 99 % of those in the rows, within what is soon generated."""
    wanted = max(16, _up(percentile(data.responses, 0.99), 16))
    if wanted <= LONGEST_ANSWER:
        return Choice(wanted, "99 % of the answers in your rows are shorter")
    longer = sum(length > LONGEST_ANSWER for length in data.responses)
    return Choice(
        LONGEST_ANSWER, f"{_percent(longer, len(data.responses))} of the answers in your rows are longer; more: slower"
    )


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _validation(data: DataLook) -> Choice:
    if data.held_out is not None:
        return Choice(data.held_out, "found beside the training rows")
    if data.share is None:
        return Choice(None, "too few different prompts to hold any out: no evaluation; or a file of held-out rows")
    return Choice(data.share, f"this share of the rows is held out, {data.share_rows:,} of them; or a file of them")


def _template_reason(teacher: TeacherLook) -> str:
    return (
        "the teacher's own chat template" if teacher.has_chat_template else "the teacher has no chat template: Alpaca"
    )


def _learning_rate(teacher: TeacherLook, student: str | None) -> Choice:
    large = teacher.parameters >= 1e9
    if student is not None:
        return Choice(2.0e-5 if large else 5.0e-5, "usual for a model that is trained already")
    return Choice(
        1.0e-4 if large else 4.0e-4, "a student with layers missing has much to mend; lower for an intact one"
    )


def _fitted(choices: Choices, teacher: TeacherLook, data: DataLook, output: str) -> tuple[Choices, str]:
    """``choices`` with the largest micro-batch that memory is good for, and their text."""
    text = ""
    for rows in MICRO_BATCHES:
        steps = Choice(ROWS_OF_A_STEP // rows, choices.accumulation.reason)
        tried = replace(choices, batch_size=Choice(rows, choices.batch_size.reason), accumulation=steps)
        text = recipe_text(tried, teacher, data, output)
        memory = memory_of(Recipe.from_dict(parse_yaml(text, "recipe")))
        if memory is None:
            return tried, text
        needed, room = memory
        reason = f"about {gb(needed)} of {gb(room)} free memory"
        tried = replace(tried, batch_size=Choice(rows, f"{choices.batch_size.reason}; {reason}"))
        text = recipe_text(tried, teacher, data, output)
        if needed <= COMFORTABLE * room:
            return tried, text
    return tried, text
