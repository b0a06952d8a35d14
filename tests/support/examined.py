"""Recipes of tiny models for ``dts-hf doctor``: a clean one that tests change section by section, and a classifier's."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    AutoConfig,
    LlamaForSequenceClassification,
)

import dts_hf.doctor.walk as doctor_walk
from dts_hf.data.chat_templates import get_template
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import rows_from_dataset
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.report import screen
from dts_hf.runs.memory import device_of
from tests.support.tiny import tiny_llama, tiny_tokenizer

INSTRUCTIONS = ["Name a fruit", "Say yes", "Count to three", "Name a colour", "Say no", "Write a word"]


ANSWERS = ["apples and pears", "yes", "one two three", "the boat is white", "no", "lake"]


def rows_between(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"id": f"row-{i}", "instruction": f"{INSTRUCTIONS[i % 6]} {i}", "input": "", "output": ANSWERS[i % 6]}
        for i in range(start, stop)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def trained(steps: int, layers: int = 4) -> dict[str, torch.Tensor]:
    """Weights of a tiny model that knows the rows, the better the more steps."""
    model = tiny_llama(layers=layers, seed=3)
    tokenizer = tiny_tokenizer()
    template = get_template("chat")
    data, _ = encode_rows(
        rows_from_dataset(rows_between(0, 24)), tokenizer, template, max_length=96, max_prompt_length=64
    )
    batch = PaddedCollator(2)([data[index] for index in range(len(data))])
    batch.pop("row_id")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def save_model(folder: str, steps: int, layers: int = 4, **options: Any) -> None:
    model = tiny_llama(layers=layers, seed=3, **options)
    model.load_state_dict(trained(steps, layers))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def recipe(**sections: Any) -> Path:
    """A clean recipe, changed section by section, as a file."""
    values: dict[str, Any] = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "chat", "max_length": 96,
                 "max_prompt_length": 64},
        "temperature": {"name": "dts", "rule": "gap"},
        "training": {"use_cpu": True, "max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"max_new_tokens": 8},
        "output": {"dir": "run"},
    }  # fmt: skip
    for name, section in sections.items():
        whole = section is None or name in ("student", "temperature")
        values[name] = section if whole else {**values.get(name, {}), **section}
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def own_student(tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """A student of its own in the folder ``student``."""
    model = tiny_llama(layers=2, seed=5, **options)
    model.save_pretrained("student")
    (tokenizer or tiny_tokenizer()).save_pretrained("student")
    return {"model": "student"}


def problems(diagnosis: Diagnosis) -> dict[str, str]:
    return {problem.code: problem.level for problem in diagnosis.problems}


def texts(diagnosis: Diagnosis) -> str:
    return "\n".join(f"{problem.code}: {problem.text}" for problem in diagnosis.problems)


def limited(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**device_of(args), "memory": memory})


def classifier(folder: str, *, swapped: bool = False) -> None:
    """A tiny classifier of 'good' and 'bad'."""
    config = AutoConfig.from_pretrained("teacher")
    config.num_labels = 2
    config.id2label = {0: "negative", 1: "positive"}
    config.label2id = {"negative": 0, "positive": 1}
    config.pad_token_id = 2
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    tokenizer = tiny_tokenizer()
    texts_and_labels = [(f"{word} boat {i}", label) for i in range(12) for label, word in enumerate(("bad", "good"))]
    batch = tokenizer([text for text, _ in texts_and_labels], return_tensors="pt", padding=True)
    labels = torch.tensor([label != swapped for _, label in texts_and_labels]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def task_recipe(**sections: Any) -> Path:
    rows = [
        {"id": str(2 * i + label), "sentence": f"{word} boat {i}", "label": label}
        for i in range(12)
        for label, word in enumerate(("bad", "good"))
    ]
    write_rows(Path("train.jsonl"), rows)
    write_rows(Path("valid.jsonl"), [{**row, "sentence": row["sentence"] + " more"} for row in rows])
    data = {"prompt_template": "alpaca", "max_length": 512, "max_prompt_length": 256, **sections.pop("data", {})}
    task = {"name": "glue", "subset": "sst2", "max_length": 32}
    return recipe(task=task, data=data, teacher={"model": "classifier"}, **sections)


def shown(diagnosis: Diagnosis, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(screen(diagnosis))
    return console.file.getvalue()  # type: ignore[attr-defined]
