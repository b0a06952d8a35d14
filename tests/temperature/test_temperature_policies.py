"""The policies beside DTS: hand-computed tables, float64 references, what each of them must not do, bad options.

The contract that all policies share is in test_temperature.py, their way through the loss in test_policies_in_loss.py.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.errors import UserError
from dts_hf.temperature import RowStats, StepStats, build_temperature, temperature_policies
from tests.support import reference
from tests.support.recorded import policy_of


def rows_of(student: torch.Tensor, teacher: torch.Tensor) -> RowStats:
    lse_s, lse_t = student.logsumexp(-1), teacher.logsumexp(-1)
    return RowStats(lse_s - student[:, 0], lse_t - teacher[:, 0], lse_s, lse_t)


def ask(policy, student, teacher):
    student, teacher = torch.as_tensor(student).double(), torch.as_tensor(teacher).double()
    return policy(student, teacher, rows_of(student, teacher))


def step_stats(kd: float = 1.0, gradient: float = 0.0, observed: tuple[float, ...] = ()) -> StepStats:
    return StepStats(2.5, 2.0, kd, 10, temperature_grad=gradient, observed=observed)


def column(values: torch.Tensor) -> list[float]:
    return values.flatten().tolist()


def close(values: list[float]):
    return pytest.approx(values, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- DTKD


def test_dtkd_by_hand():
    # k = max - mean; tau 2, so T_t + T_s = 4.
    # row 1: k_t = 6 - 2 = 4, k_s = 3 - 1 = 2: T_t = 4 * 4/6, T_s = 4 * 2/6.
    # row 2: k_t = -10 + 12 = 2, k_s = -5 + 9 = 4. (Raw maxima, -10 and -5, would give T_t = 8/3: the wrong way round.)
    # row 3: k_t = 20, k_s = 0.02: the ratio 1000 is cut at 3: T_t = 4 * 3/4, T_s = 4 * 1/4. row 4: the reverse.
    # row 5: both constant, no sharpness at all: ratio 1.
    teacher = [[6.0, 0, 0], [-10, -13, -13], [30, 0, 0], [0, 0, 0.03], [7, 7, 7]]
    student = [[0.0, 3, 0], [-5, -11, -11], [0, 0, 0.03], [30, 0, 0], [-2, -2, -2]]
    answer = ask(build_temperature("dtkd"), student, teacher)
    assert column(answer.teacher) == close([8 / 3, 4 / 3, 3.0, 1.0, 2.0])
    assert column(answer.student) == close([4 / 3, 8 / 3, 1.0, 3.0, 2.0])
    assert answer.scale is None  # T_s T_t


@settings(deadline=None, max_examples=50)
@given(st.floats(0.2, 5), st.floats(1, 10), st.integers(2, 40), st.integers(0, 10**6))
def test_dtkd_splits_twice_tau_and_equalises_the_maxima(tau, clamp, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(6, vocab, generator=generator).double() * 4 - 30
    teacher = torch.randn(6, vocab, generator=generator).double() * 2
    answer = ask(build_temperature("dtkd", tau=tau, clamp=clamp), student, teacher)
    torch.testing.assert_close(answer.student + answer.teacher, torch.full((6, 1), 2 * tau).double())
    k_s, k_t = ((z - z.mean(-1, keepdim=True)).amax(-1, keepdim=True) for z in (student, teacher))
    free = (k_t / k_s < clamp) & (k_t / k_s > 1 / clamp)
    torch.testing.assert_close((k_s / answer.student)[free], (k_t / answer.teacher)[free])
    assert (answer.teacher / answer.student <= clamp * (1 + 1e-12)).all()
    assert (answer.teacher / answer.student >= (1 - 1e-12) / clamp).all()


def test_dtkd_has_the_plain_term_as_an_option():
    assert build_temperature("dtkd").companions == ()
    assert build_temperature("dtkd", tau=3.0, w_kd=0.25).companions == ((3.0, 0.25),)


# ----------------------------------------------------------------------------------------------------------- CTKD


def test_ctkd_by_hand():
    # theta 0: T = 1 + 3/2. Step 1, p = 0: lambda 0, theta stays. Step 2, p = ramp/2: lambda 1/2, and Adam's step with
    # equal gradients is learning_rate exactly: theta = 0.05, T = 1 + 3 sigmoid(0.05) = 1 + 3 * 0.512497396484210.
    policy = build_temperature("ctkd", learning_rate=0.1, ramp=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.5):
        policy.begin_step(progress)
        seen.append(policy.temperature)
        policy.end_step(step_stats(gradient=2.0))
    assert seen == pytest.approx([2.5, 2.5, 2.537492189452630], abs=1e-9)  # Adam's 1e-8 moves the last digits
    assert build_temperature("ctkd", t_end=20.0, theta=1.0).temperature == pytest.approx(15.62117, abs=1e-5)  # paper


def test_ctkd_equals_the_reference():
    gradients = [math.sin(k * 0.9) + 0.3 for k in range(40)]
    policy = build_temperature("ctkd", learning_rate=0.05, ramp=0.25)
    slopes, rates, thetas = [], [], []
    for k, gradient in enumerate(gradients):
        policy.begin_step(k / 40)
        s = 1 / (1 + math.exp(-policy.theta))
        slopes.append(gradient * 3.0 * s * (1 - s))
        rates.append(0.05 * ((1 - math.cos(math.pi * k / 10)) / 2 if k < 10 else 1.0))
        policy.end_step(step_stats(gradient=gradient))
        thetas.append(policy.theta)
    assert thetas == close(reference.adam(slopes, rates, (0.9, 0.999)))


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("theta", [-1.0, 0.0, 1.0])
def test_ctkd_makes_the_loss_harder(theta, t_squared):
    """theta climbs the distillation loss. A gradient reversal with the wrong sign would make the task easier."""
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(20, 30, generator=generator).double() * 3 for _ in range(2))

    def kd(t):
        factor = t**2 if t_squared else 1.0
        return (factor * reference.forward_kl(reference.softmax(z_t / t), reference.softmax(z_s / t))).mean()

    policy = build_temperature("ctkd", theta=theta, ramp=0.0)
    losses = []
    for k in range(10):
        policy.begin_step(k / 10)
        t = torch.tensor(policy.temperature, dtype=torch.float64, requires_grad=True)
        loss = kd(t)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, t)
        policy.end_step(step_stats(gradient=gradient.item()))
    assert losses == sorted(set(losses))  # strictly rising


def test_ctkd_works_against_the_student_more_and_more():
    """lambda from 0 up to 1: published ports start at 1 and fade out, which trains an ally or a vanishing adversary."""
    policy = build_temperature("ctkd", ramp=0.4)
    strengths = []
    for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.9, 1.0):
        policy.begin_step(progress)
        strengths.append(policy.adversary)
    assert strengths == close([0.0, 0.14644660940672624, 0.5, 0.8535533905932737, 1.0, 1.0, 1.0])
    policy.begin_step(0.0)
    policy.end_step(step_stats(gradient=5.0))
    assert policy.theta == 0.0


def test_ctkd_stays_in_its_range_and_counts_gradients_that_are_no_numbers():
    policy = build_temperature("ctkd", learning_rate=1.0, ramp=0.0)
    for k in range(200):
        policy.begin_step(k / 200)
        policy.end_step(step_stats(gradient=math.nan if k == 3 else 1e3))
        assert 1.0 < policy.temperature <= 4.0
    assert policy.ignored_gradients == 1 and policy.steps == 199 and policy.temperature > 3.9


# ----------------------------------------------------------------------------------------------------------- AdaKD

# Two words: p = (a^2, 1 - a^2) against q = (1 - a^2, a^2) overlaps by 2 a sqrt(1 - a^2).
PAIRS = {0.0: 0.5, 0.2: 0.64, math.sqrt(0.2): 0.8, math.sqrt(0.4): 0.9}  # Hellinger distance -> p of the first word


def pair_logits():
    first = torch.tensor(list(PAIRS.values()), dtype=torch.float64)
    teacher = torch.stack([first, 1 - first], -1).log()
    return teacher.flip(-1) + 3.0, teacher - 1.0


def test_adakd_by_hand():
    # median sqrt 0.2. tanh(log x) = (x^2 - 1) / (x^2 + 1), so with x = s / median: x^2 = 0 (the floor of s), 0.2, 1, 2
    # give shat = -1, -2/3, 0, 1/3 and T = exp(-shat / 2).
    policy = build_temperature("adakd")
    policy.load_state({"log_median": math.log(math.sqrt(0.2))})
    answer = ask(policy, *pair_logits())
    assert answer.student is answer.teacher and answer.scale is None
    expected = [1.6487212707, 1.3956124250860895, 1.0, 0.846481724890614]
    assert column(answer.student) == pytest.approx(expected, abs=2e-6)
    assert column(answer.student)[1:] == close(expected[1:])
    inverse = build_temperature("adakd", c=-0.5, t_base=2.0)
    inverse.load_state(policy.state())
    assert column(ask(inverse, *pair_logits()).student)[1:] == close([2 / t for t in expected[1:]])


def test_adakd_uses_the_median_of_the_last_step():
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(501, 20, generator=generator).double() * 2
    student = teacher + torch.randn(501, 20, generator=generator).double() * torch.rand(501, 1, generator=generator)
    policy = build_temperature("adakd", t_base=1.5)
    first = ask(policy, student, teacher)
    assert column(first.student.reshape(-1)) == [1.5]  # nothing is known yet
    policy.end_step(step_stats(observed=tuple(first.observed.mean(0).tolist())))
    s = reference.hellinger(reference.softmax(teacher), reference.softmax(student))
    assert policy.log_median == pytest.approx(s.median().log().item(), abs=0.5 / 16)
    expected = 1.5 * torch.exp(-0.5 * torch.tanh(s.log() - policy.log_median))
    torch.testing.assert_close(ask(policy, student, teacher).student.squeeze(-1), expected, rtol=0, atol=1e-9)
    chunks = torch.cat([ask(policy, student[a : a + 7], teacher[a : a + 7]).student for a in range(0, 501, 7)])
    torch.testing.assert_close(chunks.squeeze(-1), expected, rtol=0, atol=1e-9)


def test_adakd_counts_each_row_once_and_survives_extremes():
    policy = build_temperature("adakd")
    policy.load_state({"log_median": -1.0})
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 0.0], [5.0, 1.0, -3.0]])
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [5.0, 1.0, -3.0]])
    for dtype in (torch.float32, torch.float64):
        answer = policy(student.to(dtype), teacher.to(dtype), rows_of(student.to(dtype), teacher.to(dtype)))
        assert torch.isfinite(answer.student).all()
        assert math.exp(-0.5) <= answer.student.min() and answer.student.max() <= math.exp(0.5) + 1e-6
        assert answer.observed.sum(-1).tolist() == [1.0] * 4
        assert answer.observed[2].nonzero().item() == 127  # disjoint: s = 1
        assert answer.observed[1].nonzero().item() == 0  # equal: s = 0


def test_adakd_keeps_its_median_where_a_step_tells_nothing():
    policy = build_temperature("adakd")
    policy.end_step(step_stats(observed=(0.0,) * 64 + (1.0,) + (0.0,) * 63))  # all rows in the bin from -4 to -3.9375
    assert policy.log_median == -4.0 + 0.5 / 16
    for nothing in ((), (math.nan,) * 128, (0.0,) * 128):
        policy.end_step(step_stats(observed=nothing))
        assert policy.log_median == -4.0 + 0.5 / 16


# ----------------------------------------------------------------------------------------------------------- POCL


def test_pocl_by_the_paper():
    policy = build_temperature("pocl")
    seen = []
    for progress in (0.0, 0.24, 0.25, 0.49, 0.5, 0.75, 1.0):
        policy.begin_step(progress)
        seen.append((policy.temperature, policy.kd_ratio))
    temperatures, ratios = zip(*seen)
    assert temperatures == close([1.0, 1.0, 4 / 3, 4 / 3, 5 / 3, 2.0, 2.0])
    assert ratios == close([0.7, 0.7, 0.8, 0.8, 0.9, 1.0, 1.0])


def test_pocl_can_leave_the_ratio_alone_and_have_one_stage():
    policy = build_temperature("pocl", schedule_kd_ratio=False, stages=1, t_start=1.5)
    policy.begin_step(0.9)
    assert policy.kd_ratio is None and policy.temperature == 1.5


# ------------------------------------------------------------------------------------- deviations of the logits

# Unbiased deviations: (1, 2, 3) -> 1; (0, 2, 4) -> 2; (0, 0, 3): mean 1, (1 + 1 + 4) / 2 = 3 -> sqrt 3.


def test_logit_std_by_hand():
    answer = ask(build_temperature("logit_std"), [[1.0, 2, 3], [5, 5, 5]], [[0.0, 2, 4], [0, 0, 3]])
    assert column(answer.student) == close([2.0, 2.0])  # equal logits have no deviation: they are divided by 2 alone
    assert column(answer.teacher) == close([4.0, 3.4641016151377544])
    assert answer.scale.item() == 4.0 and answer.scale_free.tolist() == [[True], [False]]


def test_logit_std_is_the_z_score():
    z = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).double() * 5 - 40
    answer = ask(build_temperature("logit_std", value=3.0), z, z * 2)
    expected = reference.softmax((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) / 3.0)
    torch.testing.assert_close(reference.softmax(z / answer.student), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(answer.teacher, 2 * answer.student, rtol=1e-12, atol=0)


def test_norm_kd_by_hand():
    answer = ask(build_temperature("norm_kd"), [[1.0, 2, 3], [5, 5, 5]], [[0.0, 2, 4], [0, 0, 3]])
    assert column(answer.student) == close([1.5, 1.5])
    assert column(answer.teacher) == close([3.0, 2.598076211353316])
    assert column(answer.scale) == close([9.0, 6.75])


def test_max_logit_by_hand():
    # row 1: the largest z-score of (0, 2, 4) is 1; row 2: of (0, 0, 3) it is 2 / sqrt 3; row 3: constant, so the least
    # that any other row can have, 1 / sqrt 3.
    teacher, student = [[0.0, 2, 4], [0, 0, 3], [7, 7, 7]], [[0.0, 0, 3], [1, 2, 3], [1, 2, 3]]
    policy = build_temperature("max_logit")
    answer = ask(policy, student, teacher)
    assert column(answer.scale) == close([1.0, 4 / 3, 1 / 3])
    assert column(answer.student) == close([math.sqrt(3), 2 / math.sqrt(3), 1 / math.sqrt(3)])
    assert column(answer.teacher) == close([2.0, 2.0, 1 / math.sqrt(3)])
    policy.end_step(step_stats(observed=tuple(answer.observed.mean(0).tolist())))
    assert policy.temperature == pytest.approx((1 + 3 / math.sqrt(3)) / 3, abs=2e-7)


@pytest.mark.parametrize("offset", [0.0, -300.0])
def test_deviations_lose_no_digits_to_an_offset(offset):
    from dts_hf.temperature.parts.logit_statistics import standard_deviation

    z = torch.randn(3, 5001, generator=torch.Generator().manual_seed(0)) + offset
    torch.testing.assert_close(standard_deviation(z).double(), z.double().std(-1, keepdim=True), rtol=1e-5, atol=0)
    assert standard_deviation(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


# ------------------------------------------------------------------------------------------------------ Annealing-KD


def test_annealing_by_the_paper():
    # Phi = 1 - (T - 1) / 10 for T = 10 ... 1 is 0.1 ... 1.0; the teacher's temperature is 1 / Phi.
    policy = build_temperature("annealing", phase_share=0.8)
    seen = []
    for k in range(10):
        policy.begin_step(k * 0.08)
        assert policy.kd_ratio == 1.0
        seen.append(policy.temperature)
    assert seen == close([10.0, 5.0, 10 / 3, 2.5, 2.0, 5 / 3, 10 / 7, 1.25, 10 / 9, 1.0])
    for progress in (0.8, 0.9, 1.0):
        policy.begin_step(progress)
        assert policy.kd_ratio == 0.0 and policy.temperature == 1.0
    policy.begin_step(0.0)
    answer = ask(policy, torch.randn(2, 5), torch.randn(2, 5))
    assert (answer.student.item(), answer.teacher.item(), answer.scale.item()) == (1.0, pytest.approx(10.0), 1.0)


def test_annealing_without_a_second_phase():
    policy = build_temperature("annealing", phase_share=1.0)
    policy.begin_step(1.0)
    assert policy.kd_ratio == 1.0 and policy.temperature == 1.0


# --------------------------------------------------------------------------------------------------------------- TAID


def shares(policy, progresses, losses):
    seen = []
    for progress, loss in zip(progresses, losses):
        policy.begin_step(progress)
        answer = ask(policy, torch.randn(2, 5), torch.randn(2, 5))
        seen.append(answer.teacher_share.item())
        policy.end_step(step_stats(kd=loss))
    return seen


def test_taid_by_hand():
    # alpha 0.1. Steps 1 to 3: the line 0.4 + 0.6 p = 0.4, 0.46, 0.52 is ahead (0.46 + 0.1 * 0.50125 * 0.54 = 0.48707).
    # After step 2 the loss went 2 -> 1: delta 0.5, m 0.005; after step 3 1 -> 3: delta -2, m = 0.00495 - 0.02 = -0.01505,
    # sigmoid 0.496237571, t = 0.52 + 0.1 * 0.496237571 * 0.48 = 0.543819403 (the line is at 0.526).
    seen = shares(build_temperature("taid", alpha=0.1), [0.0, 0.1, 0.2, 0.21], [2.0, 1.0, 3.0, 1.0])
    assert seen == pytest.approx([0.4, 0.46, 0.52, 0.5438194034], abs=1e-9)
    assert build_temperature("taid").temperature == 1.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 50), min_size=2, max_size=40), st.floats(0.01, 1), st.floats(0, 1))
def test_taid_equals_the_reference_and_never_falls(losses, t_start, alpha):
    progresses = [k / len(losses) for k in range(len(losses))]
    seen = shares(build_temperature("taid", t_start=t_start, alpha=alpha), progresses, losses)
    assert seen == close(reference.taid_shares(progresses, losses, t_start, alpha, 0.99))
    assert seen == sorted(seen) and seen[-1] <= 1.0


def test_taid_survives_losses_that_are_zero_or_no_number():
    seen = shares(build_temperature("taid"), [k / 6 for k in range(6)], [0.0, 1.0, math.nan, math.inf, 0.0, 2.0])
    assert seen == close([0.4 + 0.6 * k / 6 for k in range(6)])  # the straight line


@pytest.mark.parametrize("start", [0.0, 1e-12, 1e-6])
def test_taid_moves_on_after_a_loss_near_zero(start):
    """A student that starts as its teacher: the first real loss is any number of times the one before it."""
    losses = [start] + [1e-2] * 99
    seen = shares(build_temperature("taid", alpha=0.1, t_start=0.1), [0.0] * 100, losses)
    assert seen[-1] > 0.95  # a momentum of -1e10 would leave it at 0.1
    usual = shares(build_temperature("taid", alpha=0.1, t_start=0.1), [0.0] * 100, [1e-2] * 100)
    assert seen == pytest.approx(usual, abs=0.02)


def test_taid_is_a_straight_line_in_short_runs_and_its_momentum_hardly_acts_in_long_ones():
    """What its page says, with the paper's values: 1,000 and 4,000 steps, and 20,000 of a loss that falls with noise."""
    generator = torch.Generator().manual_seed(0)

    def run(steps, losses):
        policy, seen = build_temperature("taid"), []
        for k in range(steps):
            policy.begin_step(k / steps)
            seen.append(policy.share)
            policy.end_step(step_stats(kd=losses[k]))
        return torch.tensor(seen, dtype=torch.float64)

    falling = (0.2 + 5 * torch.exp(-torch.arange(20000) / 3000)) * (1 + 0.2 * torch.randn(20000, generator=generator))
    falling = falling.clamp(min=0.05).tolist()
    for steps in (1000, 4000):
        line = 0.4 + 0.6 * torch.arange(steps, dtype=torch.float64) / steps
        torch.testing.assert_close(run(steps, falling), line, rtol=0, atol=1e-3)
    still = run(20000, [1.0] * 20000)
    assert 0.0 < (run(20000, falling) - still).abs().max() < 0.005
    assert (still - (0.4 + 0.6 * torch.arange(20000) / 20000)).max() > 0.1  # alpha does act


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_a_run_that_is_resumed_goes_on_as_if_unbroken(name):
    """With everything a step can report, not the gap alone: the answers of forward are equal, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 6, 9, generator=generator).double() for _ in range(8)]

    def run(policy, steps):
        answers = []
        for k in steps:
            policy.begin_step(k / 8)
            rows = rows_of(*logits[k])._replace(sequence_gap=torch.ones(6).double())
            answer = policy(*logits[k], rows)
            observed = () if answer.observed is None else tuple(answer.observed.mean(0).tolist())
            policy.end_step(StepStats(3.0 - 0.3 * k, 2.0, 2.0 - 0.1 * k, 6, 0.3 - 0.1 * k, observed))
            answers.append([part for part in answer if part is not None])
        return answers

    unbroken, resumed = policy_of(name), policy_of(name)
    run(unbroken, range(4))
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    for a, b in zip(run(unbroken, range(4, 8)), run(resumed, range(4, 8))):
        assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    assert resumed.state() == unbroken.state()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dtkd", {"tau": 0}, "temperature.tau: got 0"),
        ("dtkd", {"clamp": 0.5}, "temperature.clamp"),
        ("dtkd", {"w_kd": -1}, "temperature.w_kd"),
        ("dtkd", {"clmap": 2.0}, "Did you mean 'clamp'"),
        ("ctkd", {"t_start": 0}, "temperature.t_start"),
        ("ctkd", {"t_end": "3"}, "temperature.t_end"),
        ("ctkd", {"learning_rate": -0.1}, "temperature.learning_rate"),
        ("ctkd", {"betas": 0.9}, "expected two numbers"),
        ("ctkd", {"betas": [0.9, 1.0]}, "temperature.betas"),
        ("ctkd", {"ramp": 1.5}, "temperature.ramp"),
        ("ctkd", {"theta": math.nan}, "temperature.theta"),
        ("adakd", {"t_base": 0.0}, "temperature.t_base"),
        ("adakd", {"c": "0.5"}, "temperature.c"),
        ("pocl", {"stages": 0}, "temperature.stages"),
        ("pocl", {"stages": 2.0}, "temperature.stages"),
        ("pocl", {"schedule_kd_ratio": 1}, "temperature.schedule_kd_ratio"),
        ("pocl", {"kd_end": 1.5}, "temperature.kd_end"),
        ("logit_std", {"value": 0}, "temperature.value"),
        ("norm_kd", {"t_norm": -1.5}, "temperature.t_norm"),
        ("max_logit", {"value": 2.0}, "it takes no options"),
        ("annealing", {"t_max": 2.5}, "temperature.t_max"),
        ("annealing", {"phase_share": 0}, "temperature.phase_share"),
        ("taid", {"t_start": -0.1}, "temperature.t_start"),
        ("taid", {"alpha": 2}, "temperature.alpha"),
        ("taid", {"value": 0}, "temperature.value"),
        ("adaKD", {}, "Did you mean 'adakd'"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(UserError, match=words):
        build_temperature(name, **options)


def test_every_policy_says_what_the_page_shows():
    for name, kind in temperature_policies().items():
        for field in ("formula", "use", "cost"):
            assert getattr(kind, field, ""), f"{name} has no {field}"
