"""How well a student begins, by the choice of its layers: before training, and after it.

    python benchmarks/student_start.py                     # before: the quickstart's teacher, 24 and 20 of 30 layers
    python benchmarks/student_start.py --train             # after: the quickstart with each choice, three seeds
    python benchmarks/student_start.py --train --steps 40 --seeds 1   # the same, shortened

Before: nats per label on the calibration rows (by which ``search`` chooses) and on all held-out rows, which it never sees.
After: KL to the teacher at T = 1 and ROUGE-L on the held-out rows. Tables are Markdown; ``--json`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import render
from transformers import PreTrainedModel

from dts_hf.data.encoding import EncodedDataset
from dts_hf.distill import distill, task_of
from dts_hf.evaluation.held_out import VALIDATION
from dts_hf.loss.statistics import KL
from dts_hf.models.calibration import Calibration, LayerSwitch
from dts_hf.models.layer_choice import choose_layers
from dts_hf.models.loading import load_tokenizers
from dts_hf.recipe.loading import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
#: What the quickstart kept before it searched: the first ten and the last ten layers.
ENDS = [*range(10), *range(20, 30)]
STARTS: dict[str, dict[str, Any]] = {
    "evenly spaced": {"layers": 20},
    "first and last ten": {"layers": ENDS},
    "block influence": {"layers": 20, "choose": "block_influence"},
    "middle block": {"layers": 20, "choose": "middle_block"},
    "search": {"layers": 20, "choose": "search"},
}


def quickstart_rows() -> tuple[PreTrainedModel, EncodedDataset, EncodedDataset]:
    """The quickstart's teacher, its training rows and its held-out rows as tokens."""
    recipe = load_recipe(RECIPE, [])
    task = task_of(recipe)
    data = task.encode(task.load_rows(), load_tokenizers(recipe)[0])
    teacher = task.load_teacher()
    assert teacher is not None and data.validation is not None  # the recipe has both
    return teacher, data.train, data.validation


def before(counts: list[int]) -> list[dict[str, Any]]:
    """One row for each choice and number of layers: NLL on calibration and held-out rows, and the seconds it took."""
    teacher, train, validation = quickstart_rows()
    rows = Calibration.of(train, 24)
    switch, held_out = LayerSwitch(teacher, rows), LayerSwitch(teacher, Calibration.of(validation, 64))
    held_out.base(range(switch.depth))
    found = [
        {"layers": switch.depth, "choice": "all", "nll": rows.nll(teacher), "held_out": held_out.score(held_out.kept)}
    ]
    for count in counts:
        for choose in ("even", "block_influence", "middle_block", "search"):
            began = time.monotonic()
            choice = choose_layers(switch, choose, count, list)
            found.append({
                "layers": count, "choice": choose, "nll": choice.nll, "held_out": held_out.score(choice.layers),
                "seconds": time.monotonic() - began, "kept": choice.layers,
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def after(steps: int | None, seeds: int, starts: list[str]) -> list[dict[str, Any]]:
    """One row for each start and seed: what a quickstart of ``steps`` ends with; None: of as many as the recipe says."""
    found = []
    for name in starts:
        for seed in range(42, 42 + seeds):
            with tempfile.TemporaryDirectory() as folder:
                init = {"from": "teacher", "choose": "even", **STARTS[name]}
                overrides = [
                    f"student.init={json.dumps(init)}", f"training.seed={seed}", f"output.dir={folder}/run",
                    "output.report=false", "evaluation.models=[student_before, student]",
                ]  # fmt: skip
                if steps is not None:
                    overrides += [
                        f"training.max_steps={steps}",
                        "training.eval_strategy=no",
                        "evaluation.every_steps=null",
                    ]
                metrics = distill(load_recipe(RECIPE, overrides)).read_metrics()
            models = metrics["models"]
            row = {"start": name, "seed": seed, "steps": steps, "models": models, "training": metrics["training"]}
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def table_before(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| layers kept | choice | NLL, calibration rows | NLL, held-out rows | seconds |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append(f"| {row['layers']} | {row['choice']} | {row['nll']:.2f} | {row['held_out']:.2f} | {seconds} |")
    return "\n".join(lines)


def table_after(rows: list[dict[str, Any]]) -> str:
    """Markdown; mean and standard deviation over the seeds."""
    lines = [
        "| start | KL before | ROUGE-L before | KL after | ROUGE-L after | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["start"] for row in rows):
        of_start = [row["models"] for row in rows if row["start"] == name]
        cells = []
        for which in ("student_before", "student"):
            cells.append(render.spread([models[which]["teacher_forced"][KL.sum] for models in of_start], 3))
            scores = [models[which]["sets"][VALIDATION]["rougeL"]["mean"] for models in of_start]
            cells.append(render.spread([100 * score for score in scores], 1))
        lines.append(f"| {name} | {' | '.join(cells)} | {len(of_start)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20], help="how many layers are kept")
    parser.add_argument("--train", action="store_true", help="train the quickstart with each start")
    parser.add_argument("--steps", type=int, help="optimizer steps; by default those of the recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--starts", nargs="+", default=["evenly spaced", "first and last ten", "search"], choices=STARTS
    )
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    args = parser.parse_args()
    rows = after(args.steps, args.seeds, args.starts) if args.train else before(args.layers)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table_after(rows) if args.train else table_before(rows))


if __name__ == "__main__":
    main()
