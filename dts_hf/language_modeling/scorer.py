"""Scores of teacher and student around and during training, collected into ``metrics.json`` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dts_hf.console import say
from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.rows import Row
from dts_hf.distributed.sharding import is_sharded, parameter_count
from dts_hf.evaluation.fingerprint import describe_protocol
from dts_hf.evaluation.harness import score_by_harness
from dts_hf.evaluation.held_out import VALIDATION, batch_size_that_matters, protocol_of
from dts_hf.evaluation.instruct import InstructResult, answered_in, evaluate_instruct
from dts_hf.evaluation.own_text import OwnTextScorer
from dts_hf.evaluation.references import checked_references, note_on_references
from dts_hf.loss.statistics import (
    CALIBRATION_ERROR,
    CE,
    KL,
    LABELS,
    OF_TEACHER,
    REVERSE_KL,
    STUDENT_ENTROPY,
    TEACHER_CALIBRATION_ERROR,
    TEACHER_CE,
    TEACHER_ENTROPY,
    TOP1_AGREEMENT,
)
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import ONE_TEACHER, RunDirectory, is_before
from dts_hf.task import Entries, Rows
from dts_hf.training.callbacks import GenerationEvalCallback
from dts_hf.training.trainer import DistillationTrainer

#: What ``metrics.json`` calls the held-out losses of the student, and those that are the teacher's own.
_OF_STUDENT = {
    "ce": CE, "kl": KL, "reverse_kl": REVERSE_KL, "top1_agreement": TOP1_AGREEMENT, "ece": CALIBRATION_ERROR,
    "entropy": STUDENT_ENTROPY,
}  # fmt: skip
_OF_ITS_TEACHER = {"ce": TEACHER_CE, "ece": TEACHER_CALIBRATION_ERROR, "entropy": TEACHER_ENTROPY}


class GenerationScorer:
    """Scores models on the held-out prompts and collects what goes into ``metrics.json``.

    Every process calls ``score`` and ``during``; the prompts are shared out among them.

    Args:
        recipe: what is scored, and how.
        run: takes predictions, log lines and ``metrics.json``.
        trainer: gives the teacher-forced loss and the state of training.
        tokenizer: of the student, and of a teacher that has no other one.
        rows: the held-out rows; ``evaluation.rows`` says how many of ``validation`` are answered. Of texts there is the
            loss alone.
        kept: entries that an earlier attempt of the run made, by model; these models are not scored again.
        teacher_tokenizer: of a teacher with another tokenizer (``teacher.alignment``); it answers in its own template.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        trainer: DistillationTrainer,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        kept: Entries,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        own = recipe.teacher is not None and recipe.teacher.alignment is not None
        self.teacher_tokenizer = teacher_tokenizer if own and teacher_tokenizer is not None else tokenizer
        self.recipe, self.run, self.trainer, self.tokenizer = recipe, run, trainer, tokenizer
        self.protocol = protocol_of(recipe)
        # A text asks nothing: it has a loss, and no answer
        questions = [row for row in rows.validation if row.kind != "text"]
        self.rows, self.sets = questions[: recipe.evaluation.rows], rows.sets
        # Found now, and not when the training is over
        template = resolve_template(self.protocol.template, tokenizer)
        for set_name, of_set in {VALIDATION: self.rows, **self.sets}.items():
            if of_set:
                checked_references(of_set, tokenizer, template, set_name)
        self.has_losses = bool(rows.validation)
        asked, held_out = recipe.evaluation.own_text, trainer.eval_dataset
        self.own_text: OwnTextScorer | None = None
        if asked is not None and isinstance(held_out, EncodedDataset):
            self.own_text = OwnTextScorer(asked, trainer, held_out, recipe.evaluation.batch_size)
        self.entries = dict(kept)

    def callbacks(self) -> list[TrainerCallback]:
        """What scores the student every so many steps, where the recipe says how many."""
        every_steps = self.recipe.evaluation.every_steps if self.rows else None
        return [] if every_steps is None else [GenerationEvalCallback(self.during, every_steps, self.record)]

    def score(self, name: str, model: nn.Module) -> None:
        """Score ``model`` by generation and, for the student, by its teacher-forced held-out loss at T = 1.

        Args:
            name: ``teacher`` (``teacher_NAME`` of several), ``student_before`` (training) or ``student``.
            model: as it is now.
        """
        sets: dict[str, Sequence[Row]] = {VALIDATION: self.rows} if self.rows else {}
        if name != "student_before":  # the student before training is a control, not a result
            sets |= self.sets
        is_teacher = name == "teacher" or name.startswith(ONE_TEACHER)
        evaluation, kind = self.recipe.evaluation, "teacher" if is_teacher else name
        asked = (bool(sets) or self.has_losses) and kind in evaluation.models
        harness = evaluation.whole_harness
        by_harness = harness is not None and kind in harness.models
        if not (asked or by_harness) or name in self.entries:
            return
        sets = sets if asked else {}
        entry: dict[str, Any] = {"parameters": parameter_count(model)}
        if not is_teacher and self.has_losses and asked:
            entry["teacher_forced"] = self._teacher_forced()
        title = name.replace("_", " ")
        tokenizer = self.teacher_tokenizer if is_teacher else self.tokenizer
        with weights_as(model, evaluation.dtype):
            results = {
                set_name: self._answer(
                    model,
                    rows,
                    set_name,
                    f"{title} answers ({set_name})",
                    tokenizer,
                )
                for set_name, rows in sets.items()
            }
            lowered = {"bf16": "bfloat16", "fp16": "float16"}.get(self.trainer.accelerator.mixed_precision, "")
            entry["dtype"] = answered_in(model, f"{lowered} autocast")
            own = None if is_teacher or not asked or self.own_text is None else self.own_text.answer(model)
            if by_harness and harness is not None:
                entry["harness"] = score_by_harness(model, tokenizer, harness, evaluation.batch_size)
        if own is not None and self.own_text is not None:
            # With the weights as they are trained, as the held-out losses
            entry["own_text"] = self.own_text.score(own)
        entry["sets"] = {set_name: result.scores for set_name, result in results.items()}
        self.entries[name] = entry
        if self.trainer.is_world_process_zero():
            self._write(name, results)

    def _teacher_forced(self) -> dict[str, Any]:
        """The student's held-out losses; the teacher's own, which come out of the same pass, go into its entry."""
        values = self.trainer.evaluate()
        labels = int(values["eval_labels"])
        teacher = self.entries.get("teacher")
        if teacher is not None:
            own = self._of_teacher(values)
            to_itself = {"kl": 0.0, "reverse_kl": 0.0, "top1_agreement": 1.0}
            teacher["teacher_forced"] = {**own, **to_itself, "n_tokens": labels}
        for name in self.recipe.teachers or ():  # each on the rows that it has
            key = f"{TEACHER_CE.held_out_log}{OF_TEACHER}{name}"
            if f"{ONE_TEACHER}{name}" in self.entries and key in values:
                own = self._of_teacher(values, f"{OF_TEACHER}{name}")
                count = int(values[f"eval_{LABELS}{OF_TEACHER}{name}"])
                self.entries[f"{ONE_TEACHER}{name}"]["teacher_forced"] = {**own, "n_tokens": count}
        # Without a teacher there is no distance to it.
        found = {key: values[one.held_out_log] for key, one in _OF_STUDENT.items() if one.held_out_log in values}
        return {**found, "n_tokens": labels}

    def _of_teacher(self, values: Mapping[str, float], end: str = "") -> dict[str, float]:
        """What an evaluation says of the teacher whose numbers have this ``end`` behind their names."""
        found = {key: values.get(f"{one.held_out_log}{end}") for key, one in _OF_ITS_TEACHER.items()}
        if self.trainer.alignment is not None:  # over common tokens, or projected: not its own
            found["entropy"] = None
        return {key: value for key, value in found.items() if value is not None}

    def _write(self, name: str, results: Mapping[str, InstructResult]) -> None:
        """Put answers, log line and kept scores into the run directory, and say the scores."""
        self.run.write_predictions(name, [row for result in results.values() for row in result.predictions])
        if not name.startswith("teacher") and VALIDATION in results:
            scores = results[VALIDATION].scores
            self.record(self.trainer.state.global_step, float(self.trainer.state.epoch or 0.0), scores)
        if is_before(name):
            self.run.write_scores(self.entries)
        if (own := self.entries[name].get("own_text")) is not None:
            say(
                f"{name.replace('_', ' ')} on its own text ({own['n_tokens']:,} tokens): KL(teacher || student) "
                f"{own['kl']:.3f}, KL(student || teacher) {own['reverse_kl']:.3f} nats per token"
            )
        for set_name, result in results.items():
            mean = means(result.scores)
            if note := note_on_references(result.scores, set_name):
                say(note)
            where = "" if set_name == VALIDATION else f" on {set_name}"
            say(
                f"{name.replace('_', ' ')}{where}: ROUGE-L {100 * mean['rougeL']:.1f}, answers that repeat a 4-gram "
                f"{mean['repeats_4gram']:.0%}, {mean['mean_tokens']:.0f} tokens on average"
            )

    def during(self) -> dict[str, Any]:
        """Scores of the student as it is now, on the validation rows."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        with self.trainer.exclude_from_timing(), weights_as(model, self.recipe.evaluation.dtype):
            return self._answer(model, self.rows, VALIDATION, None, self.tokenizer).scores

    def record(self, step: int, epoch: float, scores: dict[str, Any]) -> None:
        """Write the scores as a line of ``log.jsonl``."""
        record = {"kind": "generation", "step": step, "epoch": epoch, "model": "student", **means(scores)}
        self.run.append_log(record)

    def finish(self, training: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; its protocol names the ``dtype`` of the student's answers, each model has its own."""
        dtypes = {name: entry["dtype"] for name, entry in self.entries.items()}
        protocol = {
            **describe_protocol(self.protocol, self.tokenizer),
            "dtype": dtypes.get("student") or next(iter(dtypes.values()), None),
            "batch_size": batch_size_that_matters(dtypes.values(), self.recipe.evaluation.batch_size),
        }
        facts = {**training, "vocabulary_note": self.trainer.vocab_note}
        self.run.write_metrics({"format": 1, "protocol": protocol, "models": self.entries, "training": facts})

    def _answer(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        set_name: str,
        progress: str | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> InstructResult:
        return evaluate_instruct(
            model,
            tokenizer,
            rows,
            self.protocol,
            batch_size=self.recipe.evaluation.batch_size,
            set_name=set_name,
            progress=progress,
            all_processes=True,
        )


def means(scores: Mapping[str, Any]) -> dict[str, float]:
    """The mean over seeds of each measure of a set's scores."""
    return {name: value["mean"] for name, value in scores.items() if isinstance(value, dict)}


class weights_as(AbstractContextManager[None]):
    """Within it the floating-point weights of ``model`` have another dtype; afterwards the very same tensors are back.

    Decoding is bound by reading weights, so bf16 is about twice as fast as fp32; a round trip through bf16 would lose
    the low bits, so the originals are kept aside and put back. Weights sharded over processes (ZeRO-3, FSDP2) stay as
    they are: their shards belong to the wrapper.
    """

    def __init__(self, model: nn.Module, dtype: str | None) -> None:
        self.model = model
        self.dtype = None if dtype is None or is_sharded(model) else getattr(torch, dtype)
        self.kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def __enter__(self) -> None:
        for parameter in self.model.parameters():
            if self.dtype is not None and parameter.is_floating_point() and parameter.dtype != self.dtype:
                self.kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self.dtype)

    def __exit__(self, *exc: object) -> None:
        for parameter, data in self.kept:
            parameter.data = data
        self.kept = []
