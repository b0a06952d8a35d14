"""Which road the loss takes: kernels where they can be had and trusted; how much of the logits is in memory at a time."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dts_hf.divergences import ForwardKL, build_divergence
from dts_hf.errors import UserError
from dts_hf.loss import chunk_walk, distillation_loss, road
from dts_hf.loss.chunk_walk import ChunkWalk, equal_chunks
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature
from tests.support.row_roads import FORMS

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
V, CPU, CARD = 20, torch.device("cpu"), torch.device("cuda")
LOSS_LOG = "dts_hf.loss.distillation_loss"


def run(
    kernels: Any, divergence: Any = "forward_kl", dtype: torch.dtype = torch.float32, policy: str = "constant",
    **options: Any,
) -> Any:  # fmt: skip
    loss = DistillationLoss(divergence, temperature=build_temperature(policy), kernels=kernels, **options)
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*shape, generator=draw).to(dtype).requires_grad_() for shape in ((3, 4), (V, 4)))
    return loss(states, Head(weight), states.detach(), Head(weight.detach().flip(0)), torch.tensor([0, 5, 19]), 3)


class Louder(ForwardKL):
    """A subclass may compute what it likes."""

    name = "forward_kl"


@has_triton
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"divergence": "adaptive_kl"}, "the divergence 'adaptive_kl' has none over 20 classes"),
        ({"divergence": "dkd", "policy": "ctkd"}, "'dkd' has none for a temperature that learns"),
        ({"policy": "ats"}, "'ats' gives one token of a row a temperature of its own, which they do not know"),
        ({"policy": "cist"}, "'cist' is differentiated through the student's largest logit, which they do not know"),
        ({"dtype": torch.float64}, "they compute in float32, and the logits are float64"),
        ({"dtype": torch.float64, "logits_dtype": "float32"}, "they compute in float32, and the logits are float64"),
        ({"divergence": Louder()}, "the divergence 'forward_kl' has none over 20 classes"),
    ],
)
def test_triton_where_there_are_no_kernels_says_why(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"loss.kernels: got 'triton'.*{reason}"):
        run("triton", **options)
    assert torch.isfinite(run("auto", **options).loss)


def test_triton_on_a_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="they need a GPU, and the logits are on cpu"):
        run("triton")


def test_triton_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(road.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        run("triton")


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_cpu_is_silent_and_takes_pytorch(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the interpreter is at hand, as in these tests: the numbers of a CPU do not change."""
    asked: list[LossSettings] = []
    monkeypatch.setattr(distillation_loss, "ChunkWalk", lambda settings, **rest: asked.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(kernels)
    assert [one.fused for one in asked] == [False] and not caplog.records
    assert asked[0].logits_budget_mb == 256.0


@pytest.mark.parametrize(("option", "value"), [("kernels", "tritn"), ("logits_dtype", "float"), ("kernels", True)])
def test_a_wrong_word_is_refused(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"loss\.{option}: got {value!r}, expected one of auto"):
        DistillationLoss(temperature=build_temperature("constant"), **{option: value})


# ------------------------------------------------------------------------------------------------------------ trusted


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings for a divergence and a policy, with nothing proved yet."""
    monkeypatch.setattr(road, "_proved", {})
    return lambda form="forward_kl", policy="constant": LossSettings(
        build_divergence(FORMS[form]), build_temperature(policy), 0.5, True, 256.0
    )


def reason_for(settings: LossSettings, dtype: torch.dtype = torch.float32, **head: Any) -> str | None:
    of = Head(torch.empty(V, 1), None, **head)
    return road.why_not_trusted(settings, CPU, of, of, (dtype, dtype, dtype))


@has_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "policy"),
    [("forward_kl", "dts"), ("jsd", "logit_std"), ("dkd", "dtkd"), ("logit_mse", "annealing"), ("todi", "ctkd"),
     ("alpha_beta", "adakd"), ("reverse_kl", "taid"), ("tvd", "max_logit")],
)  # fmt: skip
def test_right_kernels_are_trusted(settings_of: Any, form: str, policy: str, dtype: torch.dtype) -> None:
    assert reason_for(settings_of(form, policy), dtype, softcap=10.0) is None


@has_triton
@pytest.mark.parametrize("wrong", ["a formula", "a gradient", "a statistic", "no number", "a sum"])
def test_wrong_kernels_are_found_out(settings_of: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dts_hf.loss import fused_rows, kernels

    if wrong == "a formula":
        monkeypatch.setattr(kernels, "forward_kl", kernels.reverse_kl)
    elif wrong == "a sum":
        monkeypatch.setattr(fused_rows.FusedRows, "_add_up", lambda self, one: None)
    else:
        plain = fused_rows.FusedRows.run

        def planted(self: Any, z_s: Any, z_t: Any, targets: Any, gaps: Any, grad: Any) -> None:
            plain(self, z_s, z_t, targets, gaps, grad)
            if wrong == "a gradient":  # in a single entry
                grad[1, 3] += 0.02
            elif wrong == "no number":
                grad[2, 0] = float("nan")
            else:
                self.sums["student_entropy"] *= 1.05

        monkeypatch.setattr(fused_rows.FusedRows, "run", planted)
    name = {"a statistic": "student_entropy", "a sum": "ce"}.get(wrong, "gradient")
    assert reason_for(settings_of()) == f"'{name}' is not what PyTorch makes of the same rows"


class Broken:
    """A kernel that the compiler refuses."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        raise self.error


@has_triton
def test_a_kernel_that_does_not_compile_is_a_reason_and_asked_for_once(
    settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dts_hf.loss import kernels

    broken = Broken(RuntimeError("ptxas:\n  no such instruction"))
    monkeypatch.setattr(kernels, "gradient_kernel", broken)
    assert [reason_for(settings_of()) for _ in range(2)] == ["RuntimeError: ptxas: no such instruction"] * 2
    assert broken.launches == 1
    assert reason_for(settings_of("jsd")) is not None and broken.launches == 2  # another kernel is another question


class Watched:
    """A kernel of which every launch is noted: what Triton compiles by."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*tensors: torch.Tensor, **options: Any) -> None:
            fixed = {key: value for key, value in options.items() if key not in ("C", "ce_weight")}
            self.launches.append((self.kernel, [(one.dtype, one.data_ptr() % 16) for one in tensors], fixed))
            self.kernel[grid](*tensors, **options)

        return launch


@has_triton
@pytest.mark.parametrize("logits_dtype", ["auto", "float32"])
def test_what_is_trusted_is_what_the_training_launches(
    logits_dtype: Any, settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same dtypes, V, steps from row to row: another would be another kernel, which nobody has looked at."""
    from dts_hf.loss import kernels

    launches: list[Any] = []
    for name in ("statistics_kernel", "divergence_kernel", "gradient_kernel"):
        monkeypatch.setattr(kernels, name, Watched(getattr(kernels, name), launches))
    monkeypatch.setattr(distillation_loss, "free_bytes", lambda _: None)
    run("triton", "jsd", torch.bfloat16, "logit_std", logits_dtype=logits_dtype)
    trained, launches[:] = list(launches), []
    monkeypatch.setattr(
        distillation_loss, "why_not_trusted", lambda of, _, *rest: road.why_not_trusted(of, CPU, *rest)
    )
    loss = DistillationLoss("jsd", temperature=build_temperature("logit_std"), logits_dtype=logits_dtype)
    head = Head(torch.empty(V, 1, dtype=torch.bfloat16))
    assert loss._is_fused(
        replace(settings_of("jsd", "logit_std"), fp32_logits=logits_dtype == "float32"), head, head, CARD
    )
    # Of the divergence the options are the loss's own
    without = [[(kernel, tensors, {**fixed, "a": 0}) for kernel, tensors, fixed in of] for of in (trained, launches)]
    assert len(trained) == 4 and without[0] == without[1]


@has_triton
def test_a_policy_that_is_not_ready_says_nothing_of_the_kernels(
    settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings_of()
    with monkeypatch.context() as patched:
        patched.setattr(type(asked.temperature), "forward", lambda *_: 1 / 0)
        assert "PyTorch, their judge, fails: ZeroDivisionError" in str(reason_for(asked))
    assert reason_for(asked) is None


def test_a_broken_triton_is_a_reason(settings_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dts_hf.loss.fused_rows", None)
    monkeypatch.setattr(road.importlib.util, "find_spec", lambda name: object())
    assert "Triton cannot be imported" in str(road.why_not_fused(settings_of(), CARD, V, {torch.float32}))


@has_triton
def test_no_memory_for_the_probe_is_no_reason_to_distrust(settings_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dts_hf.loss import kernels

    monkeypatch.setattr(kernels, "gradient_kernel", Broken(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        reason_for(settings_of())
    assert not road._proved


@has_triton
@pytest.mark.parametrize("known", ["a compile error", "adaptive_kl"])
def test_on_a_card_auto_falls_back_with_one_warning_and_triton_is_an_error(
    known: str, settings_of: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The card is played by the interpreter."""
    from dts_hf.loss import kernels

    monkeypatch.setattr(kernels, "gradient_kernel", Broken(ValueError("no ptxas")))
    monkeypatch.setattr(
        distillation_loss, "why_not_trusted", lambda of, _, *rest: road.why_not_trusted(of, CPU, *rest)
    )
    form: Any = "forward_kl" if known == "a compile error" else "adaptive_kl"
    head, losses = Head(torch.empty(V, 1)), {}
    for choice in ("auto", "triton", "torch"):
        losses[choice] = DistillationLoss(form, temperature=build_temperature("constant"), kernels=choice)  # type: ignore[arg-type]
    of = replace(settings_of(), divergence=losses["auto"].divergence)
    with caplog.at_level(logging.WARNING, LOSS_LOG):
        assert not losses["torch"]._is_fused(of, head, head, CARD) and not caplog.records
        assert not any(losses["auto"]._is_fused(of, head, head, CARD) for _ in range(3))
    (record,) = caplog.records
    reason = "not trusted: ValueError: no ptxas" if known == "a compile error" else "'adaptive_kl' has none"
    assert reason in record.getMessage() and "PyTorch" in record.getMessage()
    with pytest.raises(UserError, match=reason.removeprefix("not trusted: ")):
        losses["triton"]._is_fused(of, head, head, CARD)


@has_triton
def test_on_a_card_auto_takes_kernels_that_agree(settings_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        distillation_loss, "why_not_trusted", lambda of, _, *rest: road.why_not_trusted(of, CPU, *rest)
    )
    head = Head(torch.empty(V, 1))
    for choice in ("auto", "triton"):
        loss = DistillationLoss(temperature=build_temperature("constant"), kernels=choice)  # type: ignore[arg-type]
        assert loss._is_fused(settings_of(), head, head, CARD)


@has_triton
def test_the_probe_draws_nothing_from_the_training(settings_of: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert reason_for(settings_of()) is None
    assert torch.equal(torch.rand(1), expected)


# ----------------------------------------------------------------------------------------------------- memory, chunks


GB = 2**30


@pytest.mark.parametrize(
    ("fused", "free", "budget"),
    [(False, None, 256), (False, 80 * GB, 256), (True, None, 1024), (True, 80 * GB, 1024), (True, 4 * GB, 1024),
     (True, 4 * GB - 1, 512), (True, 3 * GB, 512), (True, 2 * GB, 512), (True, GB, 256), (True, 100 * 2**20, 16),
     (True, 0, 1)],
)  # fmt: skip
def test_the_budget_where_nobody_said(fused: bool, free: int | None, budget: float) -> None:
    assert road.default_budget_mb(fused, free) == budget


@pytest.mark.parametrize(("asked", "left"), [(None, 256.0), (2048.0, 2048.0)])
def test_a_budget_that_kernels_chose_is_none_for_pytorch(asked: float | None, left: float) -> None:
    """As after a checkpoint from another machine, or where a policy reads more from some step on."""
    loss = DistillationLoss(temperature=build_temperature("constant"), logits_budget_mb=asked)
    loss.logits_budget_mb = asked or 1024.0
    states, head = torch.zeros(3, 4), Head(torch.zeros(V, 4))
    loss(states, head, states, head, torch.tensor([0, 5, 19]), 3)
    assert loss.logits_budget_mb == left


def test_free_memory_is_what_the_driver_and_torch_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert road.free_bytes(CPU) is None
    card = SimpleNamespace(
        memory_reserved=lambda _: 100, memory_allocated=lambda _: 30, mem_get_info=lambda _: (1000, 5000)
    )
    monkeypatch.setattr(road, "torch", SimpleNamespace(cuda=card))
    assert road.free_bytes(CARD) == 1070


@given(st.integers(1, 50_000), st.integers(1, 20_000))
@settings(max_examples=300, deadline=None)
def test_chunks_are_few_equal_and_whole_tiles(rows: int, limit: int) -> None:
    chunk = equal_chunks(rows, limit)
    assert 1 <= chunk <= limit
    count, fewest = -(-rows // chunk), -(-rows // limit)
    assert count in (fewest, fewest + 1)
    if count == 1:
        assert chunk == rows
    elif chunk % 128:  # no fit: not in the fewest chunks, nor in one more
        assert chunk == -(-rows // fewest)
        assert all(-(-rows // (128 * more)) * 128 > limit for more in (fewest, fewest + 1))
    if rows > limit and limit % 128 == 0:
        assert chunk % 128 == 0


@pytest.mark.parametrize(
    ("rows", "limit", "chunk"),
    [(0, 5, 1), (5, 5, 5), (6, 5, 3), (8192, 5000, 4096), (9990, 5000, 3456), (390, 200, 195), (257, 256, 256)],
)
def test_chunks_of(rows: int, limit: int, chunk: int) -> None:
    assert equal_chunks(rows, limit) == chunk


@has_triton
@pytest.mark.parametrize(
    ("policy", "chunk"), [({"name": "constant"}, 256), ({"name": "dts", "granularity": "sequence"}, 299)]
)
def test_chunks_of_whole_sequences_are_as_large_as_can_be(policy: dict[str, Any], chunk: int) -> None:
    """In a smaller one a sequence that fits would be cut, and then computed twice."""
    asked = build_temperature(**policy)
    of = LossSettings(build_divergence("forward_kl"), asked, 0.5, True, 299.5 * 4 * V / 2**20, fused=True)
    states, head = torch.zeros(300, 4, dtype=torch.bfloat16), Head(torch.zeros(V, 4, dtype=torch.bfloat16))
    walk = ChunkWalk(
        of, states=states, head=head, teacher_states=states, teacher_head=head, targets=torch.zeros(300, dtype=torch.int64),
        sequences=torch.zeros(300, dtype=torch.int64), normalizer=1.0, needs=(True, True, False),
    )  # fmt: skip
    assert asked.needs_sequence_gap == (chunk == 299) and walk.chunk == chunk


def test_a_torch_without_out_dtype_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came after the oldest torch that the package takes; the card is played by its name."""
    on_card: Any = SimpleNamespace(dtype=torch.bfloat16, device=CARD)
    assert chunk_walk._writes_fp32(on_card, torch.float32) and not chunk_walk._writes_fp32(on_card, torch.float64)
    monkeypatch.setattr(chunk_walk, "_HAS_OUT_DTYPE", False)
    assert not chunk_walk._writes_fp32(on_card, torch.float32)


@has_triton
@pytest.mark.parametrize(
    ("logits_dtype", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)], ids=["auto", "float32"]
)
def test_logits_are_of_the_dtype_that_was_asked_for(
    logits_dtype: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dts_hf.loss import fused_rows

    seen, plain = [], fused_rows.FusedRows.run

    def watched(self: Any, z_s: Any, z_t: Any, targets: Any, gaps: Any, grad: Any) -> None:
        seen.append((z_s.dtype, z_t.dtype, grad.dtype, grad.data_ptr() == z_s.data_ptr()))
        plain(self, z_s, z_t, targets, gaps, grad)

    monkeypatch.setattr(fused_rows.FusedRows, "run", watched)
    output = run("triton", dtype=torch.bfloat16, logits_dtype=logits_dtype)
    assert torch.isfinite(output.loss)
    # g is for a matmul: in its dtype, and in the place of the logits where that is theirs
    assert seen == [(dtype, dtype, torch.bfloat16, dtype == torch.bfloat16)]
