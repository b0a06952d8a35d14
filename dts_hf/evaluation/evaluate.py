"""``dts-hf evaluate``: a saved model or a run's student on evaluation sets, with the code that training uses too.

With an output folder every answer is on disk as soon as it is made, and the same command goes on where a killed one
stopped (``output_folder.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dts_hf.console import say
from dts_hf.data.held_out_split import split_off
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_many, load_mixture, load_rows
from dts_hf.distributed.processes import join_processes, process
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import describe_protocol, files_digest, model_digest, rows_digest
from dts_hf.evaluation.held_out import VALIDATION, batch_size_that_matters, load_sets
from dts_hf.evaluation.instruct import evaluate_instruct
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.evaluation.output_folder import OutputFolder
from dts_hf.evaluation.references import note_on_references
from dts_hf.evaluation.subject import Asked, choose_protocol, find_subject, notes_on, with_template
from dts_hf.generation.engine import Generated, generate
from dts_hf.generation.vllm_backend import load_vllm, vllm_generate
from dts_hf.models.loading import load_model, load_tokenizer
from dts_hf.recipe.schema import Recipe


class _Answerer(NamedTuple):
    """What answers: a model of ours or the engine of another backend, and the function that generates with it."""

    model: Any
    generate: Callable[..., list[Generated]]
    parameters: int | None
    digest: str


def evaluate(model: str, options: EvaluationOptions | None = None) -> dict[str, Any]:
    """Answer prompts with a saved model or a run's student, and score the answers.

    Launched on several processes (``torchrun``), they share out the rows, and each returns the whole result.

    Args:
        model: Hub name, model folder, or run directory. A student that says how it was trained and scored
            (``dts_hf.json``) is asked in that way wherever it lies.
        options: what is asked, how it is answered, and where the answers go.

    Returns:
        What ``metrics.json`` holds, sets of earlier calls with the same ``output`` included: ``{"format", "source",
        "protocol", "models": {"student" or "model": {"parameters", "sets"}}}``.

    Raises:
        UserError: unknown model or set, no rows, wrong options, or an output folder with another evaluation. Every
            process raises it.
    """
    options = options or EvaluationOptions()
    # All that can be wrong shows before the model is loaded
    subject = find_subject(model)
    location, recipe = subject.location, subject.recipe
    protocol = choose_protocol(subject, options)
    rows = _load_rows(model, recipe, options)
    dtype = options.dtype or subject.dtype or "float32"
    device = join_processes()
    tokenizer = load_tokenizer(location, key="model")
    asked = with_template(protocol, subject, options, tokenizer)
    protocol = asked.protocol
    # vLLM batches as it likes, so the batch size says nothing about its text
    batch_size = None if protocol.backend == "vllm" else batch_size_that_matters([dtype], options.batch_size)
    described = {**describe_protocol(protocol, tokenizer), "dtype": dtype}
    # What the answers depend on, but for the model, which is not loaded yet. The name is only a name: a protocol spelt
    # out option by option is the same evaluation
    identity = {
        "protocol": {key: value for key, value in described.items() if key != "name"},
        "batch_size": batch_size,
        "rows": {name: rows_digest(of_set) for name, of_set in rows.items()},
    }
    folder = None if options.output is None else OutputFolder(options.output, options.overwrite)
    if folder is not None:
        folder.check(identity)

    # In this order: refuse what can be refused, load, compare the model too, and only then touch the folder
    answerer = _load_answerer(location, dtype, options.backend, device)
    if folder is not None:
        folder.open({**identity, "model": answerer.digest})
    if process()[0] == 0:
        say(f"{model}: {', '.join(rows)} under the protocol {protocol.name}, weights in {dtype}")
        for note in notes_on(asked, subject, tokenizer, options):
            say(note)
        if recipe is not None and VALIDATION in rows and recipe.data.responses == "teacher":
            say("The run's own scores are against the teacher's answers, these are against the data's")
    scores = {
        name: _answer_set(name, of_set, answerer, tokenizer, asked, options, folder) for name, of_set in rows.items()
    }
    if folder is not None:
        scores = {**folder.earlier_scores(), **scores}
    models = {
        "model" if subject.own_protocol is None else "student": {"parameters": answerer.parameters, "sets": scores}
    }
    protocol_entry = {**described, "batch_size": batch_size}
    metrics = {"format": 1, "source": model, "protocol": protocol_entry, "models": models}
    if folder is not None:
        folder.write_metrics(metrics)
    return metrics


def _answer_set(
    name: str,
    rows: list[Row],
    answerer: _Answerer,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    options: EvaluationOptions,
    folder: OutputFolder | None,
) -> dict[str, Any]:
    """The scores of one set; its answers go into the folder, where there is one."""
    answers = None if folder is None else folder.answer_file(name)
    result = evaluate_instruct(
        answerer.model,
        tokenizer,
        rows,
        asked.protocol,
        template=asked.template,
        batch_size=options.batch_size,
        set_name=name,
        progress=name,
        answers=answers,
        all_processes=True,
        answer=answerer.generate,
    )
    if folder is not None and answers is not None:
        folder.finish_set(answers, result.predictions)
    if process()[0] == 0 and (note := note_on_references(result.scores, name)):
        say(note)
    return result.scores


def _load_rows(model: str, recipe: Recipe | None, options: EvaluationOptions) -> dict[str, list[Row]]:
    """The rows of each set, by name."""
    rows = load_sets(options.sets, options.rows, options.data_dir, key="--sets")
    split = recipe.data.validation_split if recipe else "validation"
    if options.data is not None:
        name = _set_name(options.data)
        if name in rows:
            raise UserError(f"--data: {name!r} is also the name of one of --sets; rename the file")
        rows[name] = load_rows(options.data, split=split, limit=options.rows)
    if not rows:
        if recipe is None or recipe.data.validation is None:
            raise UserError(
                f"evaluate: {model!r} is no run directory with validation rows; say which: --sets NAME,NAME or "
                "--data FILE"
            )
        rows[VALIDATION] = _held_out_questions(model, recipe, options.rows)
    return rows


def _held_out_questions(model: str, recipe: Recipe, count: int | None) -> list[Row]:
    """The held-out rows that the run itself was scored on; ``count``: the first so many instead of ``evaluation.rows``."""
    data = recipe.data
    if isinstance(data.validation, float):
        train = load_mixture(data.train, split=data.train_split, limit=data.max_train_rows, columns=data.columns)
        held_out = split_off(train.rows, data.validation)[1][: data.max_validation_rows]
    else:
        assert data.validation is not None
        held_out = load_many(
            data.validation, split=data.validation_split, limit=data.max_validation_rows, columns=data.columns
        )
    questions = [row for row in held_out if row.kind != "text"]
    if not questions:
        raise UserError(
            f"evaluate: {model!r}: its held-out rows are texts, which ask nothing that could be answered; the student's "
            "loss on them is in its metrics.json. Expected rows with a question: --sets NAME,NAME or --data FILE"
        )
    return questions[: recipe.evaluation.rows if count is None else count]


def _set_name(data: str) -> str:
    """What rows given by path are called: ``rows.jsonl`` and ``rows/*.jsonl`` are both ``rows``."""
    plain = [part.split(".")[0] for part in Path(data).parts if not set(part) & set("*?[")]
    return next(filter(None, reversed(plain)), "data")


def _load_answerer(location: str, dtype: str, backend: str, device: torch.device) -> _Answerer:
    if backend == "vllm":
        return _Answerer(load_vllm(location, dtype), vllm_generate, None, files_digest(location))
    model = load_model(location, key="model", dtype=dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = model_digest(model)
    return _Answerer(model.to(device), generate, parameters, digest)  # type: ignore[arg-type]
