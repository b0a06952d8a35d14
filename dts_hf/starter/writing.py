"""The text of a first recipe. Every key that a person may want to change stands there, with its reason behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dts_hf.recipe.editor_schema import MODELINE
from dts_hf.starter.looking import DataLook, TeacherLook


class Choice(NamedTuple):
    """A value, and the reason that stands behind it in the file."""

    value: object
    reason: str


@dataclass(frozen=True)
class Choices:
    """What the file will say, key by key."""

    student: str | None
    layers: Choice | None
    teacher_dtype: Choice
    validation: Choice
    template: Choice
    max_length: Choice
    max_prompt_length: Choice
    long_rows: Choice | None
    batch_size: Choice
    accumulation: Choice
    bf16: Choice
    learning_rate: Choice
    length: Choice
    max_steps: int | None
    evaluation_rows: Choice
    max_new_tokens: Choice


def recipe_text(choices: Choices, teacher: TeacherLook, data: DataLook, output: str) -> str:
    """The file, as YAML that any loader reads alike.

    Args:
        choices: its values.
        teacher: for the words of its head.
        data: likewise.
        output: the run directory.
    """
    return "\n".join(_lines(choices, teacher, data, output)) + "\n"


def _lines(c: Choices, teacher: TeacherLook, data: DataLook, output: str) -> Iterator[str]:
    size = f"{teacher.parameters / 1e6:,.0f} M parameters, " if teacher.parameters else ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in data.kinds.items())
    yield MODELINE
    yield f"# Distil {_scalar(teacher.name)} on {_scalar(data.source)}; written by dts-hf init, to be changed"
    yield "#"
    yield f"# Teacher: {size}{teacher.layers} layers, a vocabulary of {teacher.vocabulary:,}."
    yield f"# Rows: {data.rows:,} ({kinds}), {data.totals[len(data.totals) // 2]:,} tokens in the middle."
    yield ""
    yield "student:"
    if c.layers is None:
        yield f"  model: {_scalar(c.student)}"
    else:
        yield "  init: # cut out of the teacher; a model of its own: model: NAME in the place of init"
        yield "    from: teacher"
        yield _line("layers", c.layers, 4)
        yield _line(
            "choose", Choice("search", "those without which it loses least; even costs nothing, and is worst"), 4
        )
    yield ""
    yield "teacher:"
    yield f"  model: {_scalar(teacher.name)}"
    yield _line("dtype", c.teacher_dtype)
    yield ""
    yield "data:"
    yield f"  train: {_scalar(data.source)}"
    yield _line("validation", c.validation)
    yield _line("prompt_template", c.template)
    if not data.all_turns:
        yield "  train_on: last_turn # this chat template writes earlier answers otherwise once others follow"
    yield _line("max_length", c.max_length)
    yield _line("max_prompt_length", c.max_prompt_length)
    if c.long_rows is not None:
        yield _line("long_rows", c.long_rows)
    yield "  responses: data # teacher: learn from what the teacher itself answers; slower to begin, often better"
    yield ""
    yield "temperature:"
    yield "  name: dts # dts-hf list temperatures shows the others; a number alone is a constant one"
    yield "  rule: gap # follows the gap between student and teacher"
    yield "  t_init: 3.0"
    yield "  t_min: 1.0"
    yield ""
    yield "loss:"
    yield "  divergence: forward_kl # dts-hf list divergences"
    yield "  kd_ratio: 0.5 # half from the teacher's distribution, half from the labels"
    yield ""
    yield from _training(c, data.rows)
    yield "evaluation:"
    yield _line("rows", c.evaluation_rows)
    yield _line("max_new_tokens", c.max_new_tokens)
    yield ""
    yield "output:"
    yield f"  dir: {_scalar(output)} # must not exist yet; dts-hf train --resume goes on with a run that was stopped"


def _training(c: Choices, rows: int) -> Iterator[str]:
    yield "training: # any key of transformers.TrainingArguments"
    if c.max_steps is None:
        yield _line("num_train_epochs", c.length)
    else:
        yield f"  max_steps: {c.max_steps} # to see that all works; num_train_epochs: 3 trains"
    yield _line("per_device_train_batch_size", c.batch_size)
    yield _line("gradient_accumulation_steps", c.accumulation)
    yield _line("learning_rate", c.learning_rate)
    yield "  lr_scheduler_type: cosine"
    yield "  warmup_steps: 0.03 # a share of all steps"
    yield "  max_grad_norm: 1.0"
    yield _line("bf16", c.bf16)
    evaluates = c.max_steps is None and c.validation.value is not None
    yield "  eval_strategy: epoch # losses on the held-out rows" if evaluates else '  eval_strategy: "no"'
    yield "  save_strategy: epoch # what --resume goes on from" if c.max_steps is None else '  save_strategy: "no"'
    yield f"  logging_steps: {_logging_steps(c, rows)} # so the figures of the report have points enough"
    yield "  seed: 42"
    yield ""


def _logging_steps(c: Choices, rows: int) -> int:
    """Of every tenth step a line; of a short run more often, for curves of about thirty points."""
    held_out = c.validation.value if isinstance(c.validation.value, float) else 0.0
    learned = rows * (1 - held_out) * float(str(c.length.value))
    steps = c.max_steps or int(learned / (int(str(c.batch_size.value)) * int(str(c.accumulation.value))))
    return max(1, min(10, steps // 30))


def _line(key: str, choice: Choice, indent: int = 2) -> str:
    return f"{' ' * indent}{key}: {_scalar(choice.value)} # {choice.reason}"


def _scalar(value: object) -> str:
    """As YAML 1.1 and 1.2 read it alike: JSON, and plain where a word is one under both."""
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 1e-3 and value else f"{value:g}"
    if (
        isinstance(value, str)
        and value.replace("/", "a").replace("-", "a").replace(".", "a").replace("_", "a").isalnum()
    ):
        plain = value[0].isalpha() and value.lower() not in (
            "no",
            "yes",
            "on",
            "off",
            "true",
            "false",
            "null",
            "y",
            "n",
        )
        return value if plain else json.dumps(value)
    return json.dumps(value)
