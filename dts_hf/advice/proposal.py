"""The sweep that the advice comes to: four arms at most, labels alone and a constant forward KL always among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts_hf.advice.measured import Measured
from dts_hf.advice.rules import Judged
from dts_hf.errors import UserError
from dts_hf.files import check_new_file, write_text_atomic
from dts_hf.recipe.schema import Recipe, Sweep
from dts_hf.temperature import build_temperature
from dts_hf.temperature.constant import Constant

MOST_ARMS, SEEDS = 4, (1, 2, 3)
FORWARD: Mapping[str, Any] = {"name": "forward_kl"}
#: Of a student with random weights, and where the recipe leaves the teacher out.
LARGE_RATIO, RATIO = 0.9, 0.5
#: A ratio that makes both parts equal is given no closer to an end than this.
ENDS = 0.05
#: What the ends of a range are called in the policies that have one.
ENDS_OF_RANGE = ("t_init", "t_max", "t_end")


@dataclass(frozen=True)
class Arm:
    """What is trained with every seed.

    Attributes:
        label: for people.
        temperature: section of a recipe; a number: a constant.
        divergence: section of a recipe.
        kd_ratio: 0: labels alone.
    """

    label: str
    temperature: Mapping[str, Any] | float
    divergence: Mapping[str, Any]
    kd_ratio: float

    @property
    def values(self) -> dict[str, Any]:
        """By dotted key of the recipe."""
        temperature = dict(self.temperature) if isinstance(self.temperature, Mapping) else self.temperature
        return {"temperature": temperature, "loss.divergence": dict(self.divergence), "loss.kd_ratio": self.kd_ratio}


def arms(recipe: Recipe, found: Measured, judged: Sequence[Judged]) -> list[Arm]:
    """The arms, the more important first.

    Args:
        recipe: that is to be varied.
        found: what was measured.
        judged: the rules.
    """
    fired = {one.rule.id for one in judged if one.fires}
    wanted: list[Arm] = []
    for arm in _candidates(recipe, found, fired):
        if all(arm.values != other.values for other in wanted):
            wanted.append(arm)
    return wanted[:MOST_ARMS]


def _candidates(recipe: Recipe, found: Measured, fired: set[str]) -> Iterator[Arm]:
    kd_ratio = recipe.loss.kd_ratio or RATIO
    first, *others = temperatures(found, fired)
    yield Arm("labels alone", 1.0, FORWARD, 0.0)
    yield Arm(f"forward KL, constant T = {first:g}", first, FORWARD, kd_ratio)
    own = recipe.loss.divergence.model_dump()
    if own["name"] != FORWARD["name"]:
        t = 0.8 if "reverse-kl-values" in fired else first
        yield Arm(f"{own['name']}, constant T = {t:g}", t, own, kd_ratio)
    given = build_temperature(recipe.temperature.name, **recipe.temperature.options)
    if isinstance(given, Constant):
        if given.teacher_value not in (None, given.value):  # one T of both, as in the arms before, is another question
            label = f"{own['name']}, constant T = {given.value:g} (student), {given.teacher_value:g} (teacher)"
            yield Arm(label, recipe.temperature.model_dump(), own, kd_ratio)
    elif "fixed-is-enough" not in fired:
        policy = _capped(recipe, found, fired)
        yield Arm(f"{own['name']}, policy {recipe.temperature.name}", policy, own, kd_ratio)
    if "gradient-share" in fired:
        equal = found.at_hottest("equal_ratio").value
        ratio = float(f"{min(max(equal, ENDS), 1 - ENDS):.2g}")
        yield Arm(f"forward KL, constant T = {first:g}, kd_ratio {ratio:g}", first, FORWARD, ratio)
    elif "revisit-f6-random-student" in fired:
        ratio = max(kd_ratio, LARGE_RATIO)
        yield Arm(f"forward KL, constant T = {first:g}, kd_ratio {ratio:g}", first, FORWARD, ratio)
    for t in others:
        yield Arm(f"forward KL, constant T = {t:g}", t, FORWARD, kd_ratio)


def temperatures(found: Measured, fired: set[str]) -> list[float]:
    """Temperatures worth a run with forward KL, the first one first; below the ceiling where that was measured.

    Args:
        found: what was measured.
        fired: ids of the rules that did.
    """
    situation = found.situation
    values: Sequence[float] = (1.0, 2.0, 4.0) if situation.classifier else (1.0, 2.0, 1.4)
    if "flat-teacher" in fired:
        values = (1.0, 0.5, 0.7)
    elif "sharp-teacher" in fired:
        curve = found.curves["held_out_teacher_ce"]
        base = situation.grid[min(range(len(curve)), key=lambda place: curve[place].value)]
        values = (base, 2 * base, 1.0)
    elif "over-fitted-teacher" in fired:
        values = (1.0, _two_digits(found.values["matching_t"].value), 2.0)
    elif "revisit-f3-large-temperature" in fired:
        values = (1.0, 4.0, 16.0)
    elif "revisit-f4-fine-labels" in fired:
        values = (1.0, 4.0, 8.0)
    elif "revisit-f4-coarse-labels" in fired:
        values = (1.0, 2.0, 1.4)
    elif "revisit-f2-sgd" in fired:
        values = (1.0, 2.8, 0.5)
    if not situation.classifier:
        ceiling = max(found.values["ceiling"].value, 1.0)  # 1 is what the student is used at
        values = [t for t in values if t <= ceiling]
    return list(dict.fromkeys(values))


def write_sweep(path: Path, recipe: Recipe, wanted: Sequence[Arm], source: str) -> None:
    """Write the recipe with a section ``sweep`` of the arms, which ``dts-hf sweep`` reads.

    Args:
        path: of the new file.
        recipe: that is varied.
        wanted: the arms.
        source: what the recipe was read from.

    Raises:
        UserError: an arm is refused by the recipe, which is named.
    """
    for arm in wanted:
        values = recipe.model_dump(mode="json") | {"temperature": arm.values["temperature"], "sweep": None}
        values["loss"] |= {"divergence": dict(arm.divergence), "kd_ratio": arm.kd_ratio}
        Recipe.from_dict(values, f"--write: the arm '{arm.label}'")
    together = {key: [arm.values[key] for arm in wanted] for key in wanted[0].values}
    if all(value == recipe.loss.divergence.model_dump() for value in together["loss.divergence"]):
        del together["loss.divergence"]  # it would only make the names of the runs long
    text = recipe.model_copy(update={"sweep": Sweep(zip=together, seeds=list(SEEDS))}).to_yaml()
    listed = "".join(f"#   {number}. {arm.label}\n" for number, arm in enumerate(wanted, 1))
    head = (
        f"# {source}, varied as dts-hf advise has it: {len(wanted)} arms with {len(SEEDS)} seeds each\n{listed}"
        f"# Paths in it are meant from the folder where it was written: dts-hf sweep {path} --dry-run\n"
    )
    write_text_atomic(path, head + text)


def check_writable(path: Path) -> None:
    """Refuse, before anything is measured, a file for the sweep that could not be written or that is there.

    Raises:
        UserError: names what is in the way.
    """
    check_new_file(path, "--write")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--write: got {path}, expected a name that ends in .yaml")


def _capped(recipe: Recipe, found: Measured, fired: set[str]) -> dict[str, Any]:
    """The recipe's policy with the ends of its range at the ceiling, where the rule said so and they can be there."""
    own = recipe.temperature.model_dump()
    if "support-ceiling" not in fired:
        return own
    top = _two_digits(math.floor(found.values["ceiling"].value * 10) / 10)
    options = build_temperature(recipe.temperature.name, **recipe.temperature.options).describe()
    higher = {
        name: top for name in ENDS_OF_RANGE if isinstance(options.get(name), int | float) and options[name] > top
    }
    try:
        highest = build_temperature(recipe.temperature.name, **(recipe.temperature.options | higher)).highest
    except UserError:
        return own
    return own if highest is None or highest > top else own | higher


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
