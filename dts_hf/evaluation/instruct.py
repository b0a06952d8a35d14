"""Answer held-out instructions with a model and score the answers: the numbers of ``metrics.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dts_hf.data import Row
from dts_hf.errors import UserError
from dts_hf.evaluation.rouge import best_rouge_l
from dts_hf.evaluation.text import exact_match, repeats_ngram
from dts_hf.generation import Generated, GenerationSettings, generate, stop_token_ids
from dts_hf.prompts import Template, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# In the order of metrics.json
MEASURES = ("rougeL", "exact_match", "repeats_4gram", "cut_at_limit", "empty", "mean_tokens")


class InstructResult(NamedTuple):
    """``scores``: the set's entry of ``metrics.json``; ``predictions``: the rows of ``predictions/*.jsonl``."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate_instruct(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template,
    settings: GenerationSettings,
    *,
    max_prompt_length: int,
    set_name: str = "validation",
    seeds: Sequence[int] = (),
    progress: str | None = None,
) -> InstructResult:
    """Answer the prompts of ``rows`` once for each seed and score the answers against the references.

    Args:
        model: causal language model; left as it was, and no random state is touched.
        tokenizer: of the model.
        rows: prompts and their references.
        template: from ``prompts.get_template``.
        settings: how to generate; its seed is replaced by each of ``seeds``.
        max_prompt_length: in tokens. A row whose prompt cannot be cut to it is left out and counted.
        set_name: name of the data set, written into the predictions.
        seeds: one run of sampling each; default: the seed of ``settings``. Greedy text is generated once, under the
            first of them.
        progress: title of the progress bar, or None.

    Returns:
        Scores ``{measure: {"mean", "sd", "per_seed"}}``: ROUGE-L, exact match and the shares from 0 to 1,
        ``mean_tokens`` in tokens. ``sd`` is the sample standard deviation over seeds, None for a single one.

    Raises:
        UserError: there are no rows, or no prompt fits.
    """
    if not rows:
        raise UserError(f"evaluation on '{set_name}': no rows, expected at least one")
    encoded = encode_prompts(list(rows), tokenizer, template, max_prompt_length)
    kept = [(row, prompt) for row, prompt in zip(rows, encoded, strict=True) if prompt is not None]
    if not kept:
        raise UserError(
            f"evaluation on '{set_name}': none of the {len(rows)} prompts fits into "
            f"data.max_prompt_length={max_prompt_length} tokens"
        )
    texts = [
        str(tokenizer.decode(prompt.ids)) if prompt.cut else template.render(row, tokenizer) for row, prompt in kept
    ]
    runs = list(seeds) or [settings.seed]
    predictions: list[dict[str, Any]] = []
    per_seed: list[dict[str, float]] = []
    for seed in runs if settings.do_sample else runs[:1]:
        answers = generate(
            model,
            [prompt.ids for _, prompt in kept],
            dataclasses.replace(settings, seed=seed),
            eos_token_ids=stop_token_ids(model, tokenizer),
            pad_token_id=_padding_id(tokenizer),
            row_keys=[row.id for row, _ in kept],
            progress=progress,
        )
        scored = [
            _prediction(row, text, answer, tokenizer, set_name, seed)
            for (row, _), text, answer in zip(kept, texts, answers, strict=True)
        ]
        predictions += scored
        per_seed.append(_means(scored))
    scores: dict[str, Any] = {
        "n": len(kept),
        "dropped": len(rows) - len(kept),
        "prompts_cut": sum(prompt.cut for _, prompt in kept),
        "seeds": runs[: len(per_seed)],
    }
    for measure in MEASURES:
        scores[measure] = _spread([means[measure] for means in per_seed])
    return InstructResult(scores, predictions)


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer without special tokens, spaces around it, or what follows a spelt-out end mark."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.split("<|endoftext|>")[0].strip()


def protocol_fingerprint(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: GenerationSettings,
    *,
    max_prompt_length: int,
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Describe all that a score depends on besides model and data: scores of equal ``fingerprint`` can be compared.

    The batch size is left out because the text does not depend on it, and for greedy text so are seeds and
    temperature.
    """
    runs = list(seeds) or [settings.seed]
    protocol: dict[str, Any] = {
        "template": template.name,
        "tokenizer": _tokenizer_digest(tokenizer, template),
        "max_prompt_length": max_prompt_length,
        "max_new_tokens": settings.max_new_tokens,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "do_sample": settings.do_sample,
        "temperature": settings.temperature if settings.do_sample else None,
        "seeds": runs if settings.do_sample else [],
        "rouge": "rougeL F-measure of rouge_score 0.1.2, Porter stemmer, best reference",
    }
    text = json.dumps(protocol, sort_keys=True)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], **protocol}


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Digest of what the tokenizer is, not of where it was loaded from."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template if template.name == "chat" else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
