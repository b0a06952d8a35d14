"""A quantised teacher beside the full one: how far it is from itself is measured and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_torchao_available

import dts_hf.classification.task as classification
import dts_hf.doctor.walk as doctor_walk
import dts_hf.language_modeling.task as language_modeling
from dts_hf.doctor.diagnosis import Check
from dts_hf.doctor.run import diagnose
from dts_hf.models import quantization
from dts_hf.runs.memory import device_of
from tests.support.examined import classifier, own_student, problems, recipe, task_recipe, texts

INT8 = {"model": "teacher", "dtype": "float32", "quantization": "int8"}


def rounds(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """In the place of a package: the weights of the layers are rounded to multiples of ``step`` of their maximum."""

    def rounded(load: Any) -> Any:
        def loaded(teacher: Any, *task: Any) -> Any:
            model = load(teacher.model_copy(update={"quantization": "none"}), *task)
            if teacher.quantization != "none":
                with torch.no_grad():
                    for name, weight in model.named_parameters():
                        if ".layers." in name and weight.dim() > 1:
                            size = step * weight.abs().max()
                            weight.copy_((weight / size).round() * size)
            return model

        return loaded

    monkeypatch.setattr(quantization, "is_torchao_available", lambda: True)
    monkeypatch.setattr(language_modeling, "load_teacher", rounded(language_modeling.load_teacher))
    monkeypatch.setattr(classification, "load_task_teacher", rounded(classification.load_task_teacher))


def test_a_faithful_teacher_is_praised_in_numbers(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(monkeypatch, 1 / 127)
    diagnosis = diagnose(recipe(student=own_student(), teacher=INT8))
    found = diagnosis["quantization"]
    assert found.status == "ok" and diagnosis.status != "error", texts(diagnosis)
    assert 1e-7 < found.values["kl"] < found.values["kl_99"] < 0.02 == found.values["limit"]
    assert found.values["labels"] == diagnosis["cross-entropy"].values["labels"]
    kl, high = found.values["kl"], found.values["kl_99"]
    assert found.summary == (
        f"int8: KL {kl:.2g} nats per label from the full teacher (99th percentile {high:.2g}), same first choice "
        f"{found.values['agreement']:.1%}"
    )
    names = [check.name for check in diagnosis.checks]
    assert names[names.index("quantization") - 1] == "cross-entropy"


def test_an_unfaithful_teacher_is_a_warning(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(monkeypatch, 1 / 2)
    diagnosis = diagnose(recipe(student=own_student(), teacher=INT8))
    assert diagnosis["quantization"].values["kl"] > 0.02
    assert problems(diagnosis)["teacher-unfaithful"] == "warning"
    problem = next(problem for problem in diagnosis.problems if problem.code == "teacher-unfaithful")
    assert "more than 0.02" in problem.text and "none" in problem.advice


def test_a_full_teacher_that_does_not_fit_is_not_loaded(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(monkeypatch, 1 / 127)
    asked: list[str] = []
    load = language_modeling.load_teacher
    monkeypatch.setattr(
        language_modeling, "load_teacher", lambda teacher: asked.append(teacher.quantization) or load(teacher)
    )

    compare = doctor_walk.Walk.compare_with_full

    def without_room(walk: Any, check: Check, teacher: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(doctor_walk, "device_of", lambda args: {**device_of(args), "memory": 1e5})
            compare(walk, check, teacher)

    monkeypatch.setattr(doctor_walk.Walk, "compare_with_full", without_room)
    diagnosis = diagnose(recipe(student=own_student(), teacher=INT8))
    check = diagnosis["quantization"]
    assert check.status == "skipped" and "does not fit beside the models" in str(check.skipped)
    assert asked == ["int8"]


def test_a_classifier_is_compared_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier("classifier")
    classifier("pupil")
    rounds(monkeypatch, 1 / 3)
    quantized = {"model": "classifier", "dtype": "float32", "quantization": "int8"}
    path = task_recipe(student={"model": "pupil"})
    check = diagnose(path, [f"teacher.{key}={value}" for key, value in quantized.items()])["quantization"]
    assert check.status in ("ok", "warning") and check.values["labels"] == 24
    assert check.values["kl"] > 1e-8 and "int8: KL" in check.summary


@pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed: pip install 'dts-hf[quantization]'")
def test_torchaos_int8(workplace: Path) -> None:
    """All checks: weights of torchao know few of torch's functions."""
    diagnosis = diagnose(recipe(student=own_student(), teacher=INT8))
    assert not [check.name for check in diagnosis.checks if check.status in ("error", "skipped")], texts(diagnosis)
    assert 1e-7 < diagnosis["quantization"].values["kl"] < 0.02
    assert diagnosis.memory[0]["placement"] == "int8"
