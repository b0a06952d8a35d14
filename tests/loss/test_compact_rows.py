"""Rows of a compact teacher: what is kept, how the tail is rebuilt, and how far that is from the whole distribution."""

from __future__ import annotations

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.compact_rows import KNOTS, CompactRows
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from tests.support.compact import rebuilt

N, V, K = 7, 400, 24


def problem(seed: int = 0, ties: bool = False):
    generator = torch.Generator().manual_seed(seed)
    z = 3.0 * torch.randn(N, V, generator=generator, dtype=torch.float64) + 40.0
    return (z * 2).round() / 2 if ties else z, torch.randint(0, V, (N,), generator=generator)


def rows_of(z, targets, top_k=K, dtype=torch.float64):
    return CompactRows.of(z, targets, top_k, dtype).to(torch.float64)


@pytest.mark.parametrize("ties", [False, True])
def test_the_label_and_the_largest_others_are_kept_and_of_equal_ones_the_first(ties):
    z, targets = problem(ties=ties)
    rows = rows_of(z, targets)
    for ids, row, target in zip(rows.ids.tolist(), z.tolist(), targets.tolist()):
        order = sorted(range(V), key=lambda i: (i != target, -row[i], i))
        assert ids == sorted(order[:K])
    if ties:  # the case is there: the last kept logit is also one that is not kept
        last = z.gather(-1, rows.ids.long()).sort(-1).values[:, 1]
        assert bool(((z == last[:, None]).sum(-1) > 1).all())


@pytest.mark.parametrize("temperature", [1 / b for b in KNOTS if b] + [1e3])
def test_at_a_knot_the_kept_tokens_have_the_teachers_probabilities_and_the_tail_its_mass(temperature):
    z, targets = problem()
    found = rows_of(z, targets).at(temperature)
    torch.testing.assert_close(found.prob, rebuilt(z, targets, K, temperature), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.prob.sum(-1), torch.ones(N, dtype=torch.float64))
    assert float(found.logits.amax()) == 0.0


@pytest.mark.parametrize("temperature", [0.3, 0.6, 0.7, 1.3, 1.5, 2.7, 3.0, 5.5, 11.0, 30.0])
def test_between_knots_the_mass_of_the_tail_is_off_by_less_than_two_thousandths(temperature):
    z, targets = problem()
    rows = rows_of(z, targets)
    exact = torch.softmax(z / temperature, -1).gather(-1, rows.ids.long()).sum(-1)
    assert float((rows.kept_mass(temperature) - exact).abs().max()) < 3e-4
    torch.testing.assert_close(rows.at(temperature).prob, rebuilt(z, targets, K, temperature), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_entropy_is_the_teachers_own_and_not_that_of_an_even_tail(temperature):
    z, targets = problem()
    rows = rows_of(z, targets)
    own = torch.special.entr(torch.softmax(z / temperature, -1)).sum(-1)
    assert float((rows.entropy(temperature) - own).abs().max()) < 1e-3
    if temperature >= 2.0:
        assert float((rows.at(temperature).entropy() - own).min()) > 0.05


def test_each_row_may_have_its_own_temperature():
    z, targets = problem()
    temperatures = torch.linspace(0.2, 9.0, N, dtype=torch.float64)
    together = rows_of(z, targets).at(temperatures[:, None])
    for i, temperature in enumerate(temperatures.tolist()):
        alone = rows_of(z, targets)[i : i + 1].at(temperature)
        torch.testing.assert_close(together.prob[i : i + 1], alone.prob)


def test_how_the_logits_move_with_the_temperature_is_their_derivative():
    z, targets = problem()
    rows, temperature, step = rows_of(z, targets), 1.7, 1e-5
    found = rows.at(temperature, moving=True)
    ends = [rows.at(temperature * (1 + sign * step)) for sign in (-1, 1)]  # log b moves the other way
    difference = (ends[0].logits - ends[1].logits) / (2 * step)
    torch.testing.assert_close(found.by_sharpness, difference, rtol=1e-6, atol=1e-6)
    slopes = [(end.logits - end.log_norm) for end in ends]
    torch.testing.assert_close(found.log_prob_slope(), (slopes[1] - slopes[0]) / (2 * step), rtol=1e-6, atol=1e-6)


def test_mean_and_deviation_of_all_logits_are_exact():
    z, targets = problem()
    summary = rows_of(z, targets).summary()
    torch.testing.assert_close(summary.standard_deviation(), z.std(-1, keepdim=True), rtol=1e-6, atol=0.0)
    peak = z.amax(-1, keepdim=True) - z.mean(-1, keepdim=True)
    torch.testing.assert_close(summary.sharpness(), peak, rtol=1e-6, atol=0.0)


def test_all_tokens_kept_is_the_whole_distribution():
    z, targets = problem()
    rows = rows_of(z, targets, top_k=V)
    for temperature in (0.5, 1.0, 4.0):
        torch.testing.assert_close(rows.at(temperature).prob, torch.softmax(z / temperature, -1))
        assert float(rows.kept_mass(temperature).min()) == pytest.approx(1.0)
    torch.testing.assert_close(rows.summary().standard_deviation(), z.std(-1, keepdim=True))


def test_fp16_moves_probabilities_by_less_than_two_thousandths_of_the_row():
    z, targets = problem()
    z[:, 0] += 12.0  # as far apart as logits of language models
    half, whole = rows_of(z, targets, dtype=torch.float16), rows_of(z, targets)
    assert float((half.at(1.0).prob - whole.at(1.0).prob).abs().sum(-1).max()) < 5e-4


def test_what_is_no_number_is_refused_and_an_excluded_token_is_not():
    z, targets = problem()
    z[:, 5] = -torch.inf
    found = rows_of(z, targets).at(1.0)
    assert bool(torch.isfinite(found.logits).all()) and bool(torch.isfinite(found.entropy()).all())
    for bad in (torch.nan, torch.inf):
        z[2, 9] = bad
        with pytest.raises(UserError, match="not finite"):
            rows_of(z, targets)


def test_no_rows_are_no_rows():
    z, targets = problem()
    rows = rows_of(z[:0], targets[:0])
    assert len(rows) == 0 and rows.at(2.0).prob.shape == (0, V)


@pytest.mark.parametrize("scaling", ["squared", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("policy", ["constant", "dts", "logit_std", "norm_kd", "max_logit"])
def test_the_gradient_is_the_derivative_of_the_loss_as_beside_a_live_teacher(policy, divergence, scaling):
    """Central differences in float64, in eight directions, with temperatures made of the rows' summaries among them.

    In fp32 no step tells: at 1e-6 the rounding of the loss is as large as its change.
    """
    z_t, targets = problem(1)
    z_s = 2.0 * torch.randn(N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = DistillationLoss(divergence, temperature=policy, kd_ratio=0.7, temperature_scaling=scaling)
    identity = Head(torch.eye(V, dtype=torch.float64))
    teachers = {
        "live": (z_t, identity),
        "compact": (rows_of(z_t, targets, dtype=torch.float16), Head(torch.empty(V, 0, dtype=torch.float64))),
    }

    def value(logits, teacher):
        return loss(logits, identity, *teachers[teacher], targets, float(N)).loss

    generator, step, gradients = torch.Generator().manual_seed(3), 1e-4, {}
    for teacher in teachers:
        student = z_s.clone().requires_grad_()
        value(student, teacher).backward()
        gradients[teacher] = student.grad
        for _ in range(8):
            direction = torch.randn(N, V, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            with torch.no_grad():
                ends = [value(z_s + sign * step * direction, teacher).item() for sign in (1, -1)]
            derivative = float((student.grad * direction).sum())
            assert derivative == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-9), teacher
    apart = (gradients["compact"] - gradients["live"]).norm() / gradients["live"].norm()
    assert apart > 1e-4  # something is lost in the tail, so what is differentiated is not the live loss
