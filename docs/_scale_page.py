"""The tables of docs/scale.md, computed by the estimator that `dts-hf doctor` uses; its text is written by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _scale_estimates import estimate_communication, estimate_host, floor_seconds

from dts_hf.training.memory_estimate import disk_needed, estimate_memory
from dts_hf.training.model_shape import ModelShape
from dts_hf.training.workload import Plan, Workload

DOCS = Path(__file__).resolve().parent
MEASURED = DOCS / "estimate_check.json"
#: What the tables assume of a GPU: bf16 matmuls that a good step really reaches, and bytes a second sent by one GPU.
FLOPS = 400e12
INSIDE, BETWEEN = 300e9, 40e9
PER_NODE = 8
CARD_GB = 80
#: Of a card: the rest is for CUDA, NCCL and the allocator's fragmentation, which are not counted.
USABLE = 0.9


@dataclass(frozen=True)
class Case:
    """Teacher and student, the type of their files, what one device works on, and the plans worth comparing."""

    teacher: ModelShape
    student: ModelShape
    teacher_files: str
    student_files: str
    workload: Workload
    plans: tuple[Plan, ...]


def llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    """A LLaMA with an output layer of its own."""
    kv = hidden * kv_heads // heads
    block = 2 * hidden * (hidden + kv) + 3 * hidden * intermediate + 2 * hidden
    parameters = layers * block + 2 * vocab * hidden + hidden
    return ModelShape(
        parameters, vocab * hidden, layers, hidden, intermediate, heads, kv_heads, vocab, tied=False, block=block
    )


def gpt2(layers: int, hidden: int, heads: int) -> ModelShape:
    """A GPT-2 with dropout, as published."""
    vocab, positions = 50257, 1024
    block = 12 * hidden * hidden + 13 * hidden
    return ModelShape(
        layers * block + (vocab + positions + 2) * hidden, vocab * hidden, layers, hidden, 4 * hidden, heads, heads, vocab,
        tied=True, block=block, activation="gelu_new", rms_norm=False, dropout=True,
    )  # fmt: skip


CASES = {
    "gpt2": Case(
        gpt2(48, 1600, 25),
        gpt2(12, 768, 12),
        "float32",
        "float32",
        Workload(rows=8, tokens=512, labelled=2048, autocast="bfloat16", fused=True),
        (Plan(), Plan(teacher="4bit"), Plan("ddp", 8), Plan("zero2", 8)),
    ),
    "7b": Case(
        llama(32, 4096, 11008, 32, 32, 32000),
        llama(22, 2048, 5632, 32, 4, 32000),
        "float16",
        "float32",
        Workload(rows=4, tokens=1024, labelled=2048, autocast="bfloat16", fused=True),
        (
            Plan(),
            Plan(teacher="fp8"),
            Plan(teacher="4bit"),
            Plan("ddp", 8),
            Plan("zero2", 8),
            Plan("zero2", 8, "4bit"),
            Plan("zero3", 8, "sharded"),
            Plan("fsdp2", 8, "sharded"),
        ),
    ),
    "70b": Case(
        llama(80, 8192, 28672, 64, 8, 128256),
        llama(32, 4096, 14336, 32, 8, 128256),
        "bfloat16",
        "bfloat16",
        Workload(
            rows=2,
            tokens=2048,
            labelled=2048,
            student_dtype="bfloat16",
            gradient_checkpointing=True,
            autocast="bfloat16",
            fused=True,
        ),
        (
            Plan("ddp", 8),
            Plan("zero2", 8, "4bit"),
            Plan("zero3", 8),
            Plan("zero3", 8, "fp8"),
            Plan("zero3", 8, "4bit"),
            Plan("zero3", 8, "sharded"),
            Plan("fsdp2", 8, "sharded"),
            Plan("zero3", 16, "sharded"),
            Plan("zero3", 32, "sharded"),
            Plan("zero3", 8, "cached"),
        ),
    ),
}


def scale_page() -> str:
    """docs/scale.md with its tables as they are now."""
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    texts = {f"scale:{name}": table(case) for name, case in CASES.items()}
    texts["scale:assumed"] = assumed()
    texts["scale:measured"] = measured()
    for name, text in texts.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, found = place.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"docs/scale.md: expected one place for {name}, found {found}")
    return page


def assumed() -> str:
    return (
        f"Times assume {FLOPS / 1e12:.0f} TFLOP/s in bf16 matmuls (about 40 % of an H100), {INSIDE / 1e9:.0f} GB/s sent by "
        f"a GPU inside a node of {PER_NODE} and {BETWEEN / 1e9:.0f} GB/s between nodes. They are a floor: matmuls and "
        "transfers alone, perfectly even work."
    )


def table(case: Case) -> str:
    """One row per plan, for one workload per device."""
    rows = [cells(case, plan) for plan in case.plans]
    lines = [_row(rows[0]), _row("---" if head in ("strategy", "teacher") else "---:" for head in rows[0])]
    lines += [_row(row.values()) for row in rows]
    work = case.workload
    about = (
        f"Student {_count(case.student)}, teacher {_count(case.teacher)}; each GPU has {work.rows} rows of {work.tokens:,} "
        f"tokens, {work.labelled:,} of them labelled; {_types(work)} Files: student {case.student_files}, "
        f"teacher {case.teacher_files}."
    )
    return "\n".join([about, "", *lines])


def cells(case: Case, plan: Plan) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    work = case.workload
    memory = estimate_memory(case.student, case.teacher, work, plan)
    sent = estimate_communication(case.student, case.teacher, work, plan)
    host = estimate_host(
        case.student, case.teacher, work, plan,
        per_node=PER_NODE, stored_dtype=case.student_files, teacher_stored_dtype=case.teacher_files,
    )  # fmt: skip
    compute = floor_seconds(case.student, case.teacher, work, plan, FLOPS)
    network = sent / (INSIDE if plan.devices <= PER_NODE else BETWEEN)
    total = memory.total / 1e9
    peak = f"**{total:.1f}**" if total <= USABLE * CARD_GB else f"{total:.1f} (too much)"
    return {
        "strategy": plan.strategy,
        "GPUs": str(plan.devices),
        "teacher": plan.teacher,
        "student": _gb(memory.student),
        "gradients": _gb(memory.gradients),
        "optimizer": _gb(memory.optimizer),
        "teacher GB": _gb(memory.teacher),
        "activations": _gb(memory.activations),
        "loss": _gb(memory.loss),
        "buffers": _gb(memory.buffers),
        f"peak GB of {CARD_GB}": peak,
        "host GB a node": _gb(host),
        "sent GB a step": _gb(sent),
        "compute s": f"{compute:.2f}",
        "network s": f"{network:.2f}",
        "disk GB": _gb(disk_needed(case.student, work, plan, checkpoints=2)),
    }


def measured() -> str:
    """The estimator beside measured peaks, from the kept result of benchmarks/estimate_check.py."""
    if not MEASURED.is_file():
        return "Not measured yet: `python benchmarks/estimate_check.py --json > docs/estimate_check.json`."
    report: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    where = report["environment"]
    lines = [
        f"Measured on {where['date']} on {where['machine']}; torch {where['versions']['torch']}.",
        "",
        _row(["variant", "processes", "measured MB", "estimated MB", "estimated / measured"]),
        _row(["---", "---:", "---:", "---:", "---:"]),
    ]
    for row in report["tables"][0]["rows"]:
        numbers = [f"{row['measured_mb']:.0f}", f"{row['estimated_mb']:.0f}", f"{row['ratio']:.2f}"]
        lines.append(_row([row["label"], str(row["processes"]), *numbers]))
    return "\n".join(lines)


def _row(texts: Any) -> str:
    return f"| {' | '.join(texts)} |"


def _gb(amount: float) -> str:
    return "-" if amount == 0 else f"{amount / 1e9:.1f}" if amount < 99.5e9 else f"{amount / 1e9:.0f}"


def _count(shape: ModelShape) -> str:
    return f"{shape.parameters / 1e9:.2f} B" if shape.parameters > 1e9 else f"{shape.parameters / 1e6:.0f} M"


def _types(work: Workload) -> str:
    checkpointing = ", gradient checkpointing" if work.gradient_checkpointing else ""
    return f"student's weights {work.student_dtype}, `bf16: true`, teacher {work.teacher_dtype}{checkpointing}."
