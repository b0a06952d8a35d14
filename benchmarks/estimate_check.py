"""The estimator's memory against the measured peak of real training: one fresh process (or two) per variant.

    python benchmarks/estimate_check.py
    python benchmarks/estimate_check.py --only lora zero3 --quick
    python benchmarks/estimate_check.py --json > docs/estimate_check.json     what docs/scale.md shows

Measured is what two optimizer steps of the real trainer add to the resident memory of a process that has its
libraries loaded and warm: weights, gradients, optimizer state, activations, loss and buffers. Estimated is
``dts_hf.training.memory_estimate.estimate_memory`` for the same shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import render

STEPS = 2
COLUMNS = (
    render.Column("label", "variant", None),
    render.Column("processes", "processes", 0),
    render.Column("measured_mb", "measured MB", 1),
    render.Column("estimated_mb", "estimated MB", 1),
    render.Column("ratio", "estimated / measured", 2),
    render.Column("moment", "at its peak in", None),
)


@dataclass(frozen=True)
class Sizes:
    """``rows`` of ``tokens`` each, the second half of every row labelled; without padding."""

    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 16384
    student_layers: int = 6
    teacher_layers: int = 8
    rows: int = 4
    tokens: int = 192
    logits_budget_mb: float = 24


QUICK = Sizes(384, 1024, 6, 3, 12288, 4, 6, 4, 96, 8)


@dataclass(frozen=True)
class Variant:
    """What differs from a LLaMA in fp32 on one process."""

    label: str
    family: str = "llama"
    strategy: str = "single"
    accumulation: int = 1
    dtype: str = "float32"
    autocast: bool = False
    checkpointing: bool = False
    lora: bool = False
    packing: bool = False
    teacher: str = "replicated"

    @property
    def processes(self) -> int:
        return 1 if self.strategy == "single" else 2


VARIANTS = {
    "fp32": Variant("fp32"),
    "packed": Variant("fp32, packed", packing=True),
    "accumulation": Variant("fp32, 2 micro-batches a step", accumulation=2),
    "bf16": Variant("bf16 weights", dtype="bfloat16"),
    "autocast": Variant("fp32 weights, bf16 autocast", autocast=True),
    "checkpointing": Variant("fp32, gradient checkpointing", checkpointing=True),
    "lora": Variant("fp32, LoRA", lora=True),
    "gpt2": Variant("fp32, GPT-2 without dropout", family="gpt2"),
    "opt": Variant("fp32, OPT without dropout", family="opt"),
    "ddp": Variant("fp32, DDP", strategy="ddp"),
    "zero2": Variant("fp32, ZeRO-2", strategy="zero2"),
    "zero3": Variant("fp32, ZeRO-3", strategy="zero3"),
    "zero2_bf16": Variant("ZeRO-2, bf16: true", strategy="zero2", autocast=True),
    "zero3_bf16": Variant("ZeRO-3, bf16: true", strategy="zero3", autocast=True),
    "fsdp2": Variant("fp32, FSDP2", strategy="fsdp2"),
    "fsdp2_accumulation": Variant("fp32, FSDP2, 2 micro-batches a step", strategy="fsdp2", accumulation=2),
    "sharded": Variant("fp32, ZeRO-3, sharded teacher", strategy="zero3", teacher="sharded"),
}


# --------------------------------------------------------------------------------------------------- in the process


def make_config(family: str, sizes: Sizes, layers: int) -> Any:
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    if family == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(
            vocab_size=sizes.vocab, n_embd=sizes.hidden, n_layer=layers, n_head=sizes.heads, n_positions=1024, **quiet, **ids
        )  # fmt: skip
    if family == "opt":
        return OPTConfig(
            vocab_size=sizes.vocab, hidden_size=sizes.hidden, word_embed_proj_dim=sizes.hidden, num_hidden_layers=layers,
            ffn_dim=4 * sizes.hidden, num_attention_heads=sizes.heads, max_position_embeddings=1024, dropout=0.0, **ids
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, max_position_embeddings=1024,
        tie_word_embeddings=True, **ids
    )  # fmt: skip


def make_models(variant: Variant, sizes: Sizes) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    build = AutoModelForCausalLM.from_config
    teacher = build(make_config(variant.family, sizes, sizes.teacher_layers), dtype=dtype)
    student: Any = build(make_config(variant.family, sizes, sizes.student_layers), dtype=dtype)
    if variant.lora:
        from dts_hf.models.adapters import add_lora
        from dts_hf.recipe.schema import Lora

        student = add_lora(student, Lora(r=16))
    return student, teacher


def make_arguments(variant: Variant, **values: Any) -> Any:
    """``TrainingArguments`` under the variant's strategy, on the CPU."""
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    for left_behind in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # by the variant before
        os.environ.pop(left_behind, None)
    if variant.processes > 1:
        values["ddp_backend"] = "gloo"
    if variant.strategy == "fsdp2":
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        args = TrainingArguments(**values, use_cpu=True, fsdp=True, fsdp_config=config)
        # On a CPU accelerate turns FSDP into DDP, although torch's fully_shard works there.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        return args
    if variant.strategy.startswith("zero"):
        options: dict[str, Any] = {"stage": int(variant.strategy.removeprefix("zero")), "overlap_comm": False}
        auto = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
            "gradient_clipping",
        )
        config = {"zero_optimization": options, "bf16": {"enabled": "auto"}}
        values["deepspeed"] = config | dict.fromkeys(auto, "auto")
    return TrainingArguments(**values, use_cpu=True)


def make_rows(variant: Variant, sizes: Sizes) -> tuple[Any, Any]:
    """(data set, tokenizer); they are no part of the estimate, so they are made before memory is read."""
    import torch
    from train_step import make_tokenizer

    from dts_hf.data.encoding import EncodedDataset

    generator = torch.Generator().manual_seed(2)
    count = sizes.rows * variant.processes * variant.accumulation * STEPS
    rows = torch.randint(3, sizes.vocab, (count, sizes.tokens), generator=generator).tolist()
    names = [str(number) for number in range(count)]
    return EncodedDataset(names, rows, [sizes.tokens // 2] * count), make_tokenizer(sizes)  # type: ignore[arg-type]


def train(variant: Variant, sizes: Sizes, dataset: Any, tokenizer: Any) -> Any:
    """The real trainer's ``train``; returns it, so that what it holds stays alive."""
    from dts_hf import DistillationTrainer
    from dts_hf.distributed.sharding import shard_teacher, unsharded_init

    with tempfile.TemporaryDirectory() as folder:
        args = make_arguments(
            variant, output_dir=folder, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=STEPS,
            per_device_train_batch_size=sizes.rows, gradient_accumulation_steps=variant.accumulation, bf16=variant.autocast,
            activation_checkpointing=variant.checkpointing, logging_steps=1000,
        )  # fmt: skip
        device = args.device  # also joins the processes
        with unsharded_init():
            student, teacher = make_models(variant, sizes)
        if variant.teacher == "sharded":
            shard_teacher(teacher, device)
        trainer = DistillationTrainer(
            student, teacher, {"name": "dts", "rule": "gap", "t_max": 4.0}, args=args, train_dataset=dataset,
            processing_class=tokenizer, packing=variant.packing, logits_budget_mb=sizes.logits_budget_mb,
        )  # fmt: skip
        trainer.train()
    return trainer


def measure(variant: Variant, sizes: Sizes) -> dict[str, Any]:
    """Peak bytes that training adds to this process, and what wraps the student."""
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tiny = replace(sizes, hidden=48, intermediate=96, vocab=256, student_layers=1, teacher_layers=1, rows=2, tokens=16)
    train(variant, tiny, *make_rows(variant, tiny))  # loads what is loaded late
    rows = make_rows(variant, sizes)
    harness.give_memory_back()
    before = harness.resident_bytes("VmRSS")
    if not harness.reset_high_water_mark():
        raise SystemExit(harness.MEMORY_NOTE)
    trainer = train(variant, sizes, *rows)
    peak = harness.resident_bytes("VmHWM") - before
    return {"measured": peak, "wrapper": type(trainer.model_wrapped).__name__, "world": trainer.args.world_size}


def estimate(variant: Variant, sizes: Sizes) -> Any:
    from dts_hf.training.memory_estimate import estimate_memory
    from dts_hf.training.model_shape import ModelShape
    from dts_hf.training.workload import Plan, Workload

    student, teacher = (
        ModelShape.from_config(make_config(variant.family, sizes, layers))
        for layers in (sizes.student_layers, sizes.teacher_layers)
    )
    adapters = None
    if variant.lora:
        import torch

        with torch.device("meta"):
            model, _ = make_models(variant, replace(sizes, teacher_layers=1))
        adapters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    rows = 1 if variant.packing else sizes.rows
    workload = Workload(
        rows=rows,
        tokens=sizes.tokens * sizes.rows // rows,
        labelled=sizes.rows * (sizes.tokens - sizes.tokens // 2),
        accumulation=variant.accumulation,
        student_dtype=variant.dtype,
        teacher_dtype=variant.dtype,
        gradient_checkpointing=variant.checkpointing,
        lora_parameters=adapters,
        logits_budget_mb=sizes.logits_budget_mb,
        autocast="bfloat16" if variant.autocast else None,
        attention="packed" if variant.packing else "sdpa",
        device="cpu",
    )
    plan = Plan(variant.strategy, variant.processes, variant.teacher)  # type: ignore[arg-type]
    return estimate_memory(student, teacher, workload, plan)


# ----------------------------------------------------------------------------------------------------- from outside


def launch(names: list[str], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Run variants one after the other in a fresh process, or two under torchrun; rank 0's figures by name."""
    processes = VARIANTS[names[0]].processes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-W", "ignore"]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, "--worker", ",".join(names), str(out), json.dumps(vars(sizes))]
        # Large blocks are given back to the system as soon as they are freed, so that resident means alive.
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            words = done.stdout[max(done.stdout.find("Traceback"), 0) :]
            raise SystemExit(f"{', '.join(names)} failed:\n{words[:5000]}")
        found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def run(sizes: Sizes, names: list[str], fresh: bool) -> dict[str, Any]:
    groups = [[name] for name in names]
    if not fresh:
        groups = [[name for name in names if VARIANTS[name].processes == count] for count in (1, 2)]
    found: dict[str, dict[str, Any]] = {}
    for group in filter(None, groups):
        print(f"{', '.join(group)} ...", file=sys.stderr, flush=True)
        found |= launch(group, sizes)
    rows = []
    for name in names:
        memory = estimate(VARIANTS[name], sizes)
        rows.append(
            {
                "name": name,
                "label": VARIANTS[name].label,
                "processes": VARIANTS[name].processes,
                **found[name],
                "measured_mb": found[name]["measured"] / 1e6,
                "estimated_mb": memory.total / 1e6,
                "ratio": memory.total / found[name]["measured"],
                **memory.as_dict(),
            }
        )
    return render.make_report("estimate_check", vars(sizes), [render.make_table("", COLUMNS, rows)], [])


def work(names: list[str], out: Path, sizes: Sizes) -> None:
    """What a launched process does."""
    found = {name: measure(VARIANTS[name], sizes) for name in names}
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(found))


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--worker"]:
        work(given[1].split(","), Path(given[2]), Sizes(**json.loads(given[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller models, seconds instead of minutes")
    parser.add_argument(
        "--together", action="store_true", help="variants share a process: faster, a little less exact"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(given)
    render.show(run(QUICK if options.quick else Sizes(), options.only, not options.together), options.json)


if __name__ == "__main__":
    main()
