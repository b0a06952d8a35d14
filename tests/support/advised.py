"""Tiny teachers of strings of random letters, whose true probabilities are known, and recipes to take advice on."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from dts_hf.data.chat_templates import get_template
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import rows_from_dataset
from tests.support.tiny import tiny_llama, tiny_tokenizer

#: No two of them are one token.
LETTERS, WEIGHTS = "xqzjkwvy", (40, 20, 12, 10, 8, 5, 3, 2)
LENGTH, ROWS = 40, 160


def rows_of(seed: int, different: int | None = None) -> list[dict[str, str]]:
    """Rows whose answers are strings of random letters; with ``different`` only so many strings, by the instruction."""
    draw = random.Random(seed)
    strings = ["".join(draw.choices(LETTERS, WEIGHTS, k=LENGTH)) for _ in range(different or ROWS)]
    return [
        {"id": f"row-{seed}-{i}", "instruction": f"Say {i % len(strings)}", "input": "", "output": strings[i % len(strings)]}
        for i in range(ROWS)
    ]  # fmt: skip


def write_rows(path: str, rows: list[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def _trained(different: int | None, steps: int) -> dict[str, torch.Tensor]:
    model, tokenizer = tiny_llama(seed=1), tiny_tokenizer()
    rows = rows_from_dataset(rows_of(1, different))
    data, _ = encode_rows(rows, tokenizer, get_template("chat"), max_length=96, max_prompt_length=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    model.train()
    for step in range(steps):
        batch = PaddedCollator(2)([data[place] for place in draw.sample(range(len(data)), 24)])
        batch.pop("row_id")
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def teacher(scale: float = 1.0, different: int | None = None) -> PreTrainedModel:
    """A teacher that knows the letters' frequencies, or by heart the few strings; its logits are multiplied by ``scale``."""
    model = tiny_llama(seed=1)
    model.load_state_dict(_trained(different, 60 if different is None else 120))
    model.model.norm.weight.data.mul_(scale)
    return model


def workplace(scale: float = 1.0, different: int | None = None, **sections: Any) -> Path:
    """Teacher, rows and recipe in the current folder; the teacher has seen the training rows, or rows like them."""
    teacher(scale, different).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    write_rows("train.jsonl", rows_of(1, different))
    write_rows("valid.jsonl", rows_of(2))
    return recipe(**sections)


def recipe(**sections: Any) -> Path:
    """The recipe as a file, some sections changed."""
    values: dict[str, Any] = {
        "student": {"init": {"from": "teacher", "layers": 1}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "chat", "max_length": 96,
                 "max_prompt_length": 48},
        "temperature": {"name": "constant", "value": 2.0},
        "training": {"use_cpu": True, "max_steps": 20, "per_device_train_batch_size": 16},
        "evaluation": {"max_new_tokens": 8},
        "output": {"dir": "run"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = section if name in ("student", "temperature") else {**values.get(name, {}), **section}
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    return path
