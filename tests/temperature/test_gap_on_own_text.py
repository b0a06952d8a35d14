"""What the gap is on text of the student's own, and what policies make of such steps."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, StepStats, build_temperature, temperature_policies
from dts_hf.temperature.base import TemperaturePolicy
from dts_hf.temperature.parts.per_teacher import PerTeacher
from tests.support.launching import ROOT
from tests.support.recorded import options_of

DRAWS, CONTEXTS, V = 200_000, 40, 24


def toy():
    """Logits ``[CONTEXTS, V]`` of a student and of a teacher that is like it, and the context of each draw."""
    draw = torch.Generator().manual_seed(3)
    student = 1.5 * torch.randn(CONTEXTS, V, generator=draw, dtype=torch.float64)
    teacher = student + torch.randn(CONTEXTS, V, generator=draw, dtype=torch.float64)
    return student, teacher, torch.randint(0, CONTEXTS, (DRAWS,), generator=draw), draw


def z_score(student, teacher, contexts, labels, expected):
    """How many standard errors the loss's own mean gap is from what is expected of it."""
    eye = Head(torch.eye(V, dtype=torch.float64))
    loss = DistillationLoss(temperature=1.0, kd_ratio=1.0)
    with torch.no_grad():
        sums = loss(student[contexts], eye, teacher[contexts], eye, labels, DRAWS).sums
    mean = (sums["ce"] - sums["teacher_ce"]).item() / DRAWS
    gaps = (teacher.log_softmax(-1) - student.log_softmax(-1))[contexts, labels]
    return (mean - expected) / (gaps.std().item() / math.sqrt(DRAWS))


def test_on_text_of_the_students_own_the_mean_gap_is_minus_the_reverse_kl():
    student, teacher, contexts, draw = toy()
    q, p = student.softmax(-1), teacher.softmax(-1)
    reverse = (q * (q.log() - p.log())).sum(-1)[contexts].mean().item()
    labels = torch.multinomial(q, DRAWS, replacement=True, generator=draw)  # [CONTEXTS, DRAWS]
    labels = labels[contexts, torch.arange(DRAWS)]
    assert reverse > 0.1
    assert abs(z_score(student, teacher, contexts, labels, -reverse)) < 4
    # On text of the teacher's it is + KL(teacher || student): what a rule that follows the gap takes it for
    of_teacher = torch.multinomial(p, DRAWS, replacement=True, generator=draw)[contexts, torch.arange(DRAWS)]
    forward = (p * (p.log() - q.log())).sum(-1)[contexts].mean().item()
    assert abs(z_score(student, teacher, contexts, of_teacher, forward)) < 4
    # Sampled at another temperature it is neither
    cold = torch.multinomial((student / 0.5).softmax(-1), DRAWS, replacement=True, generator=draw)
    assert abs(z_score(student, teacher, contexts, cold[contexts, torch.arange(DRAWS)], -reverse)) > 8


def told(gap):
    return StepStats(student_ce=2.0 + gap, teacher_ce=2.0, kd=1.0, num_items=10)


def test_while_it_holds_the_schedule_and_the_momentum_go_on_with_the_last_gap():
    """Steps 2, 3 and 6 are on text of the student's own; a policy that is told the last gap of the data once more agrees."""
    gaps, own = [3.0, 1.5, -9.0, -9.0, 0.7, 0.5, -9.0, 0.4], {2, 3, 6}
    held, other = build_temperature("dts", momentum=0.6), build_temperature("dts", momentum=0.6)
    seen, last = [], None
    for step, gap in enumerate(gaps):
        held.holding = step in own
        for policy in (held, other):
            policy.begin_step(step / len(gaps))
        seen.append((held.temperature, other.temperature))
        last = last if step in own else told(gap)
        other.end_step(last)
        if not held.holding:
            held.end_step(last)
    assert all(one == two for one, two in seen)
    assert held.state() == other.state()


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_rows_with_temperatures_by_their_labels_all_run_at_that_of_the_policy(granularity):
    policy = build_temperature("dts", granularity=granularity, momentum=0.0)
    policy.begin_step(0.0)
    policy.end_step(told(1.0))
    z = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    gaps = torch.tensor([2.0, -1.0, 0.5, 4.0])
    rows = RowStats(gaps, torch.zeros(4), torch.zeros(4), torch.zeros(4), gaps)
    for holding in (False, True):
        policy.holding = holding
        policy.begin_step(0.5)
        t = policy(z, z, rows).student
        assert policy.needs_sequence_gap == (granularity == "sequence" and not holding)
        assert policy.reads == ("nothing" if holding else "rows")
        if holding:  # also without a row to read
            assert t.shape == () and t.item() == pytest.approx(policy.temperature)
            assert torch.equal(policy(z, z[:0], RowStats(*[gaps[:0]] * 5)).student, t)
        else:
            assert len(t.unique()) == 4


def test_one_state_for_each_teacher_holds_in_all_of_them():
    policy = PerTeacher(build_temperature("dts", granularity="token"), ["a", "b"])
    assert not policy.any_text and not policy.holding
    policy.holding = True
    assert policy.holding and all(policy.of_teacher(name).holding for name in "ab")
    assert policy.of_teacher("a").reads == "nothing"


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_only_policies_whose_statistics_do_not_read_labels_go_on(name):
    """``any_text`` is kept: other labels, the same state and temperatures. TAID compares steps and is not among them."""
    options = options_of(name)
    z_s, z_t = (torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for gap in (0.2, 5.0):
        policy = build_temperature(name, **options)
        policy.begin_run()
        seen = []
        for step in range(3):
            policy.begin_step(step / 12)
            lse = [z.logsumexp(-1) for z in (z_s, z_t)]
            answer = policy(z_s, z_t, RowStats(torch.full((6,), 2 + 2 * gap), torch.full((6,), 2 + gap), *lse))
            seen.append((answer.student.tolist(), None if answer.raised is None else answer.raised.tolist()))
            observed = () if answer.observed is None else tuple(answer.observed.double().mean(0).tolist())
            policy.end_step(StepStats(2.0 + gap, 2.0, 1.0, 10, temperature_grad=0.3, observed=observed))
        found.append((seen, policy.state()))
    assert (found[0] == found[1]) == (policy.any_text or name == "taid")


def test_gaps_that_are_not_of_the_training_rows_go_on():
    for source in ("held_out", {"replay": "x"}):
        assert build_temperature("dts", gap_source=source).any_text
    assert not build_temperature("dts").any_text and not TemperaturePolicy.any_text


def test_the_table_of_the_page_says_of_every_policy_what_it_does():
    page = (ROOT / "docs" / "gap.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| policy | reads | there |\n|---|---|---|\n")
    rows = [line.split("|")[1:4] for line in table.split("\n\n")[0].splitlines()]
    found = {}
    for names, _, there in rows:
        for name in re.findall(r"`(\w+)`", names):
            if name in temperature_policies() and not (name == "dts" and "held out" in names):
                found[name] = there.strip().startswith("goes on")
    assert found == {name: build_temperature(name, **options_of(name)).any_text for name in temperature_policies()}
