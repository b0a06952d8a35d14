"""Runs whose scores are planted, for what compares runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from dts_hf.recipe.schema import Recipe
from tests.support.made_run import RECIPE, make_predictions, make_run

ROWS = 60


def plant(
    folder: Path,
    value: float,
    seed: int,
    effect: float = 0.0,
    *,
    kl: float = 0.6,
    ids: tuple[str, ...] = (),
    protocol: str = "0f3ac1d2e4b59687",
    ended: bool = True,
    generations: int = 2,
    **training: Any,
) -> Path:
    """A run with ``temperature.value`` whose ROUGE-L is about 40 + ``effect``; rows are as hard in every run."""
    recipe = copy.deepcopy(RECIPE)
    recipe["temperature"] = {"name": "constant", "value": value}
    recipe["training"] = {**recipe["training"], "seed": seed, **training}
    recipe["output"] = {"dir": str(folder)}
    full = Recipe.from_dict(recipe, deep=False).model_dump(mode="json")
    hard = np.random.default_rng(0).normal(0, 15, ROWS)
    random = np.random.default_rng([seed, round(100 * value)])
    run_effect = random.normal(0, 0.2)
    rows = [
        {
            "id": ids[row] if ids else f"q-{row:03}", "set": "validation", "seed": generation, "prediction": "x",
            "references": ["x"], "prompt": "p", "instruction": "i", "input": "", "tokens": 3, "finished": True,
            "rougeL": (40 + effect + run_effect + hard[row] + random.normal(0, 1)) / 100,
        }
        for generation in range(10, 10 + generations)
        for row in range(ROWS)
    ]  # fmt: skip
    run = make_run(folder, recipe=full, predictions={"student": rows})
    metrics = run.read_metrics()
    metrics["protocol"]["fingerprint"] = protocol
    metrics["models"]["student"]["teacher_forced"]["kl"] = kl + random.normal(0, 0.001)
    run.metrics_path.write_text(json.dumps(metrics)) if ended else run.metrics_path.unlink()
    return folder


def plant_classifier(folder: Path, value: float, seed: int, effect: float = 0.0, *, rows: bool = True) -> Path:
    """A run of the task MRPC whose accuracy is about 70 + ``effect``; without ``rows`` it has no predictions."""
    recipe = {
        "task": {"name": "glue", "subset": "mrpc"}, "student": {"model": "student"}, "teacher": {"model": "teacher"},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "temperature": {"name": "constant", "value": value}, "training": {"seed": seed}, "output": {"dir": str(folder)},
    }  # fmt: skip
    full = Recipe.from_dict(recipe, deep=False).model_dump(mode="json")
    random = np.random.default_rng([seed, round(100 * value)])
    hard = np.random.default_rng(0).uniform(size=200)
    right = hard < (70 + effect) / 100 + random.normal(0, 0.01)
    answers = [
        {"id": f"mrpc-{row}", "set": "validation", "sentence1": "a", "sentence2": "b", "label": row % 2,
         "predicted": row % 2 if right[row] else 1 - row % 2, "logits": [0.0, 1.0]}
        for row in range(200)
    ]  # fmt: skip
    run = make_run(folder, recipe=full, predictions={"student": answers} if rows else {}, log=[])
    scores = {"accuracy": float(right.mean()), "f1": 0.8 + effect / 100, "teacher_kl": 0.1, "label_ce": 0.6}
    entry = {"n": 200, **{key: {"mean": score} for key, score in scores.items()}}
    metrics = run.read_metrics()
    metrics["models"] = {"student": {"parameters": 10, "sets": {"validation": entry}}}
    run.metrics_path.write_text(json.dumps(metrics))
    return folder


def with_answers(run: Path) -> Path:
    """The same with prompts, references and answers to be read, one of which has a script in it."""
    path = run / "predictions" / "student.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = make_predictions("student")
    for place, row in enumerate(rows):
        text = texts[place % len(texts)]
        row |= {key: text[key] for key in ("prompt", "instruction", "input", "prediction", "references", "finished")}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run
