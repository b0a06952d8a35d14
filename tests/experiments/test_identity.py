"""A run's id: changed by what changes the student or its scores, and by nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dts_hf.divergences import DIVERGENCES
from dts_hf.experiments.identity import run_id
from dts_hf.recipe.schema import Recipe
from dts_hf.temperature import temperature_policies
from tests.support.recipes import recipe, write_rows


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 0, 6)
    write_rows(tmp_path / "valid.jsonl", 6, 3)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").write_bytes(b"weights")
    (tmp_path / "teacher/config.json").write_text("{}")
    return tmp_path


def changed(dotted: str, value: Any) -> Recipe:
    values = recipe().model_dump(mode="json", exclude_defaults=True)
    at = values
    *sections, key = dotted.split(".")
    for section in sections:
        at = at.setdefault(section, {})
    at[key] = value
    return Recipe.from_dict(values)


def test_keys_in_another_order_and_defaults_written_out_change_nothing() -> None:
    values = recipe().model_dump(mode="json", exclude_defaults=True)
    turned = json.loads(json.dumps(values), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert (
        run_id(Recipe.from_dict(turned))
        == run_id(recipe())
        == run_id(Recipe.from_dict(recipe().model_dump(mode="json")))
    )
    assert run_id(changed("training.weight_decay", 0.0)) == run_id(recipe())
    assert run_id(changed("training.seed", 42)) == run_id(recipe())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output.dir", "elsewhere"), ("output.report", False), ("training.report_to", "none"),
        ("training.run_name", "mine"), ("training.logging_steps", 1), ("training.save_strategy", "epoch"),
        ("training.eval_strategy", "epoch"), ("evaluation.every_steps", 3), ("evaluation.models", ["student"]),
        ("data.cache_dir", "cache"), ("sweep", {"seeds": [1, 2]}), ("training.dataloader_num_workers", 2),
    ],
)  # fmt: skip
def test_what_is_shown_and_kept_changes_nothing(key: str, value: Any) -> None:
    assert run_id(changed(key, value)) == run_id(recipe())


def test_a_moved_folder_keeps_its_id_and_other_bytes_change_it(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_id(recipe())
    shutil.copytree(rows, rows / "moved", ignore=shutil.ignore_patterns("moved"))
    monkeypatch.chdir(rows / "moved")
    assert run_id(recipe()) == before
    assert run_id(changed("data.train", str(rows / "train.jsonl"))) == before
    for file in ("train.jsonl", "valid.jsonl", "teacher/model.safetensors"):
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[:-2] + b" " + content[-2:])
        assert run_id(recipe()) != before, file
        Path(file).write_bytes(content)
    assert run_id(recipe()) == before


#: Where a key takes a value of another kind, or a section where there was none; every key is in test_identity_schema.py.
OTHER = {
    "data.packing": True, "data.validation": 0.3, "student.lora": {"r": 4}, "student.init.layers": [0, 1],
    "loss.divergence": {"name": "jsd"}, "temperature": {"name": "constant", "value": 3}, "data.on_policy": {},
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_value_of_another_kind_changes_it(key: str) -> None:
    assert run_id(changed(key, OTHER[key])) != run_id(recipe())


@pytest.mark.parametrize("name", [*temperature_policies(), *(f"divergence {name}" for name in DIVERGENCES)])
def test_every_policy_and_divergence_is_another_run(name: str) -> None:
    kind, _, divergence = name.partition(" ")
    key = "loss.divergence" if divergence else "temperature"
    options = {"name": divergence or kind}
    options |= {"replay": {"run": "x"}, "skew_kl": {}, "alpha_beta": {}}.get(options["name"], {})
    before = recipe().model_dump(mode="json", exclude_defaults=True)
    same = options["name"] in ("dts", "forward_kl")
    assert before and (run_id(changed(key, options)) == run_id(recipe())) == same


def test_evaluations_count_where_they_decide() -> None:
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
    }
    values = recipe().model_dump(mode="json", exclude_defaults=True)
    values["training"] |= best
    first = run_id(Recipe.from_dict(values))
    values["training"] |= {"eval_steps": 1, "save_steps": 1}
    assert run_id(Recipe.from_dict(values)) != first


def test_a_folder_called_as_the_policy_changes_nothing(rows: Path) -> None:
    before = run_id(changed("temperature", {"name": "constant", "value": 2.0}))
    (rows / "constant").mkdir()
    assert run_id(changed("temperature", {"name": "constant", "value": 2.0})) == before


def test_when_held_out_rows_are_looked_at_counts_where_the_learning_rate_follows_them() -> None:
    def looked(steps: int) -> str:
        values = recipe().model_dump(mode="json", exclude_defaults=True)
        values["training"] |= {
            "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": steps,
        }  # fmt: skip
        return run_id(Recipe.from_dict(values))

    assert looked(1) != looked(2)


def test_when_held_out_rows_are_looked_at_counts_for_classifiers() -> None:
    """By default the best checkpoint is the student."""
    task = {"task": {"name": "glue", "subset": "sst2"}, "evaluation": {"every_steps": None}}
    steps = [{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": n, "save_steps": n} for n in (1, 2)]
    ids = [run_id(recipe(**task, data={"prompt_template": "auto"}, training=training)) for training in steps]
    assert ids[0] != ids[1]
