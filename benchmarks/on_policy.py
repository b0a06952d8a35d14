"""Does the student's own text teach more than the data's, for the same time? Off-policy, mixed and on-policy quickstarts.

    python benchmarks/on_policy.py                                    # as long as 160 steps off-policy take, three seeds
    python benchmarks/on_policy.py --minutes 0.2 --seeds 1 --probe 2  # does it run?

The quickstart's teacher, student and rows (the teacher's own answers); temperature, loss and learning rate as in its recipe.
An arm differs in ``data.on_policy.fraction`` alone: 0, 0.5 and 1, sampled at temperature 1.

The student is cut once, with the layers that the recipe's search finds, and all arms start from it. Equal wall time: see
equal_time.py; evaluation does not count.

Measured after training: KL(teacher || student) on the held-out rows; both KLs on the student's own answers to their prompts,
sampled at temperature 1; ROUGE-L and the share of answers that repeat a 4-gram (greedy); the share of the time that went
into generation; and how long sampled answers were beside those of the data.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equal_time
import render

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
ARMS = {"off-policy": 0.0, "mixed 0.5": 0.5, "on-policy": 1.0}
DIGITS = {
    "kl": 3, "own_forward_kl": 3, "own_reverse_kl": 3, "rougeL": 1, "repeats": 0, "generation": 0, "length": 2, "steps": 0,
    "seconds_a_step": 2,
}  # fmt: skip
COLUMNS = [
    render.Column("arm", "arm", None), render.Column("kl", "KL, held-out text", None),
    render.Column("own_forward_kl", "KL(t, s), own text", None), render.Column("own_reverse_kl", "KL(s, t), own text", None),
    render.Column("rougeL", "ROUGE-L", None), render.Column("repeats", "repeating, %", None),
    render.Column("generation", "generation, % of time", None), render.Column("length", "length / data's", None),
    render.Column("steps", "steps", None), render.Column("seconds_a_step", "s a step", None),
    render.Column("seeds", "seeds", 0),
]  # fmt: skip


def train(fraction: float, run: Path, seed: int, steps: int, rows: int, layers: Sequence[int] | None) -> Any:
    """The finished run of one arm.

    Args:
        fraction: share of the steps on the student's own text.
        run: its directory.
        seed: of training.
        steps: how many.
        rows: held-out prompts that are answered at its end; 0: none.
        layers: that the student keeps; None: the recipe's search finds them.
    """
    from dts_hf.distill import distill
    from dts_hf.recipe.loading import load_recipe

    overrides = [
        f"training.max_steps={steps}", f"training.warmup_steps={min(10, steps // 2)}", f"training.seed={seed}",
        "training.eval_strategy=no", "evaluation.every_steps=null", "output.report=false", f"output.dir={run}",
        f"evaluation.models={'[student]' if rows else '[]'}", f"evaluation.rows={max(rows, 1)}",
        f"evaluation.own_text={f'{{rows: {rows}, max_new_tokens: 64, seed: 1}}' if rows else 'null'}",
    ]  # fmt: skip
    if layers is not None:
        overrides.append(f"student.init={{from: teacher, layers: {list(layers)}, choose: even}}")
    if fraction:
        overrides.append(f"data.on_policy={{fraction: {fraction}, max_new_tokens: 64}}")
    return distill(load_recipe(RECIPE, overrides))


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a run."""
    kept = equal_time.read_kept(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not any("layers" in line for line in kept):
            found = train(0.0, folder / "search", 42, 2, 0, None).read_student_init()
            equal_time.keep(args, kept, {"arm": "all", "layers": found["layers"]})
        layers = next(line["layers"] for line in kept if "layers" in line)

        def probe(arm: str) -> dict[str, Any]:
            tried = train(ARMS[arm], folder / "probe", 42, args.probe, 0, layers)
            return dict(tried.read_metrics()["training"])

        seconds = equal_time.seconds_of_steps(args, probe, kept)
        if args.probe_only:
            return []
        budget = 60 * args.minutes or 160 * seconds["off-policy"]

        def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
            done = train(ARMS[arm], folder / f"{arm}-{seed}", seed, steps, args.rows, layers)
            return {**scores(done), "seconds_a_step": seconds[arm]}

        return equal_time.all_runs(args, {arm: max(2, int(budget / seconds[arm])) for arm in args.arms}, run, kept)


def scores(run: Any) -> dict[str, float]:
    """Of one finished run."""
    metrics = run.read_metrics()
    student, training = metrics["models"]["student"], metrics["training"]
    of_set = student["sets"]["validation"]
    log = [line for line in run.read_log() if line.get("kind") == "train"]
    generated = [line for line in log if line.get("generated_length")]
    lengths = [line["generated_length"] for line in generated]
    own = student["own_text"]
    return {
        "kl": student["teacher_forced"]["kl"], "own_forward_kl": own["kl"], "own_reverse_kl": own["reverse_kl"],
        "rougeL": 100 * of_set["rougeL"]["mean"], "repeats": 100 * of_set["repeats_4gram"]["mean"],
        "generation": 100 * sum(line.get("generation_seconds", 0.0) for line in log) / training["seconds"],
        "length": statistics.mean(lengths) / labels_of_data() if lengths else float("nan"),
    }  # fmt: skip


@functools.cache
def labels_of_data() -> float:
    """Labels of a row of the training data, the mean; the same in all runs."""
    from dts_hf.distill import task_of
    from dts_hf.models.loading import load_tokenizers
    from dts_hf.recipe.loading import load_recipe

    recipe = load_recipe(RECIPE, [])
    task, (tokenizer, _) = task_of(recipe), load_tokenizers(recipe)
    teacher = task.load_teacher()
    assert teacher is not None
    data = task.encode(task.answer(teacher, tokenizer, task.load_rows()), tokenizer).train
    return statistics.mean(sum(stop - start for start, stop in data.spans(index)) for index in range(len(data)))


def report(found: Sequence[dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """One row an arm: mean and standard deviation over the seeds."""
    return render.make_report(
        "on_policy", setting, [render.make_table("", COLUMNS, render.over_seeds(found, DIGITS))], []
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    equal_time.add_arguments(parser, list(ARMS), minutes=0.0, probe=40)
    args = parser.parse_args()
    setting = {"minutes": args.minutes or "of 160 steps off-policy", "seeds": args.seeds, "rows": args.rows}
    if runs := measured(args):
        render.finish(report(runs, setting), args.json)


if __name__ == "__main__":
    main()
