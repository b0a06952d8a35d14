"""Does a scale-free temperature leave the student alive? ``norm_kd`` on a real student, 40 steps of the quickstart.

    python benchmarks/norm_kd_gradient.py                                the quickstart recipe (about 5 minutes)
    python benchmarks/norm_kd_gradient.py --recipe FILE --steps 4        another recipe

T_s is a multiple of the standard deviation of the student's logits, so the soft loss does not depend on their scale. A
gradient that leaves the way through the deviation out pushes the scale all the same: the student goes to the uniform
distribution while its kd_loss falls. The bars: at the end the student's entropy is below 4 nats, and its cross-entropy
below that of the first step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import render
from render import Column

ROOT = Path(__file__).resolve().parents[1]
MOST_ENTROPY = 4.0
COLUMNS = (
    Column("step", "step", 0),
    Column("ce_loss", "CE", 2),
    Column("kl", "KL", 2),
    Column("kd_loss", "kd_loss", 2),
    Column("student_entropy", "student entropy", 2),
    Column("teacher_entropy", "teacher entropy", 2),
)


def train(recipe_path: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Train without any scoring and return the log lines of training, one every eighth of the run."""
    from dts_hf.distill import distill
    from dts_hf.recipe.loading import load_recipe

    overrides = (
        "temperature={name: norm_kd}",
        "loss.kd_ratio=0.9",
        f"training.max_steps={steps}",
        f"training.logging_steps={max(1, steps // 8)}",
        "training.logging_first_step=true",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "evaluation.every_steps=null",
        "evaluation.models=[]",
        "output.report=false",
        f"output.dir={json.dumps(str(folder))}",
        "output.overwrite=true",
    )
    run = distill(load_recipe(recipe_path, overrides))
    return [record for record in run.read_log() if "kd_loss" in record]


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """The two bars as sentences that say whether they are met."""
    first, last = rows[0], rows[-1]
    bars = {
        f"student entropy at the end {last['student_entropy']:.2f} nats, at most {MOST_ENTROPY:g}": (
            last["student_entropy"] < MOST_ENTROPY
        ),
        f"CE at the end {last['ce_loss']:.2f}, at the start {first['ce_loss']:.2f}": (
            last["ce_loss"] < first["ce_loss"]
        ),
    }
    return [f"{'Met' if met else 'MISSED'}: {text}." for text, met in bars.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(found.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = train(found.recipe, found.steps, Path(folder) / "run")
    notes = judge(rows)
    setting = {"recipe": Path(found.recipe).name, "temperature": "norm_kd", "kd_ratio": 0.9, "steps": found.steps}
    table = render.make_table("", COLUMNS, rows)
    render.show(render.make_report("norm_kd_gradient", setting, [table], notes), found.json)
    if any(note.startswith("MISSED") for note in notes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
