"""Answer held-out instructions with a model and score the answers: the numbers of ``metrics.json``."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dts_hf.data.prompt_templates import EncodedPrompt, encode_prompts, get_template
from dts_hf.data.rows import Row
from dts_hf.distributed.processes import gathered, on_first_process, process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.evaluation.protocol import Protocol
from dts_hf.evaluation.text_metrics import best_rouge_l, exact_match, repeats_ngram
from dts_hf.generation.answer_file import Answer, AnswerFile
from dts_hf.generation.batches import decode_answer, rows_are_independent, share_out
from dts_hf.generation.engine import Generated, checked_prompts, generate, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# In the order of metrics.json
MEASURES = ("rougeL", "exact_match", "repeats_4gram", "cut_at_limit", "empty", "mean_tokens")


class InstructResult(NamedTuple):
    """``scores``: the set's entry of ``metrics.json``; ``predictions``: the rows of ``predictions/*.jsonl``."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate_instruct(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    protocol: Protocol,
    *,
    batch_size: int = 32,
    set_name: str = "validation",
    progress: str | None = None,
    answers: AnswerFile | None = None,
    all_processes: bool = False,
    answer: Callable[..., list[Generated]] = generate,
) -> InstructResult:
    """Answer the prompts of ``rows`` once for each seed and score the answers against the references.

    **Same text for any number of processes, and after a kill.** In fp32 the text of a row does not depend on the rows
    beside it, so each process takes a strided share of the rows, and any row that is there is kept. In bf16 and fp16 it
    does, in near-ties: there the rows are cut into blocks of ``BLOCK_BATCHES`` batches, a block is always answered as a
    whole and by one process, and a block that a kill left incomplete is answered again.

    Args:
        model: causal language model; left as it was, and no random state is touched.
        tokenizer: of the model.
        rows: prompts and their references; their ids are unique.
        protocol: how to answer. A row whose prompt cannot be cut to its limit is left out and counted.
        batch_size: prompts answered at the same time.
        set_name: name of the data set, written into the predictions.
        progress: title of the progress bar, or None.
        answers: also write every answer there as it is made, and take those that are there already.
        all_processes: every process of the default group calls this with the same arguments; each answers a share of
            the rows and gets the whole result. Models replicated on all processes (DDP) and sharded ones
            (``sharding.is_sharded``) are supported. Without it a sharded model is refused.
        answer: what generates; has the signature of ``generation.generate``.

    Returns:
        Scores ``{measure: {"mean", "sd", "per_seed"}}``: ROUGE-L, exact match and the shares from 0 to 1,
        ``mean_tokens`` in tokens. ``sd`` is the sample standard deviation over seeds, None for a single one;
        ``seeds`` is empty for greedy text.

    Raises:
        UserError: there are no rows, two have the same id, no prompt fits, or one leaves the model no room to answer.
            Every process raises it.
    """
    _check_rows(rows, set_name)
    template = get_template(protocol.template)
    encoded = encode_prompts(list(rows), tokenizer, template, protocol.max_prompt_length)
    kept = [(row, prompt) for row, prompt in zip(rows, encoded, strict=True) if prompt is not None]
    if not kept:
        raise UserError(
            f"evaluation on '{set_name}': none of the {len(rows)} prompts fits into the protocol's max_prompt_length "
            f"of {protocol.max_prompt_length} tokens (in a recipe: data.max_prompt_length)"
        )
    if isinstance(model, torch.nn.Module):
        checked_prompts(model, [p.ids for _, p in kept], protocol.max_new_tokens, [row.id for row, _ in kept])
    rank, world = process() if all_processes else (0, 1)
    if not all_processes and isinstance(model, torch.nn.Module) and is_sharded(model):
        raise ValueError("the weights are sharded over processes: call evaluate_instruct on all, with all_processes")
    lengths = [len(prompt.ids) for _, prompt in kept]
    calls = share_out(lengths, rows_are_independent(model), batch_size, rank, world)
    known = on_first_process(lambda: {} if answers is None else answers.load(), rank, world)
    predictions: list[dict[str, Any]] = []
    for seed in protocol.runs:
        made: dict[Answer, dict[str, Any]] = {}

        def finished(block: Sequence[int], position: int, generated: Generated, seed: int = seed) -> None:
            row, prompt = kept[block[position]]
            text = str(tokenizer.decode(prompt.ids)) if prompt.cut else template.render(row, tokenizer)
            made[Answer(seed, row.id)] = new = _prediction(row, text, generated, tokenizer, set_name, seed)  # noqa: B023
            if answers is not None:
                answers.append(new)

        for number, (block, whole) in enumerate(calls, start=1):
            missing = [index for index in block if Answer(seed, kept[index][0].id) not in known]
            todo = list(block) if whole and missing else missing
            part = f", part {number} of {len(calls)}" if len(calls) > 1 else ""
            title = None if rank or progress is None else f"{progress}, seed {seed}{part}"
            _answer_block(model, tokenizer, kept, todo, protocol, seed, batch_size, title, answer, finished)
        found = {answer: row for part in (known, *gathered(made, world)) for answer, row in part.items()}
        predictions += [found[Answer(seed, row.id)] for row, _ in kept]
    scores: dict[str, Any] = {
        "n": len(kept),
        "dropped": len(rows) - len(kept),
        "prompts_cut": sum(prompt.cut for _, prompt in kept),
        "rows_sha256": rows_digest([row for row, _ in kept]),
        "seeds": list(protocol.seeds) if protocol.do_sample else [],
    }
    per_seed = [_means(predictions[i : i + len(kept)]) for i in range(0, len(predictions), len(kept))]
    for measure in MEASURES:
        scores[measure] = _spread([means[measure] for means in per_seed])
    return InstructResult(scores, predictions)


def _answer_block(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[tuple[Row, EncodedPrompt]],
    block: Sequence[int],
    protocol: Protocol,
    seed: int,
    batch_size: int,
    progress: str | None,
    answer: Callable[..., list[Generated]],
    finished: Callable[[Sequence[int], int, Generated], None],
) -> None:
    """Generate the answers to the rows at ``block``; of a sharded model even to none, because the others may need it."""
    if not block and not (isinstance(model, torch.nn.Module) and is_sharded(model)):
        return
    answer(
        model,
        [kept[index][1].ids for index in block],
        protocol.settings(batch_size, seed),
        eos_token_ids=stop_token_ids(model, tokenizer),
        pad_token_id=_padding_id(tokenizer),
        row_keys=[kept[index][0].id for index in block],
        progress=progress,
        on_finished=lambda position, generated: finished(block, position, generated),
    )


def rows_digest(rows: Sequence[Row]) -> str:
    """Digest of what is asked and what counts as right, in order."""
    content = [[row.id, row.instruction, row.input, row.messages, list(row.references)] for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_rows(rows: Sequence[Row], set_name: str) -> None:
    if not rows:
        raise UserError(f"evaluation on '{set_name}': no rows, expected at least one")
    name, count = Counter(row.id for row in rows).most_common(1)[0]
    if count > 1:
        raise UserError(f"evaluation on '{set_name}': {count} rows have the id {name!r}, expected unique ids")


def answered_in(model: torch.nn.Module, autocast: str = "autocast") -> str:
    """In what ``model`` answers: the dtype of its weights, or ``autocast`` where its forward runs under that."""
    # `_original_forward` is what accelerate leaves on a model whose forward it has wrapped in autocast
    if hasattr(model, "_original_forward"):
        return autocast
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "+".join(sorted(kinds))


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next(
        (token for token in ids if isinstance(token, int)), 0
    )  # never attended to: any id of the vocabulary does


def _prediction(
    row: Row, prompt: str, answer: Generated, tokenizer: PreTrainedTokenizerBase, set_name: str, seed: int
) -> dict[str, Any]:
    text = decode_answer(tokenizer, answer.tokens)
    return {
        "id": row.id,
        "set": set_name,
        "seed": seed,
        "prompt": prompt,
        "instruction": row.instruction,
        "input": row.input,
        "prediction": text,
        "references": list(row.references),
        "rougeL": best_rouge_l(text, row.references),
        "tokens": len(answer.tokens),
        "finished": answer.finished,
    }


def _means(predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    values = {
        "rougeL": [row["rougeL"] for row in predictions],
        "exact_match": [exact_match(row["prediction"], row["references"]) for row in predictions],
        "repeats_4gram": [repeats_ngram(row["prediction"]) for row in predictions],
        "cut_at_limit": [not row["finished"] for row in predictions],
        "empty": [not row["prediction"] for row in predictions],
        "mean_tokens": [row["tokens"] for row in predictions],
    }
    return {measure: sum(of_rows) / len(of_rows) for measure, of_rows in values.items()}


def _spread(per_seed: list[float]) -> dict[str, Any]:
    sd = statistics.stdev(per_seed) if len(per_seed) > 1 else None
    return {"mean": statistics.fmean(per_seed), "sd": sd, "per_seed": per_seed}
