"""``LanguageModeling``: prompts with answers, causal language models, ``DistillationTrainer``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from dts_hf.alignment.rows import AlignmentReport, RowAligner
from dts_hf.data.chat_templates import Template, encode_prompts, end_of_turn_ids, resolve_template
from dts_hf.data.encoded_files import encode_cached
from dts_hf.data.encoding import EncodedDataset, EncodingReport
from dts_hf.data.held_out_split import split_off
from dts_hf.data.kept_rows import load_mixture_once
from dts_hf.data.manifest import manifest
from dts_hf.data.mapped_rows import ids_of, picked
from dts_hf.data.mixture import Mixture, Part, is_mixed, parts_of, summary
from dts_hf.data.rows import Row
from dts_hf.data.subset import drawn
from dts_hf.data.targets import TextCutter, TrainOn
from dts_hf.data.written_template import as_chat_template
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import resolve_set
from dts_hf.evaluation.harness import check_harness
from dts_hf.evaluation.held_out import VALIDATION, load_sets
from dts_hf.evaluation.student_file import student_facts
from dts_hf.generation.answers import said_of
from dts_hf.generation.engine import cache_argument
from dts_hf.language_modeling.scorer import GenerationScorer
from dts_hf.models.checks import check_positions
from dts_hf.models.head import check_head
from dts_hf.models.loading import load_several, load_student, load_teacher, load_teacher_tokenizer
from dts_hf.models.saving import Carried
from dts_hf.models.student_init import StudentInit
from dts_hf.recipe.schema import Teacher
from dts_hf.runs.directory import RunDirectory
from dts_hf.task import Data, Entries, Models, Rows, Task
from dts_hf.teachers.answers import answer_rows, kept_answers
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.cached.recipe import check_same_model, check_server, open_cache
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.teachers.several import naming_teacher
from dts_hf.teachers.shared_answers import shared_answers
from dts_hf.training.trainer import DistillationTrainer


class LanguageModeling(Task[DistillationTrainer]):
    """Causal language models: the kind of task of a recipe without a ``task:`` section."""

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """How rows become prompts for ``tokenizer``."""
        return resolve_template(self.recipe.data.prompt_template, tokenizer)

    def load_rows(self) -> Rows:
        data, evaluation = self.recipe.data, self.recipe.evaluation
        check_harness(evaluation.whole_harness)
        load = partial(load_mixture_once, columns=data.all_columns, cache_dir=data.cache_dir)
        train = load(data.train, split=data.train_split, limit=data.max_train_rows, name="data.train")
        held_out = Mixture([], ())
        if isinstance(data.validation, float):
            kept, split = split_off(train.rows, data.validation)
            split = split[: data.max_validation_rows]
            held_out = Mixture(split, parts_of(split, train))
            train = Mixture(kept, parts_of(kept, train))
        elif data.validation is not None:
            held_out = load(
                data.validation, split=data.validation_split, limit=data.max_validation_rows, name="data.validation"
            )
        if data.train_share < 1.0:
            kept = picked(train.rows, drawn(ids_of(train.rows), data.train_share, self.recipe.seed))
            train = Mixture(kept, parts_of(kept, train))
        sets = load_sets(evaluation.sets, evaluation.set_rows)
        if VALIDATION in sets:
            raise UserError(f"evaluation.sets: {VALIDATION!r} is the name of the validation rows; rename the file")
        return Rows(train.rows, held_out.rows, sets, train_parts=train.parts, validation_parts=held_out.parts)

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The sets stay text: their prompts are encoded when they are answered."""
        aligner = self._aligner_of(tokenizer)
        train = self._encode(rows.train, tokenizer, "data.train", rows.train_parts, aligner)
        validation = None
        if rows.validation:
            validation = self._encode(rows.validation, tokenizer, "data.validation", rows.validation_parts, aligner)
        return Data(train, validation)

    def _encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        parts: Sequence[Part],
        aligner: RowAligner | None,
    ) -> EncodedDataset:
        limits = self.recipe.data.model_dump(include={"max_length", "max_prompt_length", "long_rows", "cache_dir"})
        template = self.template(tokenizer)
        encoded, _ = encode_cached(rows, tokenizer, template, train_on=self.train_on, name=name, **limits)
        if (routing := self.recipe.routing) is not None:
            routing.route(encoded, rows, name, [(part.source, part.used) for part in parts])
        if aligner is not None:
            self.aligned[name] = aligner.align(encoded, rows)
        return encoded

    def _aligner_of(self, tokenizer: PreTrainedTokenizerBase) -> RowAligner | None:
        """What aligns rows of the student's ``tokenizer`` with a teacher that has another one; None: it has the same."""
        recipe = self.recipe
        if recipe.teacher is None or recipe.teacher.alignment is None:
            return None
        limits = recipe.data.model_dump(include={"max_length", "max_prompt_length"})
        teacher = load_teacher_tokenizer("teacher", recipe.teacher)
        return RowAligner(tokenizer, teacher, recipe.data.prompt_template, train_on=self.train_on, **limits)

    @functools.cached_property
    def aligned(self) -> dict[str, AlignmentReport]:
        """Of rows as tokens, by the name of the data set: what is the same for a teacher with another tokenizer."""
        return {}

    @property
    def train_on(self) -> TrainOn | None:
        """Which turns are learned; of answers by the teacher the last one, which alone is its own."""
        data = self.recipe.data
        return "last_turn" if data.train_on is None and data.responses == "teacher" else data.train_on

    def cutter(self, tokenizer: PreTrainedTokenizerBase) -> TextCutter:
        """What cuts rows into what is read and what is learned."""
        return TextCutter(tokenizer, self.template(tokenizer), self.train_on)

    def load_teacher(self) -> PreTrainedModel | None:
        teacher = self.recipe.teacher
        if teacher is None or not self.recipe.loads_teacher:
            return None
        model = load_teacher(teacher)
        if (states := self.elsewhere.get("teacher")) is not None:
            check_same_model(states, model, teacher)
        return model

    @functools.cached_property
    def elsewhere(self) -> dict[str, StateCache | RemoteTeacher]:
        """Caches that are opened and servers that are met of the teachers that have one, by the key of their section.

        Raises:
            UserError: a cache is unfinished, damaged or of another teacher than the recipe's; see ``RemoteTeacher``; or a
                server has another teacher.
        """
        found: dict[str, StateCache | RemoteTeacher] = {}
        sections = self.recipe.all_teachers
        for key, section in sections.items():
            if section.kind in ("live", "self"):
                continue
            same = next((other for other in found if sections[other] == section), None)
            with naming_teacher(key.partition(".")[2]):
                found[key] = found[same] if same is not None else self._meet(section)
        return found

    def _meet(self, section: Teacher) -> StateCache | RemoteTeacher:
        if section.kind == "cached":
            return open_cache(section)
        remote = RemoteTeacher(str(section.url), token_env=section.token_env, cache=section.cache)
        check_server(remote, section)
        return remote

    def teacher_records(self) -> dict[str, dict[str, Any]]:
        return {key: states.record() for key, states in self.elsewhere.items()}

    def load_several(self) -> dict[str, PreTrainedModel]:
        if not self.recipe.teachers:
            return {}
        models = load_several(self.recipe)
        for name, model in models.items():
            key = f"teachers.{name}"
            if key in self.elsewhere:
                with naming_teacher(name):
                    check_same_model(self.elsewhere[key], model, self.recipe.all_teachers[key])
        return models

    def check_head(self, model: nn.Module, role: str) -> None:
        check_head(model, role=role)

    def load_student(self, teacher: PreTrainedModel | None, seed: int, made: StudentInit | None = None) -> nn.Module:
        return load_student(self.recipe.student, teacher, seed, made)

    def check_context_length(
        self, models: Sequence[nn.Module], tokenizer: PreTrainedTokenizerBase, rows: Rows
    ) -> None:
        evaluation, data = self.recipe.evaluation, self.recipe.data
        answered = [row for row in rows.validation if row.kind != "text"][: evaluation.rows]
        answered += [row for of_set in rows.sets.values() for row in of_set]
        prompts = encode_prompts(answered, tokenizer, self.template(tokenizer), data.max_prompt_length)
        longest = max((len(prompt.ids) for prompt in prompts if prompt is not None), default=0)
        advice = f"Lower evaluation.max_new_tokens ({evaluation.max_new_tokens}) or data.max_prompt_length"
        for model in models:
            if answered:
                cache_argument(model)
            check_positions(model, "evaluation: the model", longest + evaluation.max_new_tokens, advice)  # type: ignore[arg-type]

    def answer(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Rows:
        """Training and validation prompts are answered together: they share batches and one file in the cache."""
        prompts = [*rows.train, *rows.validation]
        answered, record = answer_rows(self.recipe, teacher, tokenizer, self.template(tokenizer), prompts)
        return self._answered(rows, answered, record)

    def kept_answers(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Rows | None:
        """What ``answer`` would return where an earlier run has kept it; None: the teacher would have to answer.

        Args:
            teacher: is not run.
            tokenizer: of student and teacher.
            rows: as ``load_rows`` gave them.
        """
        prompts = [*rows.train, *rows.validation]
        found = kept_answers(self.recipe, teacher, tokenizer, self.template(tokenizer), prompts)
        return None if found is None else self._answered(rows, *found)

    def answer_by_several(
        self, teachers: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, rows: Rows
    ) -> Rows:
        prompts, routing = [*rows.train, *rows.validation], self.recipe.routing
        assert routing is not None  # the recipe has been refused without
        numbers = [routing.number(row.teacher, f"row '{row.id}'") for row in prompts]
        answered: list[Row | None] = [None] * len(prompts)
        records = {}
        for number, (name, teacher) in enumerate(teachers.items()):
            places = [place for place, of_row in enumerate(numbers) if of_row == number]
            if places:
                own = [prompts[place] for place in places]
                alone = self.recipe.with_teacher(name)
                texts, records[name] = answer_rows(alone, teacher, tokenizer, self.template(tokenizer), own)
                for place, row in zip(places, texts, strict=True):
                    answered[place] = row
        return self._answered(rows, answered, records)

    def _answered(self, rows: Rows, answered: Sequence[Row | None], record: Mapping[str, Any]) -> Rows:
        count = len(rows.train)
        train, validation = ([row for row in part if row is not None] for part in (answered[:count], answered[count:]))
        if not train:
            raise UserError(
                f"data.responses: teacher, but the teacher answered none of the training prompts ({self._said(record)})"
            )
        return dataclasses.replace(
            rows, train=train, validation=validation, answers=record, unanswered=list(answered).count(None)
        )

    def _said(self, record: Mapping[str, Any]) -> str:
        """What became of the answers, in words: of one teacher, or of each of several."""
        if not self.recipe.teachers:
            return said_of(record["counts"])
        return "; ".join(f"{name}: {said_of(of_one['counts'])}" for name, of_one in record.items())

    def make_trainer(self, args: TrainingArguments, models: Models, data: Data) -> DistillationTrainer:
        recipe = self.recipe
        trainer = DistillationTrainer(
            args=args,
            logits_budget_mb=recipe.loss.logits_budget_mb,
            router_aux_loss=recipe.loss.router_aux_loss,
            teacher_prefix_column=recipe.data.teacher_prefix_column,
            packing=recipe.data.model_dump()["packing"],
            prompt_template=recipe.data.prompt_template,
            train_on=self.train_on,
            on_policy=None if recipe.data.on_policy is None else recipe.data.on_policy.model_dump(),
            alignment=None if recipe.teacher is None else recipe.teacher.alignment,
            vocab_alignment=next((one.vocab_alignment for one in recipe.all_teachers.values()), "strict"),
            **(self.trainer_options(models, data) | self._of_teachers(models)),
        )
        if type(trainer.teacher) is LiveTeacher:
            trainer.teacher.shared = shared_answers()
        return trainer

    def _of_teachers(self, models: Models) -> dict[str, Any]:
        """What the trainer asks: the teacher, or each of several and how the rows are shared out."""
        if not self.recipe.teachers:
            return {"teacher": self._asked("teacher", models.teacher)}
        data = self.recipe.data
        weights = {name: section.weight for name, section in self.recipe.teachers.items()}
        asked: dict[str, Any] = {}
        for name in self.recipe.teachers:
            first = self.recipe.names_of(name)[0]  # equal sections are one teacher
            asked[name] = asked[first] if first in asked else self._asked(f"teachers.{name}", models.several.get(name))
        return {
            "teachers": asked,
            "teacher_tokenizer": models.several_tokenizers,
            "teacher_weights": weights if data.teacher_column is None else None,
            "teacher_column": data.teacher_column,
            "default_teacher": data.default_teacher,
            "temperature_per_teacher": self.recipe.loss.temperature_per_teacher,
        }

    def _asked(
        self, key: str, model: PreTrainedModel | None
    ) -> PreTrainedModel | CachedTeacher | RemoteTeacher | SelfTeacher | None:
        """What the trainer asks: the model, what has been cached of it, the server that has it, or the student itself."""
        section, states = self.recipe.all_teachers.get(key), self.elsewhere.get(key)
        if section is not None and section.kind == "self":
            dtype = None if self.recipe.student.lora is not None else getattr(torch, section.dtype)
            return SelfTeacher(section.weights, section.ema_rate, section.ema_every, dtype)
        if not isinstance(states, StateCache):
            return states or model
        live = model if key in self.recipe.kept_teachers else None
        return CachedTeacher(states, None if live is None else LiveTeacher(live))

    def carried(self, tokenizer: PreTrainedTokenizerBase) -> Carried:
        template = self.template(tokenizer)
        return Carried(
            facts=student_facts(self.recipe, tokenizer),
            turn_ends=end_of_turn_ids(tokenizer, template),
            chat_template=as_chat_template(template, tokenizer),
        )

    def manifest(self, rows: Rows, data: Data) -> dict[str, Any]:
        asked = self.recipe.data
        train = manifest(asked.train, rows.train, split=asked.train_split, parts=rows.train_parts)
        splits = {"train": {**train, **self._described(data.train, "data.train")}}
        if asked.validation is not None and data.validation is not None:
            if isinstance(asked.validation, float):
                validation = {**train, "share": asked.validation, "rows": len(rows.validation)}
                if "mixture" in train:
                    validation["mixture"] = [part.described() for part in rows.validation_parts]
            else:
                validation = manifest(
                    asked.validation, rows.validation, split=asked.validation_split, parts=rows.validation_parts
                )
            encoded = data.validation
            splits["validation"] = {
                **validation,
                **self._described(encoded, "data.validation"),
            }
        # The names of the sets are in the order of the recipe
        sets = zip(self.recipe.evaluation.sets, rows.sets.items(), strict=True)
        return {
            "splits": splits,
            "evaluation_sets": {name: manifest(resolve_set(source).path, of_set) for source, (name, of_set) in sets},
            "template": _report(data.train).template,
            "responses": asked.responses,
            "teacher_answers": rows.answers,
        }

    def _described(self, dataset: EncodedDataset, name: str) -> dict[str, Any]:
        """What ``data_manifest.json`` says of rows as tokens."""
        routing = self.recipe.routing
        more: dict[str, Any] = {} if routing is None else {"teachers": routing.counts(dataset)}
        if name in self.aligned:
            more["alignment"] = dataclasses.asdict(self.aligned[name])
        return {**dataclasses.asdict(_report(dataset)), "token_digest": dataset.digest, **more}

    def notes(self, rows: Rows, data: Data) -> Iterator[str]:
        if rows.unanswered:
            yield f"data.responses: teacher: left out {rows.unanswered:,} rows that it did not answer"
        if rows.answers is not None:
            yield f"data.responses: teacher: {self._said(rows.answers)}"
        if is_mixed(rows.train_parts):
            yield f"data.train: {summary(rows.train_parts)}"
        yield f"train: {_report(data.train).summary()}"
        if data.validation is not None:
            yield f"validation: {_report(data.validation).summary()}"
        for name, report in self.aligned.items():
            yield f"{name.removeprefix('data.')}: {report.summary()}"
        if (routing := self.recipe.routing) is not None:
            of_rows = (f"{name} {count:,}" for name, count in routing.counts(data.train).items())
            yield f"teachers of the training rows: {', '.join(of_rows)}"
        if self.recipe.teachers:
            each = self.recipe.loss.temperature_per_teacher
            yield f"temperature: {'a state for each teacher' if each else 'one state for the rows of all teachers'}"

    def make_scorer(
        self, run: RunDirectory, trainer: DistillationTrainer, models: Models, rows: Rows, data: Data, kept: Entries
    ) -> GenerationScorer:
        return GenerationScorer(self.recipe, run, trainer, models.tokenizer, rows, kept, models.teacher_tokenizer)


def _report(dataset: EncodedDataset) -> EncodingReport:
    assert dataset.report is not None  # encode_rows has written it
    return dataset.report
