"""What the loss measures of held-out rows alone: reverse KL and calibration errors, beside dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dts_hf.divergences import build_divergence
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.logged_sums import LogColumns, SumMeter
from dts_hf.loss.plain_rows import PlainRows
from dts_hf.loss.row_loss import LossSettings
from dts_hf.loss.statistics import CONFIDENCE_BINS, IN_BINS, OF_HELD_OUT
from dts_hf.models.head import Head
from dts_hf.temperature.constant import Constant
from tests.support import reference
from tests.support.loss_problem import N, in_chunks_of, problem
from tests.support.row_roads import FORMS, chunk_of


class One:
    """Stands for an accelerator of one process."""

    def gather(self, flat: Tensor) -> Tensor:
        return flat


def calibration_error(p: Tensor, targets: Tensor) -> float:
    """Guo et al. 2017, equation 3, bin by bin: |B| / n times |accuracy - confidence| of each bin (l, u]."""
    confidence, choice = p.max(-1)
    right, total = (choice == targets).double(), 0.0
    for lower in range(CONFIDENCE_BINS):
        of_bin = (confidence > lower / CONFIDENCE_BINS) & (confidence <= (lower + 1) / CONFIDENCE_BINS)
        if of_bin.any():
            total += float(of_bin.double().mean() * (right[of_bin].mean() - confidence[of_bin].mean()).abs())
    return total


def measured(loss: DistillationLoss, data: dict[str, Tensor], *parts: slice) -> dict[str, float]:
    """The held-out columns of rows that come in several batches."""
    meter = SumMeter()
    for rows in parts:
        head, teacher_head = Head(data["weight"], data["bias"]), Head(data["teacher_weight"])
        states = data["states"][rows], data["teacher_states"][rows]
        with torch.no_grad():
            meter.add(loss(states[0], head, states[1], teacher_head, data["targets"][rows], N).sums)
    return LogColumns().means(meter.reduce(One()), held_out=True)


def test_they_are_those_of_the_dense_distributions_whatever_the_chunks_and_batches() -> None:
    data = problem()
    q = reference.softmax(reference.logits(data["states"], data["weight"], data["bias"])).detach()
    p = reference.softmax(reference.logits(data["teacher_states"], data["teacher_weight"], None))
    expected = {
        "reverse_kl": float(reference.reverse_kl(p, q).mean()),
        "ece": calibration_error(q, data["targets"]),
        "teacher_ece": calibration_error(p, data["targets"]),
    }
    assert min(expected.values()) > 0.05  # or an error could hide in it
    halves = slice(0, N // 2), slice(N // 2, N)
    one_by_one = [slice(row, row + 1) for row in range(N)]
    for rows, parts in ((None, [slice(None)]), (3, [slice(None)]), (3, halves), (None, one_by_one)):
        loss = DistillationLoss(temperature=1.0, logits_budget_mb=in_chunks_of(rows), held_out=True)
        found = measured(loss, data, *parts)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)


def test_a_perfect_guess_and_a_planted_error() -> None:
    """Four labels at a confidence of 0.7 of which two are right: the error is 0.2. At certainty and right it is 0."""
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]] * 4 + [[1.0, 1e-30, 1e-30]] * 4, dtype=torch.float64))
    targets = torch.tensor([0, 0, 1, 2, 0, 0, 0, 0])
    loss = DistillationLoss(temperature=1.0, kd_ratio=0.0, held_out=True)
    identity = Head(torch.eye(3, dtype=torch.float64))
    for rows, expected in ((slice(0, 4), 0.2), (slice(4, 8), 0.0), (slice(None), 0.1)):
        meter = SumMeter()
        meter.add(loss(logits[rows], identity, None, None, targets[rows], 1.0).sums)
        means = LogColumns(teacher=False).means(meter.reduce(One()), held_out=True)
        assert means["ece"] == pytest.approx(expected, abs=1e-12) and "teacher_ece" not in means


def test_training_does_not_measure_them() -> None:
    data = problem()
    head, teacher_head = Head(data["weight"], data["bias"]), Head(data["teacher_weight"])
    loss = DistillationLoss(temperature=1.0)
    sums = loss(data["states"], head, data["teacher_states"], teacher_head, data["targets"], N).sums
    assert not {statistic.sum for statistic in OF_HELD_OUT} & sums.keys()


@pytest.mark.parametrize("form", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_kernels_measure_what_pytorch_does(form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DKD too, whose statistics at T leave the label out."""
    pytest.importorskip("triton", reason="no kernels where Triton is not installed")
    from dts_hf.loss import fused_rows

    if device == "cpu":
        monkeypatch.setattr(fused_rows, "_THREADS", 8)
    chunk = chunk_of(rows=5, vocab=37, device=device)
    chunk.targets[2:4] = torch.stack([chunk.student[2].argmax(), chunk.teacher[3].argmax()])  # a right guess of each
    settings = LossSettings(build_divergence(FORMS[form]), Constant(1.0), 0.5, True, 64.0, held_out=True)
    sums = []
    for road in (PlainRows, fused_rows.FusedRows):
        head = Head(torch.empty(37, 1, device=device))
        rows = road(
            settings, head=head, teacher_head=head, has_teacher=True, with_grad=False, math_dtype=torch.float32,
            device=torch.device(device),
        )  # fmt: skip
        rows.run(chunk.student.clone(), chunk.teacher, chunk.targets, None, torch.empty(0))
        sums.append(rows.sums)
    for statistic in OF_HELD_OUT:
        assert torch.allclose(sums[0][statistic.sum], sums[1][statistic.sum], rtol=1e-4, atol=1e-5), statistic.log
    assert all(float(sums[0][name].abs().max()) > 0.1 for name in IN_BINS)
