"""What docs/scale.md says beside memory: ordinary memory, traffic and the floor of time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from dts_hf.training.model_shape import ModelShape
from dts_hf.training.workload import Plan, Workload

ROOT = Path(__file__).resolve().parents[2]
LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
STUDENT = ModelShape.from_config(LLAMA)
TEACHER = ModelShape.from_config(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 8}))
WORK = Workload(rows=4, tokens=64, labelled=128, device="cpu")

sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
try:
    import train_step
    from _scale_estimates import estimate_communication, estimate_host, floor_seconds, flops
finally:
    del sys.path[:2]


def test_several_micro_batches_send_more_where_each_is_reduced() -> None:
    twice = replace(WORK, accumulation=2)
    plain, sharded = Plan("zero2", 8), Plan("zero3", 8, "sharded")
    for plan in (plain, sharded):
        once, both = (estimate_communication(STUDENT, TEACHER, work, plan) for work in (WORK, twice))
        assert once < both <= 2 * once
    ddp = [estimate_communication(STUDENT, TEACHER, work, Plan("ddp", 8)) for work in (WORK, twice)]
    assert ddp[0] == ddp[1] == 2 * 4 * STUDENT.parameters * 7 / 8


@pytest.mark.parametrize(("stage", "reductions"), [(1, 1), (2, 3)])
def test_deepspeed_reduces_gradients_by_all_reduce(stage: int, reductions: int) -> None:
    """All-reduce and an all-gather of the updated weights: half as much again as DDP, for each micro-batch in stage 2."""
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    assert config(stage=stage).use_multi_rank_bucket_allreduce
    work, plan = replace(WORK, accumulation=3), Plan(f"zero{stage}", 8)  # type: ignore[arg-type]
    one_way = 4 * STUDENT.parameters * 7 / 8
    assert estimate_communication(STUDENT, TEACHER, work, plan) == (2 * reductions + 1) * one_way


def test_floor_is_that_of_the_benchmarks() -> None:
    """Attention apart, the same matmuls as benchmarks/train_step.py counts."""
    sizes = train_step.Sizes(
        hidden=64, intermediate=176, heads=4, kv_heads=2, vocab=512, teacher_layers=8, student_layers=2
    )
    work = Workload(rows=1, tokens=sizes.tokens, labelled=sizes.labelled)
    found, counted = flops(STUDENT, TEACHER, work, Plan()), sizes.gflop()
    attention = 2 * 64 * sizes.tokens**2
    norms = 2 * 64 * sizes.tokens
    assert found["student"] == pytest.approx(counted["student"] * 1e9 + 3 * 2 * (attention + 2 * norms))
    assert found["teacher"] == pytest.approx(counted["teacher"] * 1e9 + 8 * (attention + 2 * norms))
    assert found["head"] == pytest.approx(counted["head"] * 1e9)
    assert floor_seconds(STUDENT, TEACHER, work, Plan(), 1e9) == pytest.approx(sum(found.values()) / 1e9)
    assert flops(STUDENT, TEACHER, work, Plan(teacher="cached"))["teacher"] == 0


def test_host_memory_counts_copies_and_not_mapped_files() -> None:
    work = replace(WORK, student_dtype="bfloat16")
    mapped = 2 * (STUDENT.parameters + TEACHER.parameters)
    assert estimate_host(STUDENT, TEACHER, work, Plan("ddp", 16)) == mapped
    changed = estimate_host(STUDENT, TEACHER, WORK, Plan("ddp", 16), per_node=8)
    assert changed == 8 * 4 * STUDENT.parameters + 2 * TEACHER.parameters
    halves = {"stored_dtype": "float32", "teacher_stored_dtype": "float16"}
    both = estimate_host(STUDENT, TEACHER, WORK, Plan("ddp", 4), **halves)  # type: ignore[arg-type]
    assert both == 4 * STUDENT.parameters + 4 * 2 * TEACHER.parameters
    packed = estimate_host(STUDENT, TEACHER, WORK, Plan("ddp", 4, "4bit"), **halves)  # type: ignore[arg-type]
    assert packed == 4 * STUDENT.parameters + 2 * TEACHER.parameters


def test_host_memory_counts_what_is_cast_before_it_is_divided() -> None:
    """accelerate casts a student to fp32 for FSDP2, DeepSpeed one to bf16, whole and in every process."""
    half = replace(WORK, student_dtype="bfloat16", autocast="bfloat16")
    assert estimate_host(STUDENT, None, half, Plan("fsdp2", 8)) == (2 + 8 * 4) * STUDENT.parameters
    assert estimate_host(STUDENT, None, half, Plan("zero3", 8)) == 2 * STUDENT.parameters
    adapters = replace(half, lora_parameters=100)  # peft makes them fp32, and the rest is not trained
    assert estimate_host(STUDENT, None, adapters, Plan("fsdp2", 8)) == 2 * STUDENT.parameters
    whole = replace(WORK, autocast="bfloat16")
    for strategy, copied in (("ddp", 0), ("fsdp2", 0), ("zero2", 2)):
        found = estimate_host(STUDENT, None, whole, Plan(strategy, 8), stored_dtype="float32")  # type: ignore[arg-type]
        assert found == (4 + 8 * copied) * STUDENT.parameters
    changed = estimate_host(STUDENT, None, whole, Plan("zero2", 8), stored_dtype="bfloat16")
    assert changed == 8 * 4 * STUDENT.parameters  # cast twice: one copy takes the place of the other
