"""What an earlier attempt of a run has recorded of rows and models, compared with what there is now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from dts_hf.console import say
from dts_hf.distributed.processes import on_first_process
from dts_hf.errors import UserError
from dts_hf.models.description import READ_TO_ANSWER, SET_BY_TRAINER, describe_model, describe_tokenizer, versions
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.yaml_files import leaves
from dts_hf.runs.directory import RunDirectory

#: Said of a model, and not compared: what may move without a change of anything that acts.
TOLD_ONLY = ("commit",)
#: Compared only where the same versions of transformers and tokenizers have written both; else what they encode is.
OF_VERSION = ("rules", "class")
MOST_LINES, MOST_CHARACTERS = 12, 300  # of a message, and of a value in it


class ModelRecord:
    """What the models of a run are, recorded as they are loaded; refuses the first that an earlier attempt had otherwise.

    All processes have one and call it alike; the first one looks.

    Args:
        recipe: names the models and the run directory.
        args: of it.
        goes_on: an earlier attempt at this run is gone on with.

    Attributes:
        values: the section ``models`` of ``data_manifest.json``.
    """

    def __init__(self, recipe: Recipe, args: TrainingArguments, goes_on: bool) -> None:
        self.recipe, self.args, self.goes_on = recipe, args, goes_on
        self.values: dict[str, Any] = versions()

    def add_tokenizers(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        """Record the tokenizers, which are one where a student is cut out of its teacher.

        Raises:
            UserError: one has changed.
        """

        def describe() -> dict[str, Any]:
            found = {"student_tokenizer": describe_tokenizer(student)}
            return found if teacher is student else {**found, "teacher_tokenizer": describe_tokenizer(teacher)}

        self._add(describe)

    def add_models(
        self, student: Any, teachers: Mapping[str, PreTrainedModel], elsewhere: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Record the models, before a teacher is sharded.

        Args:
            student: as it is trained.
            teachers: those that were loaded, by the key of their section: ``teacher``, or ``teachers.NAME`` of each of
                several.
            elsewhere: what the caches of teachers' states and their servers say of themselves, by the same keys.

        Raises:
            UserError: one has changed.
        """

        def describe() -> dict[str, Any]:
            asked = self.recipe.student
            found = {"student": describe_model(student, asked.model, asked.revision)}
            settings = READ_TO_ANSWER if self._teacher_answers() else ()
            for key, section in self.recipe.all_teachers.items():
                if key in teachers:
                    found[key] = describe_model(teachers[key], section.model, section.revision, settings)
            return found | {f"{key}_states": dict(of_states) for key, of_states in elsewhere.items()}

        self._add(describe)

    def _teacher_answers(self) -> bool:
        data, evaluation = self.recipe.data, self.recipe.evaluation
        return data.responses == "teacher" or (data.validation is not None and "teacher" in evaluation.models)

    def _add(self, describe: Callable[[], dict[str, Any]]) -> None:
        def look() -> dict[str, Any]:
            new = describe()
            if self.goes_on:
                self._compare({**versions(), **new})
            return new

        self.values |= on_first_process(look, self.args.process_index, self.args.world_size)

    def _compare(self, now: Mapping[str, Any]) -> None:
        run = RunDirectory(self.recipe.output.dir)
        manifest = run.read_data_manifest()
        if "models" in manifest:
            refuse_changed_models(str(run.path), manifest["models"], now, "start again with --overwrite")
        elif manifest and "student" in now:
            say(f"{run.path}: an older version began this run and did not record its models: a change is not noticed")


def refuse_changed_models(where: str, was: Mapping[str, Any], now: Mapping[str, Any], otherwise: str) -> None:
    """Refuse to go on with other models than those of the record.

    Args:
        where: a run or a checkpoint, for the message.
        was: what it was begun with, as ``ModelRecord.values`` or a part of it.
        now: the same of what has been loaded now.
        otherwise: what else there is to do than to put them back.

    Raises:
        UserError: names what has changed.
    """
    lines = changed_models(was, now)
    if not lines:
        return
    more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    roles = sorted(role for role in {*was} & {*now} if isinstance(was[role], Mapping))
    commits = {role: [of[role].get("commit") for of in (was, now)] for role in roles}
    moved = [
        f"  (the Hub's {role} was commit {before}, and is {after}: set {role}.revision to the first)"
        for role, (before, after) in commits.items()
        if before and after and before != after
    ]
    raise UserError(
        f"{where}: its models are not those that it was started with, so going on would give numbers of neither:\n"
        + "\n".join([*lines[:MOST_LINES], *more, *moved])
        + f"\nPut them back as they were, or choose another output.dir, or {otherwise}"
    )


def changed_models(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs, of the models and tokenizers that both records know."""
    same_version = was.get("transformers") == now.get("transformers")
    same_rules = same_version and was.get("tokenizers", now.get("tokenizers")) == now.get("tokenizers")
    lines = []
    for role in sorted({*was} & {*now} - {*versions()}):
        for part in sorted({*was[role]} & {*now[role]} - {*TOLD_ONLY, *(() if same_rules else OF_VERSION)}):
            before, after = leaves({part: was[role][part]}), leaves({part: now[role][part]})
            # What one version of transformers (or peft) writes out, another one may not know
            whole = (same_version and part != "adapter") or not (was[role][part] and now[role][part])
            one_sided = {*before} ^ {*after} if whole else set()
            keys = {*before} & {*after} | one_sided - {f"config.{key}" for key in SET_BY_TRAINER}
            lines += [
                f"  {role}.{key}: was {as_text(before, key)}, now {as_text(after, key)}"
                for key in sorted(keys)
                if before.get(key) != after.get(key)
            ]
    return lines


def check_same_rows(run: RunDirectory, manifest: Mapping[str, Any]) -> None:
    """Refuse to resume on other rows than those that the run directory was made with.

    Args:
        run: the run so far.
        manifest: what would be its ``data_manifest.json``.

    Raises:
        UserError: rows, or the tokens that are made of them, have changed.
    """
    was = run.read_data_manifest()
    for section in ("splits", "evaluation_sets"):
        for name, values in was.get(section, {}).items():
            now = manifest.get(section, {}).get(name, {})
            tokens = values.get("token_digest"), now.get("token_digest")
            for key in ("sha256", "rows"):
                if values.get(key) != now.get(key):
                    raise UserError(
                        f"{run.path}: the rows of {name!r} have changed since this run was started ({key} was "
                        f"{values.get(key)}, now {now.get(key)}), so it cannot go on. Start again with --overwrite"
                    )
            if (
                None not in tokens and tokens[0] != tokens[1]
            ):  # None: an older version, or a template that writes the date
                counts = [of.get("prompt_tokens") for of in (values, now)]
                versions_of = [of.get("models", {}).get("transformers") for of in (was, manifest)]
                raise UserError(
                    f"{run.path}: the rows of {name!r} are the same, but not their tokens (of prompts {counts[0]}, now "
                    f"{counts[1]}): the tokenizer or its template words them otherwise (transformers was {versions_of[0]}, "
                    f"now {versions_of[1]}). Install what it was started with, or start again with --overwrite"
                )


def as_text(values: Mapping[str, Any], key: str) -> str:
    """The value of ``key`` for a message."""
    text = json.dumps(values[key]) if key in values else "not set"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
