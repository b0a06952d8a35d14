"""Sequence-level KD (Kim and Rush 2016, arXiv 1606.07947): a model answers every prompt of a data set, once and for all.

``dts-hf generate --for-training`` and ``data.responses: teacher`` take this road. The rows come one by one; a block of them
is encoded, answered, filtered and written down as a whole, by one process. So the rows that come out depend on no kill, on
no number of processes and, in fp32, on no batch size: the sampling noise of an answer follows the seed, the id of its row
and its number, and below fp32, where the rows beside it matter in near-ties, a block is always the same rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from dts_hf.data.chat_templates import EncodedPrompt
from dts_hf.data.rows import Row
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.generation.answer_blocks import AnswerBlocks
from dts_hf.generation.engine import Generated, GenerationSettings, generate, stop_token_ids
from dts_hf.generation.filters import MAX_REPETITION, Cut, fault
from dts_hf.generation.shares import BLOCK_BATCHES, decode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The ids of rows without an answer that a manifest names.
MOST_NAMED = 5
BestOf: TypeAlias = Literal["mean", "sum"]


@dataclass(frozen=True)
class AnswerSettings:
    """How rows are answered, and which answers are kept.

    Args:
        generation: limits and sampling.
        answers: how many answers a row gets, each from noise of its own.
        cut: what becomes of answers that ran into ``max_new_tokens``: ``drop`` them, or ``keep`` them, to be learned
            without an end of turn.
        max_repetition: answers above it are left out (``filters.repetition``); 1 keeps them all.
        best_of: keep of each row the answer of the highest log-probability alone: its ``mean`` per token, or its ``sum``,
            which prefers short answers. None: keep all.

    Raises:
        UserError: a value out of range, or several answers that would be the same one.
    """

    generation: GenerationSettings
    answers: int = 1
    cut: Cut = "drop"
    max_repetition: float = MAX_REPETITION
    best_of: BestOf | None = None

    def __post_init__(self) -> None:
        if self.answers < 1:
            raise UserError(f"answers: got {self.answers}, expected a whole number of at least 1")
        if not 0 <= self.max_repetition <= 1:
            raise UserError(f"max_repetition: got {self.max_repetition}, expected a share from 0 to 1")
        if self.answers > 1 and not self.generation.do_sample:
            raise UserError(
                f"answers: got {self.answers} with temperature 0, which gives the same answer each time; expected a "
                "temperature above 0, such as 1, or one answer"
            )
        if self.best_of is not None and self.answers < 2:
            raise UserError("best_of: there is one answer a row to choose from; expected answers of at least 2")

    @property
    def block_rows(self) -> int:
        """Rows that are answered together."""
        return max(1, BLOCK_BATCHES * self.generation.batch_size // self.answers)

    def identity(self) -> dict[str, Any]:
        """All of it, for answers that were made with it: without ``top_p`` where all tokens count, as older ones are."""
        values = dataclasses.asdict(self)
        if self.generation.top_p == 1:
            del values["generation"]["top_p"]
        return values


class Answer(NamedTuple):
    """One answer that is kept: its number among those of its row, from 1."""

    number: int
    text: str
    cut: bool


#: One row, and what its caller knows of it.
Item: TypeAlias = tuple[Row, Any]


@dataclass(frozen=True)
class Answerer:
    """What answers, and what becomes of its answers.

    Args:
        model: causal language model, or the engine of another backend.
        tokenizer: of the model.
        turn_ends: of the prompt template (``chat_templates.end_of_turn_ids``).
        encode: the tokens of the prompts of some rows; None where one does not fit.
        lines: makes the rows that are written of one row and its answers.
        score: the log-probability of each response of some rows as (sum in nats, tokens); for ``best_of``.
        answer: what generates; has the signature of ``generation.engine.generate``.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    turn_ends: Sequence[int]
    encode: Callable[[list[Row]], Sequence[EncodedPrompt | None]]
    lines: Callable[[Row, Any, Sequence[Answer]], Iterable[Mapping[str, Any]]]
    score: Callable[[Row, Sequence[Answer]], Sequence[tuple[float, int]]] | None = None
    answer: Callable[..., list[Generated]] = generate


def write_answers(
    blocks: AnswerBlocks,
    identity: Mapping[str, Any],
    items: Iterable[Item],
    total: int,
    answerer: Answerer,
    settings: AnswerSettings,
    *,
    overwrite: bool = False,
    progress: str | None = None,
) -> Mapping[str, Any]:
    """Answer every row and write the file of ``blocks``; a call that was killed goes on behind its last block.

    Every process calls it with the same rows, of which it holds a block at a time.

    Args:
        blocks: where the rows go.
        identity: all that they depend on, as JSON has it.
        items: the rows, in order; their ids are unique.
        total: how many they are.
        answerer: what answers.
        settings: how, and what is kept.
        overwrite: replace other rows.
        progress: title of the progress bars of the first process, or None.

    Returns:
        the manifest, with ``counts`` (``summary``).

    Raises:
        UserError: what is there is of other rows; all processes raise it.
    """
    with closing(blocks):
        known, rank, world = blocks.begin(identity, overwrite), blocks.rank, blocks.world
        together = isinstance(answerer.model, torch.nn.Module) and is_sharded(answerer.model)
        count = -(-total // settings.block_rows)
        todo = [number for number in range(count) if number not in known]
        owners = {number: place % world for place, number in enumerate(todo)}
        calls = 0
        for number, block in enumerate(_blocks(items, settings.block_rows)):
            if owners.get(number) != rank:
                continue
            calls += 1
            title = None if rank or progress is None else f"{progress}, part {number + 1} of {count}"
            lines, facts = _answer_block(block, answerer, settings, title)
            blocks.write(number, lines, facts)
        # The weights that lie here are needed by those that have one block more
        if together and calls < -(-len(todo) // world):
            _generate([], [], answerer, settings, None)
        return blocks.finish(count, identity, overwrite, lambda facts: {"counts": summary(facts)})


def _blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while block := list(islice(rest, size)):
        yield block


def _answer_block(
    block: list[Item], answerer: Answerer, settings: AnswerSettings, progress: str | None
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """The rows that come out of a block, and what its manifest entry counts."""
    prompts = answerer.encode([row for row, _ in block])
    asked = [place for place, prompt in enumerate(prompts) if prompt is not None]
    ids = [prompt.ids for prompt in prompts if prompt is not None for _ in range(settings.answers)]
    keys = [answer_key(block[place][0].id, number) for place in asked for number in range(1, settings.answers + 1)]
    generated = iter(_generate(ids, keys, answerer, settings, progress))
    counts = Counter(rows=len(block), no_prompt=len(block) - len(asked), generated=len(ids))
    lines: list[Mapping[str, Any]] = []
    without = []
    for place, (row, of_caller) in enumerate(block):
        made = list(islice(generated, settings.answers)) if prompts[place] is not None else []
        answers = _best(row, _kept(made, answerer, settings, counts), answerer, settings, counts)
        counts.update(kept=len(answers), kept_cut=sum(answer.cut for answer in answers), rows_answered=bool(answers))
        lines += answerer.lines(row, of_caller, answers) if answers else ()
        without += [] if answers else [row.id]
    return lines, {"counts": dict(counts), "without": without[:MOST_NAMED]}


def _generate(
    prompts: Sequence[list[int]], keys: Sequence[str], answerer: Answerer, settings: AnswerSettings, title: str | None
) -> list[Generated]:
    tokenizer = answerer.tokenizer
    if not prompts and not (isinstance(answerer.model, torch.nn.Module) and is_sharded(answerer.model)):
        return []
    return answerer.answer(
        answerer.model,
        prompts,
        settings.generation,
        eos_token_ids=stop_token_ids(answerer.model, tokenizer, answerer.turn_ends),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,  # never attended to: any id does
        row_keys=keys,
        progress=title,
    )


def answer_key(row_id: str, number: int) -> str:
    """What the sampling noise of an answer follows: the first of several is the one that there would be alone."""
    return row_id if number == 1 else f"{row_id}\x1f{number}"


def _kept(
    made: Sequence[Generated], answerer: Answerer, settings: AnswerSettings, counts: Counter[str]
) -> list[Answer]:
    """The answers without a fault; those with one are counted."""
    answers = []
    for number, (tokens, finished, _) in enumerate(made, 1):
        text = decode_answer(answerer.tokenizer, tokens)
        if not finished:  # the limit may fall into the middle of a character
            text = text.removesuffix("\ufffd").rstrip()
        found = fault(text, tokens, finished, settings.cut, settings.max_repetition)
        counts[found or "sound"] += 1
        if found is None:
            answers.append(Answer(number, text, not finished))
    return answers


def _best(
    row: Row, answers: list[Answer], answerer: Answerer, settings: AnswerSettings, counts: Counter[str]
) -> list[Answer]:
    if settings.best_of is None or len(answers) < 2:
        return answers
    assert answerer.score is not None
    scores = [total / (tokens if settings.best_of == "mean" else 1) for total, tokens in answerer.score(row, answers)]
    counts["not_best"] += len(answers) - 1
    return [answers[scores.index(max(scores))]]  # of equal ones the first


def summary(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of all rows.

    Args:
        facts: of every block.

    Returns:
        ``rows``; ``no_prompt``, those whose prompt does not fit; ``generated`` answers, of which ``empty``, ``cut`` and
        ``repeating`` ones were left out, and ``not_best`` ones; ``kept``, ``kept_cut`` of them without an end;
        ``rows_answered``, rows with an answer at least; ``without_answer``, the first ids of those without.
    """
    total: Counter[str] = Counter()
    for block in facts:
        total.update(block["counts"])
    names = (
        "rows",
        "no_prompt",
        "generated",
        "empty",
        "cut",
        "repeating",
        "not_best",
        "kept",
        "kept_cut",
        "rows_answered",
    )
    without = [row_id for block in facts for row_id in block["without"]]
    return {**{name: total[name] for name in names}, "without_answer": without[:MOST_NAMED]}


def why_none(counts: Mapping[str, Any]) -> str:
    """Why a file has no row, and what to do, in a sentence for people; empty where it has some."""
    if counts["kept"]:
        return ""
    advice = {
        "cut": "raise --max-new-tokens, or keep answers without an end with --cut keep",
        "repeating": "raise --temperature, or keep them with --max-repetition 1",
        "empty": "look at its prompt template (--template)",
        "no_prompt": "lower --max-new-tokens, or answer with a model of more positions",
    }
    most = max(advice, key=lambda name: counts[name])
    return (
        f"no answer was kept, so there is nothing to train on; {advice[most]}, and replace the file with --overwrite"
    )


def said_of(counts: Mapping[str, Any]) -> str:
    """``summary`` in one line for people."""
    parts = [f"{counts['kept']:,} of {counts['generated']:,} answers to {counts['rows']:,} rows kept"]
    faults = {"empty": "empty", "cut": "cut at the limit", "repeating": "repeating themselves"}
    for name, words in {**faults, "not_best": "less likely than the best"}.items():
        if counts[name]:
            parts.append(f"left out as {words}: {counts[name]:,}")
    if counts["kept_cut"]:
        parts.append(f"kept without an end: {counts['kept_cut']:,}")
    if counts["no_prompt"]:
        parts.append(f"prompts that do not fit: {counts['no_prompt']:,}")
    missing = counts["rows"] - counts["rows_answered"]
    if missing:
        names = counts["without_answer"]
        parts.append(f"rows without an answer: {missing:,} ({', '.join(names)}{', ...' * (missing > len(names))})")
    return "; ".join(parts)
