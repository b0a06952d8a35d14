"""ATS and CIST: hand-computed tables, what they are equal to, their way through the loss, bad options."""

from __future__ import annotations

import math

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, StepStats, build_temperature
from dts_hf.temperature.cist import height_of
from tests.support import reference
from tests.support.loss_problem import fused, problem


def ask(policy, student, teacher, labels):
    student, teacher = torch.tensor(student).double(), torch.tensor(teacher).double()
    lse_s, lse_t = student.logsumexp(-1), teacher.logsumexp(-1)
    at = torch.arange(len(student)), torch.tensor(labels)
    return policy(student, teacher, RowStats(lse_s - student[at], lse_t - teacher[at], lse_s, lse_t))


def column(values):
    return pytest.approx(values, abs=1e-12)


def of_logits(policy, student, teacher, labels, divergence="forward_kl", **options):
    """The loss of rows of logits, and its gradient with respect to the student's."""
    student = torch.tensor(student).double().requires_grad_()
    eye = torch.eye(student.shape[1], dtype=torch.float64)
    loss = DistillationLoss(divergence, temperature=policy, kd_ratio=1.0, **options)
    output = loss(student, Head(eye), torch.tensor(teacher).double(), Head(eye), torch.tensor(labels), 1)
    return output, torch.autograd.grad(output.loss, student)[0]


# ---------------------------------------------------------------------------------------------------------------- ATS


def test_ats_by_hand():
    # (6, 0, 0): mean 2, centred (4, -2, -2). At label 0: 4 / 2 = 2 in the place of 4, so it falls by 2; at label 1: -2 / 2 =
    # -1, so it rises by 1. An offset of 10 changes neither.
    teacher = [[6.0, 0, 0], [6.0, 0, 0], [16.0, 10, 10]]
    answer = ask(build_temperature("ats"), [[0.0, 0, 0]] * 3, teacher, [0, 1, 0])
    assert answer.raised.flatten().tolist() == column([-2.0, 1.0, -2.0])
    assert (answer.student.item(), answer.teacher.item(), answer.scale.item()) == (1.0, 1.0, 1.0)
    # tau 4 and 2, the first choice wherever the label is: 4 / 4 - 4 / 2 = -1
    policy = build_temperature("ats", tau_y=4.0, tau_rest=2.0, value=3.0, target="argmax")
    answer = ask(policy, [[0.0, 0, 0]] * 3, teacher, [2, 1, 2])
    assert answer.raised.flatten().tolist() == column([-1.0, -1.0, -1.0])
    assert (answer.student.item(), answer.teacher.item(), answer.scale.item()) == (3.0, 2.0, 9.0)


@pytest.mark.parametrize("target", ["label", "argmax"])
def test_ats_target_by_hand(target):
    """c / tau is (2, -2, -2) for the label 0, which is the first choice: KL to a uniform student is log 3 - H."""
    policy = build_temperature("ats", target=target)
    p = torch.tensor([2.0, -2.0, -2.0]).double().softmax(-1)
    output, grad = of_logits(policy, [[7.0, 7, 7]], [[6.0, 0, 0]], [0])
    assert output.loss.item() == pytest.approx(math.log(3) + (p * p.log()).sum().item(), abs=1e-12)
    assert grad[0].tolist() == column((1 / 3 - p).tolist())
    assert output.sums["teacher_entropy_at_t"].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "eopd"])
def test_ats_with_equal_temperatures_is_constant(divergence):
    data, found = problem(), []
    pairs = [
        ("ats", {"tau_y": 2.0, "tau_rest": 2.0, "value": 2.0}), ("constant", {"value": 2.0}),
        ("ats", {"tau_y": 3.0, "tau_rest": 3.0, "value": 1.5}), ("constant", {"value": 1.5, "teacher_value": 3.0}),
    ]  # fmt: skip
    for name, options in pairs:
        output = fused(
            DistillationLoss(divergence, temperature=build_temperature(name, **options), kd_ratio=1.0), data
        )
        found.append((output.loss.item(), torch.autograd.grad(output.loss, data["states"])[0]))
    for (one, grad), (other, other_grad), factor in ((*found[:2], 1.0), (*found[2:], 1.5 / 3.0)):
        assert one == pytest.approx(other * factor, rel=1e-12)
        torch.testing.assert_close(grad, other_grad * factor, rtol=1e-10, atol=1e-12)


def test_ats_does_not_soften_the_students_own_tokens():
    policy = build_temperature("ats")
    policy.holding = True
    assert ask(policy, [[0.0, 0, 0]], [[6.0, 0, 0]], [0]).raised is None and not policy.any_text
    policy = build_temperature("ats", target="argmax")
    policy.holding = True
    assert ask(policy, [[0.0, 0, 0]], [[6.0, 0, 0]], [0]).raised is not None and policy.any_text


# --------------------------------------------------------------------------------------------------------------- CIST


def test_cist_by_hand():
    # Heights: (6, 0, 0) 4, (3, 0, 0) 2, flat rows none. rho 2: T_t = 2, T_s = 1, factor T_t^2; with rho_s 4 both are half.
    student, teacher = [[3.0, 0, 0], [5.0, 5, 5], [-1.0, -4, -4]], [[6.0, 0, 0], [6.0, 0, 0], [7.0, 7, 7]]
    answer = ask(build_temperature("cist", rho_t=2.0), student, teacher, [0] * 3)
    assert answer.student.flatten().tolist() == column([1.0, 1.0, 1.0])
    assert answer.teacher.flatten().tolist() == column([2.0, 2.0, 1.0])
    assert answer.scale.flatten().tolist() == column([4.0, 4.0, 1.0])
    assert answer.peaked.tolist() == [[True], [False], [True]]
    answer = ask(build_temperature("cist", rho_t=2.0, rho_s=4.0), student, teacher, [0] * 3)
    assert answer.student.flatten().tolist() == column([0.5, 1.0, 0.5])
    assert answer.scale.flatten().tolist() == column([2.0, 2.0, 0.5])
    policy = build_temperature("cist", rho_t=2.0, factor="product")
    answer = ask(policy, student, teacher, [0] * 3)
    assert answer.scale is None  # T_s T_t
    policy.end_step(StepStats(2.0, 1.0, 1.0, 3, observed=tuple(answer.observed.mean(0).tolist())))
    assert policy.temperature == pytest.approx(1.0)


@pytest.mark.parametrize("factor", ["teacher", "product"])
def test_cist_gradient_by_hand(factor):
    """rho 2. z_s = (3, 0, 0) and z_t = (6, 0, 0) are both u = (3, 0, 0): D and its pull are 0."""
    policy = build_temperature("cist", rho_t=2.0, factor=factor)
    output, grad = of_logits(policy, [[3.0, 0, 0]], [[6.0, 0, 0]], [0])
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12) and grad.abs().max() < 1e-12
    # z_s = (3, 1, -1): m 2, T_s 1, mean 1; u_t = (3, 0, 0). g = F (q - p), F = 4 or 2; through m_s, a = (e_0 - 1/3) / 2,
    # less (g . z) a, and with the product the value times a.
    z = torch.tensor([3.0, 1.0, -1.0]).double()
    p, q = torch.tensor([3.0, 0, 0]).double().softmax(-1), z.softmax(-1)
    scale = 4.0 if factor == "teacher" else 2.0
    value, g = scale * (p * (p / q).log()).sum(), scale * (q - p)
    a = torch.tensor([2.0, -1.0, -1.0]).double() / 6.0
    expected = g - (g * z).sum() * a + (value * a if factor == "product" else 0.0)
    output, grad = of_logits(policy, [[3.0, 1.0, -1.0]], [[6.0, 0, 0]], [0])
    assert output.loss.item() == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(grad[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", ["teacher", "product"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "todi", "csd", "logit_mse"])
def test_cist_of_equal_models_is_zero_and_pulls_nowhere(factor, divergence):
    z = (4.0 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double() - 30.0).tolist()
    output, grad = of_logits(build_temperature("cist", factor=factor), z, z, [0] * 5, divergence)
    assert abs(output.loss.item()) < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("factor", ["teacher", "product"])
def test_only_the_product_is_paid_for_small_logits(factor):
    """The value at the student's logits and at half of them: why ``teacher`` is the default."""
    draw = torch.Generator().manual_seed(3)
    z_s, z_t = (3.0 * torch.randn(6, 30, generator=draw).double() for _ in range(2))
    whole, half = (
        of_logits(build_temperature("cist", factor=factor), z.tolist(), z_t.tolist(), [0] * 6)[0].loss.item()
        for z in (z_s, z_s / 2)
    )
    assert half == pytest.approx(whole * (0.5 if factor == "product" else 1.0), rel=1e-12)


@pytest.mark.parametrize("support", [1.5, 5.0, 50.0, 2000.0])
@pytest.mark.parametrize("classes", [2, 3, 1000, 49152])
def test_the_height_of_a_peak_over_an_even_rest(support, classes):
    if support >= classes:
        return
    height = height_of(support, classes)
    z = torch.zeros(classes, dtype=torch.float64)
    z[0] = height * classes / (classes - 1)
    assert (z.max() - z.mean()).item() == pytest.approx(height, rel=1e-9)
    p = reference.softmax(z)
    assert torch.exp(-(p * p.log()).sum()).item() == pytest.approx(support, rel=1e-6)


def test_cist_asks_for_fewer_tokens_over_few_classes():
    assert build_temperature("cist").heights(49152) == (height_of(5.0, 49152),) * 2
    assert build_temperature("cist").heights(3) == (height_of(math.sqrt(3), 3),) * 2
    assert build_temperature("cist", rho_t=4.0, rho_s=2.0).heights(3) == (4.0, 2.0)
    for classes in (2, 3, 49152):
        build_temperature("cist").check_classes(classes)
    build_temperature("cist", support=2.5).check_classes(3)
    with pytest.raises(UserError, match=r"temperature\.support: got 3 over 3 classes"):
        build_temperature("cist", support=3.0).check_classes(3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ats", {"tau_y": 0.0}, "temperature.tau_y"),
        ("ats", {"tau_rest": -1.0}, "temperature.tau_rest"),
        ("ats", {"value": True}, "temperature.value"),
        ("ats", {"target": "labels"}, "temperature.target: got 'labels'.*Did you mean 'label'"),
        ("ats", {"tau": 2.0}, "unknown option of policy 'ats'"),
        ("cist", {"rho_t": 0.0}, "temperature.rho_t"),
        ("cist", {"rho_s": "2"}, "temperature.rho_s"),
        ("cist", {"support": 1.0}, "temperature.support: got 1.0 .*above 1"),
        ("cist", {"support": 4.0, "rho_t": 9.0}, "temperature.support: got 4.0 beside rho_t 9.0"),
        ("cist", {"factor": "produkt"}, "temperature.factor: got 'produkt'.*Did you mean 'product'"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(UserError, match=words):
        build_temperature(name, **options)
