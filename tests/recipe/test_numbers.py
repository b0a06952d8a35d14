"""Numbers of ``training:`` that nobody means: every key has a range, and no NaN or infinity gets through anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_keys import (
    MAY_BE_INFINITE,
    RESERVED_TRAINING_KEYS,
    TRAINING_RANGES,
    key_schema,
    training_fields,
)
from dts_hf.training.arguments import checked_arguments

VALUES: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 1}},
    "teacher": {"model": "some/teacher"},
    "data": {"train": "rows.jsonl"},
    "output": {"dir": "runs/x"},
}


def number_keys(*kinds: str) -> list[str]:
    """Keys of ``training:`` that take a number."""
    found = []
    for key in training_fields():
        node = key_schema(key) if key not in RESERVED_TRAINING_KEYS else {}
        if {branch.get("type") for branch in (node, *node.get("anyOf", ()))} & {*kinds}:
            found.append(key)
    return found


NUMBERS, FLOATS = number_keys("number", "integer"), number_keys("number")


def refusals(training: dict[str, Any]) -> dict[str, str]:
    """The problems of ``training:`` by key."""
    try:
        Recipe.from_dict({**VALUES, "training": training})
    except UserError as error:
        lines = [line.partition(": training.")[2] for line in str(error).splitlines()]
        return {key: text for key, _, text in (line.partition(": ") for line in lines)}
    return {}


def test_every_number_has_a_range() -> None:
    """Also those that the next release of transformers brings."""
    assert len(NUMBERS) > 25 and {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"} <= {*FLOATS}
    assert {*NUMBERS} == {*TRAINING_RANGES}
    open_above = [key for key, limits in TRAINING_RANGES.items() if math.isinf(limits.high) or math.isinf(limits.low)]
    assert open_above == ["max_grad_norm"] == [*MAY_BE_INFINITE]


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, 1e308, 10**400, -(10**400), -2, -0.5])
def test_absurd_numbers_are_refused_by_name(value: float) -> None:
    asked = {key: value for key in NUMBERS if not (key == "max_grad_norm" and value in (math.inf, 1e308, 10**400))}
    found = refusals(asked)
    assert found.keys() == asked.keys()
    for key, text in found.items():
        assert text.startswith("got ") and "expected a" in text and len(text) < 200, (key, text)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("learning_rate", math.inf, "expected a number between 0 and 1,000. It must be finite."),
        ("adam_beta1", 1.5, "got 1.5, expected a number of at least 0 and below 1"),
        ("adam_beta2", 1.0, "below 1"),
        ("dataloader_num_workers", 100_000, "expected a whole number between 0 and 512"),
        ("warmup_steps", math.inf, "of at least 0"),
        ("num_train_epochs", 0, "expected a number above 0"),
        ("lr_scheduler_kwargs", {"a": {"min_lr_rate": math.nan}}, "got NaN in lr_scheduler_kwargs.a.min_lr_rate"),
        ("lr_scheduler_kwargs", '{"min_lr": NaN}', 'got "NaN" in lr_scheduler_kwargs.min_lr'),
        ("optim_args", "rank=4, scale=-inf", 'got "-inf" in optim_args.scale'),
        ("deepspeed", {"optimizer": {"params": {"betas": [0.9, math.inf]}}}, "deepspeed.optimizer.params.betas.1"),
        ("fsdp_config", {"x": [-math.inf]}, "got -Infinity in fsdp_config.x.0"),
    ],
)
def test_what_is_said(key: str, value: Any, words: str) -> None:
    found = refusals({key: value})
    assert list(found) == [key] and words in found[key], found


def test_bold_numbers_are_taken() -> None:
    bold = {
        "learning_rate": 10, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0.9999999, "max_grad_norm": math.inf,
        "adam_epsilon": 1e-30, "warmup_steps": 0.1, "num_train_epochs": 0.01, "dataloader_num_workers": 64,
        "max_steps": 10**9, "per_device_train_batch_size": 10**6, "eval_delay": 0.5, "seed": 2**32 - 1, "save_steps": 0.1,
        "optim_args": "rank=64, update_proj_gap=100, scale=0.10, name=information", "lr_scheduler_kwargs": {"num_cycles": 3},
        "deepspeed": {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}, "ddp_timeout": 10**6, "local_rank": -1,
    }  # fmt: skip
    assert refusals(bold) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": math.nan}, r"args.learning_rate: got NaN, expected a number between 0 and 1,000"),
        ({"adam_beta2": 1.5}, r"args.adam_beta2: got 1.5, expected a number of at least 0 and below 1"),
        ({"weight_decay": math.inf}, r"args.weight_decay: got Infinity"),
        ({"dataloader_num_workers": 100_000}, r"args.dataloader_num_workers: got 100000"),
        ({"max_grad_norm": math.nan}, r"args.max_grad_norm: got NaN"),
    ],
)
def test_the_trainer_refuses_them_too(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **change)
    with pytest.raises(UserError, match=words):
        checked_arguments(args, {})


def test_the_trainer_takes_what_transformers_means_by_them(tmp_path: Path) -> None:
    zeros = {
        "save_total_limit": 0,
        "num_train_epochs": 0,
        "max_grad_norm": math.inf,
        "warmup_steps": 0,
        "max_steps": 0,
    }
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **zeros)
    assert checked_arguments(args, {}).max_grad_norm == math.inf
