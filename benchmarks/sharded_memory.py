"""Peak memory of a process: DDP with the whole teacher on each, against ZeRO-3 and a teacher sharded over both.

    python benchmarks/sharded_memory.py            a student of 116 M and a teacher of 456 M weights: 5 GB a process
    python benchmarks/sharded_memory.py --quick    27 M and 78 M

Two processes on a CPU, fp32, AdamW, two steps of the real trainer on short rows, so that weights dominate. Both models
are made whole in the memory of each process first, which files in their own dtype would not need (they are mapped).
``weights`` is what the run adds to a process that has its libraries loaded; ``peak`` is with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import render

STEPS = 2
PROCESSES = 2
#: (strategy, placement of the teacher); the first is what the others are compared with.
VARIANTS = (
    ("ddp", "replicated"),
    ("ddp", "sharded"),
    ("zero2", "sharded"),
    ("zero3", "replicated"),
    ("zero3", "sharded"),
)
COLUMNS = (
    render.Column("label", "variant", None),
    render.Column("loading_mb", "loading MB", 0),
    render.Column("weights_mb", "weights MB", 0),
    render.Column("peak_mb", "peak MB", 0),
    render.Column("weights_ratio", "weights x DDP", 2),
    render.Column("peak_ratio", "peak x DDP", 2),
)


@dataclass(frozen=True)
class Sizes:
    hidden: int = 768
    intermediate: int = 2048
    vocab: int = 4096
    student_layers: int = 16
    teacher_layers: int = 64


QUICK = Sizes(512, 1408, 2048, 8, 24)


# --------------------------------------------------------------------------------------------------- in the process


def run(strategy: str, placement: str, sizes: Sizes) -> dict[str, Any]:
    """Train for two steps and return the memory of this process, in MB (10^6 bytes)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

    from dts_hf.distributed.sharding import unsharded_init
    from dts_hf.training.trainer import DistillationTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", per_device_train_batch_size=1, max_steps=STEPS,
            save_strategy="no", logging_steps=STEPS, disable_tqdm=True, learning_rate=1e-4, **arguments(strategy),
        )  # fmt: skip
        if strategy.startswith("zero"):
            import deepspeed  # noqa: F401  (what it takes is no weight)
        torch.distributed.barrier()
        harness.give_memory_back()
        before = harness.resident_bytes("VmRSS")
        assert harness.reset_high_water_mark(), harness.MEMORY_NOTE

        def model(layers: int, seed: int) -> Any:
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
                num_hidden_layers=layers, num_attention_heads=8, tie_word_embeddings=True, max_position_embeddings=64,
            )  # fmt: skip
            with unsharded_init():
                return AutoModelForCausalLM.from_config(config)

        teacher, student = model(sizes.teacher_layers, 1), model(sizes.student_layers, 0)
        parameters = {"student": student.num_parameters(), "teacher": teacher.num_parameters()}
        row = {"input_ids": list(range(16)), "labels": list(range(16))}
        trainer = DistillationTrainer(
            student, teacher, 2.0, args=args, train_dataset=[row] * PROCESSES * STEPS, processing_class=_tokenizer(sizes),
            teacher_placement=placement, logits_budget_mb=8,
        )  # fmt: skip
        loading = harness.resident_bytes("VmHWM")
        trainer.train()
        peak = harness.resident_bytes("VmHWM")
        found = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "world": trainer.accelerator.num_processes,
            "teacher": type(next(teacher.parameters())).__name__,
            "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "loading_mb": (loading - before) / 1e6,
            "weights_mb": (peak - before) / 1e6,
            "peak_mb": peak / 1e6,
            "parameters": parameters,
        }
    return found


def arguments(strategy: str) -> dict[str, Any]:
    """What ``TrainingArguments`` need for ``strategy``."""
    if strategy == "ddp":
        return {"ddp_backend": "gloo"}
    zero = {
        "stage": int(strategy.removeprefix("zero")),
        "overlap_comm": False,
        # DeepSpeed's own buffers are made for billions of weights
        "reduce_bucket_size": 1_000_000,
        "sub_group_size": 1_000_000,
        "stage3_prefetch_bucket_size": 1_000_000,
        "stage3_max_live_parameters": 1_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 10_000,
    }
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {"deepspeed": {"zero_optimization": zero, **dict.fromkeys(auto, "auto")}}


def _tokenizer(sizes: Sizes) -> Any:
    """Nothing is tokenised, but a tokenizer says how many ids there are."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(sizes.vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1", unk_token="w0")


# --------------------------------------------------------------------------------------------------------- the parent


def measure(strategy: str, placement: str, sizes: Sizes) -> dict[str, Any]:
    """``run`` on two fresh processes; the larger numbers of the two."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1"}
        # Large blocks go back to the system when they are freed, as they do from a GPU's pool: so memory is what is in use
        own |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES), "--standalone",
             __file__, "--worker", folder, strategy, placement, json.dumps(asdict(sizes))],
            env={**os.environ, **own}, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{strategy}, {placement}: {done.stderr[-3000:]}")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {key: max(rank[key] for rank in ranks) if key.endswith("_mb") else ranks[0][key] for key in ranks[0]}


def compare(variants: list[tuple[str, str]], sizes: Sizes) -> list[dict[str, Any]]:
    """A row of the table for each variant; the first is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    for strategy, placement in variants:
        found = measure(strategy, placement, sizes)
        first = rows[0] if rows else found
        ratios = {f"{key}_ratio": found[f"{key}_mb"] / first[f"{key}_mb"] for key in ("weights", "peak")}
        label = f"{strategy.upper().replace('ZERO', 'ZeRO-')}, teacher {placement}"
        rows.append({"label": label, "strategy": strategy, "placement": placement, **found, **ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a student of 27 M and a teacher of 78 M weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, strategy, placement, sizes = options.worker
        found = run(strategy, placement, Sizes(**json.loads(sizes)))
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    sizes = QUICK if options.quick else Sizes()
    rows = compare(list(VARIANTS), sizes)
    setting = {
        **rows[0]["parameters"],
        "processes": PROCESSES,
        "dtype": "float32",
        "optimizer": "AdamW",
        "steps": STEPS,
    }
    table = render.make_table("", COLUMNS, rows)
    render.show(render.make_report("sharded_memory", setting, [table], []), options.json)


if __name__ == "__main__":
    main()
