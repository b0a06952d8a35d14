"""Tiny classifiers, and rows whose label can be read off the text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from dts_hf.classification.glue_tasks import TASKS, GlueTask
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama

SST2, MNLI, STSB = TASKS["sst2"], TASKS["mnli"], TASKS["stsb"]
WORDS = ("apples", "pears", "a boat on the lake", "two horses", "legs", "plums grow")


def classifier(kind: str = "llama", task: GlueTask = SST2, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A tiny random classifier in fp32 and eval mode."""
    names = task.labels or ("LABEL_0",)
    if kind == "bert":
        config: Any = BertConfig(
            vocab_size=TINY_VOCAB,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
        )
    else:
        config = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind](layers=layers).config
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.pad_token_id = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model


def rows_of(task: GlueTask, count: int) -> list[dict[str, Any]]:
    """Rows of all lengths whose label can be read off the text."""
    rows = []
    for i in range(count):
        label: float = i % task.outputs if task.labels else (i % 11) / 2
        text = f"{WORDS[int(label) % 6]} {WORDS[i % 6] * (i % 4 + 1)} {i}"
        rows.append({**{name: f"{text} {name}" for name in task.fields}, "label": label, "idx": i})
    return rows
