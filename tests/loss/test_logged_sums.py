"""From sums to log lines: the names and their order, which runs have which, and how each sum is reduced."""

from __future__ import annotations

import math

import pytest
import torch

from dts_hf.loss.logged_sums import LogColumns, MeanLog, SumMeter, Totals
from dts_hf.loss.statistics import (
    IN_BINS,
    OF_HELD_OUT,
    OF_POLICY,
    ROWS,
    STATISTICS,
    SUMS_OF_LOSS,
    TEMPERATURE_MAX,
    TEMPERATURE_MIN,
)

#: ``log.jsonl`` and ``metrics.json`` are read by other programs: these names are a promise.
BOTH = ["ce_loss", "kd_loss", "teacher_ce", "gap", "kl", "student_entropy", "teacher_entropy"]
HELD_OUT = [*BOTH, "top1_agreement", "reverse_kl", "ece", "teacher_ece"]
TRAINING = [
    *BOTH, "student_entropy_at_t", "teacher_entropy_at_t", "effective_support", "top1_agreement",
    "temperature", "teacher_temperature", "temperature_min", "temperature_max", "aux_loss", "kd_ratio",
]  # fmt: skip
REGRESSION = ["label_mse", "kd_loss", "teacher_mse"]


class Processes:
    """Stands for an accelerator: rank k's numbers are (k + 1) times the first one's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def gather(self, flat: torch.Tensor) -> torch.Tensor:
        return torch.cat([(k + 1) * flat for k in range(self.count)])


def totals_of_a_step(rows: float = 4.0) -> Totals:
    totals = Totals()
    totals.update({name: float(k) for k, name in enumerate(SUMS_OF_LOSS, 1)}, rows=rows, aux=2.0, tokens=9.0)
    totals.add_policy_values({"kd_ratio": 0.25, "temperature_cosine": None})
    return totals


@pytest.mark.parametrize(
    ("columns", "held_out", "names"),
    [
        (LogColumns(), False, TRAINING),
        (LogColumns(), True, HELD_OUT),
        (LogColumns(teacher=False), False, ["ce_loss", "student_entropy", "aux_loss"]),
        (LogColumns(teacher=False), True, ["ce_loss", "student_entropy", "ece"]),
        (LogColumns(regression=True), False, REGRESSION),
        (LogColumns(regression=True), True, REGRESSION),
        (LogColumns(teacher=False, regression=True), False, ["label_mse"]),
    ],
)
def test_the_names_of_a_log_line(columns: LogColumns, held_out: bool, names: list[str]) -> None:
    totals = totals_of_a_step()
    if held_out:  # nobody sums these up in an evaluation
        del totals["aux"], totals[f"{OF_POLICY}kd_ratio"]
        totals.update({statistic.sum: 1.0 for statistic in OF_HELD_OUT})
    assert list(columns.means(totals, held_out=held_out)) == names


def test_the_numbers_of_a_log_line() -> None:
    totals = totals_of_a_step(rows=4.0)
    logged = LogColumns().means(totals)
    assert logged["ce_loss"] == totals["ce"] / 4 and logged["kd_loss"] == totals["kd"] / 4
    assert logged["gap"] == (totals["ce"] - totals["teacher_ce"]) / 4
    assert logged["effective_support"] == math.exp(totals["teacher_entropy_at_t"] / 4)
    assert logged["temperature_min"] == totals["temperature_min"]  # extremes are no sums
    assert logged["temperature_max"] == totals["temperature_max"]
    assert logged["aux_loss"] == 0.5 and logged["kd_ratio"] == 0.25


def test_without_a_row_the_means_are_nan() -> None:
    logged = LogColumns().means(totals_of_a_step(rows=0.0))
    assert math.isnan(logged["ce_loss"]) and math.isnan(logged["effective_support"])


def test_bins_of_confidence_are_added_up_over_batches_and_ranks_before_their_magnitudes_are() -> None:
    """Errors of opposite signs cancel within a bin and not between bins, wherever their rows were."""
    meter, (name, _) = SumMeter(), IN_BINS
    for bins in ([3.0, 1.0, 0.0], [-3.0, 1.0, -1.0]):
        meter.add({ROWS: torch.tensor(2.0), name: torch.tensor(bins)})
    totals = meter.reduce(Processes(2))  # 12 rows; the second rank has the same errors twice
    assert totals.vectors[name] == (0.0, 6.0, -3.0) and totals[name] == 9.0
    assert LogColumns(teacher=False).means({**totals}, held_out=True) == {"ece": 0.75}


def test_every_sum_is_reduced_as_the_table_says_over_batches_ranks_and_steps() -> None:
    meter, log = SumMeter(), MeanLog(LogColumns())
    for value in (3.0, 1.0):
        meter.add({name: torch.tensor(value) for name in (ROWS, "tokens", *SUMS_OF_LOSS)})
    for totals in (meter.reduce(Processes(2)), dict.fromkeys((ROWS, "tokens", *SUMS_OF_LOSS), 7.0)):
        log.add(totals)
    extremes = {TEMPERATURE_MIN.sum: 1.0, TEMPERATURE_MAX.sum: 7.0}  # of 3, 1, twice that on the second rank, and 7
    expected = {name: extremes.get(name, 3.0 + 1.0 + 6.0 + 2.0 + 7.0) for name in log.totals}
    assert log.totals == expected and set(expected) == {ROWS, "tokens", *SUMS_OF_LOSS}
    assert not meter.reduce(Processes(2)), "reduced sums start again from nothing"


def test_a_policys_own_number_is_a_mean_whatever_it_is_called() -> None:
    log = MeanLog(LogColumns())
    for value in (1.0, 3.0):
        totals = totals_of_a_step()
        totals.add_policy_values({"share_min": value})
        log.add(totals)
    assert log.pop()["share_min"] == 2.0 and log.pop() == {}


def test_what_a_policy_is_told_of_a_step() -> None:
    totals = totals_of_a_step(rows=2.0)
    totals["temperature_grad"], totals.vectors["observed"] = 3.0, (1.0, 4.0)
    stats = totals.step_stats()
    assert (stats.student_ce, stats.teacher_ce, stats.kd) == (
        totals["ce"] / 2,
        totals["teacher_ce"] / 2,
        totals["kd"] / 2,
    )
    assert (stats.num_items, stats.temperature_grad, stats.observed) == (2.0, 1.5, (0.5, 2.0))


def test_the_table_names_each_number_once_and_says_what_it_is() -> None:
    names = [statistic.log for statistic in STATISTICS]
    assert len(set(names)) == len(names)
    for statistic in STATISTICS:
        assert statistic.unit and statistic.meaning and statistic.sums
        assert statistic.of is not float or len(statistic.sums) == 1
