"""DistillationLoss against the dense float64 reference: value, every gradient, every statistic, on ugly shapes."""

from __future__ import annotations

import weakref

import pytest
import torch

from dts_hf import divergences
from dts_hf.errors import UserError
from dts_hf.loss.chunk_walk import ChunkWalk
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.row_loss import LossSettings
from dts_hf.loss.statistics import SUMS_OF_LOSS
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, StepStats, TemperaturePolicy, Temperatures, build_temperature
from tests.support import reference

#: Through every policy, head and chunk size.
DIVERGENCES = ["forward_kl", "reverse_kl", {"name": "jsd", "beta": 0.3}]
#: Through one ugly shape each.
MORE_DIVERGENCES = [
    {"name": "symmetric_kl", "weight": 0.3},
    {"name": "skew_kl", "alpha": 0.1},
    {"name": "skew_reverse_kl", "alpha": 0.1},
    {"name": "adaptive_kl", "mu": 0.5},
    {"name": "tvd"},
    {"name": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    {"name": "dkd", "alpha": 1.0, "beta": 0.5},
    {"name": "todi"},
    {"name": "logit_mse"},
    {"name": "csd"},
    {"name": "csd", "weights": "student"},
    {"name": "eopd", "entropy": 2.0, "mode": "switch"},
]
V, H_S, H_T = 37, 11, 7


class PerRow(TemperaturePolicy):
    """A temperature for each row, and another one for the teacher: what later policies need from the loss."""

    name = "per_row_for_tests"

    @property
    def temperature(self) -> float:
        return 1.5

    def forward(self, student_logits, teacher_logits, rows: RowStats) -> Temperatures:
        spread = (student_logits.amax(-1, keepdim=True) - student_logits.mean(-1, keepdim=True)).sigmoid()
        return Temperatures(1.0 + spread, 2.5 - spread)


def started(name, **options):
    """A policy in the middle of its run."""
    policy = build_temperature(name, **options)
    for progress in (0.0, 0.3, 0.4):
        policy.begin_step(progress)
        policy.end_step(StepStats(3.0, 2.0, 1.0, 5))
    return policy


POLICIES = {
    "one": lambda: build_temperature("constant", value=1.0),
    "constant": lambda: build_temperature("constant", value=2.0),
    "linear": lambda: started("linear"),
    "cosine": lambda: started("cosine"),
    "dts_paper": lambda: started("dts", rule="paper"),
    "dts_code": lambda: started("dts", rule="code"),
    "dts_gap": lambda: started("dts", rule="gap"),
    "per_row": PerRow,
}
HEADS = {"plain": {}, "scaled_and_capped": {"logit_scale": 0.7, "softcap": 4.0}}


def budget(rows: int | None, itemsize: int) -> float:
    """The budget, MiB, that gives chunks of ``rows`` rows; None: one chunk for all."""
    return 256 if rows is None else (rows + 0.5) * 2 * itemsize * V / 2**20


def problem(n: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed + n)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "states": make(n, H_S).requires_grad_(),
        "weight": make(V, H_S).requires_grad_(),
        "bias": make(V).requires_grad_(),
        "teacher_states": make(n, H_T),
        "teacher_weight": make(V, H_T),
        "targets": torch.randint(0, V, (n,), generator=generator),
    }


def dense(data, divergence, policy, kd_ratio, squared, normalizer, head_options):
    """Loss and gradients of (states, weight, bias) in float64 by autograd through [N, V] tensors."""
    leaves = [data[name].detach().double().requires_grad_() for name in ("states", "weight", "bias")]
    scale, cap = head_options.get("logit_scale", 1.0), head_options.get("softcap")
    z_s = reference.logits(*leaves, scale, cap)
    z_t = reference.logits(data["teacher_states"].double(), data["teacher_weight"].double(), None)
    # Temperatures carry no gradient into the logits.
    temperatures = policy(z_s.detach(), z_t, None)
    name = divergence if isinstance(divergence, str) else divergence["name"]
    options = {} if isinstance(divergence, str) else {key: divergence[key] for key in divergence if key != "name"}
    loss = reference.distillation_loss(
        z_s, z_t, data["targets"], name, options, *temperatures[:2], kd_ratio, squared, normalizer
    )
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_equals_the_dense_reference(divergence, policy_name, head_name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    policy, head_options = POLICIES[policy_name](), HEADS[head_name]
    for n in (0, 1, 13, 257):
        data = problem(n, dtype)
        normalizer = max(n, 1) * 0.8
        expected, expected_grads = dense(data, divergence, policy, 0.3, True, normalizer, head_options)
        for chunk in (1, 7, None):
            if chunk == 1 and n == 257 and policy_name not in ("dts_gap", "per_row"):
                continue  # 257 chunks of one row: enough to see it for two policies
            loss = DistillationLoss(
                divergence, temperature=policy, kd_ratio=0.3, logits_budget_mb=budget(chunk, dtype.itemsize)
            )
            head = Head(data["weight"], data["bias"], **head_options)
            teacher_head = Head(data["teacher_weight"])
            output = loss(data["states"], head, data["teacher_states"], teacher_head, data["targets"], normalizer)
            grads = torch.autograd.grad(output.loss, [data["states"], data["weight"], data["bias"]])
            assert abs(output.loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
            for grad, expected_grad in zip(grads, expected_grads):
                assert grad.dtype == dtype and grad.shape == expected_grad.shape
                torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("policy_name", ["one", "per_row"])
@pytest.mark.parametrize("divergence", MORE_DIVERGENCES, ids=lambda divergence: divergence["name"])
def test_every_divergence_equals_the_dense_reference(divergence, policy_name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    policy, head_options, data = POLICIES[policy_name](), HEADS["scaled_and_capped"], problem(13, dtype)
    expected, expected_grads = dense(data, divergence, policy, 0.3, True, 9.0, head_options)
    for chunk in (1, 7, None):
        loss = DistillationLoss(
            divergence, temperature=policy, kd_ratio=0.3, logits_budget_mb=budget(chunk, dtype.itemsize)
        )
        output = loss(
            data["states"], Head(data["weight"], data["bias"], **head_options), data["teacher_states"],
            Head(data["teacher_weight"]), data["targets"], 9.0,
        )  # fmt: skip
        grads = torch.autograd.grad(output.loss, [data["states"], data["weight"], data["bias"]])
        assert abs(output.loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
        for grad, expected_grad in zip(grads, expected_grads):
            torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance)


def test_every_divergence_goes_through_the_loss():
    given = [spec if isinstance(spec, str) else spec["name"] for spec in DIVERGENCES + MORE_DIVERGENCES]
    assert set(given) == set(divergences.DIVERGENCES)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scaling", ["squared", "none"])
def test_ratio_and_scaling(kd_ratio, scaling):
    data, policy = problem(13, torch.float64), build_temperature("constant", value=3.0)
    expected, expected_grads = dense(data, "forward_kl", policy, kd_ratio, scaling == "squared", 13, {})
    loss = DistillationLoss(temperature=policy, kd_ratio=kd_ratio, temperature_scaling=scaling)
    output = loss(
        data["states"], Head(data["weight"], data["bias"]), data["teacher_states"], Head(data["teacher_weight"]),
        data["targets"], 13,
    )  # fmt: skip
    grads = torch.autograd.grad(output.loss, [data["states"], data["weight"], data["bias"]])
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_tied_head_gets_both_gradients():
    """A tied weight is used as embedding and as head: both uses must add up."""
    torch.manual_seed(0)
    weight = torch.randn(V, H_S, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(0, V, (9,)), torch.randint(0, V, (9,))
    teacher_states, teacher_weight = torch.randn(9, H_T).double(), torch.randn(V, H_T).double()
    policy = build_temperature("constant", value=2.0)
    output = DistillationLoss(temperature=policy)(
        torch.tanh(weight[ids]), Head(weight), teacher_states, Head(teacher_weight), targets, 9
    )
    (grad,) = torch.autograd.grad(output.loss, weight)
    z_t = reference.logits(teacher_states, teacher_weight, None)
    z_s = reference.logits(torch.tanh(weight[ids]), weight, None)
    expected = reference.distillation_loss(z_s, z_t, targets, "forward_kl", {}, 2.0, 2.0, 0.5, True, 9)
    (expected_grad,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_frozen_head_and_frozen_states():
    data = problem(13, torch.float64)
    loss = DistillationLoss(temperature=build_temperature("constant"))
    teacher = (data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 13)
    whole = loss(data["states"], Head(data["weight"], data["bias"]), *teacher)
    expected = torch.autograd.grad(whole.loss, [data["states"], data["weight"]])
    frozen = loss(data["states"], Head(data["weight"].detach(), data["bias"].detach()), *teacher)
    assert torch.equal(torch.autograd.grad(frozen.loss, data["states"])[0], expected[0])
    head_only = loss(data["states"].detach(), Head(data["weight"], data["bias"].detach()), *teacher)
    assert torch.equal(torch.autograd.grad(head_only.loss, data["weight"])[0], expected[1])


def test_no_rows_keep_the_graph_whole():
    data = problem(0, torch.float32)
    output = DistillationLoss(temperature=build_temperature("dts"))(
        data["states"], Head(data["weight"], data["bias"]), data["teacher_states"], Head(data["teacher_weight"]),
        data["targets"], 0,
    )  # fmt: skip
    output.loss.backward()
    assert output.loss.item() == 0.0 and output.sums["rows"].item() == 0
    for name in ("states", "weight", "bias"):
        assert data[name].grad is not None and not data[name].grad.any()


def test_sums_are_the_statistics_at_temperature_one():
    data, t = problem(13, torch.float64), 2.0
    loss = DistillationLoss(temperature=build_temperature("constant", value=t), logits_budget_mb=budget(4, 8))
    sums = loss(
        data["states"], Head(data["weight"]), data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 13
    ).sums
    z_s = reference.logits(data["states"].detach(), data["weight"].detach(), None)
    z_t = reference.logits(data["teacher_states"], data["teacher_weight"], None)
    p, q, at = reference.softmax(z_t), reference.softmax(z_s), torch.arange(13)
    p_t, q_t = reference.softmax(z_t / t), reference.softmax(z_s / t)
    entropy = lambda x: -(x * x.log()).sum()  # noqa: E731
    expected = {
        "rows": 13.0,
        "ce": -q[at, data["targets"]].log().sum(),
        "teacher_ce": -p[at, data["targets"]].log().sum(),
        "kd": t * t * reference.forward_kl(p_t, q_t).sum(),
        "kl": reference.forward_kl(p, q).sum(),
        "student_entropy": entropy(q),
        "teacher_entropy": entropy(p),
        "student_entropy_at_t": entropy(q_t),
        "teacher_entropy_at_t": entropy(p_t),
        "top1_agreement": (z_s.argmax(-1) == z_t.argmax(-1)).sum(),
        "temperature": 13 * t,
        "teacher_temperature": 13 * t,
        "temperature_min": t,
        "temperature_max": t,
    }
    assert set(expected) == set(sums) == {"rows", *SUMS_OF_LOSS}
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(float(value), abs=1e-10), name
        assert not sums[name].requires_grad


def test_under_no_grad_nothing_is_kept():
    data = problem(5, torch.float32)
    with torch.no_grad():
        output = DistillationLoss(temperature=build_temperature("constant"))(
            data["states"],
            Head(data["weight"]),
            data["teacher_states"],
            Head(data["teacher_weight"]),
            data["targets"],
            5,
        )
    assert not output.loss.requires_grad


def test_incoming_gradient_scales_and_a_second_backward_is_refused():
    data = problem(5, torch.float64)
    loss = DistillationLoss(temperature=build_temperature("constant"))
    teacher = (data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 5)
    plain = torch.autograd.grad(loss(data["states"], Head(data["weight"]), *teacher).loss, data["states"])[0]
    output = loss(data["states"], Head(data["weight"]), *teacher).loss
    scaled = torch.autograd.grad(output * 1024, data["states"], retain_graph=True)[0]
    torch.testing.assert_close(scaled, 1024 * plain)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        output.backward()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16_weights"])
def test_low_precision_is_close(weights):
    """bf16 matmuls, fp32 softmax: gradients within bf16's own rounding, in the dtype of their leaf."""
    data = problem(33, torch.float64)
    expected, expected_grads = dense(data, "forward_kl", build_temperature("constant"), 0.5, True, 33, {})
    leaves = [data[name].detach().to(weights).requires_grad_() for name in ("states", "weight", "bias")]
    loss = DistillationLoss(temperature=build_temperature("constant"), logits_budget_mb=budget(7, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        output = loss(
            leaves[0], Head(leaves[1], leaves[2]), data["teacher_states"].to(weights),
            Head(data["teacher_weight"].to(weights)), data["targets"], 33,
        )  # fmt: skip
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for leaf, grad, expected_grad in zip(leaves, torch.autograd.grad(output.loss, leaves), expected_grads):
        assert grad.dtype == leaf.dtype
        error = (grad.double() - expected_grad).norm() / expected_grad.norm()
        assert error < 3e-2


def test_extreme_logits_stay_finite():
    states = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.linspace(-1, 1, 9).unsqueeze(-1)
    for divergence in DIVERGENCES + MORE_DIVERGENCES:
        output = DistillationLoss(divergence, temperature=build_temperature("constant", value=1.5))(
            states, Head(weight), -states.detach(), Head(weight), torch.tensor([0, 8]), 2
        )
        assert torch.isfinite(output.loss) and torch.isfinite(torch.autograd.grad(output.loss, states)[0]).all()


def test_chunks_fit_the_budget():
    loss = DistillationLoss(temperature=build_temperature("constant"), logits_budget_mb=256)
    rows = loss.chunk_rows(49_152)
    assert rows == 682 and rows * 49_152 * 4 * 2 <= 256 * 2**20
    assert DistillationLoss(temperature=build_temperature("constant"), logits_budget_mb=0.001).chunk_rows(49_152) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kd_ratio": 1.5}, "loss.kd_ratio"),
        ({"kd_ratio": True}, "loss.kd_ratio"),
        ({"temperature_scaling": "square"}, "loss.temperature_scaling"),
        ({"logits_budget_mb": 0}, "loss.logits_budget_mb"),
        ({"divergence": "kl"}, "loss.divergence"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        DistillationLoss(temperature=build_temperature("constant"), **options)


def test_mismatched_shapes_are_refused():
    loss, data = DistillationLoss(temperature=build_temperature("constant")), problem(5, torch.float32)
    with pytest.raises(ValueError, match=r"^rows differ: student 5, teacher 3, targets 5$"):
        loss(
            data["states"],
            Head(data["weight"]),
            data["teacher_states"][:3],
            Head(data["teacher_weight"]),
            data["targets"],
            5,
        )
    labels_alone = DistillationLoss(temperature=build_temperature("constant"), kd_ratio=0.0)
    with pytest.raises(ValueError, match=r"^rows differ: student 5, targets 2$"):
        labels_alone(data["states"], Head(data["weight"]), None, None, data["targets"][:2], 5)
    with pytest.raises(ValueError, match="vocabularies differ"):
        loss(
            data["states"],
            Head(data["weight"]),
            data["teacher_states"],
            Head(data["teacher_weight"][:30]),
            data["targets"],
            5,
        )


def test_fp16_gradients_do_not_underflow_before_the_loss_scaler():
    """Divided by many labels before the fp16 matmuls, gradients of the logits would be lost below 6e-8."""
    data, normalizer, scaler = problem(13, torch.float64), 5e6, 2.0**16
    _, expected_grads = dense(data, "forward_kl", build_temperature("constant"), 0.5, True, normalizer, {})
    states, weight = (data[name].detach().half().requires_grad_() for name in ("states", "weight"))
    output = DistillationLoss(temperature=build_temperature("constant"))(
        states, Head(weight, data["bias"].detach().half()), data["teacher_states"].half(),
        Head(data["teacher_weight"].half()), data["targets"], normalizer,
    )  # fmt: skip
    for grad, expected_grad in zip(torch.autograd.grad(output.loss * scaler, [states, weight]), expected_grads):
        error = (grad.double() / scaler - expected_grad).norm() / expected_grad.norm()
        assert error < 2e-2


@pytest.mark.parametrize("chunk_mb", [0.001, 256])
@pytest.mark.parametrize("rows", [0, 13])
def test_without_a_teacher_it_is_the_cross_entropy(rows, chunk_mb):
    data = problem(rows, torch.float64)
    states, weight = (data[name].detach().clone().requires_grad_() for name in ("states", "weight"))
    loss_fn = DistillationLoss(temperature=build_temperature("constant"), kd_ratio=0.0, logits_budget_mb=chunk_mb)
    output = loss_fn(states, Head(weight), None, None, data["targets"], 13)
    output.loss.backward()
    expected_states, expected_weight = (data[name].detach().clone().requires_grad_() for name in ("states", "weight"))
    logits = reference.logits(expected_states, expected_weight, None)
    expected = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="sum") / 13
    expected.backward()
    torch.testing.assert_close(output.loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(states.grad, expected_states.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=0, atol=1e-12)


def test_without_a_teacher_there_is_nothing_to_distil():
    data = problem(3, torch.float64)
    loss_fn = DistillationLoss(temperature=build_temperature("constant"), kd_ratio=0.5)
    with pytest.raises(ValueError, match=r"teacher: got None with kd_ratio 0\.5"):
        loss_fn(data["states"], Head(data["weight"]), None, None, data["targets"], 3)


def test_without_a_teacher_a_policy_with_its_own_kd_ratio_is_refused():
    data = problem(3, torch.float64)
    loss_fn = DistillationLoss(temperature=build_temperature("pocl"), kd_ratio=0.0)
    with pytest.raises(ValueError, match="labels alone need kd_ratio 0"):
        loss_fn(data["states"], Head(data["weight"]), None, None, data["targets"], 3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_chunk_and_changes_nothing(monkeypatch, caplog, error):
    import dts_hf.loss.chunk_walk as module

    data = problem(13, torch.float64)
    teacher = (data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 13)
    results = []
    for room in (13, 3):
        states = data["states"].detach().clone().requires_grad_()
        weight = data["weight"].detach().clone().requires_grad_()
        plain = module._raw_logits

        def limited(hidden, *args, room=room, plain=plain):
            if len(hidden) > room:
                raise error
            return plain(hidden, *args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_raw_logits", limited)
            loss_fn = DistillationLoss(temperature=build_temperature("constant"))
            output = loss_fn(states, Head(weight), *teacher)
            output.loss.backward()
        results.append((output.loss.detach(), states.grad, weight.grad, output.sums["kd"]))
    assert loss_fn.chunk_rows(V, 8) <= 3 and "going on with logits_budget_mb" in caplog.text
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_walk_that_failed_is_gone_before_the_next_one_takes_room(monkeypatch):
    """Its buffers would be in the way of the smaller ones."""
    import dts_hf.loss.chunk_walk as module

    alive, budgets = weakref.WeakSet(), []
    build, plain = ChunkWalk.__init__, module._raw_logits

    def counted(walk, settings, **given):
        assert not alive
        alive.add(walk)
        budgets.append(settings.logits_budget_mb)
        build(walk, settings, **given)

    def limited(hidden, *args):
        if len(hidden) > 3:
            raise torch.OutOfMemoryError("no room")
        return plain(hidden, *args)

    monkeypatch.setattr(ChunkWalk, "__init__", counted)
    monkeypatch.setattr(module, "_raw_logits", limited)
    data = problem(13, torch.float64)
    loss_fn = DistillationLoss(temperature=build_temperature("constant"), logits_budget_mb=budget(13, 8))
    teacher = (data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 13)
    loss = loss_fn(data["states"], Head(data["weight"]), *teacher).loss
    assert len(budgets) == 3 and budgets[-1] == budgets[0] / 4
    assert not alive, "the graph of the loss keeps the gradients and not the walk"
    loss.backward()


def test_a_walk_has_all_its_state_from_the_start():
    data = problem(13, torch.float64)
    policy = build_temperature("dts", granularity="sequence")
    walk = ChunkWalk(
        LossSettings(divergences.build_divergence("forward_kl"), policy, 0.5, True, budget(4, 8)),
        states=data["states"],
        head=Head(data["weight"]),
        teacher_states=data["teacher_states"],
        teacher_head=Head(data["teacher_weight"]),
        targets=data["targets"],
        sequences=torch.arange(13) // 6,
        normalizer=13,
        needs=(True, True, False),
    )
    before = set(vars(walk))
    with torch.no_grad():
        walk.run()
    assert set(vars(walk)) == before and [grad is not None for grad in walk.gradients] == [True, True, False]


def test_another_error_is_not_taken_for_memory(monkeypatch):
    import dts_hf.loss.chunk_walk as module

    def broken(*args):
        raise RuntimeError("size mismatch")

    data = problem(3, torch.float64)
    monkeypatch.setattr(module, "_raw_logits", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        DistillationLoss(temperature=build_temperature("constant"))(
            data["states"],
            Head(data["weight"]),
            data["teacher_states"],
            Head(data["teacher_weight"]),
            data["targets"],
            3,
        )


def test_who_is_unsure_does_not_hang_on_the_temperature():
    """EOPD's threshold is of the teacher at T = 1: at T = 4 every row's entropy is above it."""
    draw = torch.Generator().manual_seed(2)
    z_s, z_t = (3.0 * torch.randn(12, V, generator=draw).double() for _ in range(2))
    eye, targets, found = Head(torch.eye(V).double()), torch.zeros(12, dtype=torch.int64), {}
    entropy = -(z_t.softmax(-1) * z_t.log_softmax(-1)).sum(-1)
    unsure = entropy > 1.2
    assert 0 < unsure.sum() < 12 and (-((z_t / 4).softmax(-1) * (z_t / 4).log_softmax(-1)).sum(-1) > 1.2).all()
    for name, rows in (("forward_kl", unsure), ("reverse_kl", ~unsure), ("eopd", unsure | ~unsure)):
        divergence = {"name": "eopd", "entropy": 1.2, "mode": "switch"} if name == "eopd" else name
        loss = DistillationLoss(divergence, temperature=4.0, kd_ratio=1.0)
        found[name] = loss(z_s[rows], eye, z_t[rows], eye, targets[rows], 1).loss.item()
    assert found["eopd"] == pytest.approx(found["forward_kl"] + found["reverse_kl"], rel=1e-12)
