"""The effect test and the schedule, without any recipe."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from dts_hf.divergences import DIVERGENCES
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.effect import Sample, check_effect, check_schedule, gradient
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature, temperature_policies
from tests.support.examined import (
    problems,
    texts,
)
from tests.support.recorded import a_run, options_of


def a_sample(rows: int = 40, vocab: int = 50, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    states, teacher = (torch.randn(rows, 16, generator=generator) for _ in range(2))
    weights = [Head(torch.randn(vocab, 16, generator=generator)) for _ in range(2)]
    targets = (teacher @ weights[1].weight.T).argmax(-1)  # the teacher is the better one
    return Sample(states, weights[0], teacher, weights[1], targets, torch.arange(rows) // 5)


def dense_gradient(sample: Sample, kd_ratio: float, temperature: float) -> torch.Tensor:
    states = sample.student_states.double().requires_grad_()
    z = states @ sample.student_head.weight.double().T
    z_t = sample.teacher_states.double() @ sample.teacher_head.weight.double().T
    ce = torch.nn.functional.cross_entropy(z, sample.targets)
    p, q = (x / temperature for x in (z_t, z))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    loss = (1 - kd_ratio) * ce + kd_ratio * temperature**2 * kl
    return torch.autograd.grad(loss, states)[0]


def test_parts_of_the_gradient_are_those_of_a_dense_loss() -> None:
    sample = a_sample()
    loss = DistillationLoss(temperature=build_temperature("constant", value=3.0), kd_ratio=0.3)
    with Diagnosis("x").check("effect") as check:
        check_effect(check, loss, sample)
    whole, ce = dense_gradient(sample, 0.3, 3.0), 0.7 * dense_gradient(sample, 0.0, 3.0)
    kd, pull = whole - ce, dense_gradient(sample, 1.0, 3.0)
    assert torch.allclose(gradient(loss, sample).double(), whole, rtol=1e-4, atol=1e-7)
    values = check.values
    assert values["ce_norm"] == pytest.approx(float(ce.norm()), rel=1e-4)
    assert values["kd_norm"] == pytest.approx(float(kd.norm()), rel=1e-4)
    assert values["kd_share"] == pytest.approx(float(kd.norm() / (kd.norm() + ce.norm())), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(ce.flatten(), kd.flatten(), dim=0)
    assert values["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    change = (dense_gradient(sample, 1.0, 3.75) - pull).norm() / pull.norm()
    assert values["change"] == pytest.approx(float(change), rel=1e-4)
    assert not check.problems


@pytest.mark.parametrize("name", temperature_policies())
def test_every_policy_has_an_effect(name: str) -> None:
    options = options_of(name, 100)
    loss = DistillationLoss(temperature=build_temperature(name, **options), kd_ratio=0.5)
    diagnosis = Diagnosis("x")
    with diagnosis.check("effect") as check:
        check_effect(check, loss, a_sample())
    with diagnosis.check("temperature") as check:
        check_schedule(check, loss, a_sample(), 100)
    assert not diagnosis.problems, texts(diagnosis)
    state = loss.temperature.state()
    assert state == build_temperature(name, **options).state(), "the doctor changed the policy that trains"


def planted(teacher: torch.Tensor, student: torch.Tensor) -> Sample:
    """Rows whose logits are these."""
    head = Head(torch.eye(teacher.shape[-1]))
    return Sample(
        student, head, teacher, head, torch.zeros(len(teacher), dtype=torch.int64), torch.arange(len(teacher))
    )


def two_level(top: float, vocab: int, rows: int = 8) -> torch.Tensor:
    """One token at ``top``, the others at 0."""
    logits = torch.zeros(rows, vocab)
    logits[:, 0] = top
    return logits


def support(top: float, vocab: int, t: float) -> float:
    others = (vocab - 1) * math.exp(-top / t)
    return math.exp(math.log1p(others) + (top / t) * others / (1 + others))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"name": "dts"}, [3.0, 1.0]),
        ({"name": "dts", "t_init": 4.0, "t_min": 2.0}, [4.0, 2.0]),
        ({"name": "cosine", "t_init": 2.0}, [2.0, 1.0]),
        ({"name": "linear", "t_init": 1.0, "t_end": 2.0}, [1.0, 2.0]),
        ({"name": "constant", "value": 2.0, "teacher_value": 3.0}, [3.0]),
        ({"name": "replay"}, [4.0, 2.5 + 1.5 / 12]),
    ],
    ids=lambda value: value["name"] + str(len(value)) if isinstance(value, dict) else "",
)
def test_the_doctor_says_how_many_tokens_the_teacher_offers(options: dict[str, Any], ends: list[float]) -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    policy = build_temperature(**options, **options_of(options["name"]))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, DistillationLoss(temperature=policy), sample, 12)
    assert not check.problems, check.problems
    found = check.values["support"]
    assert [entry["temperature"] for entry in found] == pytest.approx(ends)
    for entry in found:
        expected = support(9.0, 1000, entry["temperature"])
        assert entry["support"] == pytest.approx(expected, rel=1e-3) and entry["of"] == 1000
        t, share = entry["temperature"], f"{expected / 10:.2g} %"
        assert re.search(rf"about [\d.]+ of 1,000 tokens at T = {t:.3g} \({re.escape(share)}\)", check.summary)


def test_the_doctor_shows_what_auto_solves_to() -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    loss = DistillationLoss(temperature=build_temperature("dts", range="auto", support_max=100, support_min=5))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, loss, sample, 100)
    assert not check.problems
    for entry, wanted in zip(check.values["support"], (100, 5), strict=True):
        assert entry["support"] == pytest.approx(wanted, rel=0.1)  # all rows melt at once: the hardest case
        assert support(9.0, 1000, entry["temperature"]) == pytest.approx(entry["support"], rel=1e-3)
    assert "about 110 of 1,000 tokens at T = 1.37 (11 %)" in check.summary
    assert loss.temperature.state()["solved_range"] == []  # that of the run is its own first step's


def test_the_gap_of_this_run_is_not_missed_where_another_ones_is_replayed() -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    policy = build_temperature("dts", gap_source={"replay": a_run(), "order": "permuted"}, momentum=0.5)
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, DistillationLoss(temperature=policy), sample, 12)
    assert not check.problems and "if the gap closes" not in check.summary


@pytest.mark.parametrize(("keep", "said"), [("auto", []), (0.5, []), (1.0, ["temperature-never-moves"])])
def test_a_policy_that_chooses_tokens_alone_is_not_one_that_does_nothing(keep: float | str, said: list[str]) -> None:
    """Its share follows the loss of a student that learns, and the doctor's does not."""
    diagnosis = Diagnosis("x")
    loss = DistillationLoss(temperature=build_temperature("adakd", c=0, keep=keep))
    with diagnosis.check("temperature") as check:
        check_schedule(check, loss, a_sample(), 100)
    assert list(problems(diagnosis)) == said


def test_a_task_offers_classes() -> None:
    sample = planted(two_level(2.0, 3), torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    loss = DistillationLoss(temperature=build_temperature("constant", value=1.0))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, loss, sample, 10, classes="classes")
    assert f"about {support(2.0, 3, 1.0):.2g} of 3 classes at T = 1" in check.summary


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_gets_an_answer(name: str) -> None:
    loss = DistillationLoss(name, temperature=build_temperature("constant", value=2.0), kd_ratio=0.5)
    diagnosis = Diagnosis("x")
    with diagnosis.check("effect") as check:
        check_effect(check, loss, a_sample())
    expected = ["temperature-without-effect"] if name == "logit_mse" else []
    assert list(problems(diagnosis)) == expected


def test_a_loss_that_loses_its_teacher_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say a change of the loss drops the soft part: the trainer's own gradient is looked at, not a copy of the formula."""
    loss = DistillationLoss(temperature=build_temperature("constant", value=2.0), kd_ratio=0.5)
    right = DistillationLoss.forward

    def forgetful(self: DistillationLoss, *args: Any) -> Any:
        own = self.kd_ratio if self.temperature.kd_ratio is None else self.temperature.kd_ratio
        output = right(DistillationLoss(temperature=build_temperature("constant"), kd_ratio=0.0), *args)
        return (
            output._replace(loss=output.loss * (1 - own))
            if hasattr(output, "_replace")
            else type(output)(output.loss * (1 - own), output.sums)
        )

    monkeypatch.setattr(DistillationLoss, "forward", forgetful)
    with Diagnosis("x").check("effect") as check:
        check_effect(check, loss, a_sample())
    assert "kd-gradient-zero" in {problem.code for problem in check.problems}
