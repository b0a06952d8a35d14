"""Scores of teacher and student around and during training, collected into ``metrics.json`` of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dts_hf.console import say
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.distributed.sharding import is_sharded, parameter_count
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import canonical_name, resolve_set
from dts_hf.evaluation.fingerprint import describe_protocol
from dts_hf.evaluation.instruct import InstructResult, answered_in, evaluate_instruct
from dts_hf.evaluation.protocol import Protocol, custom_protocol, get_protocol
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.saved_scores import BEFORE, keep_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dts_hf.training.trainer import DistillationTrainer

VALIDATION = "validation"


def protocol_of(recipe: Recipe) -> Protocol:
    """The protocol that a recipe describes: its evaluation section, and the template and limit of its data section."""
    wanted = recipe.evaluation
    values = {
        "template": recipe.data.prompt_template,
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_new_tokens": wanted.max_new_tokens,
        "do_sample": wanted.do_sample,
        "no_repeat_ngram_size": wanted.no_repeat_ngram_size,
        "seeds": wanted.seeds,
    }
    return custom_protocol(**values) if wanted.protocol is None else get_protocol(wanted.protocol).changed(**values)


def load_sets(
    names: Sequence[str],
    limit: int | None = None,
    data_dir: str | Path | None = None,
    *,
    key: str = "evaluation.sets",
) -> dict[str, list[Row]]:
    """Rows of evaluation sets, by name.

    Args:
        names: of prepared sets (``dts-hf list sets``), or row files.
        limit: the first so many rows of each; None: all.
        data_dir: folder of the prepared sets; None: the default of ``sets.resolve_set``.
        key: what the user calls this choice, for messages.

    Raises:
        UserError: an unknown or unprepared set, one of GLUE, bad rows, or a name given twice.
    """
    found: dict[str, list[Row]] = {}
    for wanted in names:
        family, _, task = (canonical_name(wanted) or "").partition("/")
        if family == "glue":
            raise UserError(
                f"{key}: {wanted!r} is a GLUE set: its rows have labels and no written answers. Scores on it are those of "
                f"a classifier, in the run of a recipe with task: {{name: glue, subset: {task}}}"
            )
        prepared = resolve_set(wanted, data_dir, key=key)
        if prepared.name in found:
            raise UserError(f"{key}: {prepared.name!r} is there twice; give each set once, and files different names")
        found[prepared.name] = load_rows(prepared.path, limit=limit)
    return found


class Scorer:
    """Scores models on the held-out prompts and collects what goes into ``metrics.json``.

    Every process calls ``score`` and ``during``; the prompts are shared out among them.

    Args:
        recipe: what is scored, and how.
        run: takes predictions, log lines and ``metrics.json``.
        trainer: gives the teacher-forced loss and the state of training.
        tokenizer: of student and teacher.
        rows: the validation rows; the recipe's ``rows`` says how many are answered.
        sets: further sets for the end of training, from ``load_sets``.
        made: entries that an earlier attempt of the run has made, by model; these models are not scored again.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        trainer: DistillationTrainer,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        sets: Mapping[str, Sequence[Row]] | None = None,
        made: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.recipe, self.run, self.trainer, self.tokenizer = recipe, run, trainer, tokenizer
        self.protocol = protocol_of(recipe)
        self.rows, self.sets = rows[: recipe.evaluation.rows], dict(sets or {})
        self.models: dict[str, dict[str, Any]] = dict(made or {})

    def score(self, name: str, model: nn.Module, *, held_out: bool = False) -> None:
        """Score ``model`` by generation and, for the student, by its teacher-forced held-out loss at T = 1."""
        sets: dict[str, Sequence[Row]] = {VALIDATION: self.rows} if self.rows else {}
        if name != "student_before":  # the student before training is a control, not a result
            sets |= self.sets
        if not sets or name not in self.recipe.evaluation.models or name in self.models:
            return
        entry: dict[str, Any] = {"parameters": parameter_count(model)}
        if held_out and self.rows:
            values = self.trainer.evaluate()
            # Without a teacher there is no distance to it.
            found = {"ce": "eval_ce_loss", "kl": "eval_kl", "top1_agreement": "eval_top1_agreement"}
            forced = {name: values[key] for name, key in found.items() if key in values}
            entry["teacher_forced"] = {**forced, "n_tokens": int(values["eval_labels"])}
            # The teacher's own cross-entropy on these rows comes out of the same pass.
            teacher = self.models.get("teacher")
            if teacher is not None:
                forced = {"ce": values["eval_teacher_ce"], "kl": 0.0, "top1_agreement": 1.0}
                teacher["teacher_forced"] = {**forced, "n_tokens": int(values["eval_labels"])}
        title = name.replace("_", " ")
        with weights_as(model, self.recipe.evaluation.dtype):
            results = {
                set_name: self._answer(model, rows, set_name, f"{title} answers ({set_name})")
                for set_name, rows in sets.items()
            }
            lowered = {"bf16": "bfloat16", "fp16": "float16"}.get(self.trainer.accelerator.mixed_precision, "")
            entry["dtype"] = answered_in(model, f"{lowered} autocast")
        entry["sets"] = {set_name: result.scores for set_name, result in results.items()}
        self.models[name] = entry
        if not self.trainer.is_world_process_zero():
            return
        self.run.write_predictions(name, [row for result in results.values() for row in result.predictions])
        if name != "teacher" and VALIDATION in results:
            scores = results[VALIDATION].scores
            self.record(self.trainer.state.global_step, float(self.trainer.state.epoch or 0.0), scores)
        if name in BEFORE:
            keep_scores(self.run, self.models)
        for set_name, result in results.items():
            mean = means(result.scores)
            where = "" if set_name == VALIDATION else f" on {set_name}"
            say(
                f"{title}{where}: ROUGE-L {100 * mean['rougeL']:.1f}, answers that repeat a 4-gram "
                f"{mean['repeats_4gram']:.0%}, {mean['mean_tokens']:.0f} tokens on average"
            )

    def during(self) -> dict[str, Any]:
        """Scores of the student as it is now, on the validation rows."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        with self.trainer.clock_stopped(), weights_as(model, self.recipe.evaluation.dtype):
            return self._answer(model, self.rows, VALIDATION, None).scores

    def record(self, step: int, epoch: float, scores: dict[str, Any]) -> None:
        """Write the scores as a line of ``log.jsonl``."""
        record = {"kind": "generation", "step": step, "epoch": epoch, "model": "student", **means(scores)}
        self.run.append_log(record)

    def finish(self, training: dict[str, Any]) -> None:
        """Write ``metrics.json``; its protocol names the ``dtype`` of the student's answers, each model has its own."""
        dtypes = {name: entry["dtype"] for name, entry in self.models.items()}
        protocol = {
            **describe_protocol(self.protocol, self.tokenizer),
            "dtype": dtypes.get("student") or next(iter(dtypes.values()), None),
            "batch_size": batch_size_that_matters(dtypes.values(), self.recipe.evaluation.batch_size),
        }
        metrics: dict[str, Any] = {"format": 1, "protocol": protocol, "models": self.models, "training": training}
        self.run.write_metrics(metrics)

    def _answer(self, model: nn.Module, rows: Sequence[Row], set_name: str, progress: str | None) -> InstructResult:
        return evaluate_instruct(
            model,
            self.tokenizer,
            rows,
            self.protocol,
            batch_size=self.recipe.evaluation.batch_size,
            set_name=set_name,
            progress=progress,
            all_processes=True,
        )


def batch_size_that_matters(dtypes: Iterable[str], batch_size: int) -> int | None:
    """``batch_size`` where a model answered below fp32: there the text depends on what is answered together."""
    return None if all(dtype == "float32" for dtype in dtypes) else batch_size


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
