"""The loss kernels beside the PyTorch road in float64 and the dense reference: on a CPU interpreted, on a card native.

Tiles are made small, so that a short row has whole blocks, a rest, and threads without an entry.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no kernels where Triton is not installed")

from dts_hf.divergences import DIVERGENCES
from dts_hf.loss import fused_rows
from dts_hf.loss.road import why_not_fused
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import TemperaturePolicy, Temperatures, build_temperature, temperature_policies
from tests.support import reference
from tests.support.daily import one_in
from tests.support.loss_problem import POLICIES, started
from tests.support.recorded import policy_of
from tests.support.row_roads import FORMS, Chunk, apart, build_divergence, by_kernels, by_plain, chunk_of

#: What lies behind the end of a row is computed, and then left out.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")

MORE = {"dts_decoupled": ("dts", {"decoupled": True}), "dts_auto_unsolved": ("dts", {"range": "auto"})}
PLAIN_HEADS = ((1.0, None), (1.0, None))
#: Scale and soft-cap of student and teacher; not both models have one everywhere.
HEADS = (PLAIN_HEADS, ((0.7, 12.0), (1.3, 20.0)), ((0.5, None), (1.0, 30.0)), ((1.0, 15.0), (2.0, None)))
#: PyTorch does the rows of the others, see test_kernels_road.py.
KNOWN = [
    case for case, (name, _) in {**POLICIES, **MORE}.items() if temperature_policies()[name].without_kernels is None
]  # fmt: skip
PAIRS = [
    (policy, form) for policy, form in itertools.product(KNOWN, FORMS)
    if not (form == "dkd" and policy.startswith("ctkd"))  # has no kernel, see test_kernels_road.py
]  # fmt: skip
#: Every policy and every form, each with two or three of the others; all of them are for ``make soak``.
DAILY = [pair for place, pair in enumerate(PAIRS) if place % 11 == 0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cpu":
        monkeypatch.setattr(fused_rows, "_THREADS", 16)


def policy_named(case: str) -> TemperaturePolicy:
    if case == "dts_auto_unsolved":  # reads logits, until its first step has ended
        return policy_of("dts", range="auto")
    return started(*{**POLICIES, **MORE}[case])


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5, gradient: float | None = None) -> None:
    """Sums and gradients, each relative to its largest number."""
    (sums, grad), (expected_sums, expected_grad) = found, expected
    assert set(sums) == set(expected_sums)
    for name, value in expected_sums.items():
        # d kd / d T is a difference of sums that may cancel whole: as with logit_mse, whose T^2 D does not move with T
        parts = abs(float(expected_sums["kd"])) if name == "temperature_grad" else 1e-3
        assert sums[name].shape == value.shape and sums[name].dtype == torch.float32
        assert apart(sums[name], value, parts) <= tolerance, (name, sums[name], value)
    assert apart(grad, expected_grad, 1e-30) <= (tolerance if gradient is None else gradient)


def compare(policy: str, form: str, device: str) -> None:
    """One pair, under options that its place in the list chooses: so all of them meet."""
    place = PAIRS.index((policy, form))
    options: dict[str, Any] = {
        "heads": HEADS[place % 4], "squared": place % 3 > 0, "kd_ratio": (0.6, 1.0, 0.6, 0.3, 0.0)[place % 5],
        "in_place": place % 2 == 0,
    }  # fmt: skip
    chunk, asked = chunk_of(3 if policy == "replay" else 2, device=device), policy_named(policy)
    exact, plain = (by_plain(chunk, FORMS[form], asked, dtype, **options) for dtype in (torch.float64, torch.float32))
    # What cancels in the gradient (all but nothing is left of it for total variation, say) fp32 does not have
    gradient = max(1e-5, 5.0 * apart(plain[1], exact[1], 1e-30))
    assert_same(by_kernels(chunk, FORMS[form], asked, **options), exact, gradient=gradient)


@pytest.mark.parametrize(("policy", "form"), DAILY)
def test_kernels_give_what_pytorch_gives_in_float64(policy: str, form: str, device: str) -> None:
    compare(policy, form, device)


@pytest.mark.soak
@pytest.mark.parametrize(("policy", "form"), [pair for pair in PAIRS if pair not in DAILY])
def test_kernels_give_what_pytorch_gives_in_float64_everywhere(policy: str, form: str, device: str) -> None:
    compare(policy, form, device)


def test_no_divergence_and_no_policy_is_left_out() -> None:
    with_kernel = {name for name, kind in DIVERGENCES.items() if fused_rows.formula_of(kind(), 70) is not None}
    assert with_kernel == set(DIVERGENCES) - {"adaptive_kl"}
    assert {build_divergence(form).name for form in FORMS.values()} == with_kernel
    assert {policy for policy, _ in DAILY} == set(KNOWN) and {form for _, form in DAILY} == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_give_the_dense_reference(form: str, device: str) -> None:
    """From the equations at full size, with torch's autograd: no code is shared with either road."""
    chunk, policy = chunk_of(device=device), build_temperature("constant", value=1.5, teacher_value=3.0)
    heads = HEADS[1]
    sums, grad = by_kernels(chunk, FORMS[form], policy, heads=heads)
    raw = chunk.student.double().cpu().requires_grad_()
    z_s, z_t = (
        cap * torch.tanh(z * scale / cap)  # type: ignore[operator]
        for z, (scale, cap) in zip((raw, chunk.teacher.double().cpu()), heads)
    )
    options = {key: value for key, value in build_divergence(FORMS[form]).describe().items() if key != "name"}
    name, targets = build_divergence(FORMS[form]).name, chunk.targets.cpu()
    whole = reference.distillation_loss(z_s, z_t, targets, name, options, 1.5, 3.0, 0.6, True, 1.0)
    (expected,) = torch.autograd.grad(whole, raw)
    assert 0.4 * float(sums["ce"]) + 0.6 * float(sums["kd"]) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert apart(grad.cpu(), expected, 1e-30) <= 1e-5
    p, q = reference.softmax(z_t), reference.softmax(z_s)
    assert float(sums["kl"]) == pytest.approx(float(reference.forward_kl(p, q).sum().detach()), rel=1e-5)
    assert float(sums["student_entropy"]) == pytest.approx(float(-(q * q.log()).sum().detach()), rel=1e-5)
    assert float(sums["teacher_entropy"]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ low precision

#: One policy of each kind of answer: a number, rows' own, scale-free, a mixed target, a second term, a learnt one.
KINDS = ["constant_of_two", "dts_per_token", "logit_std", "taid_tempered", "dtkd_with_kd", "ctkd", "adakd"]
LOW = [
    (form, policy, dtype)
    for place, (form, policy) in enumerate(itertools.product(FORMS, KINDS))
    for dtype in (torch.bfloat16, torch.float16)
    if not (form == "dkd" and policy == "ctkd") and (place + (dtype == torch.float16)) % 2 == 0
]
LOW_DAILY = LOW[::7]


def compare_low(form: str, policy: str, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """On the same rounded logits neither a sum nor the gradient is worse than that of PyTorch in fp32."""
    chunk, asked = chunk_of(dtype=dtypes[0], device=device), policy_named(policy)
    chunk = Chunk(chunk.student, chunk.teacher.to(dtypes[1]), chunk.targets, chunk.gaps)
    exact, exact_grad = by_plain(chunk, FORMS[form], asked, torch.float64)
    plain, _ = by_plain(chunk, FORMS[form], asked, torch.float32)
    sums, grad = by_kernels(chunk, FORMS[form], asked)
    assert grad.dtype == dtypes[0]
    for name, value in exact.items():
        parts = abs(float(exact["kd"])) if name == "temperature_grad" else 1e-3
        assert apart(sums[name], value, parts) <= max(1e-5, apart(plain[name], value, parts)), name
    # As if computed exactly and rounded once: to the nearest number by a card, down by the interpreter's bf16
    digits = torch.finfo(dtypes[0]).eps * (1.0 if device == "cpu" and dtypes[0] == torch.bfloat16 else 0.5)
    allowed = 1.001 * digits * exact_grad.abs() + 1e-5 * exact_grad.abs().max()
    assert bool(((grad.double() - exact_grad).abs() <= allowed).all())


@pytest.mark.parametrize(("form", "policy", "dtype"), LOW_DAILY)
def test_kernels_are_no_worse_in_low_precision(form: str, policy: str, dtype: torch.dtype, device: str) -> None:
    compare_low(form, policy, (dtype, dtype), device)


@pytest.mark.soak
@pytest.mark.parametrize(("form", "policy", "dtype"), [case for case in LOW if case not in LOW_DAILY])
def test_kernels_are_no_worse_in_low_precision_everywhere(
    form: str, policy: str, dtype: torch.dtype, device: str
) -> None:
    compare_low(form, policy, (dtype, dtype), device)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_kernels_take_models_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    compare_low("jsd", "logit_std", dtypes, device)


# -------------------------------------------------------------------------------------------------------------- shapes

SIZES = [1, 2, 3, 31, 32, 33, 700, 1023, 1024, 1025, 2049]


@pytest.mark.parametrize("vocab", SIZES)
def test_kernels_take_any_vocabulary(vocab: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles as a card has them: rows within one, at its edges, of several."""
    monkeypatch.undo()
    form, policy = (("jsd", "constant_of_two"), ("forward_kl", "adakd"))[vocab % 2]
    chunk, asked = chunk_of(vocab=vocab, device=device), policy_named(policy)
    expected = by_plain(chunk, FORMS[form], asked, torch.float64)
    found = by_kernels(chunk, FORMS[form], asked)
    if vocab == 1:  # nothing to tell apart: the gradient is 0, and every sum but those of the temperatures
        assert apart(found[1], expected[1], 1.0) <= 1e-6
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("vocab", one_in(2, [2, 3]))
@pytest.mark.parametrize("form", FORMS)
def test_kernels_of_two_and_three_classes(form: str, vocab: int, device: str) -> None:
    chunk, asked = chunk_of(3, vocab, spread=1.0, device=device), policy_named("constant_of_two")
    expected = by_plain(chunk, FORMS[form], asked, torch.float64)
    assert_same(by_kernels(chunk, FORMS[form], asked), expected)


@pytest.mark.soak
@pytest.mark.parametrize("policy", ["constant_of_two", "dts_per_token", "logit_std", "taid_tempered"])
def test_kernels_of_a_whole_vocabulary(policy: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chunk, asked = chunk_of(vocab=50257, device=device), policy_named(policy)
    for form in ("forward_kl", "jsd", "dkd", "logit_mse"):
        assert_same(by_kernels(chunk, FORMS[form], asked), by_plain(chunk, FORMS[form], asked, torch.float64), 2e-5)


@pytest.mark.parametrize("rows", [1, 13])
def test_kernels_take_any_number_of_rows(rows: int, device: str) -> None:
    chunk, asked = chunk_of(rows, 40, device=device), policy_named("logit_std")
    assert_same(by_kernels(chunk, "jsd", asked), by_plain(chunk, "jsd", asked, torch.float64))


def test_kernels_take_rows_with_gaps_between_them(device: str) -> None:
    """Rows of a wider buffer, as a padded vocabulary leaves them; nothing behind a row is touched."""
    wide, asked = chunk_of(3, 80, device=device), policy_named("logit_std")
    targets = wide.targets % 70
    parts = Chunk(wide.student[:, 3:73], wide.teacher[:, 7:77], targets, wide.gaps)
    packed = Chunk(parts.student.contiguous(), parts.teacher.contiguous(), targets, wide.gaps)
    assert not parts.student.is_contiguous()
    settings = LossSettings(build_divergence("jsd"), asked, 0.6, True, 256.0, fused=True)
    head = Head(torch.empty(70, 1, device=device))
    rows = fused_rows.FusedRows(settings, head=head, teacher_head=head, has_teacher=True, with_grad=True,
                                math_dtype=torch.float32, device=torch.device(device))  # fmt: skip
    room = torch.full((3, 80), 7.0, device=device)
    before = wide.student.clone(), wide.teacher.clone()
    rows.run(parts.student, parts.teacher, targets, wide.gaps, room[:, 5:75])
    sums, grad = by_kernels(packed, "jsd", asked)
    assert torch.equal(room[:, 5:75], grad) and bool((room[:, :5] == 7.0).all() and (room[:, 75:] == 7.0).all())
    assert all(torch.equal(value, sums[name]) for name, value in rows.sums.items())
    assert torch.equal(wide.student, before[0]) and torch.equal(wide.teacher, before[1])


def test_kernels_write_no_gradient_where_none_is_needed(device: str) -> None:
    chunk, asked = chunk_of(device=device), policy_named("logit_std")
    expected = by_plain(chunk, "jsd", asked, torch.float64)
    sums, grad = by_kernels(chunk, "jsd", asked, with_grad=False)
    assert bool((grad == 7.0).all())
    assert_same((sums, expected[1]), expected)


@pytest.mark.parametrize("policy", ["constant_of_two", "logit_std", "dtkd_with_kd"])
def test_kernels_without_a_teacher_train_on_labels_alone(policy: str, device: str) -> None:
    chunk, asked = chunk_of(device=device), policy_named(policy)
    options: dict[str, Any] = {"has_teacher": False, "kd_ratio": 0.0, "in_place": True, "heads": (HEADS[1][0],) * 2}
    sums, grad = by_kernels(chunk, "forward_kl", asked, **options)
    expected, expected_grad = by_plain(chunk, "forward_kl", asked, torch.float64, **options)
    assert apart(sums["ce"], expected["ce"]) <= 1e-5 and apart(grad, expected_grad) <= 1e-5


# ------------------------------------------------------------------------------------------------------------- extremes


def extremes(device: str) -> dict[str, Chunk]:
    usual = chunk_of(device=device)
    row, label = torch.arange(2, device=device), usual.targets
    student, teacher = usual.student, usual.teacher
    sure, taught, wrong = student.clone(), teacher.clone(), student.clone()
    sure[row, label] += 300.0
    taught[row, label] += 300.0
    wrong[row, (label + 3) % 70] += 300.0
    huge = torch.where(torch.arange(70, device=device) % 2 == 0, 1e4, -1e4).expand(2, 70).contiguous()
    flat = torch.full_like(student, -5.0)
    pairs = {
        "student sure": (sure, teacher), "teacher sure": (student, taught), "both sure": (sure, taught),
        "student wrong": (wrong, teacher), "student wrong, teacher sure": (wrong, taught),
        "1e4 against -1e4": (huge, -huge), "1e4": (huge, teacher), "offset": (student - 100.0, teacher - 1000.0),
        "flat student": (flat, teacher), "flat teacher": (student, flat + 7.0), "both flat": (flat, flat + 7.0),
        "equal": (student, student.clone()),
    }  # fmt: skip
    return {name: Chunk(*pair, label, usual.gaps) for name, pair in pairs.items()}


EXTREMES = sorted(extremes("cpu"))
EXTREME_CASES = [
    case for case in itertools.product(EXTREMES, FORMS, ["constant_of_two", "max_logit", "ctkd", "taid_tempered"])
    if case[1:] != ("dkd", "ctkd")
]  # fmt: skip
EXTREME_DAILY = EXTREME_CASES[::37]
#: Whose gradient has log p - log q in it, and so multiplies what its last digits lack.


def compare_extreme(extreme: str, form: str, policy: str, device: str) -> None:
    """As near float64 as anywhere, or as PyTorch is in fp32; at logits of 1e4 to the digits that their size leaves."""
    tolerance, least, of_slope = (1e-3 if "1e4" in extreme else 2e-5), 1e-3, 1.0
    if "1e4" in extreme and form.startswith("csd"):
        # fp32 has such logits to 1e-3. It squares their differences: where those are alike, 1e-6 is left of it, and of its
        # slope in T, a product of such a rest and of differences of 2e4, some 40.
        least, of_slope = 1e-2, 1e5
    chunk, asked = extremes(device)[extreme], policy_named(policy)
    exact, exact_grad = by_plain(chunk, FORMS[form], asked, torch.float64)
    plain, plain_grad = by_plain(chunk, FORMS[form], asked, torch.float32)
    sums, grad = by_kernels(chunk, FORMS[form], asked)
    for name, value in exact.items():
        parts = abs(float(exact["kd"])) + of_slope if name == "temperature_grad" else least
        assert apart(sums[name], value, parts) <= max(tolerance, 4.0 * apart(plain[name], value, parts)), name
    assert apart(grad, exact_grad, 1e-6) <= max(tolerance, 4.0 * apart(plain_grad, exact_grad, 1e-6))


@pytest.mark.parametrize(("extreme", "form", "policy"), EXTREME_DAILY)
def test_kernels_bear_extreme_rows(extreme: str, form: str, policy: str, device: str) -> None:
    compare_extreme(extreme, form, policy, device)


@pytest.mark.soak
@pytest.mark.parametrize(("extreme", "form", "policy"), [case for case in EXTREME_CASES if case not in EXTREME_DAILY])
def test_kernels_bear_extreme_rows_everywhere(extreme: str, form: str, policy: str, device: str) -> None:
    compare_extreme(extreme, form, policy, device)


@pytest.mark.parametrize("policy", ["constant_of_two", "logit_std"])
def test_dkd_of_a_student_that_is_sure_of_its_label_has_a_gradient(policy: str, device: str) -> None:
    """Seen from the other entries the label's u is above 88, whose exponential is infinite in fp32."""
    compare_extreme("student sure", "dkd", policy, device)
    chunk = extremes(device)["student sure"]
    _, grad = by_kernels(chunk, FORMS["dkd"], policy_named(policy))
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("wrong", "policy"), [(-100, "constant_of_two"), (-1, "logit_std"), (70, "logit_std"), (2**40, "constant_of_two")]
)
def test_a_label_outside_the_vocabulary_is_no_number(wrong: int, policy: str, device: str) -> None:
    usual = chunk_of(device=device)
    chunk = Chunk(usual.student, usual.teacher, torch.tensor([3, wrong], device=device), usual.gaps)
    for form in ("forward_kl", "jsd", "dkd"):
        sums, grad = by_kernels(chunk, FORMS[form], policy_named(policy))
        assert bool(sums["ce"].isnan() and sums["kd"].isnan() and sums["kl"].isnan())
        assert bool(grad[1].isnan().all() and grad[0].isfinite().all())


def test_equal_models_have_nothing_to_learn(device: str) -> None:
    """KL, divergence, gap and the gradient of the soft loss are 0, not only small."""
    student = chunk_of(device=device).student
    chunk = Chunk(student, student.clone(), chunk_of(device=device).targets, chunk_of(device=device).gaps)
    for form in FORMS:
        sums, grad = by_kernels(chunk, FORMS[form], policy_named("constant"), kd_ratio=1.0)
        assert abs(float(sums["kd"])) <= 1e-6 and float(grad.abs().max()) <= 1e-6, form
        assert float(sums["kl"]) == 0.0 and float(sums["ce"]) == float(sums["teacher_ce"])
        assert float(sums["top1_agreement"]) == 2.0


def test_the_first_of_equal_choices_counts(device: str) -> None:
    """As in PyTorch on a CPU: the first of several largest logits is the student's choice."""
    student, teacher = torch.zeros(2, 70, device=device), torch.zeros(2, 70, device=device)
    student[:, [5, 38, 66]] = 3.0
    teacher[0, 5], teacher[1, 66] = 2.0, 2.0
    targets = torch.tensor([1, 1], device=device)
    sums, _ = by_kernels(Chunk(student, teacher, targets, targets.float()), "forward_kl", policy_named("constant"))
    assert float(sums["top1_agreement"]) == 1.0


# ----------------------------------------------------------------------------------------- what a policy says it reads


@pytest.mark.parametrize("case", [*POLICIES, *MORE])
def test_no_policy_reads_more_than_it_says(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown the whole logits instead, it answers the same."""
    chunk, honest = chunk_of(2, 35, device=device), policy_named(case)
    found = by_kernels(chunk, "forward_kl", honest)
    generous = policy_named(case)
    monkeypatch.setattr(type(generous), "reads", "logits")
    shown = by_kernels(chunk, "forward_kl", generous)
    assert_same(found, tuple(shown))


class Custom(TemperaturePolicy):
    """Says nothing about what it reads, and reads everything."""

    name = "custom_for_tests"

    @property
    def temperature(self) -> float:
        return 1.5

    def forward(self, student_logits: Any, teacher_logits: Any, rows: Any) -> Any:
        assert student_logits.dtype == teacher_logits.dtype == torch.float32
        self.most = max(getattr(self, "most", 0), len(student_logits))
        high = (student_logits - teacher_logits).median(-1, keepdim=True).values.sigmoid()
        t = 1.0 + high + rows.student_ce.unsqueeze(-1).sigmoid()
        return Temperatures(t, 2.0 * t, observed=teacher_logits[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_says_nothing_is_shown_whole_logits_a_few_rows_at_a_time(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, asked = chunk_of(5, dtype=dtype, device=device), Custom()
    expected = by_plain(chunk, "reverse_kl", asked, torch.float32, heads=HEADS[1])
    monkeypatch.setattr(fused_rows, "_SHOWN_BYTES", 2 * 4 * 70 + 1)
    asked.most = 0
    found = by_kernels(chunk, "reverse_kl", asked, heads=HEADS[1])
    assert asked.most == 2
    assert_same(found, expected, gradient=1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("says", ["nothing", "rows", "summary"])
def test_a_policy_that_reads_more_than_it_says_fails_loudly(
    says: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Custom()
    monkeypatch.setattr(Custom, "reads", says)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError, AttributeError)):
        by_kernels(chunk_of(3, device=device), "forward_kl", asked)


@pytest.mark.parametrize(
    ("form", "who"), [("forward_kl", "student"), ("forward_kl", "teacher"), ("skew_kl", "student")]
)
def test_an_entry_of_minus_infinity_leaves_a_gradient_where_pytorch_has_one(form: str, who: str, device: str) -> None:
    chunk, asked = chunk_of(device=device), policy_named("constant_of_two")
    getattr(chunk, who)[0, 5] = -torch.inf
    (_, grad), (_, expected) = (
        by_kernels(chunk, FORMS[form], asked),
        by_plain(chunk, FORMS[form], asked, torch.float64),
    )
    assert apart(grad, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_temperatures_of_another_dtype_cost_no_digits(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Any, z_s: Any, z_t: Any, rows: Any) -> Temperatures:
        return Temperatures(z_s[:, :1].sigmoid().to(dtype) + 1.0, z_t[:, :1].sigmoid().to(dtype) + 1.0)

    monkeypatch.setattr(Custom, "forward", answer)
    chunk = chunk_of(device=device)
    sums, grad = by_kernels(chunk, "forward_kl", Custom())
    expected, expected_grad = by_plain(chunk, "forward_kl", Custom(), torch.float32)
    assert apart(sums["kd"], expected["kd"]) <= 1e-5 and apart(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("road", [by_plain, by_kernels])
def test_a_mixed_target_has_one_share_for_all_rows(road: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would take the first row's for that of all."""
    asked = Custom()
    monkeypatch.setattr(Custom, "forward", lambda self, z_s, z_t, rows: Temperatures(
        z_s.new_ones(()), z_s.new_ones(()), teacher_share=torch.linspace(0.0, 1.0, len(z_s)).to(z_s).unsqueeze(-1)
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"gave teacher_share \[3, 1\], expected \[\]"):
        road(chunk_of(3, device=device), "forward_kl", asked, *([torch.float32] if road is by_plain else []))


def test_kernels_say_what_they_cannot_do(device: str) -> None:
    with pytest.raises(ValueError, match="'adaptive_kl' has no kernel"):
        by_kernels(chunk_of(device=device), "adaptive_kl", policy_named("constant"))
    settings = LossSettings(build_divergence("adaptive_kl"), policy_named("constant"), 0.5, True, 256.0)
    assert "adaptive_kl" in str(why_not_fused(settings, torch.device(device), 70, {torch.float32}))
