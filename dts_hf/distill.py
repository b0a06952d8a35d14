"""The straight line: ``distill(recipe)`` goes from a recipe to a finished run directory. Start reading here.

recipe -> tokenizer -> rows -> teacher -> (the teacher's own answers) -> student -> trainer -> scores -> report.
Everything that can be wrong with the input is found before the run directory is made.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from dts_hf.callbacks import GenerationEvalCallback, RunLogCallback
from dts_hf.data import (
    EncodedDataset,
    EncodingReport,
    Row,
    check_positions,
    encode_rows,
    load_many,
    load_rows,
    manifest,
)
from dts_hf.errors import UserError
from dts_hf.evaluation.instruct import evaluate_instruct, protocol_fingerprint
from dts_hf.generation import GenerationSettings
from dts_hf.models import load_model, load_student, load_teacher, load_tokenizer, save_student
from dts_hf.prompts import Template, encode_prompts, get_template
from dts_hf.recipe import Recipe, training_arguments
from dts_hf.run_directory import RunDirectory, environment, write_jsonl_atomic
from dts_hf.teacher_answers import answer_rows
from dts_hf.temperature import build_temperature
from dts_hf.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def distill(recipe: Recipe) -> RunDirectory:
    """Run ``recipe`` from start to finish and return its run directory.

    Raises:
        UserError: wrong input, named by key, row or file; nothing has been written then.
    """
    started = time.monotonic()
    resume = recipe.training.get("resume_from_checkpoint")
    if resume is not None and not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(
            f"training.resume_from_checkpoint: {resume} is no complete checkpoint (checkpoint-STEP of a run)"
        )
    RunDirectory.check_can_create(recipe.output.dir, recipe.output.overwrite, resume=resume is not None)
    args = training_arguments(recipe, recipe.output.dir)
    set_seed(args.seed)
    transformers_logging.disable_progress_bar()

    # Rows and models. Rows come first because they are cheap to check.
    template = get_template(recipe.data.prompt_template)
    train_rows = load_many(recipe.data.train, split=recipe.data.train_split, limit=recipe.data.max_train_rows)
    validation_rows = _load_validation(recipe)
    tokenizer, teacher_tokenizer = _load_tokenizers(recipe)
    train_data, train_report = _encode(recipe, train_rows, tokenizer, template, "data.train")
    teacher = load_teacher(recipe.teacher).to(args.device)  # type: ignore[arg-type]
    student = load_student(recipe.student, teacher)
    _check_room(recipe, [teacher, student], tokenizer, template, validation_rows)

    answers: dict[str, Any] | None = None
    if recipe.data.responses == "teacher":  # sequence-level KD: train on what the teacher itself would say
        with args.main_process_first(local=False, desc="teacher answers"):
            rows = [*train_rows, *validation_rows]
            answered, answers = answer_rows(recipe, teacher, tokenizer, template, rows)
        train_rows = [row for row in answered[: len(train_rows)] if row is not None]
        if not train_rows:
            raise UserError("data.responses: teacher, but the teacher answered none of the training prompts")
        validation_rows = [row for row in answered[len(rows) - len(validation_rows) :] if row is not None]
        train_data, train_report = _encode(recipe, train_rows, tokenizer, template, "data.train")
    validation_data, validation_report = (
        _encode(recipe, validation_rows, tokenizer, template, "data.validation") if validation_rows else (None, None)
    )

    policy = build_temperature(recipe.temperature.name, **recipe.temperature.options)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        temperature=policy,
        divergence=recipe.loss.divergence.model_dump(),
        kd_ratio=recipe.loss.kd_ratio,
        args=args,
        train_dataset=train_data,
        eval_dataset=validation_data,
        processing_class=tokenizer,
        temperature_scaling=recipe.loss.temperature_scaling,
        logits_budget_mb=recipe.loss.logits_budget_mb,
        packing=recipe.data.packing,
        vocab_alignment=recipe.teacher.vocab_alignment,
        teacher_tokenizer=teacher_tokenizer,
    )

    # From here on things are written.
    run = RunDirectory(recipe.output.dir)
    main = trainer.is_world_process_zero()
    if main:
        run = RunDirectory.create(recipe.output.dir, recipe.output.overwrite, resume=resume is not None)
        run.save_recipe(recipe)
        run.write_environment(environment())
        run.write_data_manifest(
            _manifest(recipe, train_report, validation_report, train_rows, validation_rows, answers)
        )
        trainer.add_callback(RunLogCallback(run))
        _say(f"train: {train_report.summary()}")
    trainer.accelerator.wait_for_everyone()

    scorer = _Scorer(recipe, run, trainer, tokenizer, template, validation_rows)
    if recipe.evaluation.every_steps is not None:
        trainer.add_callback(GenerationEvalCallback(scorer.during, recipe.evaluation.every_steps, scorer.record))
    scorer.score("teacher", teacher)
    scorer.score("student_before", student, held_out=True)
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    training_seconds = time.monotonic() - began
    scorer.score("student", student, held_out=True)

    if main:
        merge = recipe.student.lora is None or recipe.student.lora.save == "merged"
        # push_to_hub saves trainer.model again: it must be the merged one.
        trainer.model = save_student(student, tokenizer, run.final_path, merge_lora=merge)  # type: ignore[assignment]
        scorer.finish(
            {
                "steps": trainer.state.global_step,
                "seconds": round(training_seconds, 1),
                "total_seconds": round(time.monotonic() - started, 1),
                "tokens": int(trainer.tokens_seen),
                "peak_memory_gb": round(_peak_memory_gb(), 2),
                "vocabulary_note": trainer.vocab_note,
            }
        )
        if recipe.output.report:
            from dts_hf.reporting.report import write_report

            write_report(run)
    if args.push_to_hub:
        _push(trainer, run)
    return run


# ------------------------------------------------------------------------------------------------------- its pieces


def _load_validation(recipe: Recipe) -> list[Row]:
    if recipe.data.validation is None:
        return []
    limit = recipe.data.max_validation_rows
    return load_rows(recipe.data.validation, split=recipe.data.validation_split, limit=limit)


def _load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(student's, teacher's); a student pruned from the teacher shares the teacher's."""
    teacher = load_tokenizer(
        recipe.teacher.tokenizer or recipe.teacher.model,
        key="teacher.tokenizer" if recipe.teacher.tokenizer else "teacher.model",
        revision=recipe.teacher.revision,
        trust_remote_code=recipe.teacher.trust_remote_code,
    )
    if recipe.student.model is None:
        return teacher, teacher
    student = load_tokenizer(
        recipe.student.model,
        key="student.model",
        revision=recipe.student.revision,
        trust_remote_code=recipe.student.trust_remote_code,
    )
    return student, teacher


def _encode(
    recipe: Recipe, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, name: str
) -> tuple[EncodedDataset, EncodingReport]:
    return encode_rows(
        rows,
        tokenizer,
        template,
        max_length=recipe.data.max_length,
        max_prompt_length=recipe.data.max_prompt_length,
        long_rows=recipe.data.long_rows,
        name=name,
    )


def _check_room(
    recipe: Recipe,
    models: Sequence[nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> None:
    """Generation would refuse too long prompts as well, but only once the run directory is there."""
    wanted = recipe.evaluation
    prompts = encode_prompts(list(rows[: wanted.rows]), tokenizer, template, recipe.data.max_prompt_length)
    longest = max((len(prompt.ids) for prompt in prompts if prompt is not None), default=0)
    for model in models:
        advice = f"Lower evaluation.max_new_tokens ({wanted.max_new_tokens}) or data.max_prompt_length"
        check_positions(model, "evaluation: the model", longest + wanted.max_new_tokens, advice)  # type: ignore[arg-type]


def _manifest(
    recipe: Recipe,
    train_report: EncodingReport,
    validation_report: EncodingReport | None,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    answers: dict[str, Any] | None,
) -> dict[str, Any]:
    """What was trained and measured on: sources with their sha256, and what became of the rows."""
    train_source = manifest(recipe.data.train, train_rows, split=recipe.data.train_split)
    splits = {"train": {**train_source, **dataclasses.asdict(train_report)}}
    if recipe.data.validation is not None and validation_report is not None:
        source = manifest(recipe.data.validation, validation_rows, split=recipe.data.validation_split)
        splits["validation"] = {**source, **dataclasses.asdict(validation_report)}
    return {
        "splits": splits,
        "template": recipe.data.prompt_template,
        "responses": recipe.data.responses,
        "teacher_answers": answers,
    }


class _Scorer:
    """Scores models on the held-out prompts and collects what goes into ``metrics.json``."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        trainer: DistillationTrainer,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        rows: Sequence[Row],
    ) -> None:
        wanted = recipe.evaluation
        self.recipe, self.run, self.trainer, self.tokenizer, self.template = recipe, run, trainer, tokenizer, template
        self.rows = rows[: wanted.rows]
        self.settings = GenerationSettings(
            max_new_tokens=wanted.max_new_tokens,
            batch_size=wanted.batch_size,
            do_sample=wanted.do_sample,
            seed=wanted.seeds[0],
            no_repeat_ngram_size=wanted.no_repeat_ngram_size,
        )
        self.models: dict[str, dict[str, Any]] = {}

    def score(self, name: str, model: nn.Module, *, held_out: bool = False) -> None:
        """Score ``model`` by generation and, for the student, by its teacher-forced held-out loss at T = 1."""
        if not self.rows or name not in self.recipe.evaluation.models:
            return
        entry: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        if held_out:
            values = self.trainer.evaluate()
            entry["teacher_forced"] = {
                "ce": values["eval_ce_loss"],
                "kl": values["eval_kl"],
                "top1_agreement": values["eval_top1_agreement"],
                "n_tokens": int(values["eval_rows"]),
            }
            # The teacher's own cross-entropy on these rows comes out of the same pass.
            teacher = self.models.get("teacher")
            if teacher is not None:
                forced = {"ce": values["eval_teacher_ce"], "kl": 0.0, "top1_agreement": 1.0}
                teacher["teacher_forced"] = {**forced, "n_tokens": int(values["eval_rows"])}
        result = self._generate(model, f"{name.replace('_', ' ')} answers")
        if result is not None:
            entry["sets"] = {"validation": result[0]}
            self.models[name] = entry
            self.run.write_predictions(name, result[1])
            if name != "teacher":
                self.record(self.trainer.state.global_step, float(self.trainer.state.epoch or 0.0), result[0])
            mean = _means(result[0])
            _say(
                f"{name.replace('_', ' ')}: ROUGE-L {100 * mean['rougeL']:.1f}, answers that repeat a 4-gram "
                f"{mean['repeats_4gram']:.0%}, {mean['mean_tokens']:.0f} tokens on average"
            )

    def during(self) -> dict[str, Any] | None:
        """Scores of the student as it is now; None on the other ranks."""
        result = self._generate(self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped), None)
        return None if result is None else result[0]

    def record(self, step: int, epoch: float, scores: dict[str, Any]) -> None:
        record = {"kind": "generation", "step": step, "epoch": epoch, "model": "student", **_means(scores)}
        self.run.append_log(record)

    def finish(self, training: dict[str, Any]) -> None:
        """Write ``metrics.json``."""
        recipe = self.recipe
        protocol = protocol_fingerprint(
            self.tokenizer,
            self.template,
            self.settings,
            max_prompt_length=recipe.data.max_prompt_length,
            seeds=recipe.evaluation.seeds,
        )
        protocol["dtype"] = recipe.evaluation.dtype
        metrics = {"format": 1, "protocol": protocol, "models": self.models, "training": training}
        self.run.write_metrics(metrics)

    def _generate(self, model: nn.Module, progress: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        result = None
        if self.trainer.is_world_process_zero():
            with _weights_as(model, self.recipe.evaluation.dtype):
                result = evaluate_instruct(
                    model,
                    self.tokenizer,
                    self.rows,
                    self.template,
                    self.settings,
                    max_prompt_length=self.recipe.data.max_prompt_length,
                    seeds=self.recipe.evaluation.seeds,
                    progress=progress,
                )
        self.trainer.accelerator.wait_for_everyone()
        return result


def _means(scores: dict[str, Any]) -> dict[str, float]:
    """The mean over seeds of each measure of a set's scores."""
    return {name: value["mean"] for name, value in scores.items() if isinstance(value, dict)}


class _weights_as(AbstractContextManager[None]):
    """Within it the floating-point weights of ``model`` have another dtype; afterwards the very same tensors are back.

    Decoding is bound by reading weights, so bf16 is about twice as fast as fp32; a round trip through bf16 would lose
    the low bits, so the originals are kept aside and put back.
    """

    def __init__(self, model: nn.Module, dtype: str | None) -> None:
        self.model, self.dtype = model, None if dtype is None else getattr(torch, dtype)
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


def _push(trainer: DistillationTrainer, run: RunDirectory) -> None:
    """Upload the student with its card through the Trainer's own ``push_to_hub``, from ``final/``."""
    from dts_hf.reporting.model_card import render_model_card

    trainer.model_card = lambda: render_model_card(run)
    trainer.args.output_dir = str(run.final_path)
    trainer.push_to_hub()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _peak_memory_gb() -> float:
    """High-water mark of this process: resident memory, plus the GPU's where there is one, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return (resident + on_gpu) / 2**30


# ------------------------------------------------------------------------------------------------------- evaluate


def evaluate_command(
    model: str,
    data: str | None,
    *,
    template: str | None = None,
    rows: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    no_repeat_ngram_size: int | None = None,
    seeds: Sequence[int] | None = None,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Answer prompts with a saved model or a run's student, and score the answers: the same code as in training.

    Args:
        model: Hub name, model folder, or run directory.
        data: rows to answer; None takes the validation rows of the run.
        template, max_new_tokens, no_repeat_ngram_size: None takes the run's setting.
        rows: answer the first so many; None: all.
        batch_size: prompts answered at once.
        seeds: sample once per seed; None decodes greedily.
        predictions: also write the answers there, one JSON object a line.

    Raises:
        UserError: unknown model, no rows, or wrong options.
    """
    if predictions is not None and not predictions.parent.is_dir():
        raise UserError(f"--predictions: the folder {predictions.parent} does not exist")
    is_run = (Path(model) / "recipe.yaml").is_file()
    run = RunDirectory.open(model) if is_run else None
    recipe = run.read_recipe() if run is not None else None
    if data is None:
        if recipe is None or recipe.data.validation is None:
            raise UserError(f"evaluate: {model!r} is no run directory with validation rows; say which: --data FILE")
        data = recipe.data.validation
    source = str(run.final_path) if run is not None else model
    if run is not None and not run.final_path.is_dir():
        raise UserError(
            f"{model}: this run holds no student ({run.final_path} is missing): its training has not ended"
        )
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens or (recipe.evaluation.max_new_tokens if recipe else 128),
        batch_size=batch_size,
        do_sample=seeds is not None,
        seed=seeds[0] if seeds else 10,
        no_repeat_ngram_size=(
            no_repeat_ngram_size
            if no_repeat_ngram_size is not None
            else (recipe.evaluation.no_repeat_ngram_size if recipe else 0)
        ),
    )
    chosen = get_template(template or (recipe.data.prompt_template if recipe else "alpaca"))
    wanted_rows = load_rows(data, split=recipe.data.validation_split if recipe else "validation", limit=rows)
    tokenizer = load_tokenizer(source, key="model")
    loaded = load_model(source, key="model", dtype=(recipe and recipe.evaluation.dtype) or "float32")
    limit = recipe.data.max_prompt_length if recipe else 256
    result = evaluate_instruct(
        loaded.to("cuda" if torch.cuda.is_available() else "cpu"),  # type: ignore[arg-type]
        tokenizer,
        wanted_rows,
        chosen,
        settings,
        max_prompt_length=limit,
        seeds=list(seeds or ()),
        progress="answers",
    )
    if predictions is not None:
        write_jsonl_atomic(predictions, result.predictions)
    protocol = protocol_fingerprint(tokenizer, chosen, settings, max_prompt_length=limit, seeds=list(seeds or ()))
    return {**result.scores, "protocol": protocol}
