"""Temperature policies: the contract for every policy found, and hand-computed schedules (DTS: test_dts.py)."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, build_temperature, temperature_policies
from tests.support.recorded import policy_of
from tests.support.stepping import stats, walk

POLICIES = sorted(temperature_policies())


def row_stats(student: torch.Tensor, teacher: torch.Tensor) -> RowStats:
    lse_s, lse_t = student.logsumexp(-1), teacher.logsumexp(-1)
    return RowStats(lse_s - student[:, 0], lse_t - teacher[:, 0], lse_s, lse_t)


def given(first, second):
    """The parts that a policy gives, side by side; both answers leave out the same ones."""
    assert [part is None for part in first] == [part is None for part in second]
    return [(a, b) for a, b in zip(first, second) if a is not None]


#: Options that change where a temperature goes, beside those that a policy has by itself.
OPTIONS = {
    "adakd": [{"c": -1.5}, {"c": 0.0, "keep": 0.3}, {"keep": "auto"}],
    "annealing": [{"t_max": 4, "phase_share": 1.0}],
    "ats": [{"tau_y": 0.5, "target": "argmax"}],
    "constant": [{"value": 1.0, "teacher_value": 3.0}, {"value": 3.0, "teacher_value": 1.0}],
    "ctkd": [{"theta": 5.0}],
    "dtkd": [{"clamp": 10.0, "w_kd": 0.5}],
    "dts": [
        {"granularity": "token", "t_max": 4.0}, {"rule": "code", "t_init": 5.0}, {"decoupled": True},
        {"granularity": "token", "decoupled": True}, {"range": "auto", "support_max": 5, "support_min": 2},
    ],
    "linear": [{"t_init": 1.0, "t_end": 4.0}],
    "pocl": [{"t_start": 3.0, "t_end": 1.0}],
}  # fmt: skip


def visited_by(policy, steps=12):
    """Temperatures of student and teacher, of all rows and steps of a run whose gap goes up and down."""
    draw, seen = torch.Generator().manual_seed(4), {"student": [], "teacher": []}
    for step in range(steps):
        policy.begin_step(step / steps)
        scales = (0.1 + 3.0 * torch.rand(40, 1, generator=draw) for _ in range(2))
        student, teacher = (scale * torch.randn(40, 9, generator=draw) for scale in scales)
        answer = policy(student, teacher, row_stats(student, teacher))
        for kind in seen:
            seen[kind] += getattr(answer, kind).flatten().tolist()
        observed = () if answer.observed is None else tuple(answer.observed.mean(0).tolist())
        policy.end_step(replace(stats(3.0 * math.sin(step), observed), temperature_grad=1.0))
    return seen


# ---------------------------------------------------------------------------------------- the contract, for all found


@pytest.mark.parametrize("name", POLICIES)
class TestContract:
    def test_is_finite_positive_and_broadcasts(self, name):
        policy = policy_of(name)
        student, teacher = torch.randn(5, 9), torch.randn(5, 9)
        for progress in (0.0, 0.3, 1.0):
            policy.begin_step(progress)
            answer = policy(student, teacher, row_stats(student, teacher))
            for value in (answer.student, answer.teacher, answer.scale):
                if value is not None:
                    assert torch.isfinite(value).all() and (value > 0).all()
                    assert torch.broadcast_shapes(value.shape, (5, 1)) == (5, 1)
            if answer.teacher_share is not None:
                assert answer.teacher_share.dim() == 0 and 0.0 <= answer.teacher_share.item() <= 1.0
            if answer.observed is not None:
                assert answer.observed.shape[0] == 5 and torch.isfinite(answer.observed).all()
            assert policy.kd_ratio is None or 0.0 <= policy.kd_ratio <= 1.0
            assert math.isfinite(policy.temperature) and policy.temperature > 0
            policy.end_step(stats(0.7))

    def test_no_row_is_hotter_than_it_says_and_only_what_moves_moves(self, name):
        for options in ({}, *OPTIONS.get(name, ())):
            policy = policy_of(name, **options)
            highest = policy.highest
            seen = {kind: set(found) for kind, found in visited_by(policy).items()}
            assert policy.moves == (max(map(len, seen.values())) > 1), options
            if highest is not None:
                assert max(max(found) for found in seen.values()) <= highest * (1 + 1e-6), options
                assert highest <= 2 * max(max(found) for found in seen.values()), (options, "a bound, not any number")

    def test_forward_is_pure(self, name):
        policy = policy_of(name)
        policy.begin_step(0.4)
        before = policy.state()
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        first = policy(student, teacher, row_stats(student, teacher))
        second = policy(student, teacher, row_stats(student, teacher))
        assert all(torch.equal(a, b) for a, b in given(first, second))
        assert policy.state() == before

    def test_is_shift_invariant(self, name):
        """Softmax does not see an added constant, so the temperature must not either."""
        policy = policy_of(name)
        policy.begin_step(0.2)
        student, teacher = torch.randn(4, 7).double(), torch.randn(4, 7).double()
        plain = policy(student, teacher, row_stats(student, teacher))
        moved = policy(student + 100, teacher - 50, row_stats(student + 100, teacher - 50))
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in given(plain, moved))

    def test_no_gradient_into_the_logits(self, name):
        policy = policy_of(name)
        policy.begin_step(0.2)
        student = torch.randn(4, 7, requires_grad=True)
        value = policy(student, torch.randn(4, 7), row_stats(student, torch.randn(4, 7)))
        assert not any(part.requires_grad for part in value if part is not None)

    def test_state_survives_json_and_state_dict(self, name):
        policy, by_json, by_dict = (policy_of(name) for _ in range(3))
        progresses, gaps = [k / 10 for k in range(10)], [1.0, 2.0, math.nan, 0.5, -1.0, 3.0, 0.1, 0.0, 1.0, 1.0]
        walk(policy, progresses[:5], gaps[:5])
        by_json.load_state(json.loads(json.dumps(policy.state())))
        by_dict.load_state_dict(policy.state_dict())
        expected = walk(policy, progresses[5:], gaps[5:])
        assert walk(by_json, progresses[5:], gaps[5:]) == expected
        assert walk(by_dict, progresses[5:], gaps[5:]) == expected

    def test_the_temperature_reaches_loss_and_gradient(self, name):
        """The effect test: published code has lost the KD gradient, or never passed its temperature to the loss."""
        torch.manual_seed(0)
        head, teacher_head = Head(torch.randn(11, 5)), Head(torch.randn(11, 6))
        states = torch.randn(8, 5, requires_grad=True)
        policy = policy_of(name)
        loss = DistillationLoss(temperature=policy, kd_ratio=1.0, temperature_scaling="none")
        policy.begin_step(0.0)
        loss.kd_ratio = 1.0 if policy.kd_ratio is None else policy.kd_ratio  # equal weights: only T differs
        results = []
        for value in (None, 1.7):
            used = policy if value is None else build_temperature("constant", value=value)
            loss.temperature = used
            output = loss(states, head, torch.ones(8, 6), teacher_head, torch.zeros(8, dtype=torch.int64), 8)
            (grad,) = torch.autograd.grad(output.loss, states)
            assert output.loss.requires_grad and grad.abs().max() > 1e-3  # the KD gradient is not zero
            results.append((output.loss.item(), grad))
        assert abs(results[0][0] - results[1][0]) > 1e-3
        assert (results[0][1] - results[1][1]).abs().max() > 1e-3

    def test_a_foreign_state_is_refused(self, name):
        with pytest.raises(UserError, match="another policy"):
            policy_of(name).load_state({"nonsense": 1})


# --------------------------------------------------------------------------------------------------------- schedules


def test_constant():
    policy = build_temperature("constant", value=2.5)
    assert walk(policy, [0.0, 0.5, 1.0], [1.0, 1.0, 1.0]) == [2.5, 2.5, 2.5]


def test_linear():
    policy = build_temperature("linear", t_init=4.0, t_end=2.0)
    assert walk(policy, [0.0, 0.25, 1.0], [0.0] * 3) == pytest.approx([4.0, 3.5, 2.0], abs=1e-12)


def test_cosine_aims_at_zero_and_is_cut_at_the_floor():
    policy = build_temperature("cosine", t_init=3.0, t_min=1.0)
    expected = [3.0, 2.560660171779821, 1.5, 1.0, 1.0]  # 3 S(p) for p = 0, 1/4, 1/2; below 1 from p = 0.608 on
    assert walk(policy, [0.0, 0.25, 0.5, 0.75, 1.0], [0.0] * 5) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dtss", {}, "Did you mean 'dts'"),
        ("dts", {"rulee": "gap"}, "Did you mean 'rule'"),
        ("constant", {"value": 0}, "temperature.value"),
        ("constant", {"value": math.nan}, "temperature.value"),
        ("constant", {"value": True}, "temperature.value"),
        ("cosine", {"t_init": 1.0, "t_min": 2.0}, "temperature"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(UserError, match=words):
        build_temperature(name, **options)
