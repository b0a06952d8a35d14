"""``DistillationLoss`` with kernels beside the same loss in PyTorch and float64: chunks, sequences, what is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no kernels where Triton is not installed")

from dts_hf.loss import chunk_walk, fused_rows
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature
from tests.support.daily import one_in
from tests.support.loss_problem import POLICIES, started
from tests.support.row_roads import FORMS, apart

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")

V, H_S, H_T, N = 23, 5, 7, 11
#: A head with everything that a head can have.
FULL = {"logit_scale": 0.9, "softcap": 12.0}
SEQUENCES = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2])  # one of them is longer than a chunk of three


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cpu":
        monkeypatch.setattr(fused_rows, "_THREADS", 8)


def problem(dtype: torch.dtype, device: str, rows: int = N) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "states": (N, H_S),
        "weight": (V, H_S),
        "bias": (V,),
        "teacher_states": (N, H_T),
        "teacher_weight": (V, H_T),
    }
    made = {name: torch.randn(*shape, generator=draw).to(device, dtype) for name, shape in shapes.items()}
    made["targets"] = torch.randint(0, V, (N,), generator=draw).to(device)
    return {name: value[:rows] if len(value) == N else value for name, value in made.items()}


def outcome(
    kernels: Any, dtype: torch.dtype, device: str, *, rows: int = N, chunk: int | None = None,
    policy: str = "constant_of_two", form: str = "jsd", needs: tuple[str, ...] = ("states", "weight", "bias"),
    teacher: bool = True, kd_ratio: float = 0.6,
    head: dict[str, float] = FULL, biased: bool = True, **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """The loss, the gradients of what needs one, and the sums."""
    data = problem(dtype, device, rows)
    leaves = {name: data[name].requires_grad_() for name in needs}
    asked = started(*POLICIES[policy])
    width = {torch.float64: 8, torch.float32: 4}.get(dtype, 2)
    loss = DistillationLoss(
        FORMS[form], temperature=asked, kd_ratio=kd_ratio, kernels=kernels,
        logits_budget_mb=None if chunk is None else (chunk + 0.5) * 2 * width * V / 2**20, **options,
    )  # fmt: skip
    student = Head(data["weight"], data["bias"] if biased else None, **head)  # type: ignore[arg-type]
    output = loss(
        data["states"], student, data["teacher_states"] if teacher else None,
        Head(data["teacher_weight"]) if teacher else None, data["targets"], 4.0,
        sequences=SEQUENCES[:rows].to(device) if asked.needs_sequence_gap else None,
    )  # fmt: skip
    if leaves:
        output.loss.backward()
    return output.loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}, output.sums


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert apart(found[0], expected[0]) <= tolerance
    for part, wanted in zip(found[1:], expected[1:]):
        assert set(part) == set(wanted)
        for name, value in wanted.items():
            assert apart(part[name], value) <= tolerance, name


CASES: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "chunks of three": {"chunk": 3},
    "one row a chunk": {"chunk": 1, "policy": "logit_std"},
    "a sequence longer than a chunk": {"chunk": 3, "policy": "dts_per_sequence"},
    "two terms": {"chunk": 6, "policy": "dtkd_with_kd", "form": "reverse_kl"},
    "a mixed target": {"chunk": 6, "policy": "taid_tempered", "form": "forward_kl"},
    "a learnt temperature": {"chunk": 6, "policy": "ctkd", "form": "todi"},
    "observed": {"chunk": 6, "policy": "adakd", "form": "forward_kl"},
    "a frozen head": {"needs": ("states",), "chunk": 6},
    "a frozen backbone": {"needs": ("weight", "bias"), "chunk": 6},
    "no gradient": {"needs": ()},
    "no teacher": {"teacher": False, "kd_ratio": 0.0, "chunk": 6},
    "labels alone": {"kd_ratio": 0.0, "policy": "logit_std"},
    "teacher alone": {"kd_ratio": 1.0, "form": "dkd"},
    "unscaled": {"temperature_scaling": "none", "policy": "logit_std"},
    "a bare head": {"head": {}, "form": "forward_kl"},
    "logits in float32": {"logits_dtype": "float32"},
    "no row": {"rows": 0, "policy": "adakd"},
    "one row": {"rows": 1},
}


@pytest.mark.parametrize("case", one_in(2, CASES))
def test_kernels_give_the_loss_of_pytorch(case: str, device: str) -> None:
    expected = outcome("torch", torch.float64, device, **CASES[case])
    assert_same(outcome("triton", torch.float32, device, **CASES[case]), expected)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_low_precision(dtype: torch.dtype, chunk: int | None, device: str) -> None:
    """Without a bias, which PyTorch adds in fp32 to what the matmul has rounded, the logits are the same."""
    options: dict[str, Any] = {"chunk": chunk, "needs": ("states", "weight"), "biased": False}
    expected, found = (outcome(kernels, dtype, device, **options) for kernels in ("torch", "triton"))
    assert all(grad.dtype == dtype for grad in found[1].values())
    assert_same((found[0], {}, found[2]), (expected[0], {}, expected[2]))
    assert_same((found[0], found[1], {}), (expected[0], expected[1], {}), 2.5e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("logits_dtype", ["auto", "float32"])
def test_kernels_under_autocast(logits_dtype: Any, device: str) -> None:
    results = []
    for kernels in ("torch", "triton"):
        with torch.autocast(device, dtype=torch.bfloat16):
            results.append(outcome(kernels, torch.float32, device, chunk=6, logits_dtype=logits_dtype))
    expected, found = results
    assert all(grad.dtype == torch.float32 for grad in found[1].values())
    assert_same((found[0], {}, found[2]), (expected[0], {}, expected[2]), 5e-3)
    assert_same((found[0], found[1], {}), (expected[0], expected[1], {}), 3e-2)


def test_equal_models_give_no_gap_and_no_gradient(device: str) -> None:
    """The law of identity: student = teacher."""
    data = problem(torch.float32, device, rows=4)
    for form in ("forward_kl", "reverse_kl", "jsd", "dkd"):  # all of them: test_kernels.py
        states, weight = (data[name].clone().requires_grad_() for name in ("states", "weight"))
        loss = DistillationLoss(FORMS[form], temperature=build_temperature("constant", value=2.0), kd_ratio=1.0,
                                kernels="triton", logits_budget_mb=(3 * 2 * 4 * V) / 2**20)  # fmt: skip
        same = Head(weight.detach().clone(), **FULL)  # type: ignore[arg-type]
        output = loss(states, Head(weight, **FULL), states.detach(), same, data["targets"], 4)  # type: ignore[arg-type]
        output.loss.backward()
        assert float(output.sums["kl"]) == 0.0 and float(output.sums["ce"]) == float(output.sums["teacher_ce"])
        assert abs(float(output.loss.detach())) < 1e-5 and float(states.grad.abs().max()) < 1e-5  # type: ignore[union-attr]
        assert float(weight.grad.abs().max()) < 1e-5, form  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "policy"),
    [("forward_kl", "constant_of_two"), ("jsd", "logit_std"), ("dkd", "constant_of_two"), ("logit_mse", "norm_kd")],
)
def test_the_gradient_is_the_derivative_of_the_reported_loss(form: str, policy: str, device: str) -> None:
    """By central differences along the gradient, as far as fp32 shows them."""
    data, asked = problem(torch.float32, device, rows=4), started(*POLICIES[policy])
    loss = DistillationLoss(FORMS[form], temperature=asked, kd_ratio=0.6, kernels="triton")
    teacher = (data["teacher_states"], Head(data["teacher_weight"]), data["targets"], 4.0)

    def value(states: torch.Tensor) -> torch.Tensor:
        return loss(states, Head(data["weight"], data["bias"], **FULL), *teacher).loss  # type: ignore[arg-type, no-any-return]

    states = data["states"].requires_grad_()
    (grad,) = torch.autograd.grad(value(states), states)
    way, step = grad / grad.norm(), 2e-2
    with torch.no_grad():
        slope = (value(states + step * way) - value(states - step * way)) / (2 * step)
    assert float(slope) == pytest.approx(float(grad.norm()), rel=3e-3)


def test_out_of_memory_halves_the_chunk_under_kernels_too(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, plain = outcome("triton", torch.float32, device), chunk_walk._raw_logits

    def limited(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(hidden) > 3:
            raise torch.OutOfMemoryError("no room")
        return plain(hidden, *rest)

    monkeypatch.setattr(chunk_walk, "_raw_logits", limited)
    assert_same(outcome("triton", torch.float32, device), expected)
    assert "going on with logits_budget_mb" in caplog.text


def test_out_of_memory_ends_at_one_row_in_low_precision_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def full(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        rows.append(len(hidden))
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(chunk_walk, "_raw_logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        outcome("triton", torch.bfloat16, device, chunk=7)
    assert rows[0] > rows[-1] == 1


def test_a_label_outside_the_vocabulary_makes_the_loss_no_number(device: str) -> None:
    data = problem(torch.float32, device)
    data["targets"][4] = V
    loss = DistillationLoss(temperature=build_temperature("constant"), kernels="triton")
    output = loss(data["states"], Head(data["weight"]), data["teacher_states"], Head(data["teacher_weight"]),
                  data["targets"], N)  # fmt: skip
    assert bool(output.loss.isnan())


@pytest.mark.parametrize("policy", ["constant_of_two", "dts_per_sequence", "adakd"])
def test_every_kernel_starts_on_the_device_of_the_logits(
    policy: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton takes the device in force, and a model may be on another card."""
    inside: list[torch.Tensor] = []
    launched = 0

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(student: torch.Tensor, *rest: Any, **options: Any) -> None:
                nonlocal launched
                launched += 1
                assert inside[-1].data_ptr() == student.data_ptr()
                self.kernel[grid](student, *rest, **options)

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("statistics_kernel", "divergence_kernel", "gradient_kernel"):
        monkeypatch.setattr(fused_rows.kernels, name, Kernel(getattr(fused_rows.kernels, name)))
    outcome("triton", torch.float32, device, policy=policy, chunk=3)
    assert launched > 8


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_on_a_card_that_is_not_the_current_one() -> None:
    expected = outcome("torch", torch.float64, "cuda:1", policy="adakd")
    assert torch.cuda.current_device() == 0
    assert_same(outcome("triton", torch.float32, "cuda:1", policy="adakd"), expected)


# ----------------------------------------------------------------------------------------------------- on a card alone


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["constant_of_two", "logit_std", "dtkd_with_kd", "taid_tempered", "ctkd", "adakd"])
@pytest.mark.parametrize("form", ["forward_kl", "jsd", "todi", "logit_mse"])
def test_a_step_of_the_loss_never_waits_for_the_card(form: str, policy: str) -> None:
    outcome("triton", torch.bfloat16, "cuda", form=form, policy=policy)  # compiles, and asks whether to trust
    data = problem(torch.bfloat16, "cuda")
    asked = started(*POLICIES[policy])
    loss = DistillationLoss(FORMS[form], temperature=asked, kernels="triton", logits_budget_mb=1.0)
    normalizer = torch.full((), 4.0, device="cuda")
    states, weight = (data[name].requires_grad_() for name in ("states", "weight"))
    given = (states, Head(weight), data["teacher_states"], Head(data["teacher_weight"]), data["targets"], normalizer)
    loss(*given).loss.backward()  # this head's kernels are compiled and trusted now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("logits_dtype", ["auto", "float32"])
@pytest.mark.parametrize("form", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_the_gradient_of_a_bf16_head_is_accurate(form: str, logits_dtype: Any) -> None:
    """dW ``[V, H]`` in fp32 under autocast, of a real size and in several chunks, beside float64 on the same numbers."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    rows, vocab, width = 2048, 32768, 512
    states, taught = (torch.randn(rows, width, generator=draw, device="cuda").bfloat16() for _ in range(2))
    own, teacher = ((0.06 * torch.randn(vocab, width, generator=draw, device="cuda")).bfloat16() for _ in range(2))
    targets = torch.randint(0, vocab, (rows,), generator=draw, device="cuda")
    grads = []
    roads: list[tuple[Any, torch.dtype]] = [("torch", torch.float64), ("triton", torch.float32)]
    for kernels, dtype in roads:
        weight, of_teacher = own.to(dtype).requires_grad_(), torch.float64 if kernels == "torch" else torch.bfloat16
        loss = DistillationLoss(
            FORMS[form], temperature=build_temperature("constant", value=2.0), kernels=kernels, logits_budget_mb=128.0,
            logits_dtype=logits_dtype,
        )  # fmt: skip
        with torch.autocast("cuda", torch.bfloat16, enabled=kernels == "triton"):
            output = loss(
                states.to(dtype), Head(weight), taught.to(of_teacher), Head(teacher.to(of_teacher)), targets, 1.0
            )
        output.loss.backward()
        grads.append(weight.grad)
    exact, found = grads
    assert found is not None and exact is not None and found.dtype == torch.float32
    assert apart(found, exact, 1e-30) <= 6e-4
