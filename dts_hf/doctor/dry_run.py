"""``dts-hf train --dry-run``: the first checks of the doctor, and the plan that follows from them. No model is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from dts_hf.console import quiet
from dts_hf.doctor.classification import ClassifierWalk
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.language_modeling import LanguageModelWalk
from dts_hf.doctor.run import describe_init
from dts_hf.doctor.several import describe_rows, rows_of_each, walk_of
from dts_hf.doctor.walk import Walk
from dts_hf.errors import UserError
from dts_hf.recipe.effective import effective
from dts_hf.recipe.schema import Init, Recipe
from dts_hf.reporting.facts import format_count
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.environment import where_it_trains
from dts_hf.runs.outline import outline
from dts_hf.training.model_shape import shapes_from_configs
from dts_hf.training.workload import checkpoints_kept


@dataclass(frozen=True)
class DryRun:
    """What ``train`` would do.

    Attributes:
        plan: one line for each part, by its name.
        recipe: the effective recipe, every default written out, as YAML.
    """

    plan: dict[str, str]
    recipe: str


def dry_run(recipe: Recipe) -> DryRun:
    """Check ``recipe`` as far as that is cheap, and say what a run would do; nothing is written.

    Raises:
        UserError: what ``train`` would refuse: rows, tokens, training arguments, the run directory.
    """
    RunDirectory.check_can_create(recipe.output.dir, recipe.output.overwrite)
    of_each = rows_of_each(recipe) if recipe.teachers else {}
    walk = _walked(recipe)
    diagnosis = walk.diagnosis
    problems = [problem for problem in diagnosis.problems if problem.level == "error"]
    if problems or walk.args is None or walk.rows is None:
        raise UserError(
            "\n".join(f"{problem.text}{f' ({problem.advice})' if problem.advice else ''}" for problem in problems)
        )
    plan = _plan(recipe, walk, diagnosis)
    if of_each:
        plan["teachers"] = describe_rows(of_each)
    return DryRun(plan, effective(recipe, walk.args).to_yaml())


def _student(init: Init, walk: Walk) -> str:
    """What the student will be, and how many weights it will have."""
    weights = f"about {format_count(walk.shapes[0].parameters)} weights" if walk.shapes is not None else (
        "how many weights is known once the file of the teacher is read (dts-hf doctor does so)"
    )  # fmt: skip
    rows = f"; it is chosen on {init.calibration_rows} training rows before training" if init.measures else ""
    return f"{describe_init(init)}, {weights}{rows}"


def memory_of(recipe: Recipe) -> tuple[float, float] | None:
    """(bytes that the run is estimated to need, bytes that are free); None where that is not known without loading."""
    checks = [
        check for check in _walked(recipe).diagnosis.checks if check.name == "memory" and "needed" in check.values
    ]
    return (checks[0].values["needed"], checks[0].values["device"]) if checks else None


def _walked(recipe: Recipe) -> Walk:
    """The doctor's walk up to where models would be loaded."""
    diagnosis = Diagnosis(recipe.output.dir)
    with tempfile.TemporaryDirectory(prefix="dts_hf-dry-run-") as folder, quiet():
        if recipe.teachers:  # the tokenizer of the first, the weights of all
            walk: Walk = walk_of(diagnosis, recipe, recipe.names_of(recipe.distinct_teachers[0]), Path(folder), None)
        else:
            kind = LanguageModelWalk if recipe.task is None else ClassifierWalk
            walk = kind(diagnosis, recipe, Path(folder), None)
        walk.look_at_arguments()
        walk.look_at_rows()
        if isinstance(walk, LanguageModelWalk):
            try:
                walk.shapes = shapes_from_configs(walk.recipe)
            except UserError:
                if recipe.student.init is not None:  # asks for what the model cannot become
                    raise
            except Exception:  # of a GGUF file the shapes are not known before it is loaded
                pass
            if walk.shapes is not None and walk.data is not None:
                walk.look_at_memory()
    return walk


def _plan(recipe: Recipe, walk: Walk, diagnosis: Diagnosis) -> dict[str, str]:
    args, rows = walk.args, walk.rows
    assert args is not None and rows is not None  # dry_run has looked
    steps = walk.steps or 0
    batch = f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * walk.world:,} rows"
    if recipe.data.pack_tokens is not None:
        batch = f"{recipe.data.pack_tokens * args.gradient_accumulation_steps * walk.world:,} tokens"
    sets = "".join(f", {len(of_set):,} of {name}" for name, of_set in rows.sets.items())
    memory = next(
        (check.summary for check in diagnosis.checks if check.name == "memory"), "not known before it is loaded"
    )
    kept = checkpoints_kept(args, steps)
    checkpoints = f"{kept} checkpoint{'s' if kept > 1 else ''}" if kept else "no checkpoint"
    student = {} if recipe.student.init is None else {"student": _student(recipe.student.init, walk)}
    return {
        "parts": outline(recipe, args).removeprefix("plan: "),
        **student,
        "device": where_it_trains(args).removeprefix("training on "),
        "rows": f"{len(rows.train):,} to train on, {len(rows.validation):,} held out{sets}",
        "tokens": diagnosis["data"].summary,
        "steps": f"{steps:,} optimizer steps of {batch}, on {walk.world} device{'s' if walk.world > 1 else ''}",
        "memory": memory,
        "time": "dts-hf doctor measures it: three real steps",
        "writes": f"{recipe.output.dir}: recipe, log, scores, predictions, final/ (the student), {checkpoints}"
        + (", figures, report.html, model card" if recipe.output.report else ""),
        "warnings": "; ".join(problem.text for problem in diagnosis.problems) or "none",
    }
