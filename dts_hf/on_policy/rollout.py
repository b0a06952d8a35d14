"""The rows of an optimizer step, answered by the student: out of the batches, to the engine, and rows again.

Rows come out of the batches themselves, so whatever makes our batches is answered: rows by number, streams, packs. What is
learned of an answer is known by its length. No token is ever compared with the padding id, which is the end of a turn in
many tokenizers: peers that did so masked every end, and their students never learned to stop (trl#6357).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dts_hf.data.routes import TEACHER
from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.data.teacher_context import TEACHER_BATCH, TEACHER_IDS, TEACHER_LABELS, teacher_side
from dts_hf.generation.engine import Generated, GenerationSettings, generate
from dts_hf.generation.filters import repetition
from dts_hf.loss import statistics as stats
from dts_hf.loss.selection import IGNORE_INDEX, last_answer
from dts_hf.on_policy.settings import OnPolicySettings

#: A row as our collators take it: ``input_ids``, unshifted ``labels`` and ``row_id``; the number of its teacher, where it is
#: one of several; the row as its teacher reads it, where that is more than the student does.
Row = dict[str, Any]
#: Has the signature of ``generation.engine.generate``: what answers. The model is what the trainer trains.
Generate = Callable[..., list[Generated]]


def rows_of_batch(batch: Mapping[str, Tensor]) -> list[Row]:
    """The rows that a collator of ours has made ``batch`` of, in their order; those that only fill it too.

    Args:
        batch: padded (``attention_mask`` ``[B, T]``), or packed (``[1, T]`` with ``position_ids``).
    """
    rows: list[Row] = [
        {"input_ids": ids, "labels": labels, "row_id": number}
        for number, (ids, labels) in zip(batch["row_id"].tolist(), _cut(batch), strict=True)
    ]
    if TEACHER in batch:
        for row, teacher in zip(rows, batch[TEACHER].tolist(), strict=True):
            row[TEACHER] = teacher
    if TEACHER_BATCH["labels"] in batch:
        read = {name: batch[key] for name, key in TEACHER_BATCH.items() if key in batch}
        for row, (ids, labels) in zip(rows, _cut(read), strict=True):
            row |= {TEACHER_IDS: ids, TEACHER_LABELS: labels}
    return rows


def texts_of_batch(batch: Mapping[str, Tensor]) -> Tensor:
    """How many rows of a batch have something to answer (``prompt_length``), ``[]``, int64, without waiting for the device.

    Args:
        batch: padded or packed, as for ``rows_of_batch``.
    """
    learned = batch["labels"] != IGNORE_INDEX
    if "position_ids" in batch:
        row = (batch["position_ids"][0] == 0).cumsum(0) - 1
        labels = row.new_zeros(len(batch["row_id"])).index_add_(0, row, learned[0].long())
    else:
        labels = learned.sum(-1)
    return ((labels > 0) & (batch["row_id"] != DUMMY_ROW)).sum()


def _cut(batch: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row of a batch: the student's, or one of the same names as its teacher reads it."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        bounds = [(0, start, end) for start, end in zip(starts, [*starts[1:], len(ids[0])], strict=True)]
    else:
        bounds = [(line, 0, int(length)) for line, length in enumerate(batch["attention_mask"].sum(-1).tolist())]
    return [(ids[line][start:end], labels[line][start:end]) for line, start, end in bounds]


def prompt_length(row: Row) -> int | None:
    """How many tokens come before the last answer of a row; None: there is nothing to answer (no label, or no real row)."""
    start, end = last_answer(row["labels"])
    return None if row["row_id"] == DUMMY_ROW or end == 0 else start


def teacher_prompt_length(row: Row) -> int | None:
    """As ``prompt_length``, of the row as its teacher reads it; None also where that is as the student does."""
    return last_answer(row[TEACHER_LABELS])[0] if TEACHER_IDS in row and prompt_length(row) is not None else None


def answered_row(row: Row, generated: Generated) -> Row:
    """``row`` with another last answer: the prompt is not learned, every token of the answer is, and so is its end.

    A truncated answer has no end, and none is made up: the student would learn to stop there. An answer that is empty but
    for its end has that one label. A teacher that reads more than the student reads the same tokens behind a prompt of its
    own: what comes before the last answer on its side.
    """
    prompt = row["input_ids"][: last_answer(row["labels"])[0]]
    answer = [*generated.tokens, *([] if generated.end is None else [generated.end])]
    made = {**row, "input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
    if TEACHER_IDS in row:
        side = teacher_side(row[TEACHER_IDS][: last_answer(row[TEACHER_LABELS])[0]], answer)
        made |= {TEACHER_IDS: side.ids, TEACHER_LABELS: side.labels}
    return made


@dataclass
class Rollout:
    """Answers the rows of a step.

    Args:
        settings: of sampling.
        seed: of the noise; the text of a row is a function of (seed, row, step) alone. In bf16, where near-ties are
            frequent, it also depends on the rows beside it.
        answer: what generates.
        vocab_size: ids that student and teacher share, where the student's head has more; it says no others. None: all.
    """

    settings: OnPolicySettings
    seed: int
    vocab_size: int | None = None
    answer: Generate = field(default=generate)

    @property
    def generation(self) -> GenerationSettings:
        """For the engine."""
        chosen = self.settings
        return GenerationSettings(
            max_new_tokens=chosen.max_new_tokens, batch_size=chosen.batch_size, do_sample=True,
            temperature=chosen.temperature, top_p=chosen.top_p, seed=self.seed,
        )  # fmt: skip

    def rows(
        self, model: nn.Module, batches: Sequence[Sequence[Row]], step: int, *, ends: Sequence[int], pad: int
    ) -> tuple[list[list[Row]], dict[str, float]]:
        """The rows of a step's batches with answers of ``model``, batch by batch, in one call; every process calls it.

        Args:
            model: the student, without a wrapper. It comes back as it was, whatever happens.
            batches: rows of this process.
            step: number of the optimizer step, from 0.
            ends: every token that ends an answer; which one did so is kept.
            pad: fills short prompts; never attended to.

        Returns:
            the rows, of which those without anything to answer are unchanged, and sums for the log.
        """
        asked = [row for rows in batches for row in rows if prompt_length(row) is not None]
        # Also without a prompt: where weights are sharded, the other processes need those that lie here
        answers = self.answer(
            model,
            [row["input_ids"][: prompt_length(row)] for row in asked],
            self.generation,
            eos_token_ids=ends,
            pad_token_id=pad,
            row_keys=[f"{row['row_id']}\x1f{step}" for row in asked],
            **({} if self.vocab_size is None else {"vocab_size": self.vocab_size}),
        )
        found = iter(answers)
        made = [
            [row if prompt_length(row) is None else answered_row(row, next(found)) for row in rows] for rows in batches
        ]
        return made, sums_of(answers)


def sums_of(answers: Sequence[Generated]) -> dict[str, float]:
    """What the log says of answers: how many, their tokens (ends included), and how they end."""
    return {
        stats.GENERATED_TEXTS: float(len(answers)),
        stats.GENERATED_LENGTH.sum: float(sum(len(one.tokens) + one.finished for one in answers)),
        stats.GENERATED_TRUNCATED.sum: float(sum(not one.finished for one in answers)),
        stats.GENERATED_ENDED.sum: float(sum(one.finished for one in answers)),
        stats.GENERATED_REPETITION.sum: float(sum(repetition(one.tokens) for one in answers)),
    }
