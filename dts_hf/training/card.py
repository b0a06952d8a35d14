"""What a trainer knows of its student, as ``reporting.facts.Facts``: the card from Python is the one of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.fake_quantization import trained_for
from dts_hf.reporting.facts import Facts
from dts_hf.runs.directory import ONE_TEACHER
from dts_hf.runs.environment import installed_packages

#: Held-out losses as the Trainer logs them, and their names in ``metrics.json``.
HELD_OUT = {
    "ce_loss": "ce", "kl": "kl", "reverse_kl": "reverse_kl", "top1_agreement": "top1_agreement", "ece": "ece",
    "student_entropy": "entropy", "labels": "n_tokens",
}  # fmt: skip
#: In a line of the log: it is of rows that were given to ``evaluate``, and not of the trainer's own held-out ones.
OTHER_ROWS = "other_rows"
#: Of classifiers: what is measured in fractions, and the losses.
TASK_METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
LABEL_LOSSES = {
    "ce_loss": "label_ce",
    "mse_loss": "label_mse",
    "kl": "teacher_kl",
    "top1_agreement": "teacher_agreement",
}


def held_out_scores(
    log: Sequence[Mapping[str, Any]], step: int, sets: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """What ``evaluate`` found for the weights of ``step`` on the trainer's own held-out rows; nothing: they have no scores.

    The newest line of the log may be one of other weights: those that ``load_best_model_at_end`` left behind, or those of an
    evaluation before the last steps.

    Args:
        log: lines of the Trainer.
        step: whose weights the student has.
        sets: names of the held-out sets; none: there is one, without a name.

    Returns:
        by set (``held-out`` is one without a name) the values of its line, without the prefixes of their names.
    """
    own = [line for line in reversed(log) if line.get("step") == step and OTHER_ROWS not in line]
    found: dict[str, dict[str, Any]] = {}
    for name in sets or ("",):
        prefix = f"eval_{name}_" if name else "eval_"
        # By its rows: ``eval_a_ce_loss`` may be a value of the set "a", or the loss of a set "a_ce"
        line = next((line for line in own if f"{prefix}rows" in line), None)
        if line is not None:
            values = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
            found[name or "held-out"] = values
    return found


def facts_of_training(
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    loss: DistillationLoss,
    args: TrainingArguments,
    *,
    taught: bool,
    several: Mapping[str, Any],
    itself: Mapping[str, Any],
    rows: Mapping[str, Any],
    task: str | None,
    log: Sequence[Mapping[str, Any]],
    held_out: Mapping[str, Mapping[str, Any]],
    done: Mapping[str, Any],
) -> Facts:
    """Everything that a card says, as far as a trainer knows it.

    Args:
        student: as it is trained; where it came from is in its configuration.
        teachers: the same, by the key of a recipe; nothing: there is none, or one whose name is not known.
        loss: with its temperature.
        args: of the trainer.
        taught: there is a teacher.
        several: the section of each of several teachers, without its model.
        itself: the section of a teacher that is the student itself; empty: it is another one.
        rows: how rows became tokens: a template and limits, and the column of what the teacher alone reads.
        task: of classifiers, by name.
        log: lines of the Trainer.
        held_out: scores of the student as it is; see ``held_out_scores``.
        done: ``steps``, ``seconds``, ``tokens`` so far.
    """
    policy = loss.temperature.describe()
    per_teacher = policy.pop("per_teacher", False)
    recipe: dict[str, Any] = {
        "student": _student_section(student),
        "data": _described(rows),
        "temperature": {"name": loss.temperature.name, **policy},
        "loss": {
            "divergence": loss.divergence.describe(),
            "kd_ratio": loss.kd_ratio,
            "temperature_scaling": loss.temperature_scaling,
            "temperature_per_teacher": per_teacher,
        },
        "training": {
            key: getattr(args, key) for key in ("learning_rate", "num_train_epochs", "max_steps", "seed")
            if key != "max_steps" or args.max_steps > 0
        },
    }  # fmt: skip
    if task is not None:
        recipe["task"] = {"subset": task, "max_length": rows.get("max_length")}
    models: dict[str, Any] = {"student": {"parameters": _parameters(student)}}
    if several:
        named = {name: teachers.get(f"teachers.{name}") for name in several}
        recipe["teachers"] = {
            name: {"model": "" if model is None else _name(model), **several[name]} for name, model in named.items()
        }
    elif taught:
        recipe["teacher"] = dict(itself) or {"model": _name(teachers["teacher"]) if "teacher" in teachers else ""}
    for key, teacher in teachers.items():
        models[key.replace("teachers.", ONE_TEACHER)] = {"parameters": _parameters(teacher)}
    if task is not None:
        for model, entry in models.items():
            prefix = "" if model == "student" else f"{model}_"
            entry["sets"] = {name: scores for name, line in held_out.items() if (scores := _scores(line, prefix))}
    elif held_out:
        losses = {
            name: {ours: line[key] for key, ours in HELD_OUT.items() if key in line} for name, line in held_out.items()
        }
        models["student"]["teacher_forced"] = losses.get("held-out", {"sets": losses})
    name = Path(str(args.output_dir)).absolute().name
    metrics: dict[str, Any] = {"models": models, "training": dict(done)}
    if task is not None:
        metrics |= {"protocol": {"pair": None}, "task": {"metrics": list(TASK_METRICS)}}
    return Facts(name, recipe, metrics, list(log), {}, {"packages": installed_packages()}, {})


def _student_section(student: nn.Module) -> dict[str, Any]:
    """The student as a recipe's section has it."""
    section: dict[str, Any] = {"model": _name(student)}
    if adapter := getattr(student, "peft_config", {}).get("default"):
        section["lora"] = {"r": getattr(adapter, "r", None), "save": "adapter"}  # other kinds have no rank
    if quantize := trained_for(student):
        section["quantize"] = quantize
    return section


def _scores(held_out: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Of classifiers: the metrics of the task and, of the student, the losses, as ``metrics.json`` has them."""
    names = {f"{prefix}{name}": name for name in TASK_METRICS} | ({} if prefix else LABEL_LOSSES)
    found = {name: {"mean": held_out[key]} for key, name in names.items() if key in held_out}
    return {"n": held_out.get("rows", 0), **found} if found else {}


def _described(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Template and limits by name, and mixed data; a tokenizer and other objects are left out."""
    known = {"max_length", "max_prompt_length", "teacher_prefix_column"} & rows.keys()
    template = getattr(rows.get("template"), "name", None)
    own = {"on_policy": rows["on_policy"]} if rows.get("on_policy") else {}
    return ({"prompt_template": template} if template else {}) | {key: rows[key] for key in known} | own


def _name(model: nn.Module) -> str:
    """Name or folder that the model was loaded from; empty: it was made in memory."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def _parameters(model: nn.Module) -> int:
    """How many weights, those counted whole that ZeRO-3 has spread over processes."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
