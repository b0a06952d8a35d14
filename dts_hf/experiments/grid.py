"""The runs of a sweep: every combination of the values that are varied, times the seeds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dts_hf.errors import UserError
from dts_hf.recipe.yaml_files import parse_yaml

MOST_RUNS = 10_000
#: What a sweep gives each run itself, and what to say in their place.
OWN = {"training.seed": "seeds", "output.dir": "--output", "sweep": "set, zip and seeds"}


@dataclass(frozen=True)
class Grid:
    """What is varied together; a sweep may be several of them.

    Attributes:
        product: values by dotted key, each with each.
        together: values by dotted key of which the first go together, then the second, and so on.
    """

    product: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    together: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def of_grids(grids: Sequence[Grid], seeds: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """``(number of the grid, values by dotted key, seed)`` of every run of several grids, seeds outermost.

    Args:
        grids: one after the other.
        seeds: of training.

    Raises:
        UserError: see ``combinations``, or all together are too many.
    """
    rows = [(number, values) for number, grid in enumerate(grids) for values, _ in combinations(
        grid.product, grid.together, seeds[:1]
    )]  # fmt: skip
    if (total := len(rows) * len(seeds)) > MOST_RUNS:
        raise UserError(f"sweep: {total:,} runs, expected at most {MOST_RUNS:,}")
    for seed in seeds:
        for number, values in rows:
            yield number, values, seed


def combinations(
    product: Mapping[str, Sequence[Any]], together: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> Iterator[tuple[dict[str, Any], int]]:
    """``(values by dotted key, seed)`` of every run, seeds outermost: a sweep that is broken off is balanced.

    Args:
        product: each value with each of the others.
        together: the first values of all keys, then the second ones, and so on.
        seeds: of training.

    Raises:
        UserError: a key has no values, is varied twice or is the sweep's own, or values that go together are not as many.
    """
    if both := [key for key in together if key in product]:
        raise UserError(f"sweep: {both[0]} is in set and in zip, expected it in one of them")
    if own := [key for key in (*product, *together) if key in OWN]:
        raise UserError(
            f"sweep: {own[0]} cannot be in set or zip, every run has its own; expected {OWN[own[0]]} for it"
        )
    counts = {key: len(values) for key, values in together.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"sweep.zip: expected as many values of each key, got {counts}")
    if empty := [key for key, values in {**product, **together, "seeds": seeds}.items() if not len(values)]:
        raise UserError(f"sweep: {empty[0]} has no values")
    rows = [dict(zip(together, values, strict=True)) for values in zip(*together.values(), strict=True)] or [{}]
    grid = [dict(zip(product, values, strict=True)) for values in itertools.product(*product.values())]
    total = len(seeds) * len(rows) * len(grid)
    if total > MOST_RUNS:
        raise UserError(f"sweep: {total:,} runs, expected at most {MOST_RUNS:,}")
    for seed in seeds:
        for row in rows:
            for values in grid:
                yield {**row, **values}, seed


def varied(texts: Sequence[str], option: str) -> dict[str, list[Any]]:
    """``["temperature=1,2", "loss.divergence={name: jsd, beta: 0.1},forward_kl"]`` as keys with their values.

    Args:
        texts: each ``key=value,value``; values as YAML, so a comma inside of brackets, braces or quotes separates nothing.
        option: what the command line calls it.

    Raises:
        UserError: a text of another form, or the same key twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise UserError(f"{option} {text!r}: expected key=value,value, for example temperature=1,2,4")
        if key.strip() in found:
            raise UserError(f"{option}: {key.strip()} is given twice, expected all its values behind one {option}")
        found[key.strip()] = list(parse_yaml(f"[{values}]", f"{option} {text!r}"))
    return found


def overrides_of(values: Mapping[str, Any], seed: int) -> list[str]:
    """The values as overrides of a recipe: JSON is YAML, but for escapes of characters beyond U+FFFF, inf and NaN."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()] + [f"training.seed={seed}"]


def short(value: Any) -> str:
    """A value in a label: a choice by its name and options, another mapping as a recipe has it."""
    if not isinstance(value, Mapping):
        return str(value)
    if "name" not in value:
        return json.dumps(value, ensure_ascii=False).replace('"', "")
    return " ".join([str(value["name"]), *(f"{key}={short(one)}" for key, one in value.items() if key != "name")])


def _yaml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value, ensure_ascii=False)
