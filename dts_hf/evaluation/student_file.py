"""``dts_hf.json`` in a student's folder: the template and the protocol it was trained and scored with.

It travels with the weights, so that a run, its ``final/``, a copy of it and the student on the Hub are asked in one way and
get one score. It holds no paths.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dts_hf.data.chat_templates import AUTO, Template, get_template, resolve_template
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import describe_protocol
from dts_hf.evaluation.held_out import protocol_of
from dts_hf.evaluation.protocol import Protocol, custom_protocol
from dts_hf.models.loading import ModelSource
from dts_hf.models.saving import STUDENT_FILE
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.environment import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1


@dataclass(frozen=True)
class StudentFile:
    """What is read back.

    Attributes:
        protocol: of the run's own scores; its template is a definite one, never ``auto``.
        wraps_prompts: whether the template also words prompts that are finished texts (rows of kind ``prompt``).
        dtype: of the weights that answered.
        facts: the whole file.
    """

    protocol: Protocol
    wraps_prompts: bool
    dtype: str
    facts: Mapping[str, Any]

    @property
    def template(self) -> Template:
        """The template of the student's prompts, as training used it."""
        return as_trained(self.protocol.template, self.wraps_prompts)


def as_trained(name: str, wraps_prompts: bool) -> Template:
    """The template called ``name``; one that ``auto`` chose leaves finished prompts as they are."""
    return dataclasses.replace(get_template(name), wraps_prompts=wraps_prompts)


def student_facts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What ``dts_hf.json`` says of the student of ``recipe``.

    Args:
        recipe: of a language model.
        tokenizer: the student's, which decides what the template ``auto`` is.
    """
    data, loss = recipe.data, recipe.loss
    learns = {"kd_ratio": loss.kd_ratio, "temperature_scaling": loss.temperature_scaling}
    policy: dict[str, Any] = {"temperature": recipe.temperature.model_dump(mode="json"), **learns}
    policy["divergence"] = loss.divergence.model_dump(mode="json")
    if recipe.teachers:  # how many and how they share the rows, and not what they are
        weights = {name: section.weight for name, section in recipe.teachers.items()}
        policy["teachers"] = [*weights] if data.teacher_column else weights
        policy["temperature_per_teacher"] = loss.temperature_per_teacher
    return {
        "format": FORMAT,
        "dts_hf": installed_version("dts-hf"),
        "prompt_template": resolve_template(data.prompt_template, tokenizer).name,
        "wraps_prompts": data.prompt_template != AUTO,
        "train_on": data.train_on,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "protocol": describe_protocol(protocol_of(recipe), tokenizer),
        "dtype": recipe.evaluation.dtype or recipe.student.dtype,
        "distillation": _without_paths(policy) if recipe.all_teachers else None,
    }


def read_student_file(model: str) -> StudentFile | None:
    """The file of a student's folder or of a repository on the Hub; None where there is none.

    Raises:
        UserError: the file is damaged, or of a later version of this package.
    """
    path = _find(model)
    if path is None:
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        given = facts["protocol"]
        known = {field.name for field in fields(Protocol)} - {"name", "about"}
        # What greedy text does not use is written as nothing: the defaults stand for it
        values = {key: value for key, value in given.items() if key in known and value not in (None, [])}
        protocol = dataclasses.replace(custom_protocol(**values), name=str(given["name"]))
        student = StudentFile(protocol, bool(facts["wraps_prompts"]), str(facts["dtype"]), facts)
        get_template(protocol.template)
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{model}: {STUDENT_FILE} cannot be read ({type(error).__name__}: {error}). Remove it, and give --protocol "
            "and --template instead"
        ) from None
    if facts["format"] != FORMAT:
        raise UserError(
            f"{model}: {STUDENT_FILE} has format {facts['format']}, this version of dts-hf reads {FORMAT}: update it"
        )
    return student


def _find(model: str) -> Path | None:
    location = ModelSource.resolve(model, "model")
    if location.options:  # a GGUF file
        return None
    if Path(location.location).is_dir():
        path = Path(location.location) / STUDENT_FILE
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(location.location, STUDENT_FILE))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        # No such file, no network or no such repository: what is wrong with the model, its own loading says better
        return None


def _without_paths(value: Any) -> Any:
    """``value`` with the last name of every path in it: the file goes where the student goes."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return PurePath(value.replace("\\", "/")).name if isinstance(value, str) else value
