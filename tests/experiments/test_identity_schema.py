"""A run's id over the whole schema: every key of a recipe counts, but for those of one list."""

from __future__ import annotations

import random
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from dts_hf.divergences import DIVERGENCES
from dts_hf.errors import UserError
from dts_hf.experiments.identity import OF_EVALUATION, WITHOUT_EFFECT, is_under, run_id
from dts_hf.recipe.editor_schema import editor_schema
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.recipe.training_keys import RESERVED_TRAINING_KEYS, training_fields
from dts_hf.temperature import temperature_policies
from tests.support.recipes import recipe, write_rows
from tests.support.schema_walk import NAME, at, keys, other, put, training_keys

MODEL = {"model": "some/model", "init": None}
CACHED = {"model": "some/a", "kind": "cached", "cache": "states"}
REMOTE = {"model": "some/a", "kind": "remote", "url": "http://one"}
#: What the section of a teacher has beside a key of it, where that is more than a model.
OF_TEACHER: dict[str, dict[str, Any]] = {
    "cache": CACHED, "missing": CACHED, "url": REMOTE, "token_env": REMOTE, "weights": {"kind": "self"},
    "ema_rate": {"kind": "self", "weights": "ema"}, "ema_every": {"kind": "self", "weights": "ema"},
}  # fmt: skip
SEVERAL = {"teacher": None, "student": MODEL, "data.teacher_column": "who"}
TWO = {**SEVERAL, "teachers": {NAME: {"model": "some/a"}, "two": {"model": "some/b"}}}
WEIGHED = {NAME: {"model": "some/a", "weight": 0.5}, "two": {"model": "some/b", "weight": 0.5}}
FALLING = {"data.on_policy": {"schedule": "linear", "end_fraction": 0.9}}
#: What stands beside a key, where it needs more than the recipe of all tests; by the beginning of the key.
BESIDE: dict[str, dict[str, Any]] = {
    "training.num_train_epochs": {"training.max_steps": -1},
    "student.model": {"student": MODEL}, "student.revision": {"student": MODEL}, "student.lora": {"student.lora": {}},
    "student.lora.save": {"student": {**MODEL, "lora": {}}},
    "student.init.calibration_rows": {"student.init.mlp": 8},
    "student.quantize": {"student.quantize": {"scheme": "int4_weight_only"}}, "teacher.alignment": {"student": MODEL},
    "teacher.quantization": {"student": MODEL},
    "teachers.one.weight": {**SEVERAL, "data.teacher_column": None, "teachers": WEIGHED},
    "loss.temperature_per_teacher": TWO, "data.default_teacher": TWO, "data.teacher_column": TWO,
    "data.train.": {"data.train": {"source": "train.jsonl"}},
    "data.validation.": {"data.validation": {"source": "valid.jsonl"}},
    "data.packing.": {"data.packing": {"tokens": 400}}, "data.on_policy": {"data.on_policy": {}},
    "data.on_policy.end_fraction": FALLING, "data.on_policy.schedule": FALLING,
    "data.on_policy.vllm": {"data.on_policy": {"backend": "vllm", "vllm_url": "http://one", "vllm_folder": "weights"}},
    "data.on_policy.adaptive": {"data.on_policy": {"adaptive": {}}, "training.eval_strategy": "epoch"},
    "evaluation.harness": {"evaluation.harness": {"tasks": ["one"]}},
    "task": {"task": {"name": "glue", "subset": "mnli"}, "evaluation": {}},
}  # fmt: skip
#: Values that are right, where the schema alone leads to none.
VALUES: dict[str, Any] = {
    "student.init.from": "some/model",
    "student.init.parameters": 60_000, "teacher.token_env": "A_TOKEN", "teachers.one.token_env": "A_TOKEN",
    "data.default_teacher": "two", "data.columns": {"instruction": "ask"}, "data.train.columns": {"instruction": "ask"},
    "data.validation.columns": {"instruction": "ask"}, "temperature.name": "cosine", "loss.divergence.name": "jsd",
    "sweep.set": {"temperature": [1, 2]}, "sweep.zip": {"temperature": [1, 2]}, "data.on_policy.schedule": "cosine",
    "data.on_policy.vllm_token_env": "A_TOKEN", "training.accelerator_config": {"split_batches": True},
    "training.report_to": "all",  # a tracker by name has to be installed
    "training.debug": "underflow_overflow", "training.liger_kernel_config": {"rope": False},
}  # fmt: skip
#: Keys that no other value can be given by itself.
NO_OTHER = (
    "task.name", "data.validation.weight", "teacher.kind", "teachers.one.kind", "teachers.one.weight",
    # Of a student that teaches itself alone, and of one teacher alone
    "teachers.one.weights", "teachers.one.ema_rate", "teachers.one.ema_every", "teachers.one.alignment",
    "teachers.one.vocab_alignment",
    # Of another machine, or no value of a file
    "training.ddp_backend", "training.tf32", "training.fsdp", "training.deepspeed", "training.parallelism_config",
    "training.dataloader_prefetch_factor",
)  # fmt: skip

#: The same of the options of policies and divergences; of a name alone for all of its options.
OPTIONS_BESIDE: dict[str, dict[str, Any]] = {
    "replay": {"run": "x"}, "dts.support_max": {"range": "auto"}, "dts.support_min": {"range": "auto"},
    "dts.seed": {"gap_source": {"replay": "x", "order": "permuted"}},
}  # fmt: skip
OPTIONS: dict[str, Any] = {"ctkd.betas": [0.5, 0.9], "dts.support_max": 60.0, "dts.support_min": 5.0}
#: Keys of ``training:`` for which we have another default, so that transformers' own is another run.
OURS = ("remove_unused_columns", "train_sampling_strategy")


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 0, 6)
    write_rows(tmp_path / "valid.jsonl", 6, 3)
    return tmp_path


def base_of(key: str) -> dict[str, Any]:
    """The recipe of all tests, with what ``key`` needs beside it."""
    values = recipe().model_dump(mode="json", exclude_defaults=True)
    beside = BESIDE.get(max((begin for begin in BESIDE if key.startswith(begin)), key=len, default=""), {})
    section, _, last = key.rpartition(".")
    if last in OF_TEACHER and section == "teacher":
        beside = {"teacher": OF_TEACHER[last], "student": MODEL}
    elif section == f"teachers.{NAME}" and not beside:
        own = OF_TEACHER.get(last, {"model": "some/a"})
        beside = put(TWO, f"teachers.{NAME}", own) if own.get("kind") != "self" else TWO
    for place, value in beside.items():
        values = put(values, place, value)
    return values


def changes(key: str, node: dict[str, Any], now: Any = None) -> bool | None:
    """Whether another value of ``key`` changes the id; None: no value of the schema is right there."""
    base = base_of(key)
    before = Recipe.from_dict(base)
    now = at(before.model_dump(mode="json"), key) if now is None else now
    for value in [VALUES[key]] if key in VALUES else other(node, now):
        try:
            return run_id(Recipe.from_dict(put(base, key, value))) != run_id(before)
        except (UserError, ImportError):
            continue
    return None


def all_changes() -> dict[str, bool | None]:
    defaults = training_arguments(recipe(), ".")
    found = {key: changes(key, node) for key, node in keys().items()}
    for key, node in training_keys().items():
        now = getattr(defaults, key)
        found[f"training.{key}"] = changes(f"training.{key}", node, getattr(now, "value", now))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_key_counts_but_those_of_the_list() -> None:
    found = all_changes()
    silent = {key for key in found if is_under(key, (*WITHOUT_EFFECT, *OF_EVALUATION))}
    assert len(found) > 220 and {key for key, counts in found.items() if counts is None} == {*NO_OTHER}
    assert {key for key, counts in found.items() if counts is False} == silent - {*NO_OTHER}
    # The list has no key that there is none of, or it would hide one that is called so one day
    listed = {key for key in (*WITHOUT_EFFECT, *OF_EVALUATION) if key.rpartition(".")[2] not in RESERVED_TRAINING_KEYS}
    assert not {key for key in listed if not any(is_under(one, (key,)) for one in found)}


@pytest.mark.parametrize(
    ("place", "kinds"),
    [("temperature", temperature_policies()), ("loss.divergence", DIVERGENCES)],
    ids=["policies", "divergences"],
)
def test_every_option_of_a_choice_counts(place: str, kinds: dict[str, Any]) -> None:
    """By the ranges of the schema for editors."""
    known, found = editor_schema()["$defs"], {}
    for name in kinds:
        options = known[f"{place.rpartition('.')[2]}.{name}"]["properties"]
        for option, node in options.items():
            if option != "name":
                found[f"{name}.{option}"] = option_counts(place, name, option, node)
    assert found and {key for key, counts in found.items() if not counts} == set()


def option_counts(place: str, name: str, option: str, node: dict[str, Any]) -> bool | None:
    """As ``changes``, of an option beside a name."""
    key = f"{name}.{option}"
    base = put(
        recipe().model_dump(mode="json", exclude_defaults=True),
        place,
        {"name": name, **OPTIONS_BESIDE.get(key, OPTIONS_BESIDE.get(name, {}))},
    )
    before = run_id(Recipe.from_dict(base))
    for value in [OPTIONS[key]] if key in OPTIONS else other(node, node.get("default")):
        try:
            return run_id(Recipe.from_dict(put(base, f"{place}.{option}", value))) != before
        except UserError:
            continue
    return None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"teacher": {"model": "some/a"}, "student": MODEL}, {"teacher": CACHED, "student": MODEL}),
        (
            {"teachers": WEIGHED},
            {"teachers": {name: {**WEIGHED[name], "weight": 0.25 + 0.5 * (name == NAME)} for name in WEIGHED}},
        ),
    ],
    ids=["kind", "weights"],
)
def test_keys_that_change_together_count(first: dict[str, Any], second: dict[str, Any]) -> None:
    ids = []
    for values in (first, second):
        base = base_of("teachers.one.weight" if "teachers" in values else "")
        for key, value in values.items():
            base = put(base, key, value)
        ids.append(run_id(Recipe.from_dict(base)))
    assert ids[0] != ids[1]


def test_no_default_counts_that_is_written_out() -> None:
    """Neither those of the schema nor those of ``training:``, all at once and one by one."""
    base = recipe().model_dump(mode="json", exclude_defaults=True)
    whole = recipe().model_dump(mode="json")
    first, defaults = run_id(recipe()), {}
    for key, field in training_fields().items():
        value = field.default
        if f"training.{key}" in NO_OTHER or key in base["training"] or key in RESERVED_TRAINING_KEYS:
            continue
        if isinstance(value, (bool, int, float, str)):
            defaults[key] = value.value if isinstance(value, Enum) else value
    found = [
        key
        for key, value in defaults.items()
        if run_id(Recipe.from_dict(put(base, f"training.{key}", value))) != first
    ]
    assert len(defaults) > 60 and sorted(found) == [*OURS]
    assert run_id(Recipe.from_dict(whole)) == first


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_does_not_count(seed: int) -> None:
    chance = random.Random(seed)

    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in chance.sample([*value], len(value))}
        return value

    for key in ("data.on_policy.adaptive", "teachers.one.weight", "task", "student.lora"):
        base = base_of(key)
        assert run_id(Recipe.from_dict(shuffled(base))) == run_id(Recipe.from_dict(base)), key
