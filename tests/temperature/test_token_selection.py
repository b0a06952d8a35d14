"""AdaKD's token selection: which tokens are kept, how much they count, how the share moves, what it trains on."""

from __future__ import annotations

import math

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.temperature import RowStats, StepStats, build_temperature
from dts_hf.temperature.adakd import _log_quantile
from dts_hf.temperature.parts.token_selection import TokenSelection
from tests.support import reference
from tests.support.loss_problem import N, fused, in_chunks_of, problem, started, step_stats


def test_weights_by_hand():
    selection = TokenSelection(0.25, 0.1, 0.05, 0.05, 0.05)
    log_s = torch.tensor([-3.0, -2.0, -1.0, -0.5])
    assert selection.weights(log_s).tolist() == [1.0] * 4  # the first step has no threshold
    assert selection.take(0.0, 1.0, 1.0) == 0.25
    selection.log_threshold = -1.0
    assert selection.weights(log_s).tolist() == [0.0, 0.0, 4.0, 4.0]
    assert selection.log_values() == {"keep": 0.25, "kept_tokens": 1.0}


def test_quantile_by_hand():
    # Bins of 1/16 nat from -8: a quarter in the first, three quarters in the third
    shares = [0.25, 0.0, 0.75] + [0.0] * 125
    assert _log_quantile(shares, 0.25) == -8.0 + 1 / 16
    assert _log_quantile(shares, 0.5) == pytest.approx(-8.0 + (2 + 1 / 3) / 16)
    assert _log_quantile(shares, 1.0) == -8.0 + 3 / 16
    assert _log_quantile([0.0] * 128, 0.5) is None and _log_quantile([math.nan] * 128, 0.5) is None


def test_the_share_follows_the_loss_by_hand():
    # The running mean m is 0.99 m + 0.01 loss. Warm-up: the reference is its mean, 1. Loss -9 lowers m by 0.1: keep 0.5.
    # Loss 0.9 keeps m at its reference. Loss 100.9 raises it by 1: keep 0.75; then 1.125, cut at 1; then down to the floor.
    selection = TokenSelection("auto", 0.2, 0.5, 0.05, 0.1)
    seen = [selection.take(progress, loss, 1.0) for progress, loss in
            [(0.0, 1.0), (0.1, 1.0), (0.2, -9.0), (0.3, 0.9), (0.4, 100.9), (0.5, 101.9)]]  # fmt: skip
    assert seen == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.75, 1.0])
    assert selection.loss_reference == pytest.approx(2.9) and selection.take(0.6, math.nan, 1.0) == 1.0
    assert [selection.take(0.7, -100.0, 1.0) for _ in range(4)] == pytest.approx([0.5, 0.25, 0.2, 0.2])


def difficulties(data):
    z_s = reference.logits(data["states"], data["weight"], data["bias"], 0.9, 12.0)
    z_t = reference.logits(data["teacher_states"], data["teacher_weight"], None)
    p, q = reference.softmax(z_t), reference.softmax(z_s)
    return reference.hellinger(p, q), reference.forward_kl(p, q)


@pytest.mark.parametrize("scaling", ["squared", "none"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_it_trains_on_the_hardest_tokens_alone(scaling, chunk):
    """The second step keeps what is above the quantile of the first: here of the same rows, so the share is known."""
    data, policy = problem(), build_temperature("adakd", c=0.0, keep=0.3)
    loss = DistillationLoss(
        temperature=policy, kd_ratio=1.0, temperature_scaling=scaling, logits_budget_mb=in_chunks_of(chunk)
    )
    policy.end_step(step_stats(fused(loss, data).sums))
    hard, kl = difficulties(data)
    kept = hard.log() >= policy.selection.log_threshold
    assert kept.sum().item() == pytest.approx(0.3 * N, abs=1.0)  # the threshold is inside a bin
    assert hard[kept].min() > hard[~kept].max()
    output = fused(loss, data)
    assert output.loss.item() == pytest.approx((kl[kept].sum() / 0.3 / N).item(), abs=1e-10)
    grad, whole = (torch.autograd.grad(one, data["states"])[0] for one in (output.loss, kl.sum() / 0.3 / N))
    torch.testing.assert_close(grad[kept], whole[kept], rtol=0, atol=1e-10)
    assert not grad[~kept].any()
    policy.end_step(step_stats(output.sums))
    assert policy.log_values() == {"keep": 0.3, "kept_tokens": pytest.approx(kept.double().mean().item())}


def test_cross_entropy_is_of_all_tokens():
    data, policy = problem(), started("adakd", {"keep": 0.3})
    output = fused(DistillationLoss(temperature=policy, kd_ratio=0.0), data)
    plain = fused(DistillationLoss(temperature=1.0, kd_ratio=0.0), data)
    assert output.loss.item() == plain.loss.item()


def test_keeping_everything_is_no_selection():
    policy = build_temperature("adakd")
    assert (
        policy.selection is None and policy.state_fields == ("log_median",) and set(policy.state()) == {"log_median"}
    )
    z = torch.randn(3, 9)
    rows = RowStats(*[z.logsumexp(-1)] * 4)
    answer = policy(z, z.flip(0), rows)
    assert answer.weight is None and answer.observed.shape == (3, 128)


def test_the_state_of_a_selection_goes_on():
    options = {"keep": "auto", "keep_warmup": 0.2, "keep_step": 0.3, "keep_band": 0.001}
    whole, half = (build_temperature("adakd", **options) for _ in range(2))

    def step(policy, k):
        data = problem(seed=k)
        policy.begin_step(k / 8)
        sums = fused(DistillationLoss(temperature=policy, kd_ratio=1.0), data).sums
        stats = step_stats(sums)
        policy.end_step(StepStats(stats.student_ce, stats.teacher_ce, stats.kd * 0.2**k, N, observed=stats.observed))
        return policy.log_values()

    for k in range(4):
        step(whole, k)
    half.load_state(whole.state())
    assert whole.selection.kept < 1.0
    assert [step(half, k) for k in range(4, 8)] == [step(whole, k) for k in range(4, 8)]
    assert half.state() == whole.state()
    with pytest.raises(UserError, match="another policy"):
        build_temperature("adakd").load_state(whole.state())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "temperature.keep: got 0.0 .*above 0 to 1, or auto"),
        ({"keep": 1.5}, "temperature.keep: got 1.5"),
        ({"keep": "autom"}, "temperature.keep: got 'autom'.*Did you mean 'auto'"),
        ({"keep": True}, "temperature.keep: got True"),
        ({"keep_min": 0.0}, "temperature.keep_min"),
        ({"keep_step": 1.0}, "temperature.keep_step"),
        ({"keep_band": -0.1}, "temperature.keep_band"),
        ({"keep_warmup": 1.0}, "temperature.keep_warmup"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        build_temperature("adakd", **options)
