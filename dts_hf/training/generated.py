"""Answers that a trainer generates for held-out rows, beside the references that their labels are.

There are no logits: predictions are token ids, as ``Seq2SeqTrainer`` gives them with ``predict_with_generate``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import EvalPrediction, TrainingArguments

from dts_hf.distributed.processes import gathered
from dts_hf.errors import UserError, nearest
from dts_hf.generation.engine import Generated, GenerationSettings
from dts_hf.generation.shares import answer_share
from dts_hf.loss.selection import IGNORE_INDEX, last_answer

OPTIONS = tuple(field.name for field in dataclasses.fields(GenerationSettings))


@dataclass(frozen=True)
class Asked:
    """A held-out row as a question: everything before its last answer, and that answer."""

    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Predictions:
    """What was generated, in the order of the rows.

    Attributes:
        answers: ids of each answer ``[rows, T]``, padded on the right with ``IGNORE_INDEX``; end tokens left out.
        references: ids of each last answer of the data, the same way.
        prompts: ids of what was asked, the same way.
    """

    answers: NDArray[np.int64]
    references: NDArray[np.int64]
    prompts: NDArray[np.int64]


def checked_options(given: Mapping[str, Any], batch_size: int) -> GenerationSettings:
    """The settings of generation: ``given``, greedy with 128 new tokens where it says nothing.

    Args:
        given: by the names of ``GenerationSettings``.
        batch_size: prompts answered at once, unless it is given.

    Raises:
        UserError: an option is unknown, or out of range.
    """
    for name in given:
        if name not in OPTIONS:
            raise UserError(
                f"generation: {name!r} is no option of it, expected {', '.join(OPTIONS)}.{nearest(str(name), OPTIONS)}"
            )
    return GenerationSettings(**{"batch_size": batch_size, **given})


def asks_for_generation(args: TrainingArguments) -> bool:
    """Whether ``Seq2SeqTrainingArguments`` ask for generated predictions.

    Raises:
        UserError: they have an option of generation, which is given to this trainer itself.
    """
    instead = {
        "generation_max_length": "generation={'max_new_tokens': ...}",
        "generation_num_beams": "None: answers are sampled or greedy",
        "generation_config": "generation={'max_new_tokens': ...}",
    }
    for name, expected in instead.items():
        if getattr(args, name, None) is not None:
            raise UserError(f"args.{name}: got {getattr(args, name)!r}, which is not used here; expected {expected}")
    return bool(getattr(args, "predict_with_generate", False))


def check_metrics(compute_metrics: Any, with_generate: bool, args: TrainingArguments) -> None:
    """Refuse ``compute_metrics`` where it would never be called, or would wait for logits.

    Raises:
        UserError: names what it needs.
    """
    if compute_metrics is None:
        return
    if not with_generate:
        raise UserError(
            "compute_metrics: the loss needs no logits, so it would never be called; expected predict_with_generate=True "
            "beside it (it is then given generated answers and references, as token ids), or None"
        )
    if args.batch_eval_metrics:
        raise UserError(
            "args.batch_eval_metrics: got True, expected False: compute_metrics is called once, on all answers"
        )
    unknown = set(args.include_for_metrics or ()) - {"inputs"}
    if unknown:
        raise UserError(
            f"args.include_for_metrics: got {sorted(unknown)[0]!r}, expected ['inputs'] (the prompts) or nothing; losses "
            "stand in the metrics of evaluate"
        )


def questions_of(dataset: Any, name: str) -> list[Asked]:
    """The rows of ``dataset`` as questions.

    Raises:
        UserError: it has no rows by number, or there is nothing before a row's labels to ask.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(f"{name}: answers are generated for rows with a number; expected a list of rows")
    asked = []
    for place in range(len(dataset)):
        row = dataset[place]
        ids, labels = list(row["input_ids"]), row.get("labels")
        if labels is None:
            raise UserError(
                f"{name}: row {place} has no labels, so nobody knows where its prompt ends; expected labels"
            )
        start, end = last_answer(labels)
        if start == 0:
            raise UserError(
                f"{name}: row {place} has {'labels from its first token on' if end else 'no label'}, so there is no prompt "
                "to answer; expected rows with a prompt, or predict_with_generate=False"
            )
        asked.append(Asked([int(token) for token in ids[:start]], [int(token) for token in labels[start:end]]))
    return asked


def predict_answers(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Asked],
    settings: GenerationSettings,
    *,
    turn_ends: Sequence[int] = (),
    row_keys: Sequence[str] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Predictions:
    """Answer every question; the processes share them out, and all get all answers.

    Args:
        model: the student.
        tokenizer: of the model.
        asked: the questions.
        settings: limits and sampling.
        turn_ends: tokens that end an answer, besides the end tokens of tokenizer and model.
        row_keys: one name for each, which the noise of sampling follows.
        rank: number of this process.
        world: number of processes.
    """
    mine: dict[int, list[int]] = {}

    def finished(place: int, generated: Generated) -> None:
        mine[place] = list(generated.tokens)

    prompts = [one.prompt for one in asked]
    answer_share(
        model, tokenizer, prompts, settings,
        turn_ends=turn_ends, known=(), on_finished=finished, rank=rank, world=world, row_keys=row_keys,
    )  # fmt: skip
    answers = {place: tokens for part in gathered(mine, world) for place, tokens in part.items()}
    ends = {tokenizer.eos_token_id, *turn_ends}
    return Predictions(
        padded([answers[place] for place in range(len(asked))]),
        padded([[token for token in one.reference if token not in ends] for one in asked]),
        padded(prompts),
    )


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """``[rows, T]``, filled up on the right with ``IGNORE_INDEX``."""
    array = np.full((len(rows), max((len(row) for row in rows), default=0)), IGNORE_INDEX, dtype=np.int64)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


def decoded(tokenizer: Any, ids: NDArray[np.int64]) -> list[str]:
    """The texts of padded ``ids [rows, T]``, without special tokens and spaces around them."""
    kept = [[int(token) for token in row if token != IGNORE_INDEX] for row in ids]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in kept]


def metrics_of(compute_metrics: Any, predictions: Predictions, with_inputs: bool) -> dict[str, float]:
    """What ``compute_metrics`` makes of answers and references.

    Raises:
        UserError: it returned no dictionary.
    """
    inputs = predictions.prompts if with_inputs else None
    given = EvalPrediction(predictions=predictions.answers, label_ids=predictions.references, inputs=inputs)
    values = compute_metrics(given)
    if not isinstance(values, Mapping):
        raise UserError(f"compute_metrics: returned {type(values).__name__}, expected a dictionary of numbers")
    return dict(values)
