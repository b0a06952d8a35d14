"""What is wrong with the parts of a recipe that other modules define: the policy, the divergence, the training keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from dts_hf.errors import UserError, nearest
from dts_hf.recipe.problems import Schema, all_keys, wrong_value
from dts_hf.recipe.training_keys import (
    MAY_BE_INFINITE,
    MAY_HOLD_NUMBERS,
    RENAMED_TRAINING_KEYS,
    RESERVED_TRAINING_KEYS,
    TRAINING_RANGES,
    adapter,
    key_schema,
    non_finite,
    training_fields,
)
from dts_hf.recipe.yaml_files import shown
from dts_hf.registry import Between


def deep_problems(values: Mapping[str, Any], schema: Schema) -> dict[str, str]:
    """Problems of the policy, the divergence and the training keys; what is no mapping is left to pydantic."""
    from dts_hf.divergences import build_divergence
    from dts_hf.temperature import build_temperature

    problems: dict[str, str] = {}
    loss = values.get("loss")
    temperature = _choice(values.get("temperature"))
    divergence = _choice(loss.get("divergence")) if isinstance(loss, Mapping) else {}
    if temperature:
        problems |= _refusal("temperature", lambda: build_temperature(**temperature))
    if divergence:
        problems |= _refusal("loss.divergence", lambda: build_divergence(divergence))
    if isinstance(training := values.get("training"), Mapping):
        problems |= _training_problems(training, schema)
    return problems


def _choice(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) and isinstance(value.get("name"), str) else {}


def _refusal(section: str, build: Callable[[], object]) -> dict[str, str]:
    try:
        build()
    except UserError as error:
        key, colon, text = str(error).partition(": ")
        return {key: text} if colon and key.startswith(section) else {section: str(error)}
    return {}


def _training_problems(training: Mapping[str, Any], schema: Schema) -> dict[str, str]:
    known = training_fields()
    problems = {}
    for key, value in training.items():
        if key in RESERVED_TRAINING_KEYS:
            text = RESERVED_TRAINING_KEYS[key]
        elif key in RENAMED_TRAINING_KEYS and key not in known:
            text = f"transformers no longer has this key, use {RENAMED_TRAINING_KEYS[key]}"
        elif key not in known:
            elsewhere = [name for name in all_keys(schema, schema) if name.rpartition(".")[2] == key]
            hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else nearest(key, known)
            text = f"transformers.TrainingArguments has no such key.{hint}"
        else:
            text = _training_value_problem(key, value)
        if text:
            problems[f"training.{key}"] = text
    return problems


def _training_value_problem(key: str, value: Any) -> str:
    node = key_schema(key)
    try:
        adapter(key).validate_python(value)
    except ValidationError:
        return wrong_value(value, node, node)
    if key in MAY_HOLD_NUMBERS:
        return "; ".join(
            f"got {shown(number)} in {key}{inside}, expected a finite number" for inside, number in non_finite(value)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if value == math.inf and key in MAY_BE_INFINITE:
        return ""
    return "" if value in TRAINING_RANGES.get(key, Between()) else wrong_value(value, node, node)
