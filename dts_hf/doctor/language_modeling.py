"""The doctor's walk for a language model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dts_hf.console import duration
from dts_hf.data.chat_templates import end_of_turn_ids
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.doctor import masks, tokens
from dts_hf.doctor.diagnosis import Check, Skipped, need
from dts_hf.doctor.effect import Sample
from dts_hf.doctor.models import check_rounding, check_teacher, check_vocabulary, take_sample
from dts_hf.doctor.resources import check_memory
from dts_hf.doctor.states import check_states, describe_cache, describe_server
from dts_hf.doctor.walk import Walk
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.models.fake_quantization import without_fake_quantization
from dts_hf.runs.memory import resident_bytes
from dts_hf.task import Rows
from dts_hf.teachers.answers import answer_rows
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.live import LiveTeacher
from dts_hf.training.model_shape import ModelShape, shapes_from_configs
from dts_hf.training.trainer import DistillationTrainer
from dts_hf.training.workload import Workload, workload_of

#: Rows of the sample on which teacher and student are compared (fewer where the teacher has to write them first, and then
#: so many tokens of each answer at most).
SAMPLE_ROWS, ANSWERED_ROWS, ANSWER_TOKENS = 16, 4, 32
#: Nats per label by which the teacher must like its own chat template better for a warning.
BETTER_BY = 0.2


class LanguageModelWalk(Walk):
    """A recipe without a ``task:`` section."""

    task: LanguageModeling
    classes = "tokens"

    def look_at_rows(self) -> None:
        super().look_at_rows()
        ids = set() if self.data is None else set(self.data.row_ids)
        self.kept = [row for row in self.looked_at if row.id in ids]
        self.beside = max(0, resident_bytes() - self.before)  # rows, tokenizers: a vocabulary of 262,144 takes 0.3 GB
        with self.diagnosis.check("template") as check:
            tokenizers, rows = self.compared_tokenizers(), tokens.spaced(self.kept, SAMPLE_ROWS)
            tokens.check_template(check, self.task.template(tokenizers["student"]), tokenizers, rows)
        if self.alignment is not None:
            with self.diagnosis.check("alignment") as check:
                tokens.check_alignment(check, need(self.task.aligned.get("data.train"), "tokenised rows"))

    def compared_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Those that must agree: a teacher with one of its own reads rows in its own template, up to its own end of turn."""
        tokenizers = need(self.tokenizers, "a tokenizer")
        return tokenizers if self.alignment is None else dict.fromkeys(tokenizers, tokenizers["student"])

    def look_at_models(self) -> None:
        with contextlib.suppress(Exception):  # loading the model says it better
            self.shapes = shapes_from_configs(self.recipe)
        if self.shapes is not None and self.args is not None and self.data is not None:
            self.look_at_memory()
        super().look_at_models()
        both = {"student": self.student, "teacher": self.teacher}
        models: dict[str, Any] = {who: model for who, model in both.items() if model is not None}
        with self.diagnosis.check("special-tokens") as check:
            tokenizers = self.compared_tokenizers()
            ends = end_of_turn_ids(tokenizers["student"], self.task.template(tokenizers["student"]))
            agree = models if self.alignment is None else {who: models[who] for who in models if who == "student"}
            tokens.check_special_tokens(check, tokenizers, agree, self.data, ends)
        with self.diagnosis.check("vocabulary") as check:
            # An id that means two things tells nothing of the other head
            comparable = (
                self.recipe.teacher and self.alignment is None and self.diagnosis["tokenizers"].status != "error"
            )
            alignment = self.recipe.required_teacher.vocab_alignment if comparable else None
            check_vocabulary(check, need(models or None, "a model"), need(self.tokenizers, "a tokenizer"), alignment)
        with self.diagnosis.check("positions") as check:
            loaded = list(need(models or None, "a model").values())
            held_out = need(self.rows, "rows")
            self.task.check_context_length(loaded, self.tokenizer, held_out)
            longest = max(need(self.data, "tokenised rows").lengths)
            answer = self.recipe.evaluation.max_new_tokens
            check.summary = f"{longest} tokens of the longest row and {answer} of an answer fit"
        if self.shapes is None and self.student is not None:  # no plain configuration, as of GGUF
            self.look_at_memory()

    def look_at_memory(self) -> None:
        """The estimate beside the device: before the models are loaded, where their configurations tell the shapes."""
        with self.diagnosis.check("memory") as check:
            if self.shapes is None:
                student = ModelShape.from_model(need(self.student, "the student"))
                teacher = self.teacher if self.recipe.keeps_teacher else None
                if self.recipe.teacher is not None and self.recipe.teacher.kind == "self":
                    teacher = cast(PreTrainedModel, self.student)
                self.shapes = (student, None if teacher is None else ModelShape.from_model(teacher))
            work = need(self.workload(), "tokenised rows")
            self.loads, self.trains = check_memory(check, self.diagnosis, self.recipe, self.shapes, work, self.devices)

    def look_at_states(self) -> None:
        """What a cache of the teacher's states would take, or what the recipe's is."""
        section = self.recipe.teacher
        if section is None or section.kind == "self":
            return
        with self.diagnosis.check("states") as check:
            data, rows = need(self.data, "tokenised rows"), need(self.rows, "rows")
            states = self.task.elsewhere.get("teacher")
            if isinstance(states, StateCache):
                describe_cache(check, states)
                return
            if states is not None:
                describe_server(check, states, data)
                return
            need(self.loads or None, "enough memory for the models")
            share = (len(rows.train) + len(rows.validation)) / max(len(self.looked_at), 1)
            check_states(check, LiveTeacher(need(self.teacher, "the teacher")), data, share)

    def look_at_loss(self) -> None:
        written = self.recipe.data.responses == "teacher"
        count = ANSWERED_ROWS if written else SAMPLE_ROWS
        self.sample_rows = [] if self.data is None else tokens.spaced(range(len(self.data)), count)
        if written:
            with self.diagnosis.check("answers") as check:
                self.answer(check)
        with self.diagnosis.check("labels") as check:
            data, tokenizer = need(self.data, "tokenised rows"), self.tokenizer
            if self.loads and "error" not in (self.diagnosis[name].status for name in ("tokenizers", "vocabulary")):
                with contextlib.suppress(Skipped):  # the collator can be looked at without models
                    self.make_trainer()
            padded = PaddedCollator(int(tokenizer.pad_token_id))
            collator: Any = padded if self.trainer is None else self.trainer.data_collator
            cutter = self.task.cutter(tokenizer)
            ends = {*end_of_turn_ids(tokenizer, cutter.template), int(tokenizer.eos_token_id)}
            masks.check_labels(check, data, collator, ends)
            self.diagnosis.picture = masks.picture(data, collator, tokenizer, ends, self.kept)
        super().look_at_loss()
        self.look_at_states()

    def look_at_rounding(self) -> None:
        if self.recipe.student.quantize is None:
            return
        with self.diagnosis.check("quantized-student") as check:
            rounded = need(self.sample, "a sample of rows")
            with without_fake_quantization(need(self.student, "the student")):
                plain = self.sample_of()
            check_rounding(check, plain, rounded)
            section = self.recipe.student.quantize
            check.summary = f"{section.scheme}, group {section.group_size or 'of a row'}: {check.summary}"

    def answer(self, check: Check) -> None:
        """Sequence-level KD: the teacher answers some rows itself, which take the place of the data's."""
        asked = [need(self.kept or None, "tokenised rows")[index] for index in self.sample_rows]
        limit = min(self.recipe.data.teacher_max_new_tokens, ANSWER_TOKENS)
        data = self.task.recipe.data.model_copy(update={"teacher_max_new_tokens": limit})
        recipe = self.task.recipe.model_copy(update={"data": data})
        began = time.monotonic()
        rows, _ = answer_rows(
            recipe, need(self.teacher, "the teacher"), self.tokenizer, self.task.template(self.tokenizer), asked
        )
        answered = {row.id: row for row in rows if row is not None}
        seconds = time.monotonic() - began
        prompts = len(need(self.rows, "rows").train) + len(need(self.rows, "rows").validation)
        # A larger batch takes as long as this one at best, and as much longer as it is larger at worst.
        shortest = seconds * math.ceil(prompts / max(self.recipe.evaluation.batch_size, len(asked)))
        longest = seconds * prompts / len(asked) * self.recipe.data.teacher_max_new_tokens / limit
        check.summary = (
            f"the teacher answered {len(answered)} of {len(asked)} prompts; all {prompts:,} take {duration(shortest)} to "
            f"{duration(longest)}, once"
        )
        check.values = {"asked": len(asked), "answered": len(answered), "seconds": seconds}
        if len(answered) < len(asked) / 2:
            silent = len(asked) - len(answered)
            check.warn("few-answers", f"the teacher says nothing to {silent} of {len(asked)} prompts")
        self.kept = [answered.get(row.id, row) for row in self.kept]
        self.data = self.task.encode(Rows(self.kept), self.tokenizer).train
        named = [index for index, name in enumerate(self.data.row_ids) if name in answered]
        self.sample_rows = named or self.sample_rows[:1]

    # ------------------------------------------------------------------------------------------- what differs in a task

    def check_rows(self, check: Check, rows: Rows) -> None:
        """See ``tokens.check_rows``."""
        tokens.check_rows(check, rows)

    def check_data(self, check: Check, data: EncodedDataset, rows: int) -> None:
        tokens.check_limits(check, data, rows)

    def compare(self, check: Check) -> None:
        trainer, cut = cast(DistillationTrainer, need(self.trainer, "a trainer")), self.recipe.student.is_cut
        self.sample = self.sample_of()
        classes = trainer.vocab_size if trainer.common is None else len(trainer.common.common)
        check_teacher(check, trainer.eval_loss, self.sample, classes, cut)
        if self.sample.common_mass is not None:
            student, teacher = self.sample.common_mass
            check.values |= {"common_mass": student, "teacher_common_mass": teacher}
            check.summary += (
                f"; over common tokens, which have {teacher:.1%} of the teacher's probability and {student:.1%} of the "
                "student's"
            )
            return
        if not self.task.template(self.tokenizer).is_chat and "teacher_ce" in check.values:
            self.try_chat_template(check, trainer)

    def sample_of(self, teacher: PreTrainedModel | None = None) -> Sample:
        trainer = cast(DistillationTrainer, need(self.trainer, "a trainer"))
        live = None if teacher is None else LiveTeacher(teacher)
        return take_sample(trainer, need(self.data, "tokenised rows"), self.sample_rows, live)

    def try_chat_template(self, check: Check, trainer: DistillationTrainer) -> None:
        """Whether the teacher knows the rows of the sample better in its own chat form than in the recipe's template."""
        tokenizer = need(self.tokenizers, "a tokenizer")["teacher"]
        if not tokenizer.chat_template:
            return
        given, name = check.values["teacher_ce"], self.task.template(self.tokenizer).name
        data = self.recipe.data.model_copy(update={"prompt_template": "chat"})
        rows = Rows([self.kept[index] for index in self.sample_rows])
        encoded = LanguageModeling(self.recipe.model_copy(update={"data": data})).encode(rows, tokenizer).train
        in_chat = take_sample(trainer, encoded, range(len(encoded))).means(trainer.eval_loss)["teacher_ce"]
        check.values["teacher_ce_chat"] = in_chat
        if in_chat < given - BETTER_BY:
            text = f"in its own chat template the teacher needs {in_chat:.2f} nats per label, in '{name}' {given:.2f}"
            check.warn("chat-template-unused", text, "data.prompt_template: chat")

    def workload(self) -> Workload | None:
        if self.shapes is None or self.args is None or self.data is None:
            return None
        work = workload_of(self.recipe, self.args, self.shapes[0], self.data, self.student, self.beside)
        return dataclasses.replace(work, other_teachers=self.other_teachers, teachers=self.teachers)
