"""DTS: hand-computed trajectories of each rule, temperatures per row, decoupling, the solved range."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, StepStats, Temperatures, build_temperature
from dts_hf.temperature.parts import auto_range, dts_rules
from tests.support import controls, reference
from tests.support.stepping import stats, walk

OPTION_SETS = {
    "batch": {},
    "token": {"granularity": "token"},
    "token_code": {"granularity": "token", "rule": "code", "t_max": 4.0},
    "token_paper": {"granularity": "token", "rule": "paper", "t_max": 4.0},
    "sequence": {"granularity": "sequence"},
    "decoupled": {"decoupled": True},
    "decoupled_token": {"decoupled": True, "granularity": "token"},
    "decoupled_sequence": {"decoupled": True, "granularity": "sequence"},
    "auto": {"range": "auto", "support_max": 8, "support_min": 3},
    "auto_token": {"range": "auto", "support_max": 8, "support_min": 3, "granularity": "token"},
    "auto_decoupled": {"range": "auto", "support_max": 8, "support_min": 3, "decoupled": True},
    "auto_epochs": {"range": "auto", "support_max": 8, "support_min": 3, "decoupled": True, "epochs": 3},
}


def chunk(seed: int = 0, rows: int = 6, vocab: int = 11, dtype: torch.dtype = torch.float64):
    """(student logits, teacher logits, rows) with targets of all kinds and one gap for each half."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocab, generator=generator).to(dtype) * 3 for _ in range(2))
    return student, teacher, row_stats(student, teacher)


def row_stats(student: torch.Tensor, teacher: torch.Tensor) -> RowStats:
    lse_s, lse_t = student.logsumexp(-1), teacher.logsumexp(-1)
    picked = (torch.arange(len(student)) % student.shape[-1]).unsqueeze(-1)
    ce_s, ce_t = lse_s - student.gather(-1, picked).squeeze(-1), lse_t - teacher.gather(-1, picked).squeeze(-1)
    gaps = ce_s - ce_t
    halves = [part.mean().expand(len(part)) for part in gaps.chunk(2)]
    return RowStats(ce_s, ce_t, lse_s, lse_t, torch.cat(halves))


def with_gaps(gaps: list[float]) -> RowStats:
    """Rows with these gaps, for tokens and sequences alike."""
    gap = torch.tensor(gaps, dtype=torch.float64)
    teacher_ce = torch.full_like(gap, 2.0)
    return RowStats(gap + 2.0, teacher_ce, teacher_ce, teacher_ce, gap)


def present(temperatures: Temperatures) -> list[torch.Tensor]:
    return [value for value in temperatures if value is not None]


def per_row(temperatures: Temperatures) -> list[torch.Tensor]:
    """Everything said, as ``[1, 1]`` (one for all rows) or ``[C, K]``."""
    return [value.reshape(1, 1) if value.dim() == 0 else value for value in present(temperatures)]


def train(policy, steps, first=0, total=12):
    """Steps as a training loop takes them, over chunks of random logits; returns all that the policy ever said."""
    seen = []
    for step in range(first, first + steps):
        policy.begin_step(step / total)
        student, teacher, rows = chunk(step)
        said = policy(student, teacher, rows)
        observed = () if said.observed is None else tuple(said.observed.mean(0).tolist())
        seen.append((policy.temperature, policy.cosine, *(value.flatten().tolist() for value in said[:2]), observed))
        policy.end_step(stats((rows.student_ce - rows.teacher_ce).mean().item(), observed))
    return seen


# ------------------------------------------------------------------------------ the contract, for all kinds of options


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
class TestContract:
    def test_is_finite_positive_and_broadcasts(self, options):
        policy = build_temperature("dts", **options)
        for step in range(6):
            policy.begin_step(step / 5)
            student, teacher, rows = chunk(step, dtype=torch.float32)
            said = policy(student, teacher, rows)
            for value in (said.student, said.teacher):
                assert value.dtype == torch.float32 and torch.isfinite(value).all() and (value > 0).all()
                assert torch.broadcast_shapes(value.shape, (6, 1)) == (6, 1)
            assert math.isfinite(policy.temperature) and policy.temperature > 0
            policy.end_step(stats(0.7, () if said.observed is None else tuple(said.observed.mean(0).tolist())))

    def test_forward_is_pure(self, options):
        policy = build_temperature("dts", **options)
        train(policy, 3)
        policy.begin_step(0.4)
        before, inputs = policy.state(), chunk(1)
        kept = [value.clone() for value in (*inputs[:2], *inputs[2])]
        first, second = (present(policy(*inputs)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert policy.state() == before
        assert all(torch.equal(a, b) for a, b in zip(kept, (*inputs[:2], *inputs[2])))

    @pytest.mark.parametrize("steps", [0, 3])
    def test_is_shift_invariant(self, options, steps):
        policy = build_temperature("dts", **options)
        train(policy, steps)
        policy.begin_step(0.4)
        student, teacher, _ = chunk(5)
        plain = present(policy(student, teacher, row_stats(student, teacher)))
        student, teacher = student + 100, teacher - 50
        moved = present(policy(student, teacher, row_stats(student, teacher)))
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(plain, moved))

    @pytest.mark.parametrize("steps", [0, 3])
    def test_no_gradient_into_the_logits(self, options, steps):
        policy = build_temperature("dts", **options)
        train(policy, steps)
        policy.begin_step(0.4)
        student, teacher, _ = chunk(5)
        student.requires_grad_()
        assert not any(value.requires_grad for value in present(policy(student, teacher, row_stats(student, teacher))))

    @pytest.mark.parametrize("steps", [0, 3])
    def test_chunks_and_order_change_nothing(self, options, steps):
        policy = build_temperature("dts", **options)
        train(policy, steps)
        policy.begin_step(0.4)
        student, teacher, rows = chunk(9, rows=23)
        whole = policy(student, teacher, rows)
        for size in (1, 7, 23):
            order = torch.randperm(23, generator=torch.Generator().manual_seed(size))
            pieces = [
                per_row(policy(student[part], teacher[part], RowStats(*(value[part] for value in rows))))
                for part in order.split(size)
            ]
            for column, expected in zip(zip(*pieces), per_row(whole)):
                if len(expected) == 1:
                    assert all(torch.equal(piece, expected) for piece in column)
                else:
                    torch.testing.assert_close(torch.cat(column), expected[order], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("cut", [0, 1, 5])
    def test_state_survives_json_and_state_dict(self, options, cut):
        policy, by_json, by_dict = (build_temperature("dts", **options) for _ in range(3))
        train(policy, cut)
        by_json.load_state(json.loads(json.dumps(policy.state(), allow_nan=False)))
        by_dict.load_state_dict(policy.state_dict())
        expected = train(policy, 12 - cut, cut)
        assert train(by_json, 12 - cut, cut) == expected
        assert train(by_dict, 12 - cut, cut) == expected

    def test_a_foreign_state_is_refused(self, options):
        with pytest.raises(UserError, match="another policy"):
            build_temperature("dts", **options).load_state({"value": 1.0})

    def test_a_step_that_says_nothing_keeps_the_temperature(self, options):
        policy = build_temperature("dts", **options)
        train(policy, 4)
        before = policy.temperature
        said = policy(*chunk(0))
        empty = () if said.observed is None else (math.nan,) * said.observed.shape[-1]
        policy.end_step(stats(math.nan, empty))
        json.dumps(policy.state(), allow_nan=False)
        policy.begin_step(0.5)
        assert policy.temperature == before and policy.counters()["ignored_gaps"] == 1
        policy.end_step(stats(0.5))
        policy.begin_step(0.6)
        assert policy.temperature != before and policy.counters()["ignored_gaps"] == 1


# ---------------------------------------------------------------------------------------------------- DTS, by hand
# t_init 3, t_min 1, t_max 3, momentum 0.5; progress 0, 0.25, 0.5, 0.75. S = 1, 0.85355339, 0.5, 0.14644661.
# Step k uses the gap measured in step k - 1 and the progress of step k; the first step runs at t_init.


def dts(rule, **options):
    defaults = {"rule": rule, "t_init": 3.0, "t_min": 1.0, "t_max": 3.0, "momentum": 0.5}
    return build_temperature("dts", **{**defaults, **options})


PROGRESS = [0.0, 0.25, 0.5, 0.75]


def test_dts_gap_by_hand():
    # gap 1 -> a = 1/2: target 3 (S + (1 - S)/2) = 2.78033009; gap 3 -> a = 3/4: 3 (0.5 + 0.375) = 2.625;
    # gap -2 -> a = 0: 3 * 0.14644661 = 0.43933983, clipped to 1.
    t2 = 0.5 * 3.0 + 0.5 * 2.7803300858899106
    t3 = 0.5 * t2 + 0.5 * 2.625
    t4 = 0.5 * t3 + 0.5 * 1.0
    assert [t2, t3, t4] == pytest.approx([2.890165042944955, 2.757582521472478, 1.878791260736239], abs=1e-12)
    assert walk(dts("gap"), PROGRESS, [1.0, 3.0, -2.0, 0.0]) == pytest.approx([3.0, t2, t3, t4], abs=1e-12)


def test_dts_paper_by_hand():
    # gap 5 -> alpha = 5/6: does not fire, 3 S = 2.56066017;
    # gap -3 -> alpha = -3 / -2 = 1.5 fires: 3 * 0.5 * 1.5 = 2.25; gap 0 -> alpha 0: 3 * 0.14644661, clipped to 1.
    expected = [3.0, 2.7803300858899106, 2.515165042944955, 1.7575825214724776]
    assert walk(dts("paper"), PROGRESS, [5.0, -3.0, 0.0, 0.0]) == pytest.approx(expected, abs=1e-7)


def test_dts_code_by_hand():
    # gap 3 -> d = -3, alpha = -3 / -1.9999 = 1.500075: 3 * 0.85355339 * 1.500075 = 3.841, clipped to 3;
    # gap 1.5 -> alpha = -1.5 / -0.4999 = 3.0006 > 2 becomes 1.35: 3 * 0.5 * 1.35 = 2.025;
    # gap 0.5 -> no fire: clipped to 1.
    expected = [3.0, 3.0, 2.5125, 1.75625]
    assert walk(dts("code"), PROGRESS, [3.0, 1.5, 0.5, 0.0]) == pytest.approx(expected, abs=1e-9)


def test_dts_code_multiplier_table():
    """Boost largest at gap 2 and shrinking as the student gets worse: odd, but it is what the released code does."""
    table = {1.5: 1.35, 1.9: 1.35, 2.5: 1.6667, 3.0: 1.5, 4.0: 1.3333, 6.0: 1.2}
    multipliers = dts_rules.target("code", 1.0, 1.0, torch.tensor(list(table), dtype=torch.float64))
    assert multipliers.tolist() == pytest.approx(list(table.values()), abs=2e-4)
    assert (dts_rules.target("code", 1.0, 1.0, torch.tensor([-3.0, 0.0, 0.5, 0.99])) == 1.0).all()


@pytest.mark.parametrize("rule", ["paper", "code", "gap"])
def test_dts_equals_the_reference(rule):
    progresses = [k / 40 for k in range(40)]
    gaps = [3 * math.sin(k * 1.7) for k in range(40)]
    expected = reference.dts_trajectory(rule, progresses, gaps, 4.0, 1.5, 6.0, 0.9)
    policy = build_temperature("dts", rule=rule, t_init=4.0, t_min=1.5, t_max=6.0, momentum=0.9)
    assert walk(policy, progresses, gaps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", ["paper", "code", "gap"])
@pytest.mark.parametrize("gap", [-1.0, -1.0 - 1e-8, 1.0, 1.0 + 1e-4, -1e308, 1e308])
def test_dts_is_finite_on_the_poles(rule, gap):
    policy = dts(rule)
    for value in walk(policy, PROGRESS, [gap] * 4):
        assert 1.0 <= value <= 3.0


def test_dts_at_gap_minus_one_is_the_cosine():
    # alpha = -1 / 1e-8 = -1e8: far below 1, so the rule does not fire
    assert walk(dts("paper"), PROGRESS, [-1.0] * 4) == walk(dts("paper"), PROGRESS, [0.0] * 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["paper", "code", "gap"])
def test_a_gap_that_is_no_number_keeps_the_temperature_and_is_counted(rule, bad):
    policy = dts(rule)
    seen = walk(policy, PROGRESS, [0.5, bad, 0.5, 0.5])
    assert seen[2] == seen[1] and seen[3] != seen[2]
    assert policy.counters()["ignored_gaps"] == 1


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    st.floats(0.1, 5),
    st.floats(0, 5),
    st.floats(0, 5),
    st.floats(0, 0.99),
)
def test_rule_gap_stays_between_the_cosine_and_t_init(gaps, t_min, above, more, momentum):
    t_init = t_min + above
    policy = build_temperature("dts", t_init=t_init, t_min=t_min, t_max=t_init + more, momentum=momentum)
    plain = build_temperature("cosine", t_init=t_init, t_min=t_min)
    for k, gap in enumerate(gaps):
        for each in (policy, plain):
            each.begin_step(k / len(gaps))
        assert policy.cosine <= policy.temperature <= t_init
        assert plain.temperature <= policy.temperature + 1e-12
        policy.end_step(stats(gap))


def test_rule_gap_without_a_gap_is_its_cosine():
    policy = dts("gap")
    for k in range(20):
        policy.begin_step(k / 20)
        assert policy.temperature == policy.cosine
        policy.end_step(stats(-0.5))


def test_epoch_staircase():
    policy = dts("gap", epochs=4, momentum=0.0, t_min=0.5)
    seen = walk(policy, [k / 8 for k in range(8)], [0.0] * 8)
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[1] != seen[2]
    # the released code counts epochs from one: its last epoch has S = 0, so it runs at the floor
    code = dts("code", epochs=4, momentum=0.0)
    assert walk(code, [k / 8 for k in range(8)], [0.0] * 8)[-1] == 1.0


# ------------------------------------------------------------------------------------------------ per row, by hand
# t_init 3, t_min 1, t_max 4, momentum 0.5; progress 0, 0.5: S_m = 0.5 * 1 + 0.5 * 0.5 = 0.75, the cosine is 2.25.

ROW_TABLE = {
    # gap 1 -> a = 1/2: 3 (0.75 + 0.25 / 2); gap 3 -> a = 3/4: 3 (0.75 + 0.1875); gap <= 0: the cosine
    "gap": {1.0: 2.625, 3.0: 2.8125, 0.0: 2.25, -2.0: 2.25, 1e300: 3.0, math.nan: 2.25, math.inf: 2.25},
    # alpha = -3 / -2 = 1.5 fires: 2.25 * 1.5; -1.5 -> alpha 3: 6.75, clipped; 5 -> 5/6 and -1, the pole, do not fire
    "paper": {-3.0: 3.375, -1.5: 4.0, 5.0: 2.25, -1.0: 2.25, -1.0 - 1e-8: 2.25, math.nan: 2.25, -math.inf: 2.25},
    # 3 -> alpha 1.500075; 1.5 -> 3.0006, above 2, becomes 1.35; 0.5 and the pole do not fire
    "code": {3.0: 2.25 * 3 / 1.9999, 1.5: 3.0375, 0.5: 2.25, 1.0: 2.25, 1.0 + 1e-4: 2.25, math.inf: 2.25},
}


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("rule", ROW_TABLE)
def test_rows_by_hand(rule, granularity):
    policy = dts(rule, t_max=4.0, granularity=granularity)
    policy.begin_step(0.0)
    policy.end_step(stats(1.0))
    policy.begin_step(0.5)
    gaps, expected = list(ROW_TABLE[rule]), list(ROW_TABLE[rule].values())
    logits = torch.zeros(len(gaps), 5, dtype=torch.float64)
    said = policy(logits, logits, with_gaps(gaps))
    assert said.student.shape == (len(gaps), 1) and said.teacher is said.student and said.observed is None
    # 2 + gap - 2 shifts a gap near the pole by an ulp of 2
    assert said.student.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert policy.cosine == pytest.approx(2.25, abs=1e-12)
    # the mean gap of the last step was 1
    assert policy.temperature == pytest.approx({"gap": 2.625}.get(rule, 2.25), abs=1e-12)


def test_rows_of_the_first_step_are_at_t_init():
    policy = dts("gap", granularity="token")
    policy.begin_step(0.0)
    said = policy(torch.zeros(3, 5), torch.zeros(3, 5), with_gaps([-4.0, 0.0, 9.0]))
    assert said.student.tolist() == [[3.0]] * 3 and policy.temperature == 3.0


def test_sequence_reads_the_gap_of_the_sequence_and_token_its_own():
    rows = with_gaps([1.0, 5.0])._replace(sequence_gap=torch.tensor([3.0, 3.0], dtype=torch.float64))
    logits = torch.zeros(2, 5, dtype=torch.float64)
    said = {}
    for granularity in ("token", "sequence"):
        policy = dts("gap", granularity=granularity, momentum=0.0)
        assert policy.needs_sequence_gap == (granularity == "sequence")
        walk(policy, [0.0], [0.0])
        policy.begin_step(0.5)
        said[granularity] = policy(logits, logits, rows).student.flatten().tolist()
    assert said["sequence"] == pytest.approx([2.625, 2.625], abs=1e-12)  # 3 (0.5 + 0.5 * 3/4)
    assert said["token"] == pytest.approx([2.25, 2.75], abs=1e-12)  # 3 (0.5 + 0.5 * 1/2), 3 (0.5 + 0.5 * 5/6)
    with pytest.raises(ValueError, match="sequence_gap"):
        dts("gap", granularity="sequence")(logits, logits, rows._replace(sequence_gap=None))


GAPS = st.lists(st.floats(-50, 50), min_size=1, max_size=12)
RANGE = {"t_min": st.floats(0.1, 5), "above": st.floats(0, 5), "more": st.floats(0, 5), "momentum": st.floats(0, 0.99)}


@settings(deadline=None, max_examples=150)
@given(rule=st.sampled_from(["paper", "code", "gap"]), gaps=GAPS, steps=st.integers(1, 12), **RANGE)
def test_rows_equal_the_reference_and_keep_their_bounds(rule, gaps, steps, t_min, above, more, momentum):
    t_init, t_max = t_min + above, t_min + above + more
    limits = {"t_init": t_init, "t_min": t_min, "t_max": t_max, "momentum": momentum}
    policy = build_temperature("dts", rule=rule, granularity="sequence", **limits)
    progresses = [k / steps for k in range(steps)]
    walk(policy, progresses, [0.3] * steps)
    logits = torch.zeros(len(gaps), 3, dtype=torch.float64)
    seen = policy(logits, logits, with_gaps(gaps)).student.flatten().tolist()
    assert seen == pytest.approx(reference.dts_row_temperatures(rule, progresses, gaps, *limits.values()), abs=1e-9)
    assert all(t_min <= value <= t_max for value in seen)
    if rule == "gap":
        assert all(policy.cosine - 1e-12 <= value <= t_init + 1e-12 for value in seen)
        ordered = [value for _, value in sorted(zip(gaps, seen))]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))  # a larger gap is never colder


@pytest.mark.parametrize("rule", ["paper", "code", "gap"])
@pytest.mark.parametrize("gap", [-3.0, -1.0, 0.0, 0.4, 1.5, 3.0])
def test_without_momentum_and_with_one_gap_all_granularities_agree(rule, gap):
    seen = {}
    for granularity in ("batch", "sequence", "token"):
        policy = dts(rule, momentum=0.0, t_max=4.0, granularity=granularity)
        temperatures = []
        for progress in [k / 8 for k in range(8)]:
            policy.begin_step(progress)
            said = policy(torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), with_gaps([gap, gap]))
            if progress:
                temperatures += [said.student.max().item(), policy.temperature, policy.cosine]
            policy.end_step(stats(gap))
        seen[granularity] = temperatures
    assert seen["token"] == pytest.approx(seen["batch"], abs=1e-12)
    assert seen["sequence"] == pytest.approx(seen["batch"], abs=1e-12)


def test_rows_follow_the_epoch_staircase():
    policy = dts("gap", epochs=2, momentum=0.0, granularity="token")
    seen = walk(policy, [0.0, 0.25, 0.5, 0.75], [0.0] * 4)
    assert seen == pytest.approx([3.0, 3.0, 1.5, 1.5], abs=1e-12)


# -------------------------------------------------------------------------------------------------- decoupled, by hand
# k = max - mean: [4, 0, 0, 0] -> 3, [0, 8, 0, 0] -> 6, [16, 0, 0, 0] -> 12, [1, 0, 0, 0] -> 0.75.

STUDENT = [[4.0, 0, 0, 0], [16.0, 0, 0, 0], [5.0, 5, 5, 5], [0.0, 0, 0, 0], [1.0, 0, 0, 0]]
TEACHER = [[0.0, 8, 0, 0], [1.0, 0, 0, 0], [-7.0, -7, -7, -7], [0.0, 8, 0, 0], [0.1, 0.1, 0.1, 0.1]]
# ratios 1/2; 16 cut to 4; two flat rows: 1; a flat student: 1/4; a flat teacher: 4
ROOTS = [math.sqrt(0.5), 2.0, 1.0, 0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_decoupled_rows_by_hand(shift, dtype):
    policy = dts("gap", decoupled=True, granularity="token")
    policy.begin_step(0.0)
    student, teacher = torch.tensor(STUDENT, dtype=dtype) + shift, torch.tensor(TEACHER, dtype=dtype) + shift
    said = policy(student, teacher, with_gaps([0.0] * 5))
    tolerance = 1e-12 if dtype == torch.float64 and not shift else 1e-4
    assert said.student.flatten().tolist() == pytest.approx([3.0 * root for root in ROOTS], abs=tolerance)
    assert said.teacher.flatten().tolist() == pytest.approx([3.0 / root for root in ROOTS], abs=tolerance)
    assert said.observed is None and said.scale is None


def test_decoupled_batch_uses_the_geometric_mean_of_the_last_step():
    policy = dts("gap", decoupled=True)
    policy.begin_step(0.0)
    student, teacher = torch.tensor(STUDENT[:2]).double(), torch.tensor(TEACHER[:2]).double()
    said = policy(student, teacher, None)
    assert said.student.item() == said.teacher.item() == 3.0  # nothing is known yet
    assert said.observed.flatten().tolist() == pytest.approx([math.log(0.5), math.log(4.0)], abs=1e-12)
    policy.end_step(stats(0.0, tuple(said.observed.mean(0).tolist())))
    policy.begin_step(0.0)
    said = policy(student, teacher, None)
    # sqrt(1/2 * 4) = sqrt 2, so T_s = 3 * 2^(1/4)
    assert said.student.item() == pytest.approx(3.0 * 2**0.25, abs=1e-12)
    assert said.teacher.item() == pytest.approx(3.0 / 2**0.25, abs=1e-12)
    assert said.student.shape == () and policy.temperature == 3.0


def test_decoupled_equals_the_reference():
    student, teacher, rows = chunk(4, rows=40)
    student *= torch.linspace(0.1, 8, 40).unsqueeze(-1)
    coupled, decoupled = (dts("gap", decoupled=flag, granularity="token") for flag in (False, True))
    for policy in (coupled, decoupled):
        walk(policy, [0.0, 0.4, 0.6], [0.5] * 3)
    middle, said = coupled(student, teacher, rows).student, decoupled(student, teacher, rows)
    root = reference.sharpness_ratio(student, teacher).sqrt().unsqueeze(-1)
    torch.testing.assert_close(said.student, middle * root, rtol=0, atol=1e-12)
    torch.testing.assert_close(said.teacher, middle / root, rtol=0, atol=1e-12)
    torch.testing.assert_close(said.student * said.teacher, middle**2, rtol=0, atol=1e-12)
    assert root.min() == 0.5 and root.max() > 1.2  # both the clamp and the inside were met
    # where the clamp is idle, the divided distributions are equally sharp
    sharp = [(z / t - (z / t).mean(-1, keepdim=True)).amax(-1) for z, t in zip((student, teacher), said[:2])]
    inside = (root > 0.5).flatten() & (root < 2).flatten()
    torch.testing.assert_close(sharp[0][inside], sharp[1][inside], rtol=0, atol=1e-12)


def test_decoupled_survives_infinite_logits():
    policy = dts("gap", decoupled=True, granularity="token")
    policy.begin_step(0.0)
    masked = torch.tensor([[1.0, 2.0, -math.inf], [1.0, 2.0, 0.0]])
    said = policy(masked, masked.flip(0), with_gaps([0.0, 0.0]))
    assert torch.isfinite(said.student).all() and torch.isfinite(said.teacher).all()


# --------------------------------------------------------------------------------------------------------- range: auto
# Two levels: one token at a, the other V - 1 at 0. Then p_1 = e^(a/T) / (e^(a/T) + V - 1), and H is a formula.


def two_level_entropy(a: float, vocab: int, t: float) -> float:
    others = (vocab - 1) * math.exp(-a / t)
    return math.log1p(others) + (a / t) * others / (1 + others)


def two_level_temperature(a: float, vocab: int, support: float) -> float:
    low, high = 1e-2, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if two_level_entropy(a, vocab, middle) < math.log(support) else (low, middle)
    return low


def two_level(a: float, vocab: int, rows: int = 3) -> torch.Tensor:
    logits = torch.zeros(rows, vocab, dtype=torch.float64)
    logits[torch.arange(rows), torch.arange(rows) % vocab] = a
    return logits


def solve(policy, teacher: torch.Tensor):
    """One first step; what was observed."""
    policy.begin_step(0.0)
    assert policy.temperature == 1.0
    said = policy(torch.zeros_like(teacher), teacher, with_gaps([0.0] * len(teacher)))
    assert said.student.max() == said.student.min() == 1.0
    observed = tuple(said.observed.mean(0).tolist())
    policy.end_step(stats(0.0, observed))
    return observed


def test_the_observed_entropies_are_those_of_the_formula():
    observed = solve(build_temperature("dts", range="auto"), two_level(6.0, 200))
    assert len(observed) == len(auto_range.SUPPORT_GRID) == 19
    assert (auto_range.SUPPORT_GRID[0], auto_range.SUPPORT_GRID[-1]) == (0.25, 16.0)
    expected = [two_level_entropy(6.0, 200, t) for t in auto_range.SUPPORT_GRID]
    assert list(observed) == pytest.approx(expected, abs=1e-12)


def test_auto_by_hand_on_points_of_the_grid():
    # a = ln 199 at T = 1: the top token has 1/2, the others share 1/2: H = ln 2 + ln(199) / 2, support 2 sqrt(199).
    # At T = 1/2 the others weigh 199 / 199^2 = 1/199: H = ln(200/199) + 2 ln(199) / 200.
    a = math.log(199)
    high, low = 2 * math.sqrt(199), math.exp(math.log(200 / 199) + 2 * a / 200)
    policy = build_temperature("dts", range="auto", support_max=high, support_min=low, momentum=0.5)
    solve(policy, two_level(a, 200))
    assert policy.limits.solved_range == pytest.approx([1.0, 0.5], abs=1e-9)
    # from here on it is dts with t_init = t_max = 1, t_min = 1/2
    manual = build_temperature("dts", t_init=1.0, t_max=1.0, t_min=0.5, momentum=0.5)
    walk(manual, [0.0], [0.0])
    rest = [0.2, 0.5, 0.8, 1.0], [2.0, 0.1, -1.0, 0.0]
    assert walk(policy, *rest) == pytest.approx(walk(manual, *rest), abs=1e-9)
    assert policy.cosine == pytest.approx(manual.cosine, abs=1e-9)
    assert policy(two_level(a, 200), two_level(a, 200), None).observed is None  # later steps pay nothing


@pytest.mark.parametrize("granularity", ["batch", "token"])
@pytest.mark.parametrize(("a", "vocab"), [(6.0, 200), (9.0, 1000), (12.0, 50_000)])
def test_auto_between_the_points(a, vocab, granularity):
    policy = build_temperature("dts", range="auto", granularity=granularity)
    solve(policy, two_level(a, vocab))
    expected = [two_level_temperature(a, vocab, support) for support in (50, 10)]
    # all rows melt at one temperature here, the hardest case between the points; real rows melt one after another
    assert policy.limits.solved_range == pytest.approx(expected, rel=0.015)
    assert policy.temperature == policy.cosine == policy.limits.solved_range[0] > policy.limits.solved_range[1]


def test_auto_on_random_logits_meets_the_support():
    teacher = torch.randn(64, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    policy = build_temperature("dts", range="auto", support_max=100, support_min=5)
    solve(policy, teacher)
    for t, support in zip(policy.limits.solved_range, (100, 5)):
        p = reference.softmax(teacher / t)
        assert math.exp(-(p * p.log()).sum(-1).mean()) == pytest.approx(support, rel=0.01)


def flat_among(tokens: int) -> torch.Tensor:
    """Equal logits on so many tokens: as many on offer, at any temperature."""
    logits = torch.full((2, 30), -1e4, dtype=torch.float64)
    logits[:, :tokens] = 0.0
    return logits


@pytest.mark.parametrize(
    ("supports", "teacher", "words"),
    [
        ((190, 10), two_level(40.0, 200), r"support_max: got 190.* from 1 tokens \(T = 0.25\) to 18\d\.\d \(T = 16\)"),
        ((190, 185), two_level(40.0, 200), "support_max: got 190"),  # both: the ends would be [16, 16]
        ((1.2, 1.1), two_level(0.5, 200), "support_max: got 1.2"),  # both: [0.25, 0.25]
        ((150, 1.01), two_level(1.0, 200), "support_min: got 1.01"),
        ((28, 10), flat_among(20), "support_max: got 28, .* from 20 tokens"),
    ],
    ids=["above", "both_above", "both_below", "below", "flat"],
)
def test_a_support_out_of_reach_ends_the_run_with_the_reason(supports, teacher, words):
    policy = build_temperature("dts", range="auto", support_max=supports[0], support_min=supports[1])
    policy.check_classes(teacher.shape[-1])
    with pytest.raises(UserError, match=f"temperature.{words}.*range: manual"):
        solve(policy, teacher)
    assert policy.limits.solved_range == []


@pytest.mark.parametrize(
    ("options", "classes", "words"),
    [
        ({}, 50, "support_max: got 50, .* less than 50"),
        ({}, 3, "support_max: got 50"),
        ({"support_max": 500}, 400, "support_max: got 500, .* 400 classes"),
        ({}, 2, "range: got 'auto' over 2 classes, .* between 1 and 2"),
        ({"support_max": 1.9, "support_min": 1.2}, 2, "range: got 'auto' over 2 classes"),
    ],
)
def test_supports_that_no_temperature_gives_are_refused(options, classes, words):
    with pytest.raises(UserError, match=f"temperature.{words}"):
        build_temperature("dts", range="auto", **options).check_classes(classes)
    build_temperature("dts", range="auto", **options).check_classes(1000)
    build_temperature("dts").check_classes(classes)  # manual asks for no support


def test_auto_asks_again_after_a_step_that_said_nothing():
    policy = build_temperature("dts", range="auto")
    walk(policy, [0.0], [0.0])
    policy.begin_step(0.1)
    assert policy.temperature == 1.0 and policy.limits.solved_range == []
    policy.end_step(stats(0.0, (math.nan,) * 19))
    assert policy.limits.solved_range == []
    assert len(solve(policy, two_level(9.0, 1000))) == 19 and len(policy.limits.solved_range) == 2


# -------------------------------------------------------------------------------------------------- through the loss

VOCAB = 17


class Problem:
    """Nineteen labelled rows of four sequences, and heads."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.states, self.teacher_states = make(19, 5), make(19, 6)
        self.weight, self.teacher_weight = make(VOCAB, 5), make(VOCAB, 6)
        self.targets = torch.randint(0, VOCAB, (19,), generator=generator)
        self.sequences = torch.tensor([0] * 3 + [1] * 9 + [4] + [5] * 6)

    def run(self, policy, chunk_rows: int | None = None, part: slice = slice(None), **options):
        """Loss output and gradients of states and weight, over ``part`` of the rows."""
        budget = 256 if chunk_rows is None else (chunk_rows + 0.5) * 2 * 8 * VOCAB / 2**20
        loss = DistillationLoss(temperature=policy, logits_budget_mb=budget, **{"kd_ratio": 0.7, **options})
        states, weight = self.states[part].clone().requires_grad_(), self.weight.clone().requires_grad_()
        teacher = self.teacher_states[part], Head(self.teacher_weight)
        output = loss(states, Head(weight), *teacher, self.targets[part], 19, self.sequences[part])
        return output, torch.autograd.grad(output.loss, [states, weight])

    def dense(self, policy):
        """Loss and gradients at full size, with the policy's answer for all rows at once."""
        states, weight = self.states.clone().requires_grad_(), self.weight.clone().requires_grad_()
        z_s, z_t = (
            reference.logits(states, weight, None),
            reference.logits(self.teacher_states, self.teacher_weight, None),
        )
        every = torch.arange(19)
        ce_s, ce_t = (-torch.log(reference.softmax(z)[every, self.targets]).detach() for z in (z_s, z_t))
        gap = ce_s - ce_t
        sequence_gap = torch.stack([gap[self.sequences == number].mean() for number in self.sequences])
        said = policy(z_s, z_t, RowStats(ce_s, ce_t, ce_s, ce_t, sequence_gap))
        loss = reference.distillation_loss(
            z_s, z_t, self.targets, "forward_kl", {}, said.student, said.teacher, 0.7, True, 19
        )
        return loss, torch.autograd.grad(loss, [states, weight])


def train_by_the_loss(policy, problem, chunk_rows, parts):
    """Four optimizer steps of micro-batches ``parts``; temperatures and summed losses."""
    seen = []
    for step in range(4):
        policy.begin_step(step / 4)
        outputs = [problem.run(policy, chunk_rows, part)[0] for part in parts]
        total = {name: sum(output.sums[name] for output in outputs) for name in outputs[0].sums}
        mean = {name: total[name].item() / 19 for name in ("ce", "teacher_ce", "kd", "temperature")}
        seen += [policy.temperature, sum(output.loss.item() for output in outputs), mean["temperature"]]
        observed = (total["observed"] / 19).tolist() if "observed" in total else ()
        policy.end_step(StepStats(mean["ce"], mean["teacher_ce"], mean["kd"], 19, observed=tuple(observed)))
    return seen


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
class TestThroughTheLoss:
    @pytest.mark.parametrize("steps", [0, 4])
    def test_equals_the_dense_reference_for_every_chunk_size(self, options, steps):
        problem, policy = Problem(), build_temperature("dts", **options)
        train(policy, steps)
        policy.begin_step(0.5)
        expected, expected_grads = problem.dense(policy)
        for chunk_rows in (1, 7, None):
            output, grads = problem.run(policy, chunk_rows)
            assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
            for grad, expected_grad in zip(grads, expected_grads):
                torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-10)

    def test_micro_batches_and_chunks_change_nothing(self, options):
        """A split between sequences: the temperatures of the whole run stay what they were."""
        problem = Problem()
        runs = [
            train_by_the_loss(build_temperature("dts", **options), problem, chunk_rows, parts)
            for chunk_rows, parts in (
                (None, [slice(0, 19)]),
                (7, [slice(0, 19)]),
                (1, [slice(12, 19), slice(0, 12)]),
                (4, [slice(0, 3), slice(3, 3), slice(3, 13), slice(13, 19)]),
            )
        ]
        for other in runs[1:]:
            assert other == pytest.approx(runs[0], abs=1e-9)

    def test_the_temperature_reaches_loss_and_gradient(self, options):
        problem, policy = Problem(), build_temperature("dts", **options)
        train(policy, 3)
        policy.begin_step(0.5)
        by_constant = build_temperature("constant", value=policy.temperature * 1.3)
        options = {"kd_ratio": 1.0, "temperature_scaling": "none"}
        (ours, our_grads), (other, other_grads) = (problem.run(each, **options) for each in (policy, by_constant))
        assert our_grads[0].abs().max() > 1e-3  # the gradient of the soft loss is there
        assert abs(ours.loss.item() - other.loss.item()) > 1e-3
        assert (our_grads[0] - other_grads[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{"granularity": "token"}, {"granularity": "sequence"}, {"decoupled": True}], ids=str
)
def test_each_option_changes_the_loss(options):
    problem, losses = Problem(), []
    for each in ({}, options):
        policy = build_temperature("dts", **each)
        losses.append(train_by_the_loss(policy, problem, None, [slice(0, 19)])[-2])
    assert abs(losses[0] - losses[1]) > 1e-3


# ------------------------------------------------------------------------------------------------ through the Trainer

TRAINED = {
    "sequence": {"granularity": "sequence", "decoupled": True},
    "token": {"granularity": "token", "range": "auto", "support_max": 30, "support_min": 10},
    "batch": {
        "range": "auto",
        "support_max": 30,
        "support_min": 10,
        "decoupled": True,
        "momentum": 0.5,
    },
}


def trainer_for(folder, options, **arguments):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 4}
    return controls.trainer_for(folder, {"name": "dts", **options}, **{**defaults, **arguments})


def logged(trainer):
    names = ("temperature", "temperature_min", "temperature_max", "temperature_cosine", "kd_loss")
    return [[line[name] for name in names] for line in trainer.state.log_history if "kd_loss" in line]


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_a_training_run_is_the_same_split_or_resumed(options, tmp_path):
    whole = trainer_for(tmp_path / "whole", options, save_strategy="steps", save_steps=2)
    whole.train()
    expected = logged(whole)
    assert len(expected) == 4 and len({line[0] for line in expected[1:]}) == 3  # the temperature moves

    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    split = trainer_for(tmp_path / "split", options, **halves)
    split.train()
    assert logged(split) == [pytest.approx(line, rel=1e-4) for line in expected]

    resumed = trainer_for(tmp_path / "resumed", options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed)[-2:] == expected[2:]
    assert resumed.temperature.state() == whole.temperature.state()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "gapp"}, "Did you mean 'gap'"),
        ({"t_min": 0}, "temperature.t_min"),
        ({"t_min": 4.0}, "temperature.t_max"),
        ({"t_init": "3"}, "temperature.t_init"),
        ({"momentum": 1.0}, "temperature.momentum"),
        ({"epochs": 0}, "temperature.epochs"),
        ({"granularity": "word"}, "temperature.granularity"),
        ({"granularity": "tokens"}, "Did you mean 'token'"),
        ({"range": "autom"}, "Did you mean 'auto'"),
        ({"range": "auto", "t_init": 3.0}, "temperature.t_init: got 3.0 with range 'auto'"),
        ({"range": "auto", "t_min": 1.0}, "temperature.t_min"),
        ({"range": "auto", "t_max": 1.0}, "temperature.t_max"),
        ({"support_max": 50}, "temperature.support_max: got 50 with range 'manual'"),
        ({"support_min": 5}, "temperature.support_min"),
        ({"range": "auto", "support_max": 10}, "temperature.support_max"),
        ({"range": "auto", "support_min": 60}, "temperature.support_max"),
        ({"range": "auto", "support_min": 0.5}, "temperature.support_min"),
        ({"range": "auto", "support_max": math.inf}, "temperature.support_max"),
        ({"decoupled": "yes"}, "temperature.decoupled"),
        ({"seed": 1.5}, "temperature.seed"),
        ({"seed": -1}, "temperature.seed"),
        ({"seed": True}, "temperature.seed"),
        ({"seed": 1}, "temperature.seed"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        build_temperature("dts", **options)
