"""Dual-space distillation: value and gradients against the dense reference, and the start of the maps."""

from __future__ import annotations

import pytest
import torch

from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.dual_space import Projectors, dual_space_loss, maps_between
from dts_hf.models.head import Head
from dts_hf.temperature import StepStats, build_temperature
from tests.support import reference

V_S, V_T, H_S, H_T, A = 19, 23, 5, 7, 11
STEP, BOUND = 1e-5, 1e-7
LEAVES = ("states", "weight", "to_student", "to_teacher")
DIVERGENCES = [
    {"name": "forward_kl"},
    {"name": "reverse_kl"},
    {"name": "jsd", "beta": 0.3},
    {"name": "skew_kl", "alpha": 0.1},
    {"name": "tvd"},
]


def problem(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    values = {
        "states": make(A, H_S), "weight": make(V_S, H_S), "to_student": 0.5 * make(H_T, H_S),
        "to_teacher": 0.5 * make(H_S, H_T), "teacher_states": make(A, H_T), "teacher_weight": make(V_T, H_T),
        "targets": torch.randint(0, V_S, (A,), generator=generator),
        "teacher_targets": torch.randint(0, V_T, (A,), generator=generator),
    }  # fmt: skip
    for name in LEAVES:
        values[name].requires_grad_()
    return values


def projectors_of(data) -> Projectors:
    projectors = Projectors(data["states"].shape[1], data["teacher_states"].shape[1], dtype=torch.float64)
    projectors.to_student = torch.nn.Parameter(data["to_student"].detach().clone())
    projectors.to_teacher = torch.nn.Parameter(data["to_teacher"].detach().clone())
    return projectors


def computed(loss, data, rows=slice(None), normalizer=float(A)):
    """The output, and the gradients of ``LEAVES``."""
    states, weight = (data[name].detach().clone().requires_grad_() for name in LEAVES[:2])
    projectors = projectors_of(data)
    output = dual_space_loss(
        loss, projectors, states[rows], Head(weight), data["targets"][rows], data["teacher_states"][rows],
        Head(data["teacher_weight"]), data["teacher_targets"][rows], normalizer,
    )  # fmt: skip
    output.loss.backward()
    return output, [states.grad, weight.grad, projectors.to_student.grad, projectors.to_teacher.grad]


def dense(data, divergence, temperature, squared, held=None):
    options = {key: value for key, value in divergence.items() if key != "name"}
    return reference.dual_space_loss(
        (data["states"], data["weight"], data["targets"]),
        (data["teacher_states"], data["teacher_weight"], data["teacher_targets"]),
        data["to_student"], data["to_teacher"], divergence["name"], options, temperature, squared, A, held,
    )  # fmt: skip


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda one: one["name"])
def test_value_and_every_gradient_are_those_of_the_dense_reference(divergence, temperature, squared):
    data = problem()
    expected = dense(data, divergence, temperature, squared)
    gradients = torch.autograd.grad(expected, [data[name] for name in LEAVES])
    scaling = "squared" if squared else "none"
    # Chunks of three rows: nothing is made for all rows at once
    budget = 3.5 * 2 * 8 * V_T / 2**20
    for mb in (None, budget):
        loss = DistillationLoss(
            divergence, temperature=temperature, kd_ratio=0.7, temperature_scaling=scaling, logits_budget_mb=mb
        )
        output, found = computed(loss, data)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for name, gradient, right in zip(LEAVES, found, gradients, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("divergence", DIVERGENCES[:3], ids=lambda one: one["name"])
def test_the_gradient_is_the_derivative_of_the_reported_loss(divergence, leaf):
    """Central differences. What is held constant is: the target of the student's space, and the head behind the map."""
    data = problem(seed=3)
    loss = DistillationLoss(divergence, temperature=2.0, kd_ratio=0.6)
    output, gradients = computed(loss, data)
    with torch.no_grad():
        held = data["teacher_states"] @ data["to_student"] @ data["weight"].T, data["weight"].clone()
        assert dense(data, divergence, 2.0, True, held).item() == pytest.approx(output.loss.item(), rel=1e-12)
        direction = torch.randn_like(data[leaf])
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            moved = {**data, leaf: data[leaf] + sign * STEP * direction}
            values.append(dense(moved, divergence, 2.0, True, held).item())
    slope = (values[0] - values[1]) / (2 * STEP)
    assert slope == pytest.approx((gradients[LEAVES.index(leaf)] * direction).sum().item(), rel=BOUND, abs=BOUND)


def test_what_gets_no_gradient_gets_none():
    """The head behind the map, the teacher's head and its states are held; only CE_W moves W."""
    data = problem()
    data["teacher_weight"].requires_grad_()
    data["teacher_states"].requires_grad_()
    computed(DistillationLoss(temperature=2.0, kd_ratio=0.5), data)
    assert data["teacher_weight"].grad is None and data["teacher_states"].grad is None
    # Twice the temperature is another soft loss, and CE_W is none of it
    (_, one), (_, other) = (computed(DistillationLoss(temperature=t, kd_ratio=0.5), data) for t in (2.0, 4.0))
    assert torch.equal(one[2], other[2])
    assert not torch.allclose(one[3], other[3], rtol=1e-2)


def test_the_sums_tell_the_parts():
    data = problem()
    loss = DistillationLoss(temperature=2.0, kd_ratio=0.5)
    output, _ = computed(loss, data)
    sums = {name: value.item() for name, value in output.sums.items()}
    assert output.loss.item() == pytest.approx((sums["kd"] + sums["projector_ce"]) / A, rel=1e-12)
    assert sums["projector_ce"] == pytest.approx(sums["teacher_ce"], rel=1e-12)  # of the projected teacher
    there = reference.forward_kl(
        reference.softmax(data["teacher_states"] @ data["teacher_weight"].T / 2),
        reference.softmax(data["states"] @ data["to_teacher"] @ data["teacher_weight"].T / 2),
    )
    assert sums["kd_teacher_space"] == pytest.approx(4 * there.sum().item(), rel=1e-10)


def test_temperature_moves_loss_and_gradients():
    data = problem()
    found = [computed(DistillationLoss(temperature=t, kd_ratio=1.0), data) for t in (0.5, 1.0, 4.0)]
    values = [output.loss.item() for output, _ in found]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-2 * min(values)
    for place in (0, 1, 3):  # W is trained by CE_W, at T = 1
        for i, (_, one) in enumerate(found):
            for _, other in found[:i]:
                assert (one[place] - other[place]).norm() > 1e-2 * other[place].norm()


@pytest.mark.parametrize("name", ["dts", "ctkd", "logit_std", "adakd", "taid", "annealing", "pocl"])
def test_policies_act_and_parts_add_up(name):
    """Micro-batches: what each gives over one normaliser adds up to the whole."""
    data = problem()
    policy = build_temperature(name)
    policy.begin_step(0.3)
    loss = DistillationLoss(temperature=policy, kd_ratio=0.5)
    whole, gradients = computed(loss, data)
    parts = [computed(loss, data, slice(*bounds)) for bounds in ((0, 4), (4, 4), (4, A))]
    assert sum(output.loss.item() for output, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-10)
    for place in range(4):
        torch.testing.assert_close(sum(found[place] for _, found in parts), gradients[place], rtol=1e-9, atol=1e-12)
    if policy.learns:
        slope = sum(output.sums["temperature_grad"].item() for output, _ in parts)
        assert slope == pytest.approx(whole.sums["temperature_grad"].item(), rel=1e-9) and slope != 0


def test_the_slope_of_a_learnt_temperature_is_that_of_both_spaces():
    data = problem()
    policy = build_temperature("ctkd")
    output, _ = computed(DistillationLoss(temperature=policy, kd_ratio=0.5), data)
    t, values = policy.temperature, []
    for moved in (t + STEP, t - STEP):
        values.append(computed(DistillationLoss(temperature=moved, kd_ratio=0.5), data)[0].sums["kd"].item())
    slope = (values[0] - values[1]) / (2 * STEP)
    assert output.sums["temperature_grad"].item() == pytest.approx(slope, rel=1e-6)


def test_kept_tokens_of_both_spaces_weigh_as_much_as_all_of_them():
    """One space is harder than the other; the threshold is that of both, here of the same rows again."""
    data, policy, weights = problem(), build_temperature("adakd", c=0.0, keep=0.5), []
    data["teacher_weight"] *= 4.0
    loss = DistillationLoss(temperature=policy, kd_ratio=1.0)
    sums = computed(loss, data)[0].sums
    observed = tuple((sums["observed"] / A).tolist())
    policy.end_step(StepStats(0.0, 0.0, sums["kd"].item() / A, A, observed=observed))
    given = policy.selection.weights
    policy.selection.weights = lambda log_s: weights.append(given(log_s)) or weights[-1]
    computed(loss, data)
    here, _, there = weights  # the map's cross-entropy has no soft part
    assert abs(here.mean().item() - there.mean().item()) > 0.3
    assert (here.mean().item() + there.mean().item()) / 2 == pytest.approx(1.0, abs=1.01 / A)


def test_no_row_keeps_the_graph_whole():
    output, gradients = computed(DistillationLoss(temperature=1.0), problem(), slice(0, 0))
    assert output.loss.item() == 0 and all(not gradient.any() for gradient in gradients)


# -------------------------------------------------------------------------------------------------- the start of the maps


def test_heads_that_an_invertible_map_relates_are_recovered():
    """E_t = E_s M: then h_t W = h_s for h_t = h_s M^-T, so W = M^T and W' is its inverse."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    between = torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    to_student, to_teacher = maps_between(rows, rows @ between)
    torch.testing.assert_close(to_student, between.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(to_teacher, torch.linalg.inv(between.T), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("h_s", "h_t"), [(5, 9), (9, 5)])
def test_the_maps_are_those_of_the_pseudo_inverse(h_s, h_t):
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(300, h_s, generator=generator, dtype=torch.float64)
    theirs = torch.randn(300, h_t, generator=generator, dtype=torch.float64)
    to_student, to_teacher = maps_between(own, theirs, 2.0, 0.5)
    torch.testing.assert_close(to_student, (0.5 * theirs).T @ torch.linalg.pinv((2.0 * own).T), rtol=0, atol=1e-8)
    torch.testing.assert_close(to_teacher, (2.0 * own).T @ torch.linalg.pinv((0.5 * theirs).T), rtol=0, atol=1e-8)


def test_fewer_common_tokens_than_widths_take_the_smallest_map():
    generator = torch.Generator().manual_seed(2)
    own, theirs = (torch.randn(3, width, generator=generator, dtype=torch.float64) for width in (6, 8))
    to_student, _ = maps_between(own, theirs)
    torch.testing.assert_close(to_student, theirs.T @ torch.linalg.pinv(own.T), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="0 rows"):
        maps_between(own[:0], theirs[:0])


def test_blocks_make_no_difference(monkeypatch):
    own, theirs = torch.randn(50, 6), torch.randn(50, 4)
    whole = maps_between(own, theirs)
    monkeypatch.setattr("dts_hf.loss.dual_space._BLOCK", 7)
    for one, other in zip(whole, maps_between(own, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_equal_models_have_no_soft_loss_in_either_space():
    data = problem()
    data["states"], data["weight"] = data["teacher_states"].detach(), data["teacher_weight"].detach()
    projectors = Projectors(H_T, H_T, dtype=torch.float64)
    projectors.start_from_heads(Head(data["weight"]), Head(data["teacher_weight"]))
    data["to_student"], data["to_teacher"] = projectors.to_student, projectors.to_teacher
    targets = data["teacher_targets"]
    output, _ = computed(DistillationLoss(temperature=2.0, kd_ratio=0.5), {**data, "targets": targets})
    assert abs(output.sums["kd"].item()) < 1e-10 and abs(output.sums["kd_teacher_space"].item()) < 1e-10
    assert output.sums["projector_ce"].item() == pytest.approx(output.sums["ce"].item(), rel=1e-8)


def test_the_start_is_nearer_than_a_random_one():
    """Two heads with noise between them; ids of the common tokens in another order, and a scale."""
    generator = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    common = 150
    between, theirs, teacher_states = make(H_S, H_T), make(160, H_T), make(40, H_T)
    ids, own_ids = torch.randperm(160, generator=generator)[:common], torch.randperm(170, generator=generator)[:common]
    own = make(170, H_S)
    own[own_ids] = theirs[ids] @ between.T + 0.1 * make(common, H_S)
    student, teacher = Head(own), Head(theirs, logit_scale=0.5)
    started = Projectors(H_S, H_T, dtype=torch.float64)
    started.start_from_heads(student, teacher, own_ids, ids)
    drawn = Projectors(H_S, H_T, dtype=torch.float64)
    for weight in drawn.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[0] ** -0.5, generator=generator)
    student_states = teacher_states @ torch.linalg.pinv(between)
    targets = torch.zeros(40, dtype=torch.int64)
    first = [
        dual_space_loss(
            DistillationLoss(temperature=1.0, kd_ratio=1.0), one, student_states, student, targets, teacher_states, teacher,
            targets, 40.0,
        ).sums
        for one in (started, drawn)
    ]  # fmt: skip
    assert first[0]["kd"] < 0.5 * first[1]["kd"] and first[0]["kd_teacher_space"] < 0.5 * first[1]["kd_teacher_space"]
