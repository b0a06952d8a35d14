"""Divergences: value and closed-form gradients against a float64 autograd reference, identities, limits, bad input."""

from __future__ import annotations

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.divergences import DIVERGENCES, Distribution, Distributions, build_divergence
from dts_hf.divergences.adaptive_kl import AdaptiveKL, _sorted_threshold, head_threshold
from dts_hf.errors import UserError
from tests.support import reference

ROOT = Path(__file__).resolve().parents[2]


def named(name, **options):
    return {"name": name, **options}


SPECS = [
    named("forward_kl"),
    named("reverse_kl"),
    named("symmetric_kl", weight=0.5),
    named("symmetric_kl", weight=0.9),
    named("jsd", beta=0.5),
    named("jsd", beta=0.1),
    named("skew_kl", alpha=0.1),
    named("skew_kl", alpha=0.6),
    named("skew_kl", alpha=0.0),
    named("skew_reverse_kl", alpha=0.1),
    named("skew_reverse_kl", alpha=0.6),
    named("skew_reverse_kl", alpha=0.0),
    named("adaptive_kl", mu=0.5),
    named("adaptive_kl", mu=0.9),
    named("tvd"),
    named("alpha_beta", alpha=0.2, beta=0.7),
    named("alpha_beta", alpha=0.5, beta=0.5),
    named("alpha_beta", alpha=2.0, beta=1.5),
    named("alpha_beta", alpha=0.8, beta=0.0),
    named("alpha_beta", alpha=0.0, beta=0.8),
    named("alpha_beta", alpha=0.0, beta=0.0),
    named("dkd", alpha=1.0, beta=0.5),
    named("dkd", alpha=0.3, beta=8.0),
    named("todi"),
    named("logit_mse"),
    named("csd", weights="teacher"),
    named("csd", weights="student"),
    named("eopd", entropy=0.8, weight=1.0, mode="add"),
    named("eopd", entropy=1.5, weight=0.3, mode="switch"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def distributions(teacher, student, targets=None):
    shifted = [logits - logits.amax(-1, keepdim=True) for logits in (teacher, student)]
    if targets is None:
        targets = torch.arange(len(teacher)) % teacher.shape[-1]
    return Distributions(Distribution.of(shifted[0]), Distribution.of(shifted[1]), targets)


def value_of(spec, teacher, student, targets=None):
    return build_divergence(spec).value_and_grad(distributions(teacher, student, targets))[0]


def pair(seed, shape, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_every_divergence_is_covered():
    assert {spec["name"] for spec in SPECS} == set(DIVERGENCES) == set(reference.DIVERGENCES)


@every_spec
@pytest.mark.parametrize("shape", [(1, 2), (3, 47), (13, 31)])
def test_value_and_gradients_equal_autograd(spec, shape):
    teacher, student = (logits.requires_grad_() for logits in pair(sum(shape), shape))
    targets = torch.arange(shape[0]) * 5 % shape[1]
    options = {key: value for key, value in spec.items() if key != "name"}
    p, q = reference.softmax(teacher), reference.softmax(student)
    expected = reference.divergence(spec["name"], p, q, targets, options)
    teacher_expected, student_expected = torch.autograd.grad(expected.sum(), [teacher, student])
    d = distributions(teacher.detach(), student.detach(), targets)
    parts = [*d.p[:3], *d.q[:3]]
    kept = [x.clone() for x in parts]
    teacher_grad = build_divergence(spec).teacher_grad(d)
    assert all(torch.equal(x, old) for x, old in zip(parts, kept)), "teacher_grad wrote into a buffer"
    value, grad = build_divergence(spec).value_and_grad(d)
    tolerance = {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(value, expected.detach(), **tolerance)
    torch.testing.assert_close(grad, student_expected, **tolerance)
    torch.testing.assert_close(teacher_grad, teacher_expected, **tolerance)
    after = parts[:3] + parts[4:]
    assert all(torch.equal(x, old) for x, old in zip(after, kept[:3] + kept[4:])), "more than q.prob was overwritten"


@every_spec
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.01, 30))
def test_is_never_negative_and_zero_only_when_equal(spec, seed, width, spread):
    teacher, student = pair(seed, (4, width), spread)
    divergence = build_divergence(spec)
    value, grad = divergence.value_and_grad(distributions(teacher, student))
    scale = value.abs().clamp_min(1.0)
    assert (value >= -1e-11 * scale).all()
    assert grad.sum(-1).abs().max() < 1e-10 * max(1.0, float(grad.abs().max())) * width  # u + c is the same softmax
    distance = (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)
    assert (value[distance > 1e-3] > 0).all()
    same, gradient = divergence.value_and_grad(distributions(teacher, teacher + 5.0))
    assert same.abs().max() < 1e-10
    assert spec["name"] == "tvd" or gradient.abs().max() < 1e-10  # TVD has a kink there


@every_spec
@pytest.mark.parametrize("spread", [60.0, 150.0])
def test_float32_is_right_where_probabilities_underflow(spec, spread):
    """exp(-104) is 0 in float32 and an ordinary number in float64."""
    teacher, student = (logits.float().double() for logits in pair(7, (6, 64), spread))
    divergence, targets = build_divergence(spec), (teacher.argmax(-1) + torch.arange(6) % 2) % 64
    expected = [*divergence.value_and_grad(distributions(teacher, student, targets))]
    expected.append(divergence.teacher_grad(distributions(teacher, student, targets)))
    narrow = distributions(teacher.float(), student.float(), targets)
    assert (narrow.p.prob == 0).any() and (narrow.q.prob == 0).any()
    teacher_grad = divergence.teacher_grad(narrow)
    for got, want in zip((*divergence.value_and_grad(narrow), teacher_grad), expected):
        torch.testing.assert_close(
            got.double(), want, rtol=2e-5, atol=1e-6 * spread * max(1.0, want.abs().max().item())
        )


@every_spec
@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_extreme_and_masked_logits_stay_finite(spec, low):
    """One token certain for one model and impossible for the other, and a token nobody gives a probability."""
    high = 1e4 if low == -1e4 else 0.0
    teacher = torch.tensor([[high, low, low, 0.0], [high, low, low, 0.0], [low, 0.0, 1.0, low]])
    student = torch.tensor([[low, high, low, 0.0], [high, low, low, 0.0], [low, 1.0, 0.0, low]])
    for targets in ([0, 0, 0], [1, 1, 1], [3, 3, 3]):
        d = distributions(teacher, student, torch.tensor(targets))
        teacher_grad = build_divergence(spec).teacher_grad(d)
        for found in (teacher_grad, *build_divergence(spec).value_and_grad(d)):
            assert torch.isfinite(found).all()


# ---------------------------------------------------------------------------------------------- symmetry and identities


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (named("forward_kl"), named("reverse_kl")),
        (named("symmetric_kl", weight=0.3), named("symmetric_kl", weight=0.7)),
        (named("symmetric_kl"), named("symmetric_kl")),
        (named("jsd", beta=0.3), named("jsd", beta=0.7)),
        (named("jsd"), named("jsd")),
        (named("skew_kl", alpha=0.3), named("skew_reverse_kl", alpha=0.3)),
        (named("alpha_beta", alpha=0.2, beta=0.7), named("alpha_beta", alpha=0.7, beta=0.2)),
        (named("tvd"), named("tvd")),
        (named("todi"), named("todi")),
        (named("logit_mse"), named("logit_mse")),
    ],
    ids=str,
)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_exchanging_teacher_and_student(one, other, seed, spread):
    teacher, student = pair(seed, (5, 9), spread)
    torch.testing.assert_close(value_of(one, teacher, student), value_of(other, student, teacher))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.1, 5))
def test_identities(seed, spread):
    teacher, student = pair(seed, (5, 9), spread)
    of = lambda name, **options: value_of(named(name, **options), teacher, student)  # noqa: E731
    forward, reverse = of("forward_kl"), of("reverse_kl")
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)  # noqa: E731
    close(of("skew_kl", alpha=0.0), forward)
    close(of("skew_reverse_kl", alpha=0.0), reverse)
    close(of("symmetric_kl", weight=0.0), forward)
    close(of("symmetric_kl", weight=1.0), reverse)
    close(of("alpha_beta", alpha=1, beta=0), forward)
    close(of("alpha_beta", alpha=0, beta=1), reverse)
    close(of("todi"), forward + reverse)
    close(0.5 * of("skew_kl", alpha=0.5) + 0.5 * of("skew_reverse_kl", alpha=0.5), of("jsd", beta=0.5))
    hellinger = (teacher.softmax(-1).sqrt() - student.softmax(-1).sqrt()).square().sum(-1) / 2
    close(of("alpha_beta", alpha=0.5, beta=0.5), 4 * hellinger)
    assert (of("tvd") <= 1 + 1e-12).all() and (of("jsd") <= math.log(2) + 1e-12).all()
    assert (of("skew_kl") <= math.log(10) + 1e-12).all() and (of("skew_reverse_kl") <= math.log(10) + 1e-12).all()
    assert (2 * of("tvd") ** 2 <= forward + 1e-12).all()  # Pinsker


@pytest.mark.parametrize("seed", range(3))
def test_limits_are_approached_continuously(seed):
    teacher, student = pair(seed, (5, 9), 1.0)

    def near(limit, path):
        """The distance to the limit falls in proportion to the step."""
        end = value_of(limit, teacher, student)
        far, close = ((value_of(path(step), teacher, student) - end).abs().max().item() for step in (1e-2, 1e-4))
        assert close < 0.03 * far

    near(named("forward_kl"), lambda step: named("alpha_beta", alpha=1.0, beta=step))
    near(named("reverse_kl"), lambda step: named("alpha_beta", alpha=step, beta=1.0))
    for exponent in (0.3, 2.0):  # the factor 1 / a^2 of the limit, which is 1 / a in some code, shows away from 1
        near(named("alpha_beta", alpha=exponent, beta=0), lambda step: named("alpha_beta", alpha=exponent, beta=step))  # noqa: B023
        near(named("alpha_beta", alpha=0, beta=exponent), lambda step: named("alpha_beta", alpha=step, beta=exponent))  # noqa: B023
    near(named("alpha_beta", alpha=0, beta=0), lambda step: named("alpha_beta", alpha=step, beta=step))
    near(named("alpha_beta", alpha=0, beta=0), lambda step: named("alpha_beta", alpha=0, beta=step))
    near(named("forward_kl"), lambda step: named("skew_kl", alpha=step))
    near(named("reverse_kl"), lambda step: named("skew_reverse_kl", alpha=step))


def test_jsd_vanishes_at_its_ends():
    teacher, student = pair(0, (5, 9), 1.0)
    for beta in (1e-6, 1 - 1e-6):  # and is not one of the two KLs, as an end point redefined would be
        assert value_of(named("jsd", beta=beta), teacher, student).max() < 1e-4


def test_logit_mse_is_twice_the_limit_of_a_high_temperature():
    teacher, student = pair(1, (5, 9))
    t = 1e3
    tempered = t * t * value_of("forward_kl", teacher / t, student / t)
    torch.testing.assert_close(2 * tempered, value_of("logit_mse", teacher, student), rtol=5e-2, atol=0)


@pytest.mark.parametrize("weights", ["teacher", "student"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_near_the_teacher_csd_is_twice_either_kl(weights, temperature):
    """T^2 KL at T is half the variance of z_s - z_t under the teacher's softmax at T, to second order."""
    teacher, other = pair(3, (5, 40))
    change = 0.01 * other / other.abs().max()
    student = teacher + change
    at_t = [logits / temperature for logits in (teacher, student)]
    p = at_t[0].softmax(-1)
    variance = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
    for spec, factor in ((named("forward_kl"), 2.0), (named("reverse_kl"), 2.0), (named("csd", weights=weights), 1.0)):
        value = factor * temperature**2 * value_of(spec, *at_t)
        torch.testing.assert_close(value, variance, rtol=0.01, atol=0.0)


def test_eopd_is_reverse_kl_and_forward_kl_where_the_teacher_is_unsure():
    teacher, student = pair(5, (40, 9), 2.0)
    unsure = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1) > 0.9
    assert 0 < unsure.sum() < 40
    forward, reverse = (value_of(named(name), teacher, student) for name in ("forward_kl", "reverse_kl"))
    for mode, expected in (
        ("add", reverse + 0.5 * unsure * forward),
        ("switch", torch.where(unsure, 0.5 * forward, reverse)),
    ):
        found = value_of(named("eopd", entropy=0.9, weight=0.5, mode=mode), teacher, student)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_skew_gradient_flows_through_the_mixture():
    """DistiLLM-2 holds the mixture constant; the two gradients differ, and ours is that of the divergence."""
    teacher, student = pair(3, (4, 11))
    q = student.softmax(-1).requires_grad_()
    p, alpha = teacher.softmax(-1), 0.3
    frozen = ((1 - alpha) * p + alpha * q).detach()
    student.requires_grad_()
    q = student.softmax(-1)
    (detached,) = torch.autograd.grad((q * (q.log() - frozen.log())).sum(), student)
    _, grad = build_divergence(named("skew_reverse_kl", alpha=alpha)).value_and_grad(
        distributions(teacher, student.detach())
    )
    assert (grad - detached).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- adaptive KL


def head_by_sorting(p, mu):
    """The shortest run of sorted tokens that reaches mu, with all that equal its last."""
    head = torch.zeros_like(p, dtype=torch.bool)
    for row, probabilities in enumerate(p.tolist()):
        order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
        mass = 0.0
        for token in order:
            if mass >= mu:
                break
            mass, last = mass + probabilities[token], probabilities[token]
        head[row] = p[row] >= last
    return head


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 300), st.floats(0.001, 30), st.floats(0.01, 0.99))
def test_head_equals_a_sort(seed, width, spread, mu):
    p = pair(seed, (3, width), spread)[0].softmax(-1)
    for threshold in (head_threshold, _sorted_threshold):  # on a CPU, on a GPU
        assert torch.equal(p >= threshold(p, mu), head_by_sorting(p, mu))


@pytest.mark.parametrize("head_threshold", [head_threshold, _sorted_threshold])
def test_head_with_ties_and_a_certain_token(head_threshold):
    uniform = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    assert (uniform >= head_threshold(uniform, 0.5)).all()
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    assert (certain >= head_threshold(certain, 0.5)).tolist() == [[False, True, False]]
    tied = torch.tensor([[0.25, 0.375, 0.25, 0.125]])  # both quarters, or none: 0.375 alone does not reach 0.5
    assert (tied >= head_threshold(tied, 0.5)).tolist() == [[True, True, True, False]]
    assert (tied >= head_threshold(tied, 0.375)).tolist() == [[False, True, False, False]]
    wide = torch.zeros(2, 5000, dtype=torch.float64).softmax(-1)
    assert (wide >= head_threshold(wide, 0.999)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 20), st.floats(0.01, 0.99))
def test_adaptive_weight(seed, spread, mu):
    teacher, student = pair(seed, (4, 33), spread)
    d = distributions(teacher, student)
    weight = AdaptiveKL(mu).forward_weight(d).squeeze(-1)
    assert (weight >= 0).all() and (weight <= 1).all()
    gap = (d.p.prob - d.q.prob).abs()  # unsorted, under an unsorted mask
    expected = (gap * head_by_sorting(d.p.prob, mu)).sum(-1) / gap.sum(-1)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight, reference.akl_weight(d.p.prob, d.q.prob, mu), rtol=1e-12, atol=1e-14)


def test_adaptive_kl_leans_to_the_side_of_the_error():
    p = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    in_the_head = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    in_the_tail = torch.tensor([[0.6, 0.25, 0.05, 0.05, 0.05]], dtype=torch.float64)
    weigh = lambda q: AdaptiveKL(0.5).forward_weight(distributions(p.log(), q.log())).item()  # noqa: E731
    assert weigh(in_the_head) == pytest.approx(0.5) and weigh(in_the_tail) == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------------ DKD


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 20), st.floats(0.1, 8))
def test_forward_kl_is_tckd_plus_the_rest_times_nckd(seed, width, spread):
    teacher, student = pair(seed, (1, width), spread)
    targets = torch.tensor([seed % width])
    rest = 1 - teacher.softmax(-1)[0, targets].item()
    d = lambda: distributions(teacher, student, targets)  # noqa: E731
    value, grad = build_divergence(named("dkd", alpha=1.0, beta=rest)).value_and_grad(d())
    expected, _ = build_divergence("forward_kl").value_and_grad(d())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    tckd, nckd = reference.dkd_terms(teacher.softmax(-1), student.softmax(-1), targets)
    torch.testing.assert_close(value, tckd + rest * nckd, rtol=1e-9, atol=1e-11)
    assert grad.sum().abs() < 1e-10


def test_dkd_sees_the_other_tokens_of_a_certain_teacher():
    """p_y = 1 in float32, and the ranking of the rest still counts."""
    teacher, student = torch.tensor([[300.0, 1.0, 0.0]]), torch.tensor([[300.0, 0.0, 1.0]])
    value, grad = build_divergence(named("dkd", alpha=1.0, beta=1.0)).value_and_grad(
        distributions(teacher, student, torch.tensor([0]))
    )
    share = math.e / (1 + math.e)
    assert value.item() == pytest.approx(2 * share - 1, rel=1e-5)
    assert grad.tolist() == [pytest.approx([0.0, 1 - 2 * share, 2 * share - 1], rel=1e-5)]


def test_dkd_without_targets_says_so():
    d = distributions(*pair(0, (2, 5)))._replace(targets=None)
    for call in ("value_and_grad", "teacher_grad"):
        with pytest.raises(ValueError, match="'dkd' needs the target tokens"):
            getattr(build_divergence("dkd"), call)(d)


def test_dkd_needs_something_beside_the_target():
    d = distributions(torch.zeros(2, 1), torch.zeros(2, 1))
    for call in ("value_and_grad", "teacher_grad"):
        with pytest.raises(ValueError, match="'dkd' needs two tokens or more"):
            getattr(build_divergence("dkd"), call)(d)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"dkd"}))
def test_a_vocabulary_of_one_token_has_nothing_to_learn(name):
    value, grad = build_divergence(name).value_and_grad(distributions(torch.ones(2, 1), torch.zeros(2, 1)))
    assert value.tolist() == [0.0, 0.0] and not grad.any()


# ------------------------------------------------------------------------------------------------- words, options, page


def test_a_literal_example():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    value, grad = build_divergence("forward_kl").value_and_grad(distributions(p.log(), q.log()))
    assert value.item() == pytest.approx(0.25 * 0.6931471805599453, abs=1e-15)
    assert grad.tolist() == [pytest.approx([-0.25, 0.25, 0.0], abs=1e-15)]


@every_spec
def test_describe_builds_the_same_again(spec):
    divergence = build_divergence(spec)
    assert divergence.describe() == spec
    assert build_divergence(divergence.describe()).describe() == spec
    assert build_divergence(divergence) is divergence


@pytest.mark.parametrize("kind", DIVERGENCES.values(), ids=DIVERGENCES)
def test_words_of_the_page_are_there(kind):
    words = [kind.title, kind.paper, kind.formula, kind.gradient, kind.use, kind.__doc__]
    assert all(words) and kind.paper.startswith("arXiv ") and kind.paper.split()[1] in kind.__doc__


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("forward_k", "Did you mean 'forward_kl'"),
        (named("jsd", beta=1.0), "loss.divergence.beta"),
        (named("jsd", beta=0), "forward_kl"),
        (named("jsd", alpha=0.5), "loss.divergence.alpha"),
        (named("forward_kl", beta=0.5), "takes no options"),
        ({"beta": 0.5}, "loss.divergence"),
        (named("symmetric_kl", weight=1.1), "loss.divergence.weight: got 1.1 .*between 0 and 1"),
        (named("symmetric_kl", weigth=1.1), "Did you mean 'weight'"),
        (named("skew_kl", alpha=1), "1 excluded"),
        (named("skew_reverse_kl", alpha=-0.1), "loss.divergence.alpha"),
        (named("adaptive_kl", mu=0), "ends excluded"),
        (named("adaptive_kl", mu=1.0), "loss.divergence.mu"),
        (named("alpha_beta", alpha=-0.5), "from 0 on"),
        (named("alpha_beta", beta=math.nan), "loss.divergence.beta"),
        (named("alpha_beta", beta="0.5"), "loss.divergence.beta: got '0.5'"),
        (named("dkd", beta=True), "loss.divergence.beta: got True"),
        (named("dkd", alpha=0, beta=0), "one of them above 0"),
        (named("dkd", alpha=math.inf), "loss.divergence.alpha"),
        (named("csd", weights="techer"), "got 'techer' for 'csd', expected one of teacher, student.*Did you mean"),
        (named("eopd", mode="swich"), "got 'swich' for 'eopd', expected one of add, switch.*Did you mean"),
        (named("eopd", entropy=0), "loss.divergence.entropy: got 0"),
        (named("eopd", weight=-1.0), "loss.divergence.weight"),
    ],
)
def test_bad_input(spec, words):
    with pytest.raises(UserError, match=words):
        build_divergence(spec)


def test_the_page_is_up_to_date():
    source = spec_from_file_location("_divergences_page", ROOT / "docs" / "_divergences_page.py")
    page = module_from_spec(source)
    source.loader.exec_module(page)
    written = (ROOT / "docs" / "divergences.md").read_text(encoding="utf-8")
    assert written == page.divergences_page(), "run python docs/generate.py"
    assert all(f"`{name}`" in written for name in DIVERGENCES)
