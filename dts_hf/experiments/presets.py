"""Sweeps by name: the questions that are asked of the temperature again and again, one axis at a time, as data.

The axes of ``revisit-...`` are those of the Unified Revisit (arXiv 2603.02430), whose grid points are not known: those here
are ours. Each axis is crossed with the temperatures and with nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from dts_hf.errors import UserError, nearest
from dts_hf.experiments.grid import Grid, short
from dts_hf.experiments.identity import is_under
from dts_hf.recipe.schema import Recipe

SEEDS = (1, 2, 3)  # of a preset, where nobody gives any
Kind: TypeAlias = Literal["language models", "classifiers"]
#: Keys that count optimizer steps, of which there are fewer in larger batches; -1, and a share below 1, are no counts.
STEPS = ("training.max_steps", "training.warmup_steps")


class Times(NamedTuple):
    """A value that is the recipe's own, multiplied."""

    factor: float


class Of(NamedTuple):
    """Values that depend on the kind of model."""

    language_models: Sequence[Any]
    classifiers: Sequence[Any]


@dataclass(frozen=True)
class Axis:
    """What else is varied, with every value of the preset's own grid.

    Attributes:
        about: what it is, for people.
        together: the alternatives; in each, the first values of all keys go together, then the second, and so on.
        needs: the keys of which ``--set`` has to give the values: other models. Without one of them the axis is left out.
        example: how that may look.
    """

    about: str
    together: tuple[Mapping[str, Sequence[Any] | Of], ...] = ()
    needs: tuple[str, ...] = ()
    example: str = ""


@dataclass(frozen=True)
class Preset:
    """A sweep by name.

    Attributes:
        about: the question that it asks.
        product: values by dotted key, each with each.
        axes: by name.
        of: the kind of model that it is for; None: either.
    """

    about: str
    product: Mapping[str, Sequence[Any] | Of]
    axes: Mapping[str, Axis]
    of: Kind | None = None


TEMPERATURES = Of((0.5, 0.7, 1, 1.4, 2, 2.8, 4), (1, 2, 4, 8, 16, 40))


def _policies(low: float, high: float) -> list[Any]:
    """Policies whose temperatures all lie in one range, ``constant`` in its middle."""
    middle, ratio = (low + high) / 2, high / low
    return [
        {"name": "constant", "value": middle},
        {"name": "cosine", "t_init": high, "t_min": low},
        {"name": "dts", "rule": "gap", "t_init": high, "t_min": low, "t_max": high},
        {"name": "dtkd", "tau": middle, "clamp": ratio},  # the hotter one is at most 2 tau clamp / (1 + clamp) = high
        {"name": "adakd", "t_base": round(math.sqrt(low * high), 4), "c": round(math.log(ratio) / 2, 4)},
    ]


_BATCH = {
    "training.gradient_accumulation_steps": (Times(1), Times(2), Times(4)),
    "training.learning_rate": (Times(1), Times(math.sqrt(2)), Times(2)),  # AdamW: by the square root
    **dict.fromkeys(STEPS, (Times(1), Times(1 / 2), Times(1 / 4))),
}
_AXES = {
    "optimizer": Axis(
        "AdamW against SGD with momentum, three learning rates each",
        (
            {"training.learning_rate": (Times(1 / 3), Times(1), Times(3))},
            {
                "training.optim": ("sgd",) * 3,
                "training.optim_args": ("momentum=0.9",) * 3,
                "training.learning_rate": Of((0.03, 0.1, 0.3), (0.003, 0.01, 0.03)),
            },
        ),
    ),
    "epochs": Axis("1, 3 and 10 epochs on the same rows", ({"training.num_train_epochs": (1, 3, 10)},)),
    "batch": Axis("1, 2 and 4 times the batch at equal tokens, the learning rate by the square root", (_BATCH,)),
    "loss": Axis("divergences", ({"loss.divergence": ("forward_kl", "reverse_kl", "jsd", "skew_kl")},)),
    "teacher": Axis(
        "the teacher's origin: base, instructed, fine-tuned for 1 and for 10 epochs",
        needs=("teacher.model",),
        example="--set teacher.model=BASE,INSTRUCT,SFT_1,SFT_10",
    ),
    "student": Axis(
        "the student's start: random, pretrained, pruned, pretrained and fine-tuned",
        needs=("student", "student.model", "student.init", "student.init.from"),
        example="--set 'student={init: {from: config, layers: 12}, model: null},"
        "{init: {from: teacher, layers: 12}, model: null},{model: SMALL, init: null},{model: SMALL_SFT, init: null}'",
    ),
}
#: The same names as ``PresetName`` of the schema, which cannot import from here.
PRESETS: dict[str, Preset] = {
    "temperature": Preset("Does a constant temperature matter, and which?", {"temperature": TEMPERATURES}, {}),
    "fkl-rkl-temperature": Preset(
        "Does the best temperature depend on the direction of the KL?",
        {"loss.divergence": ("forward_kl", "reverse_kl"), "temperature": (0.5, 1, 2, 4)},
        {},
    ),
    "policies": Preset(
        "Does a moving temperature beat a constant one of the same range?",
        {"temperature": Of(_policies(1.0, 2.0), _policies(1.0, 4.0))},
        {},
    ),
    "revisit-classification": Preset(
        "When does the best temperature of classifiers change?", {"temperature": TEMPERATURES}, _AXES, "classifiers"
    ),
    "revisit-lm": Preset(
        "When does the best temperature of language models change?",
        {"temperature": TEMPERATURES},
        _AXES,
        "language models",
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--preset: got {name!r}, expected one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]


def grids_of(name: str, recipe: Recipe, given: Mapping[str, Sequence[Any]], together: Mapping[str, Any]) -> list[Grid]:
    """What a preset comes to for a recipe: its own grid, then one for each alternative of each axis.

    Args:
        name: of the preset.
        recipe: whose values are multiplied, and whose kind of model counts.
        given: values by dotted key that were asked for beside it: those that an axis needs are that axis, the others are
            crossed with all.
        together: values that go together, crossed with all.

    Raises:
        UserError: there is no such preset, or ``recipe`` is not for it.
    """
    preset, kind = find_preset(name), _kind_of(recipe)
    if preset.of not in (None, kind):
        raise UserError(f"preset {name}: is for {preset.of}, but the recipe is of {kind}")
    own = {key: _of_kind(values, kind) for key, values in preset.product.items()}
    needed = {key for axis in preset.axes.values() for key in axis.needs}
    crossed = {key: values for key, values in given.items() if key not in needed}
    _refuse_twice(name, own, (*crossed, *together))
    product = {**own, **crossed}
    grids = [Grid(product, together)]
    for title, axis in preset.axes.items():
        for values in axis.together:
            for row in _rows(f"preset {name}: {title}", recipe, values, kind):
                _refuse_twice(name, row, (*crossed, *together))
                grids.append(Grid({**{key: [value] for key, value in row.items()}, **product}, together))
        if chosen := {key: values for key, values in given.items() if key in axis.needs}:
            grids.append(Grid({**chosen, **product}, together))
    return grids


def left_out(name: str, given: Mapping[str, Any]) -> dict[str, Axis]:
    """The axes of a preset that need other models, which nobody has given."""
    axes = find_preset(name).axes.items()
    return {title: axis for title, axis in axes if axis.needs and not {*axis.needs} & {*given}}


def rows_of_list() -> list[dict[str, str]]:
    """Every preset, then every axis, for a table."""
    rows = []
    for name, preset in PRESETS.items():
        rows.append({"preset": name, "of": "", "varies": preset.about, "needs": ""})
        for key, values in preset.product.items():
            kinds = get_args(Kind) if isinstance(values, Of) and preset.of is None else (preset.of or "",)
            for kind in kinds:
                varied = f"{key}: {', '.join(map(short, _of_kind(values, kind)))}"
                rows.append({"preset": "", "of": kind, "varies": varied, "needs": ""})
        if preset.axes:
            rows.append({"preset": "", "of": "", "varies": f"and one axis of {', '.join(preset.axes)}", "needs": ""})
    for title, axis in _AXES.items():
        rows.append({"preset": f"axis {title}", "of": "", "varies": axis.about, "needs": axis.example})
    return rows


def _kind_of(recipe: Recipe) -> Kind:
    return "language models" if recipe.task is None else "classifiers"


def _of_kind(values: Sequence[Any] | Of, kind: str) -> Sequence[Any]:
    if not isinstance(values, Of):
        return values
    return values.classifiers if kind == "classifiers" else values.language_models


def _refuse_twice(name: str, own: Mapping[str, Any], given: Iterable[str]) -> None:
    if both := [key for key in given if any(is_under(key, (one,)) or is_under(one, (key,)) for one in own)]:
        raise UserError(
            f"preset {name}: varies {both[0]} itself; leave it out of --set and --zip, or give all values without a preset"
        )


def _rows(
    where: str, recipe: Recipe, values: Mapping[str, Sequence[Any] | Of], kind: Kind
) -> Iterator[dict[str, Any]]:
    """The values that go together as values of ``recipe``, a mapping for each.

    Raises:
        UserError: the recipe cannot be varied so.
    """
    training = _with_defaults(recipe.training)
    if not str(training["optim"]).startswith("adamw"):
        raise UserError(f"{where}: training.optim is {training['optim']}, expected adamw_torch: the preset varies it")
    plain = {key: _of_kind(one, kind) for key, one in values.items()}
    for row in zip(*plain.values(), strict=True):
        found = {}
        for key, value in zip(plain, row, strict=True):
            if isinstance(value, Times):
                before = training[key.removeprefix("training.")]
                if key not in STEPS or before >= 1:
                    found[key] = _times(f"{where}: {key}", before, value.factor)
            else:
                found[key] = value
        if "training.num_train_epochs" in found and training["max_steps"] > 0:
            found["training.max_steps"] = -1  # or it would end every one of them
        yield found


def _times(key: str, before: float, factor: float) -> float:
    product = before * factor
    if factor == 1:
        return before
    if not isinstance(before, int):
        return float(f"{product:.4g}")
    if product != int(product):
        raise UserError(f"{key} is {before}, expected a multiple of {round(1 / factor)}: batches grow at equal tokens")
    return int(product)


def _with_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    from dts_hf.recipe.training_keys import training_fields

    known = {name: field.default for name, field in training_fields().items()}
    return {**known, **{key: value for key, value in training.items() if value is not None}}
