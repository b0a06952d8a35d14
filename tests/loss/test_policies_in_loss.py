"""Every policy through DistillationLoss: equal to the dense float64 reference in any chunks, step after step."""

from __future__ import annotations

import pytest
import torch

from dts_hf.divergences import DIVERGENCES, build_divergence
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.temperature import RowStats, build_temperature, temperature_policies
from tests.support import reference
from tests.support.loss_problem import (
    POLICIES,
    N,
    fused,
    in_chunks_of,
    leaves,
    problem,
    started,
    step_stats,
)
from tests.support.recorded import policy_of

# An option that must move the loss, and two values of it.
EFFECTS = {
    "constant": ("value", 1.5, 2.5),
    "linear": ("t_init", 3.0, 4.0),
    "cosine": ("t_init", 3.0, 4.0),
    "dts": ("t_init", 2.0, 3.0),
    "dtkd": ("tau", 2.0, 3.0),
    "ctkd": ("t_end", 3.0, 5.0),
    "adakd": ("c", 0.5, -0.5),
    "pocl": ("t_end", 2.0, 4.0),
    "logit_std": ("value", 2.0, 3.0),
    "norm_kd": ("t_norm", 1.5, 2.0),
    "annealing": ("t_max", 10, 4),
    "taid": ("t_start", 0.4, 0.9),
    "ats": ("tau_y", 2.0, 4.0),
    "cist": ("support", 3.0, 12.0),
}


def logits(data):
    z_s = reference.logits(*leaves(data), 0.9, 12.0)
    return z_s, reference.logits(data["teacher_states"], data["teacher_weight"], None)


def answer_of(policy, z_s, z_t, targets):
    """The policy asked once, for all rows at full size."""
    z_s, at = z_s.detach(), torch.arange(N)
    lse_s, lse_t = z_s.logsumexp(-1), z_t.logsumexp(-1)
    gap = None
    if policy.needs_sequence_gap:
        gaps = (lse_s - z_s[at, targets]) - (lse_t - z_t[at, targets])
        gap = torch.stack([gaps[at // 4 == k].mean() for k in (at // 4).tolist()])
    return policy(z_s, z_t, RowStats(lse_s - z_s[at, targets], lse_t - z_t[at, targets], lse_s, lse_t, gap))


def dense_kd(policy, options, answer, z_s, z_t, divergence, squared, targets):
    """The soft loss of each row, from the equations: the factor, the mixed target, the terms beside it.

    Temperatures made of z_s stay in its graph, unless the policy declares them as held.
    """
    d = reference.DIVERGENCES[divergence]
    share = 1.0 if answer.teacher_share is None else answer.teacher_share
    target = (1 - share) * z_s.detach() + share * z_t
    t_s, t_t = answer.student, answer.teacher
    factor = t_s * t_t if answer.scale is None else answer.scale
    if answer.scale_free is not None:
        t_s, t_t, factor = reference.SCALE_FREE[policy.name](z_s, z_t, **options)
    if policy.name == "cist":
        t_s, t_t, factor = reference.cist(z_s, z_t, *policy.heights(z_s.shape[-1]), policy.factor)
    factor = factor.reshape(-1) if squared else 1.0
    p = reference.softmax(target / t_t)
    if policy.name == "ats":
        tokens = targets if policy.target == "label" else z_t.argmax(-1)
        p = reference.ats_target(z_t, tokens, policy.tau_y, policy.tau_rest)
    kd = factor * d(p, reference.softmax(z_s / t_s))
    if answer.weight is not None:
        kd = kd * answer.weight.reshape(-1)
    for t, weight in policy.companions:
        kd = kd + weight * (t**2 if squared else 1.0) * d(reference.softmax(z_t / t), reference.softmax(z_s / t))
    return kd


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("case", POLICIES)
def test_equals_the_dense_reference_in_any_chunks(case, divergence, squared):
    policy, data = started(*POLICIES[case]), problem()
    z_s, z_t = logits(data)
    answer = answer_of(policy, z_s, z_t, data["targets"])
    kd = dense_kd(policy, POLICIES[case][1], answer, z_s, z_t, divergence, squared, data["targets"])
    ce = -torch.log(reference.softmax(z_s)[torch.arange(N), data["targets"]])
    ratio = 0.4 if policy.kd_ratio is None else policy.kd_ratio
    expected = ((1 - ratio) * ce + ratio * kd).sum() / 20.0
    expected_grads = torch.autograd.grad(expected, leaves(data))
    for chunk in (1, 7, None):
        loss = DistillationLoss(
            divergence,
            temperature=policy,
            kd_ratio=0.4,
            temperature_scaling="squared" if squared else "none",
            logits_budget_mb=in_chunks_of(chunk),
        )
        output = fused(loss, data, normalizer=20.0)
        assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
        for grad, expected_grad in zip(torch.autograd.grad(output.loss, leaves(data)), expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-10)
        assert output.sums["kd"].item() == pytest.approx(kd.sum().item(), abs=1e-10)
        t_s = answer.student.reshape(-1)
        assert output.sums["temperature"].item() == pytest.approx(t_s.expand(N).sum().item(), abs=1e-10)
        assert output.sums["temperature_min"].item() == pytest.approx(t_s.min().item(), abs=1e-12)
        assert output.sums["temperature_max"].item() == pytest.approx(t_s.max().item(), abs=1e-12)
        assert ("observed" in output.sums) == (answer.observed is not None)
        if answer.observed is not None:
            torch.testing.assert_close(output.sums["observed"], answer.observed.sum(0), rtol=0, atol=1e-10)


def test_per_token_policies_really_differ_between_rows_and_models():
    """Without this the comparison above could pass on policies that have fallen asleep."""
    data = problem()
    z_s, z_t = logits(data)
    spread = {}
    for name in sorted(temperature_policies()):
        answer = answer_of(started(name, {}), z_s, z_t, data["targets"])
        spread[name] = (answer.student.numel() == N, not torch.equal(answer.student, answer.teacher))
    assert {name for name, (per_row, _) in spread.items() if per_row} >= {
        "dtkd", "adakd", "logit_std", "norm_kd", "max_logit", "cist",
    }  # fmt: skip
    assert {name for name, (_, two) in spread.items() if two} >= {
        "dtkd", "logit_std", "norm_kd", "max_logit", "annealing", "cist",
    }  # fmt: skip


@pytest.mark.parametrize("case", POLICIES)
def test_a_run_does_not_depend_on_chunks_or_micro_batches(case):
    """Five optimizer steps, whole and cut: equal states and temperatures at every step."""
    name, options = POLICIES[case]
    seen = []
    for chunk, cuts in ((None, [slice(0, N)]), (3, [slice(0, 4), slice(4, 16), slice(16, N)])):
        policy = policy_of(name, **options)
        steps = []
        for k in range(5):
            data = problem(seed=k)
            policy.begin_step(k / 5)
            totals: dict[str, torch.Tensor] = {}
            for rows in cuts:
                loss = DistillationLoss(temperature=policy, logits_budget_mb=in_chunks_of(chunk))
                for key, value in fused(loss, data, rows).sums.items():
                    totals[key] = totals[key] + value if key in totals else value
            policy.end_step(step_stats(totals))
            steps.append(policy.temperature)
        seen.append((steps, policy.state()))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-9)
    for field, value in seen[0][1].items():
        if isinstance(value, float):
            assert value == pytest.approx(seen[1][1][field], abs=1e-9), field


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "none"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("case", ["ctkd", "ctkd_at_one"])
def test_a_learnt_temperature_gets_its_gradient(case, divergence, squared):
    policy, data = started(*POLICIES[case]), problem()
    z_s, z_t = (z.detach() for z in logits(data))
    t = torch.tensor(policy.temperature, dtype=torch.float64, requires_grad=True)
    options = {key: value for key, value in build_divergence(divergence).describe().items() if key != "name"}
    p, q = reference.softmax(z_t / t), reference.softmax(z_s / t)
    if divergence in reference.HELD_WEIGHTS:  # of the kd_loss that is reported: nothing is held
        options["weight"] = reference.HELD_WEIGHTS[divergence](p, q, **options)
    d = reference.divergence(divergence, p, q, data["targets"], options, reference.softmax(z_t))
    (expected,) = torch.autograd.grad((d * (t**2 if squared else 1.0)).sum(), t)
    for chunk in (1, 7, None):
        loss = DistillationLoss(
            divergence,
            temperature=policy,
            temperature_scaling="squared" if squared else "none",
            logits_budget_mb=in_chunks_of(chunk),
        )
        assert fused(loss, data).sums["temperature_grad"].item() == pytest.approx(expected.item(), abs=1e-10)


def test_ctkd_raises_the_loss_that_the_student_lowers():
    """The whole loop on one batch: at equal student, the temperature that CTKD moves to has the higher kd_loss."""
    policy, data = build_temperature("ctkd", learning_rate=0.05, ramp=0.0), problem()
    loss = DistillationLoss(temperature=policy)
    seen = []
    for k in range(12):
        policy.begin_step(k / 12)
        sums = fused(loss, data).sums
        seen.append(sums["kd"].item())
        policy.end_step(step_stats(sums))
    assert seen == sorted(set(seen))


def test_each_policy_has_an_effect_to_test():
    assert set(EFFECTS) == set(temperature_policies()) - {"max_logit", "replay"}  # they have no number for an option


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_moves_loss_and_gradient(name):
    option, *values = EFFECTS[name]
    data, results = problem(), []
    for value in values:
        loss = DistillationLoss(temperature=started(name, {option: value}), kd_ratio=0.8)
        output = fused(loss, data)
        results.append((output.loss.item(), torch.autograd.grad(output.loss, data["states"])[0]))
    assert abs(results[0][0] - results[1][0]) > 1e-4
    assert (results[0][1] - results[1][1]).abs().max() > 1e-4


def test_annealing_with_its_own_divergence_is_the_papers_loss():
    """Phase 1: the mean squared error of z_s and Phi z_t (centred: a softmax does not see a shift), no factor."""
    data = problem()
    z_s, z_t = logits(data)
    policy = started("annealing", {"phase_share": 0.5, "t_max": 5}, progress=0.3)  # 3 of 5 stages: Phi = 1 - 1/5
    centred = (z_s - z_s.mean(-1, keepdim=True)) - 0.8 * (z_t - z_t.mean(-1, keepdim=True))
    expected = centred.square().mean(-1).sum() / N
    output = fused(DistillationLoss("logit_mse", temperature=policy, kd_ratio=0.1), data)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    expected_grads = torch.autograd.grad(expected, leaves(data))
    for grad, expected_grad in zip(torch.autograd.grad(output.loss, leaves(data)), expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-10)


def test_annealing_trains_on_labels_alone_in_phase_two_whatever_the_loss_says():
    data = problem()
    output = fused(DistillationLoss(temperature=started("annealing", {"phase_share": 0.1}), kd_ratio=0.9), data)
    assert output.loss.item() == pytest.approx(output.sums["ce"].item() / N, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_low_precision_is_close_and_finite(name, dtype):
    """Policies see fp32 logits whatever the model computes in."""
    policy, data = started(name, {}), problem()
    exact = fused(DistillationLoss(temperature=policy), data).loss.item()
    low = {key: value if value.dtype == torch.int64 else value.detach().to(dtype) for key, value in data.items()}
    low["states"].requires_grad_()
    output = fused(DistillationLoss(temperature=policy), low)
    (grad,) = torch.autograd.grad(output.loss, low["states"])
    assert grad.dtype == dtype and torch.isfinite(grad).all()
    assert output.loss.item() == pytest.approx(exact, rel=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_rows_of_equal_logits_are_finite(name, dtype):
    """Equal for the student, for the teacher, for both: no deviation to divide by, no sharpness to compare."""
    policy, data = started(name, {}), problem()
    for flat in (("weight",), ("teacher_weight",), ("weight", "teacher_weight")):
        low = {key: value if value.dtype == torch.int64 else value.detach().to(dtype) for key, value in data.items()}
        for key in flat:
            low[key][:] = low[key][0]
        low["bias"] = torch.full_like(low["bias"], -5.0) if "weight" in flat else low["bias"]
        low["teacher_weight"] *= 4.0
        leaves = [low[key].requires_grad_() for key in ("states", "weight")]
        for divergence in sorted(DIVERGENCES):
            output = fused(DistillationLoss(divergence, temperature=policy, kd_ratio=0.9), low)
            assert torch.isfinite(output.loss), divergence
            for grad in torch.autograd.grad(output.loss, leaves):
                assert torch.isfinite(grad).all(), divergence


def test_a_scale_free_policy_must_give_its_own_factor():
    """T_s T_t would move with the student's deviation, and the loss could not know."""
    policy, data = build_temperature("norm_kd"), problem()
    forward = policy.forward
    policy.forward = lambda *given: forward(*given)._replace(scale=None)
    with pytest.raises(ValueError, match="'norm_kd' is scale-free, so it must give a scale"):
        fused(DistillationLoss(temperature=policy), data)


@pytest.mark.parametrize("case", POLICIES)
def test_no_rows(case):
    policy, data = started(*POLICIES[case]), problem()
    output = fused(DistillationLoss(temperature=policy), data, slice(0, 0), 1.0)
    output.loss.backward()
    assert output.loss.item() == 0.0 and not data["states"].grad.any()
