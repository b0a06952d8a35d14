"""``advise(path)``: measure a sample, judge the rules on it, and name the arms of a sweep."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dts_hf.advice.guidance import advise_on
from dts_hf.advice.measured import Measured
from dts_hf.advice.proposal import Arm, arms
from dts_hf.advice.rules import Judged, Verdict
from dts_hf.advice.sample import check_advisable, look
from dts_hf.errors import UserError
from dts_hf.files import jsonable
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe

FORMAT = 1


@dataclass(frozen=True)
class Advice:
    """Everything that one call found.

    Attributes:
        name: of the recipe file.
        recipe: as it was checked, overrides included.
        found: what was measured.
        judged: every rule.
        arms: of the sweep.
        seed: that drew the rows.
        seconds: how long it took.
    """

    name: str
    recipe: Recipe
    found: Measured
    judged: list[Judged]
    arms: list[Arm]
    seed: int
    seconds: float

    def with_verdict(self, verdict: Verdict) -> list[Judged]:
        """The rules of which that became."""
        return [one for one in self.judged if one.verdict is verdict]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        estimates = {name: dataclasses.asdict(one) for name, one in self.found.values.items()}
        curves = {name: [dataclasses.asdict(one) for one in curve] for name, curve in self.found.curves.items()}
        whole = {
            "format": FORMAT, "recipe": self.name, "seed": self.seed, "seconds": round(self.seconds, 1),
            "situation": dataclasses.asdict(self.found.situation), "notes": list(self.found.notes),
            "values": estimates, "curves": curves, "rules": [rule_as_dict(one) for one in self.judged],
            "arms": [{"label": arm.label, **arm.values} for arm in self.arms],
        }  # fmt: skip
        return cast("dict[str, Any]", jsonable(whole))


def rule_as_dict(judged: Judged) -> dict[str, Any]:
    """A rule and what became of it, for JSON."""
    rule = judged.rule
    return {
        "id": rule.id, "verdict": judged.verdict.value, "measured": judged.measured, "advice": judged.advice,
        "condition": rule.condition, "source": rule.source, "domain": rule.domain, "strength": rule.strength,
    }  # fmt: skip


def advise(path: str | Path, overrides: Sequence[str] = (), *, rows: int | None = None, seed: int = 0) -> Advice:
    """Look at a sample of a recipe's rows with its teacher and its untrained student. Nothing is written.

    Args:
        path: recipe file, or the name of a shipped one.
        overrides: as for ``load_recipe``.
        rows: of each of both samples; None: see ``sample.look``.
        seed: draws the rows.

    Raises:
        UserError: the recipe is wrong, or there is nothing to advise on; or started as one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("dts-hf advise is one process: start it without accelerate or torchrun")
    began = time.monotonic()
    recipe = load_recipe(path, overrides)
    check_advisable(recipe)
    with tempfile.TemporaryDirectory(prefix="dts_hf-advise-") as folder:
        found = look(recipe, Path(folder), rows, seed)
    judged = advise_on(found)
    return Advice(str(path), recipe, found, judged, arms(recipe, found, judged), seed, time.monotonic() - began)
