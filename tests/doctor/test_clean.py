"""A clean recipe is clean, whatever it asks for; memory, time and disk of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dts_hf.doctor.walk as doctor_walk
from dts_hf.doctor.run import diagnose
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.runs import memory
from tests.support.examined import (
    limited,
    problems,
    recipe,
    rows_between,
    save_model,
    texts,
    write_rows,
)


def test_a_clean_recipe_is_clean(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    assert diagnosis.status == "ok", texts(diagnosis)
    assert all(check.status == "ok" and check.summary for check in diagnosis.checks)
    assert [check.name for check in diagnosis.checks] == [
        "recipe", "training", "rows", "tokenizers", "data", "template", "memory", "teacher", "student",
        "special-tokens", "vocabulary", "positions", "labels", "cross-entropy", "effect", "temperature", "states", "steps",
        "output",
    ]  # fmt: skip
    found = diagnosis["cross-entropy"].values
    assert found["teacher_ce"] < found["student_ce"] < 2 * found["guess"]
    steps = diagnosis["steps"].values
    assert steps["steps"] == 3 and steps["steps_of_run"] == 40 and steps["tensors_moved"] > 0
    assert len(steps["seconds"]) == len(steps["tokens"]) == 3
    assert (
        steps["peak_bytes"] is not None
    )  # of models so small it may be 0: tests/training/test_memory_estimate.py has a large one


CLEAN: dict[str, dict[str, Any]] = {
    "packed": {"data": {"packing": True}},
    "packed to a budget": {"data": {"packing": {"tokens": 300}}, "training": {"max_steps": -1, "num_train_epochs": 2}},
    "lora": {"student": {"model": "poor", "lora": {"r": 2}}},
    "labels alone": {"student": {"model": "teacher"}, "teacher": None, "loss": {"kd_ratio": 0.0}},
    "accumulated": {"training": {"gradient_accumulation_steps": 2, "activation_checkpointing": True}},
    "epochs": {"training": {"max_steps": -1, "num_train_epochs": 2}},
    "seqkd": {"data": {"responses": "teacher", "teacher_max_new_tokens": 8}},
    "seqkd alone": {
        "student": {"model": "poor"},
        "data": {"responses": "teacher", "teacher_max_new_tokens": 8},
        "loss": {"kd_ratio": 0.0},
    },
    "first weights alone": {"loss": {"kd_ratio": 0.0}},
}


#: What a recipe without a word of the teacher's in its loss is not asked.
WITHOUT_KD = {"effect", "temperature"}


@pytest.mark.parametrize("name", CLEAN)
def test_other_clean_recipes_are_clean(workplace: Path, name: str) -> None:
    if CLEAN[name].get("student", {}).get("model") == "poor":
        save_model("poor", 12)
    diagnosis = diagnose(recipe(**CLEAN[name]))
    assert diagnosis.status == "ok", texts(diagnosis)
    alone = CLEAN[name].get("loss") == {"kd_ratio": 0.0}
    assert {check.name for check in diagnosis.checks if check.status == "skipped"} == (WITHOUT_KD if alone else set())


def test_steps_follow_the_real_schedule(workplace: Path) -> None:
    diagnosis = diagnose(recipe(training={"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}))
    assert diagnosis["steps"].values["steps_of_run"] == 9  # 24 rows, 4 x 2 a step, 3 epochs


def test_devices_and_dropped_rows_make_fewer_steps(workplace: Path) -> None:
    path = recipe(training={"max_steps": -1, "num_train_epochs": 3})
    steps = diagnose(path, devices=2)["steps"]
    assert steps.values["steps_of_run"] == 9 and steps.values["devices"] == 2  # 24 rows, 4 x 2 a step
    assert "9 steps on 2 devices" in steps.summary
    rows = [{**row, "output": "plums " * 60} if i % 2 else row for i, row in enumerate(rows_between(0, 24))]
    write_rows(Path("train.jsonl"), rows)
    assert diagnose(path)["steps"].values["steps_of_run"] == 9  # 12 rows are left


def test_the_time_of_a_step_leaves_warming_up_out(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 2 are made slow by a second each."""
    count, right = 0, DistillationLoss.forward

    def slow(self: DistillationLoss, states: torch.Tensor, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += states.requires_grad and self.training
        if states.requires_grad and self.training and count <= 2:
            time.sleep(1.0)
        return right(self, states, *args, **options)

    path = recipe()
    real = doctor_walk.check_steps

    def patched(*args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(DistillationLoss, "forward", slow)
            real(*args, **kwargs)

    monkeypatch.setattr(doctor_walk, "check_steps", patched)
    steps = diagnose(path)["steps"]
    assert min(steps.values["seconds"][:2]) >= 1.0, steps
    assert steps.values["seconds_per_step"] < 1.0 and "by the last of 3" in steps.summary


def test_nothing_is_written(workplace: Path) -> None:
    path = recipe(data={"responses": "teacher", "teacher_max_new_tokens": 8}, output={"dir": "deep/run"})
    before = sorted(str(file) for file in workplace.rglob("*"))
    diagnosis = diagnose(path)
    assert diagnosis["steps"].status == "ok", texts(diagnosis)
    assert sorted(str(file) for file in workplace.rglob("*")) == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="wants a machine that has only a CPU")
def test_a_recipe_for_a_gpu_is_examined_on_a_cpu(workplace: Path) -> None:
    diagnosis = diagnose(recipe(training={"use_cpu": False, "bf16": True}))
    assert [(check.name, check.status) for check in diagnosis.checks if check.status != "ok"] == [
        ("training", "error")
    ]
    assert "bf16" in diagnosis["training"].problems[0].text
    assert diagnosis["steps"].values["steps"] == 3


ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}


@pytest.mark.parametrize(
    "spread", [{"deepspeed": ZERO3}, {"fsdp": True, "fsdp_config": {"version": 1}}], ids=["deepspeed", "fsdp"]
)
def test_the_strategy_of_the_real_run_is_not_that_of_the_doctor(workplace: Path, spread: dict[str, Any]) -> None:
    """Its one process has no launcher, which a run under DeepSpeed or FSDP is refused without."""
    diagnosis = diagnose(recipe(training=spread))
    assert diagnosis.status == "ok", texts(diagnosis)
    assert diagnosis["training"].status == "ok" and diagnosis["steps"].values["steps"] == 3


def test_memory_that_is_tight_is_a_warning(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    needed = diagnose(path)["memory"].values["needed"]
    real = memory.device_of
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**real(args), "memory": needed / 0.95})
    diagnosis = diagnose(path)
    assert [problem.code for problem in diagnosis["memory"].problems] == ["memory-tight"]
    assert diagnosis["teacher"].status == "ok"


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_every_way_of_placing_the_teacher_is_in_the_table(workplace: Path, placement: str) -> None:
    diagnosis = diagnose(recipe(teacher={"placement": placement}), devices=8)
    listed = [(entry["strategy"], entry["placement"]) for entry in diagnosis.memory]
    assert listed[0] == ("ddp", placement)
    assert {("zero3", "sharded"), ("fsdp2", "sharded"), ("zero2", "replicated")} <= set(listed)
    assert len(listed) == len(set(listed))


def test_what_needs_several_devices_is_examined_on_one(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch does not fit, zero3 does, and the models alone fit here: everything but the three steps is checked."""
    path = recipe(training={"per_device_train_batch_size": 1})
    table = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(path, devices=8).memory}
    divided, whole = table["zero3", "sharded"]["total"], table["ddp", "replicated"]
    loads = whole["student"] + whole["teacher"] + whole["loss"]
    room = max(1.2 * divided, 1.01 * loads)
    assert room < whole["total"], "the sizes of this test are wrong"
    limited(monkeypatch, room)
    diagnosis = diagnose(path, devices=8)
    assert problems(diagnosis) == {"too-little-memory": "warning"}, texts(diagnosis)
    assert diagnosis["effect"].status == diagnosis["cross-entropy"].status == diagnosis["labels"].status == "ok"
    assert "do not fit" in (diagnosis["steps"].skipped or "")
    # On a machine of one device the launch that is meant would fail, and the advice says what would not
    alone = diagnose(path)["memory"]
    assert alone.status == "error" and "zero3.yaml --num_processes 8" in alone.problems[0].advice


def test_autocast_counts_for_a_low_precision_student(workplace: Path) -> None:
    """accelerate holds fp32 weights under FSDP2 with bf16, whatever the type of the student's files."""
    path = recipe(student={"init": {"from": "teacher", "layers": 2}, "dtype": "bfloat16"}, training={"bf16": True})
    table = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(path, devices=8).memory}
    plain = recipe(training={"bf16": True})
    in_fp32 = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(plain, devices=8).memory}
    assert table["fsdp2", "replicated"]["student"] == in_fp32["fsdp2", "replicated"]["student"]
    assert table["ddp", "replicated"]["student"] == in_fp32["ddp", "replicated"]["student"] / 2


def test_disk_of_weights_alone_and_of_the_largest_strategy(workplace: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    whole = diagnose(recipe(training=saving))["output"]
    weights = diagnose(recipe(training={**saving, "save_only_model": True}))["output"]
    student = (whole.values["needed"] - 3 * (whole.values["needed"] / 10)) / 7 * 10  # 3 x (1 + 2) + 1 students
    assert weights.values["needed"] == pytest.approx(0.4 * student, rel=0.01)  # 3 x 1 + 1
    assert "save_only_model" in weights.summary and "--resume" in weights.summary
    assert "--resume" not in whole.summary and weights.status == "ok"
    of_many = diagnose(recipe(training={**saving, "bf16": True}), devices=8)["output"]
    assert of_many.values["needed_at_most"] > 1.2 * of_many.values["needed"]
    assert f"under {of_many.values['at_most_with']}" in of_many.summary
