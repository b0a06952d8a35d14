"""What ``dts-hf evaluate`` evaluates, and how it is asked where nothing is said: one default, wherever the student lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dts_hf.data.chat_templates import AUTO, Template, get_template, resolve_template
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import canonical_name
from dts_hf.evaluation.held_out import protocol_of
from dts_hf.evaluation.instruct import generation_settings
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.evaluation.protocol import Protocol, get_protocol
from dts_hf.evaluation.student_file import StudentFile, as_trained, read_student_file
from dts_hf.generation.vllm_backend import check_vllm_settings
from dts_hf.models.saving import STUDENT_FILE
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.damage import refuse_damaged
from dts_hf.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model, and what is known of how it was trained and scored.

    Attributes:
        location: where its weights are.
        recipe: of the run, where a run directory was given.
        student: what its folder says of it; None for a foreign model and for a student of an older version.
    """

    location: str
    recipe: Recipe | None
    student: StudentFile | None

    @property
    def own_protocol(self) -> Protocol | None:
        """That of the scores it got when it was made; None for a foreign model."""
        if self.student is not None:
            return self.student.protocol
        return None if self.recipe is None else protocol_of(self.recipe)

    @property
    def dtype(self) -> str | None:
        """Of the weights, when it was scored; None for a foreign model."""
        if self.student is not None:
            return self.student.dtype
        return None if self.recipe is None else self.recipe.evaluation.dtype or self.recipe.student.dtype


class Asked(NamedTuple):
    """A protocol with its template found: ``auto`` is the one that the tokenizer decides for."""

    protocol: Protocol
    template: Template


def find_subject(model: str) -> Subject:
    """What is meant by ``model``: a run directory, a model's folder, a GGUF file, or a name on the Hub.

    Raises:
        UserError: a run without a student, a run that classifies, or a damaged file.
    """
    refuse_damaged(model)
    folder = Path(model)
    # A student that was pulled from the Hub has its recipe beside its weights, and is no run directory
    is_model = (folder / "config.json").is_file() and not (folder / "final").is_dir()
    if is_model or not (folder / "recipe.yaml").is_file():
        return Subject(model, None, read_student_file(model))
    run = RunDirectory.open(model)
    recipe = run.read_recipe()
    if not run.final_path.is_dir():
        raise UserError(
            f"{model}: this run holds no student ({run.final_path} is missing): its training has not ended"
        )
    if recipe.task is not None:
        raise UserError(f"{model}: this run classifies ({recipe.task.subset}): its scores are in {run.metrics_path}")
    location = str(run.final_path)
    return Subject(location, recipe, read_student_file(location))


def choose_protocol(subject: Subject, options: EvaluationOptions) -> Protocol:
    """The protocol that was named, else the student's own.

    Prepared sets and foreign models have the published one, in the template of the student's training or ``auto``.

    Raises:
        UserError: an unknown protocol or template, or a value out of range.
    """
    own = subject.own_protocol
    if options.protocol is not None:
        protocol = get_protocol(options.protocol)
    elif own is not None and not any(canonical_name(name) for name in options.sets):
        protocol = own
    else:
        protocol = get_protocol("minillm").changed(template=AUTO if own is None else own.template)
    if options.template not in (None, AUTO):
        get_template(options.template, "--template")
    protocol = protocol.changed(**options.protocol_changes())
    settings = generation_settings(protocol, options.batch_size)  # refuses values out of range
    if protocol.backend == "vllm":
        check_vllm_settings(settings)
    return protocol


def with_template(
    protocol: Protocol, subject: Subject, options: EvaluationOptions, tokenizer: PreTrainedTokenizerBase
) -> Asked:
    """``protocol`` with the template that it means for this tokenizer.

    Args:
        protocol: from ``choose_protocol``.
        subject: what was trained on finished prompts as they are goes on with them.
        options: a template that is named there also words finished prompts.
        tokenizer: decides what ``auto`` is.
    """
    student, named = subject.student, options.protocol is not None or options.template is not None
    if protocol.template == AUTO:
        template = resolve_template(AUTO, tokenizer)
    elif student is not None and not named:
        template = as_trained(protocol.template, student.wraps_prompts)
    else:
        template = get_template(protocol.template)
    return Asked(protocol.resolved(template.name), template)


def notes_on(
    asked: Asked, subject: Subject, tokenizer: PreTrainedTokenizerBase, options: EvaluationOptions
) -> Iterator[str]:
    """What a person should know before comparing the score with another one, as lines for the terminal.

    Args:
        asked: how it is asked now.
        subject: how it was asked when it was made, where that is known.
        tokenizer: of the subject.
        options: what was asked for by name needs no explanation.
    """
    own = subject.own_protocol
    if own is None:
        if options.protocol is None and options.template is None:
            reason = (
                "its tokenizer has a chat template" if asked.template.is_chat else "its tokenizer has no chat template"
            )
            yield (
                f"No {STUDENT_FILE} says how this model was trained: its prompts are in the template "
                f"{asked.protocol.template}, because {reason} (--template names another)"
            )
        return
    before = own.resolved(resolve_template(own.template, tokenizer).name).values()
    now = asked.protocol.values()
    different = [f"{key} {now[key]} instead of {before[key]}" for key in now if now[key] != before[key]]
    if different:
        yield (
            f"protocol {asked.protocol.name}, but this student was scored with {own.name}: its own scores cannot be "
            f"compared with these ({', '.join(different)})"
        )
