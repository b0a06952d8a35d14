"""Every number against a dense reference in float64, and the gradients against the loss that is trained with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dts_hf.advice.measured import Situation, measured
from dts_hf.advice.sums import RowSums, Settings, label_values, row_sums
from dts_hf.divergences import DIVERGENCES, build_divergence
from dts_hf.doctor.effect import Sample
from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature.constant import Constant

GRID = (0.5, 1.0, 2.0, 4.0)


def problem(labels: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher, and labels, half of which are the teacher's first choice."""
    draw = torch.Generator().manual_seed(labels)
    student, teacher = (spread * torch.randn(labels, classes, generator=draw) for _ in range(2))
    targets = torch.randint(0, classes, (labels,), generator=draw)
    targets[::2] = teacher[::2].argmax(-1)
    return student, teacher, targets


def settings(name: str = "forward_kl", squared: bool = True) -> Settings:
    return Settings(GRID, build_divergence(name), squared)


def log_p(logits: torch.Tensor, t: float) -> torch.Tensor:
    return torch.log_softmax(logits.double() / t, -1)


@pytest.mark.parametrize(("classes", "spread"), [(49_152, 3.0), (320, 1.0), (320, 30.0), (2, 2.0), (3, 200.0)])
def test_entropies_are_exact_and_add_up(classes: int, spread: float) -> None:
    student, teacher, targets = problem(24, classes, spread)
    found = label_values(student, teacher, targets, settings())
    for place, t in enumerate(GRID):
        logs = log_p(teacher, t)
        entropy = -(logs.exp() * logs).sum(-1)
        others = torch.log_softmax((teacher.double() / t).scatter(-1, targets[:, None], -math.inf), -1)
        other = -(others.exp() * others.masked_fill(others == -math.inf, 0.0)).sum(-1)
        parts = {name: found[f"{name}_at_t"][:, place] for name in ("entropy", "binary", "relation", "other")}
        assert (parts["entropy"] - entropy).abs().max() < 1e-5 and abs(parts["entropy"].mean() - entropy.mean()) < 1e-6
        assert (parts["binary"] + parts["relation"] - entropy).mean().abs() < 1e-6
        assert abs(parts["other"].mean() - other.mean()) < 1e-6
        own = logs.gather(-1, targets[:, None]).squeeze(-1).exp()
        assert (parts["relation"] - (1 - own) * other).abs().max() < 1e-5


def test_what_is_measured_at_one() -> None:
    student, teacher, targets = problem(400, 20, 2.0)
    found = label_values(student, teacher, targets, settings())
    picked = targets[:, None]
    p, q = log_p(teacher, 1.0), log_p(student, 1.0)
    ce, teacher_ce = (-one.gather(-1, picked).squeeze(-1) for one in (q, p))
    expected = {
        "student_ce": ce, "teacher_ce": teacher_ce, "negative": (ce < teacher_ce).double(),
        "kl": (p.exp() * (p - q)).sum(-1), "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "confidence": p.exp().amax(-1), "correct": (p.argmax(-1) == targets).double(), "p_target": (-teacher_ce).exp(),
    }  # fmt: skip
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=1e-5)
    for place, t in enumerate(GRID):
        order = log_p(teacher, t).exp().sort(-1, descending=True).values.cumsum(-1)
        torch.testing.assert_close(
            found["mass_at_t"][:, place].double(), order[:, [0, 1, 3, 7, 15]], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("scaling", ["squared", "none"])
def test_gradients_are_those_of_the_loss(name: str, scaling: str) -> None:
    student, teacher, targets = problem(12, 40, 2.0)
    student, teacher = student.double(), teacher.double()
    found = label_values(student, teacher, targets, settings(name, scaling == "squared"))
    identity = Head(torch.eye(40, dtype=torch.float64))

    def gradient(kd_ratio: float, t: float) -> torch.Tensor:
        states = student.clone().requires_grad_()
        loss = DistillationLoss(
            temperature=Constant(t), kd_ratio=kd_ratio, divergence=name, temperature_scaling=scaling, kernels="torch"
        )
        value = loss(states, identity, teacher, identity, targets, 1.0).loss
        return torch.autograd.grad(value, states)[0].double()

    hard = gradient(0.0, 1.0)
    torch.testing.assert_close(found["ce_gradient"], hard.square().sum(-1), rtol=1e-6, atol=1e-9)
    for place, t in enumerate(GRID):
        soft = gradient(1.0, t)
        torch.testing.assert_close(found["gradient_at_t"][:, place], soft.square().sum(-1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["product_at_t"][:, place], (soft * hard).sum(-1), rtol=1e-6, atol=1e-9)


def sample_of(labels: int = 600, classes: int = 60, per_row: int = 10) -> Sample:
    student, teacher, targets = problem(labels, classes, 2.0)
    identity = Head(torch.eye(classes))
    return Sample(student, identity, teacher, identity, targets, torch.arange(labels) // per_row)


def test_sums_do_not_depend_on_how_the_rows_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sample_of()
    whole = row_sums(sample, settings())
    monkeypatch.setattr("dts_hf.advice.sums.CHUNK", 7 * 60)
    again = row_sums(sample, settings())
    assert whole.labels.tolist() == [10.0] * 60
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(again.sums[name], sums, rtol=1e-6, atol=1e-9)


def test_numbers_that_are_none_are_refused() -> None:
    sample = sample_of(20)
    assert sample.teacher_states is not None
    sample.teacher_states[3, 2] = math.nan
    with pytest.raises(UserError, match="non-finite on rows"):
        row_sums(sample, settings())


def test_estimates_are_means_over_labels_and_their_intervals_hold_the_truth() -> None:
    """Rows of different lengths: 100 samples, of whose 95 % intervals the true mean lies in 88 to 99."""
    draw, hits = np.random.default_rng(0), 0
    one = row_sums(sample_of(), settings())
    for trial in range(100):
        labels = draw.integers(5, 40, 64).astype(float)
        level = draw.normal(2.0, 0.5, 64)  # a row has a level of its own
        sums = {name: np.repeat(values[:1], 64, 0) for name, values in one.sums.items()}
        sums["student_ce"] = labels * level + draw.normal(0, 1, 64) * np.sqrt(labels)
        found = measured(Situation(classes=60, grid=GRID), RowSums(labels, sums), None, trial, []).values["student_ce"]
        assert math.isclose(found.value, sums["student_ce"].sum() / labels.sum(), rel_tol=1e-9)
        hits += found.low <= 2.0 <= found.high
    assert 88 <= hits <= 99
