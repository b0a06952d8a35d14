"""The teacher's first choice in the place of each label: it moves what is said of the labels, and never the loss."""

from __future__ import annotations

import pytest
import torch

from dts_hf.divergences import DIVERGENCES
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature
from tests.support.loss_problem import H_T, N, V, in_chunks_of, leaves, problem

SEQUENCES = torch.arange(N) // 9


def run(loss, data, pseudo, teacher=None, normalizer=7.0):
    head = Head(data["weight"], data["bias"], logit_scale=0.9, softcap=12.0)
    teacher_head = Head(data["teacher_weight"], softcap=6.0)
    states = data["teacher_states"] if teacher is None else teacher
    sequences = SEQUENCES if loss.temperature.needs_sequence_gap else None
    output = loss(
        data["states"], head, states, teacher_head, data["targets"], normalizer, sequences, pseudo_labels=pseudo
    )
    return output, torch.autograd.grad(output.loss, leaves(data))


def by_hand(data):
    """(log p(a) - log q(a), - log p(a)) of each row in float64, a = argmax p."""
    z_s = data["states"] @ data["weight"].t() + data["bias"]
    z_s, z_t = (
        12.0 * (0.9 * z_s / 12.0).tanh(),
        6.0 * (data["teacher_states"] @ data["teacher_weight"].t() / 6.0).tanh(),
    )
    log_q, log_p = z_s.detach().log_softmax(-1), z_t.log_softmax(-1)
    choice = log_p.argmax(-1, keepdim=True)
    return (log_p - log_q).gather(-1, choice).squeeze(-1), -log_p.gather(-1, choice).squeeze(-1)


def loss_of(divergence="forward_kl", temperature=2.0, rows=None, **options):
    return DistillationLoss(
        divergence, temperature=temperature, kd_ratio=1.0, logits_budget_mb=in_chunks_of(rows), **options
    )


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "dkd"])
def test_the_loss_and_its_gradient_are_those_of_the_text_to_the_bit(divergence):
    data = problem()
    own, with_choice = (run(loss_of(divergence, rows=5), data, pseudo) for pseudo in (False, True))
    assert torch.equal(own[0].loss, with_choice[0].loss)
    for one, other in zip(own[1], with_choice[1], strict=True):
        assert torch.equal(one, other) and one.norm() > 0
    moved = {name for name, value in own[0].sums.items() if not torch.equal(value, with_choice[0].sums[name])}
    assert moved == {"ce", "teacher_ce"}


@pytest.mark.parametrize("rows", [None, 1, 5])
def test_the_gap_is_that_of_the_first_choices_by_hand(rows):
    data = problem()
    (gaps, of_teacher), sums = by_hand(data), run(loss_of(rows=rows), data, True)[0].sums
    assert (sums["ce"] - sums["teacher_ce"]).item() == pytest.approx(gaps.sum().item(), abs=1e-10)
    assert sums["teacher_ce"].item() == pytest.approx(of_teacher.sum().item(), abs=1e-10)


@pytest.mark.parametrize("rows", [None, 4, 12], ids=["whole", "cut", "some"])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_temperature_by_row_follows_the_first_choices(granularity, rows):
    policy = build_temperature("dts", granularity=granularity, momentum=0.0, t_min=0.5)
    for progress in (0.0, 0.5):
        policy.begin_step(progress)
    gaps, _ = by_hand(data := problem())
    if granularity == "sequence":
        gaps = torch.stack([gaps[number == SEQUENCES].mean() for number in SEQUENCES])
    excess = gaps.clamp(min=0)
    expected = (3.0 * (0.5 + 0.5 * excess / (excess + 1))).clamp(0.5, 3.0)
    sums = run(loss_of(temperature=policy, rows=rows), data, True)[0].sums
    assert sums["temperature"].item() == pytest.approx(expected.sum().item(), abs=1e-10)
    assert (
        abs(sums["temperature"].item() - run(loss_of(temperature=policy), data, False)[0].sums["temperature"].item())
        > 0.1
    )


def test_of_a_compact_teacher_it_is_the_largest_that_was_kept():
    data = problem()
    logits = (6.0 * (data["teacher_states"] @ data["teacher_weight"].t() / 6.0).tanh()).detach()
    rows = CompactRows.of(logits, data["targets"], 6, torch.float64)
    assert torch.equal(rows.first_choice, logits.argmax(-1))
    loss = DistillationLoss(temperature=2.0, kd_ratio=1.0)
    head = Head(data["weight"], data["bias"], logit_scale=0.9, softcap=12.0)
    empty = Head(torch.zeros(V, 0, dtype=torch.float64))
    sums = loss(data["states"], head, rows, empty, data["targets"], N, pseudo_labels=True).sums
    gaps, _ = by_hand(data)
    assert (sums["ce"] - sums["teacher_ce"]).item() == pytest.approx(
        gaps.sum().item(), abs=1e-4
    )  # its tail is in fp32


def test_what_would_enter_the_loss_is_refused():
    data = problem()
    with pytest.raises(ValueError, match=r"kd_ratio 0\.5 .*would be part of the loss"):
        run(DistillationLoss(temperature=2.0, kd_ratio=0.5), data, True)
    with pytest.raises(ValueError, match="the divergence 'dkd' would be part of the loss"):
        run(loss_of("dkd"), data, True)


def test_every_divergence_that_reads_the_targets_says_so():
    """Other targets, another loss: then, and only then."""
    data = problem()
    for name, kind in DIVERGENCES.items():
        losses = []
        for shift in (0, 1):
            moved = {**data, "targets": (data["targets"] + shift) % V}
            losses.append(run(loss_of(name), moved, False)[0].loss.item())
        assert (losses[0] != losses[1]) == kind.reads_targets, name


def test_no_rows_and_no_matrix_of_all_rows():
    data = problem()
    none = {
        **data,
        "states": data["states"][:0],
        "teacher_states": data["teacher_states"][:0],
        "targets": data["targets"][:0],
    }
    head, teacher_head = Head(none["weight"], none["bias"]), Head(none["teacher_weight"])
    output = loss_of()(
        none["states"], head, none["teacher_states"], teacher_head, none["targets"], 1.0, pseudo_labels=True
    )
    assert output.loss.item() == 0.0 and none["teacher_states"].shape == (0, H_T)
