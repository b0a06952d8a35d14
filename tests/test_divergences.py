"""Divergences: value and closed-form gradient against a float64 autograd reference, identities, bad input."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.divergences import DIVERGENCES, Distribution, Distributions, build_divergence
from dts_hf.errors import UserError

SPECS = ["forward_kl", "reverse_kl", {"name": "jsd", "beta": 0.5}, {"name": "jsd", "beta": 0.1}]


def split(spec):
    name = spec if isinstance(spec, str) else spec["name"]
    return name, {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}


def distributions(teacher, student):
    shifted = [logits - logits.amax(-1, keepdim=True) for logits in (teacher, student)]
    return Distributions(p=Distribution.of(shifted[0]), q=Distribution.of(shifted[1]))


def test_every_divergence_is_covered():
    assert {split(spec)[0] for spec in SPECS} == set(DIVERGENCES)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 47), (13, 31)])
def test_value_and_gradient_equal_autograd(spec, shape):
    torch.manual_seed(sum(shape))
    teacher, student = 3 * torch.randn(shape).double(), (3 * torch.randn(shape).double()).requires_grad_()
    name, options = split(spec)
    expected = reference.DIVERGENCES[name](reference.softmax(teacher), reference.softmax(student), **options)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    value, grad = build_divergence(spec).value_and_grad(distributions(teacher, student.detach()))
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.01, 30))
def test_is_never_negative_and_zero_only_when_equal(spec, seed, width, spread):
    torch.manual_seed(seed)
    teacher, student = spread * torch.randn(4, width).double(), spread * torch.randn(4, width).double()
    divergence = build_divergence(spec)
    value, _ = divergence.value_and_grad(distributions(teacher, student))
    assert (value >= -1e-12).all()
    distance = (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)
    assert (value[distance > 1e-3] > 0).all()
    same, gradient = divergence.value_and_grad(distributions(teacher, teacher + 5.0))
    assert same.abs().max() < 1e-10 and gradient.abs().max() < 1e-10


def test_forward_and_reverse_mirror_each_other():
    teacher, student = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    forward, _ = build_divergence("forward_kl").value_and_grad(distributions(teacher, student))
    reverse, _ = build_divergence("reverse_kl").value_and_grad(distributions(student, teacher))
    torch.testing.assert_close(forward, reverse)


def test_jsd_is_symmetric_at_one_half_and_vanishes_at_its_ends():
    teacher, student = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    half = build_divergence({"name": "jsd", "beta": 0.5})
    one_way, _ = half.value_and_grad(distributions(teacher, student))
    other_way, _ = half.value_and_grad(distributions(student, teacher))
    torch.testing.assert_close(one_way, other_way)
    for beta in (1e-6, 1 - 1e-6):
        near_end, _ = build_divergence({"name": "jsd", "beta": beta}).value_and_grad(distributions(teacher, student))
        assert near_end.max() < 1e-4  # and not one of the two KLs, as an end point redefined would be


def test_a_literal_example():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    value, grad = build_divergence("forward_kl").value_and_grad(distributions(p.log(), q.log()))
    assert value.item() == pytest.approx(0.25 * 0.6931471805599453, abs=1e-15)
    assert grad.tolist() == [pytest.approx([-0.25, 0.25, 0.0], abs=1e-15)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("forward_k", "Did you mean 'forward_kl'"),
        ({"name": "jsd", "beta": 1.0}, "loss.divergence.beta"),
        ({"name": "jsd", "beta": 0}, "forward_kl"),
        ({"name": "jsd", "alpha": 0.5}, "loss.divergence.alpha"),
        ({"name": "forward_kl", "beta": 0.5}, "takes no options"),
        ({"beta": 0.5}, "loss.divergence"),
    ],
)
def test_bad_input(spec, words):
    with pytest.raises(UserError, match=words):
        build_divergence(spec)
