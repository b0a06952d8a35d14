"""Reverse KL, calibration errors and entropy of held-out rows through ``DistillationTrainer``, beside dense float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dts_hf.loss.statistics import CONFIDENCE_BINS
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, encoded, trainer_for

HELD_OUT = ROWS[:9]
COLUMNS = ("eval_reverse_kl", "eval_ece", "eval_teacher_ece", "eval_student_entropy", "eval_kl")


def logits_of(model: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """Of every label of ``rows`` the logits ``[N, V]`` that predict it, each row alone, and the labels."""
    logits, targets = [], []
    for row in (rows[place] for place in range(len(rows))):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        logits.append(found[labels != -100])
        targets.append(labels[labels != -100])
    return torch.cat(logits), torch.cat(targets)


def calibration_error(p: Tensor, targets: Tensor) -> float:
    confidence, choice = p.max(-1)
    bins = torch.ceil(confidence * CONFIDENCE_BINS) - 1
    off = [
        (confidence - (choice == targets).double())[bins == number].sum().abs() for number in range(CONFIDENCE_BINS)
    ]
    return float(sum(off)) / len(targets)


def test_they_are_dense_and_the_same_for_any_batch_packing_and_padding(tmp_path: Path) -> None:
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double()
    (z_s, targets), (z_t, _) = (logits_of(model, encoded(HELD_OUT)) for model in (student, teacher))
    q, p = reference.softmax(z_s), reference.softmax(z_t)
    expected = (
        float(reference.reverse_kl(p, q).mean()), calibration_error(q, targets), calibration_error(p, targets),
        float(-(q * torch.log(q)).sum(-1).mean()), float(reference.forward_kl(p, q).mean()),
    )  # fmt: skip
    assert len(torch.ceil(q.max(-1).values * CONFIDENCE_BINS).unique()) > 10  # bins that have labels
    for size, packing, budget in ((1, False, None), (4, False, None), (9, True, None), (3, False, 0.01)):
        trainer = trainer_for(
            tmp_path, student, teacher, eval_dataset=HELD_OUT, packing=packing, logits_budget_mb=budget,
            options={"per_device_eval_batch_size": size},
        )  # fmt: skip
        values = trainer.evaluate()
        assert tuple(values[name] for name in COLUMNS) == pytest.approx(expected, rel=1e-9), (size, packing)


def test_several_teachers_have_their_own(tmp_path: Path) -> None:
    """And the student's is over all rows, which weights do not change."""
    student = tiny_llama(seed=0).double()
    teachers = {"math": tiny_llama(seed=1, layers=3).double(), "code": tiny_gpt2(seed=2).double()}
    rows = [{**row, "who": "code" if number % 3 else "math"} for number, row in enumerate(HELD_OUT)]
    by_rows = DistillationTrainer(
        student, teachers=teachers, args=trainer_for(tmp_path).args, train_dataset=rows, eval_dataset=rows,
        teacher_column="who", processing_class=tiny_tokenizer(),
    ).evaluate()  # fmt: skip
    data = encoded(HELD_OUT)
    errors = {}
    for name, teacher in teachers.items():
        own = [data[place] for place, row in enumerate(rows) if row["who"] == name]
        z, targets = logits_of(teacher, own)
        errors[name] = calibration_error(reference.softmax(z), targets), len(targets)
        assert by_rows[f"eval_teacher_ece/{name}"] == pytest.approx(errors[name][0], rel=1e-9)
    weighted = DistillationTrainer(
        student, teachers=teachers, args=trainer_for(tmp_path).args, train_dataset=HELD_OUT, eval_dataset=HELD_OUT,
        teacher_weights={"math": 0.25, "code": 0.75}, processing_class=tiny_tokenizer(),
    ).evaluate()  # fmt: skip
    z, targets = logits_of(student, data)
    for values in (by_rows, weighted):
        assert values["eval_ece"] == pytest.approx(calibration_error(reference.softmax(z), targets), rel=1e-9)
