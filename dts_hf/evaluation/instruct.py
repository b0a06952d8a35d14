"""Answer held-out instructions with a model and score the answers: the numbers of ``metrics.json``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dts_hf.data.chat_templates import EncodedPrompt, Template, encode_prompts, end_of_turn_ids, resolve_template
from dts_hf.data.rows import Row
from dts_hf.distributed.processes import gathered, on_first_process, process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import rows_digest
from dts_hf.evaluation.protocol import Protocol
from dts_hf.evaluation.references import checked_references
from dts_hf.evaluation.text_metrics import best_rouge_l, distinct, exact_match, has_reference, repeats_ngram
from dts_hf.generation.answer_file import Answer, AnswerFile
from dts_hf.generation.engine import Generated, GenerationSettings, generate
from dts_hf.generation.prompts import checked_prompts
from dts_hf.generation.shares import answer_share, decode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# In the order of metrics.json
MEASURES = (
    "rougeL", "exact_match", "repeats_4gram", "distinct_1", "distinct_2", "cut_at_limit", "empty", "mean_tokens"
)  # fmt: skip

Prediction = dict[str, Any]
"""A row of ``predictions/*.jsonl``."""


class InstructResult(NamedTuple):
    """``scores``: the set's entry of ``metrics.json``; ``predictions``: the rows of ``predictions/*.jsonl``."""

    scores: dict[str, Any]
    predictions: list[Prediction]


class _Question(NamedTuple):
    row: Row
    prompt: EncodedPrompt
    references: tuple[str, ...]


def evaluate_instruct(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    protocol: Protocol,
    *,
    template: Template | None = None,
    batch_size: int = 32,
    set_name: str = "validation",
    progress: str | None = None,
    answers: AnswerFile | None = None,
    all_processes: bool = False,
    answer: Callable[..., list[Generated]] = generate,
) -> InstructResult:
    """Answer the prompts of ``rows`` once for each seed and score the answers against the references.

    The text is the same for any number of processes, and after a kill: ``generation/shares.py`` says how.

    Args:
        model: causal language model; left as it was, and no random state is touched.
        tokenizer: of the model.
        rows: prompts and their references; their ids are unique.
        protocol: how to answer. A row whose prompt cannot be cut to its limit is left out and counted.
        template: of the prompts; None: the protocol's.
        batch_size: prompts answered at the same time.
        set_name: name of the data set, written into the predictions.
        progress: title of the progress bar, or None.
        answers: also write every answer there as it is made, and take those that are there already.
        all_processes: every process of the default group calls this with the same arguments; each answers a share of
            the rows and gets the whole result. Models replicated on all processes (DDP) and sharded ones
            (``sharding.is_sharded``) are supported. Without it a sharded model is refused.
        answer: what generates; has the signature of ``generation.engine.generate``.

    Returns:
        Scores ``{measure: {"mean", "sd", "per_seed"}}``: ROUGE-L, exact match and the shares from 0 to 1,
        ``mean_tokens`` in tokens; ``distinct_1`` and ``distinct_2`` of all answers of a seed together (0 where they have no
        word, or no two). Each prediction has those of its own text, None where it is too short. ``sd`` is the sample
        standard deviation over seeds, None for a single one; ``seeds`` is empty for greedy text. A row without a reference
        text has no ROUGE-L and no exact match; ``without_reference`` counts such rows, where there are any.

    Raises:
        UserError: there are no rows, two have the same id, no prompt fits, one leaves the model no room to answer, or none
            has a reference text. Every process raises it.
        ValueError: the model is sharded and ``all_processes`` is not set.
    """
    template = resolve_template(protocol.template, tokenizer) if template is None else template
    questions = _encode(rows, tokenizer, protocol, template, set_name)
    prompts, ids = [question.prompt.ids for question in questions], [question.row.id for question in questions]
    if isinstance(model, torch.nn.Module):
        checked_prompts(model, prompts, protocol.max_new_tokens, ids)
        if is_sharded(model) and not all_processes:
            raise ValueError(
                "the weights are sharded over processes: call evaluate_instruct on all, with all_processes"
            )
    rank, world = process() if all_processes else (0, 1)
    # The first process reads what is there, because another one may already see an answer that the first one does not:
    # they must agree on what is missing, or a sharded model would be called unequally often
    known = on_first_process(lambda: {} if answers is None else answers.load(), rank, world)
    predictions: list[Prediction] = []
    for seed in protocol.runs:
        new: dict[Answer, Prediction] = {}

        # `seed` and `new` as defaults: a closure would see those of the last pass
        def finished(place: int, generated: Generated, seed: int = seed, new: dict[Answer, Prediction] = new) -> None:
            row, prompt, references = questions[place]
            asked = str(tokenizer.decode(prompt.ids)) if prompt.cut else template.render(row, tokenizer)
            text = decode_answer(tokenizer, generated.tokens)
            new[Answer(seed, row.id)] = prediction = _prediction(
                row, references, asked, text, generated, set_name, seed
            )
            if answers is not None:  # scored already: a score that is read back is the one that was shown
                answers.append(prediction)

        answer_share(
            model,
            tokenizer,
            prompts,
            generation_settings(protocol, batch_size, seed),
            turn_ends=end_of_turn_ids(tokenizer, template),
            known={place for place, row_id in enumerate(ids) if Answer(seed, row_id) in known},
            on_finished=finished,
            rank=rank,
            world=world,
            row_keys=ids,
            progress=None if progress is None else f"{progress}, seed {seed}",
            answer=answer,
        )
        # An answer that was made again, below fp32, replaces the one that was there
        by_answer = {key: value for part in (known, *gathered(new, world)) for key, value in part.items()}
        predictions += [by_answer[Answer(seed, row_id)] for row_id in ids]
    return InstructResult(_scores(questions, len(rows), protocol, predictions), predictions)


def generation_settings(protocol: Protocol, batch_size: int, seed: int | None = None) -> GenerationSettings:
    """How one pass of ``protocol`` is generated; ``seed``: by default the first one.

    Raises:
        UserError: a value of the protocol or the batch size is out of range.
    """
    return GenerationSettings(
        max_new_tokens=protocol.max_new_tokens,
        batch_size=batch_size,
        do_sample=protocol.do_sample,
        temperature=protocol.temperature,
        seed=protocol.seeds[0] if seed is None else seed,
        no_repeat_ngram_size=protocol.no_repeat_ngram_size,
    )


def answered_in(model: torch.nn.Module, autocast: str = "autocast") -> str:
    """In what ``model`` answers: the dtype of its weights, or ``autocast`` where its forward runs under that."""
    # `_original_forward` is what accelerate leaves on a model whose forward it has wrapped in autocast
    if hasattr(model, "_original_forward"):
        return autocast
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "+".join(sorted(kinds))


def _encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, template: Template, set_name: str
) -> list[_Question]:
    """The rows whose prompts fit, with their tokens."""
    if not rows:
        raise UserError(f"evaluation on '{set_name}': no rows, expected at least one")
    texts = [row.id for row in rows if row.kind == "text"]
    if texts:
        raise UserError(
            f"evaluation on '{set_name}': row '{texts[0]}' is a text, which asks nothing that could be answered "
            f"({len(texts)} of {len(rows)} rows are); expected rows with a question: instruction, messages or prompt"
        )
    name, count = Counter(row.id for row in rows).most_common(1)[0]
    if count > 1:
        raise UserError(f"evaluation on '{set_name}': {count} rows have the id {name!r}, expected unique ids")
    encoded = encode_prompts(list(rows), tokenizer, template, protocol.max_prompt_length)
    fitting = [(row, prompt) for row, prompt in zip(rows, encoded, strict=True) if prompt is not None]
    if not fitting:
        raise UserError(
            f"evaluation on '{set_name}': none of the {len(rows)} prompts fits into the protocol's max_prompt_length "
            f"of {protocol.max_prompt_length} tokens (in a recipe: data.max_prompt_length)"
        )
    references = checked_references([row for row, _ in fitting], tokenizer, template, set_name)
    return [_Question(row, prompt, right) for (row, prompt), right in zip(fitting, references, strict=True)]


def _prediction(
    row: Row, references: Sequence[str], prompt: str, text: str, answer: Generated, set_name: str, seed: int
) -> Prediction:
    return {
        "id": row.id,
        "set": set_name,
        "seed": seed,
        "prompt": prompt,
        "instruction": row.instruction,
        "input": row.input,
        "prediction": text,
        "references": list(references),
        "rougeL": best_rouge_l(text, references) if has_reference(references) else None,
        "tokens": len(answer.tokens),
        "finished": answer.finished,
        **{f"distinct_{n}": distinct([text], n) for n in (1, 2)},
    }


def _scores(
    questions: Sequence[_Question], asked: int, protocol: Protocol, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """The entry of a set in ``metrics.json``: of ``asked`` rows the ``questions`` were answered once for each seed."""
    count = len(questions)
    scores: dict[str, Any] = {
        "n": count,
        "dropped": asked - count,
        "prompts_cut": sum(question.prompt.cut for question in questions),
        "rows_sha256": rows_digest([question.row for question in questions]),
        "seeds": list(protocol.seeds) if protocol.do_sample else [],
    }
    if silent := sum(not has_reference(question.references) for question in questions):
        scores["without_reference"] = silent
    # Means of each seed, then over seeds: papers report the mean of five runs and its spread, and the spread over all
    # answers would be that of easy and hard prompts. Every seed answers the same rows, so the mean itself is the same
    per_seed = [_means(predictions[start : start + count]) for start in range(0, len(predictions), count)]
    return {**scores, **{measure: _spread([means[measure] for means in per_seed]) for measure in MEASURES}}


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
    compared = [row for row in predictions if has_reference(row["references"])]
    values = {
        "rougeL": [row["rougeL"] for row in compared],
        "exact_match": [exact_match(row["prediction"], row["references"]) for row in compared],
        "repeats_4gram": [repeats_ngram(row["prediction"]) for row in predictions],
        "cut_at_limit": [not row["finished"] for row in predictions],
        "empty": [not row["prediction"] for row in predictions],
        "mean_tokens": [row["tokens"] for row in predictions],
    }
    said = [row["prediction"] for row in predictions]
    of_all = {f"distinct_{n}": distinct(said, n) or 0.0 for n in (1, 2)}
    return of_all | {measure: sum(of_rows) / len(of_rows) for measure, of_rows in values.items()}


def _spread(per_seed: list[float]) -> dict[str, Any]:
    sd = statistics.stdev(per_seed) if len(per_seed) > 1 else None
    return {"mean": statistics.fmean(per_seed), "sd": sd, "per_seed": per_seed}
