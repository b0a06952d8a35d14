"""GLUE metrics against numbers worked out by hand, scipy, and scikit-learn where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from dts_hf.errors import UserError
from dts_hf.evaluation.glue_metrics import (
    METRICS,
    TASK_METRICS,
    GlueMetric,
    f1,
    headline,
    matthews_correlation,
    pearson,
    spearmanr,
)


def compute(task: str, predictions: object, references: object) -> dict[str, float]:
    return GlueMetric(task).compute(predictions=predictions, references=references)


@pytest.mark.parametrize(
    ("task", "predictions", "references", "expected"),
    [
        ("sst2", [0, 1, 1, 0], [0, 1, 0, 0], {"accuracy": 0.75}),
        # 2 true positives, 1 false positive, 1 false negative: f1 = 4 / 6
        ("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"accuracy": 0.6, "f1": 4 / 6}),
        ("qqp", [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0}),
        # tp 2, tn 1, fp 1, fn 1: (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
        ("cola", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"matthews_correlation": 1 / 6}),
        ("cola", [1, 1, 1], [1, 0, 1], {"matthews_correlation": 0.0}),
        ("cola", [0, 1], [1, 0], {"matthews_correlation": -1.0}),
        # deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6); ranks (1, 2, 3) and (1.5, 1.5, 3)
        ("stsb", [1.0, 2.0, 3.0], [0.0, 0.0, 3.0], {"pearson": 3 / math.sqrt(12), "spearmanr": 1.5 / math.sqrt(3)}),
        ("stsb", [2.5, 2.5], [0.0, 5.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("mnli_matched", [0, 1, 2], [0, 1, 1], {"accuracy": 2 / 3}),
        ("mnli_mismatched", [2, 1, 2], [0, 1, 1], {"accuracy": 1 / 3}),
        ("qnli", [1], [1], {"accuracy": 1.0}),
        ("rte", [1], [0], {"accuracy": 0.0}),
        ("wnli", [1, 0], [1, 1], {"accuracy": 0.5}),
    ],
)
def test_by_hand(task: str, predictions: list, references: list, expected: dict[str, float]) -> None:
    found = compute(task, predictions, references)
    assert found == {name: pytest.approx(value, abs=1e-15) for name, value in expected.items()}
    assert list(found) == list(TASK_METRICS[task])


def test_correlations_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for case in range(100):
        n = int(generator.integers(3, 60))
        first, second = generator.normal(size=n) * 10.0 ** generator.integers(-8, 8), generator.normal(size=n) + 1e3
        if case % 2:  # ties, as STS-B's marks have them
            first, second = np.round(first, 0), np.round(second - 1e3, 1)
        if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
            continue
        assert pearson(first, second) == pytest.approx(scipy.stats.pearsonr(first, second).statistic, abs=1e-12)
        assert spearmanr(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-12)


def test_classes_are_scored_as_in_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    for case in range(100):
        first, second = generator.integers(0, 2 + case % 2, size=(2, int(generator.integers(1, 40))))
        assert matthews_correlation(first, second) == pytest.approx(
            metrics.matthews_corrcoef(second, first), abs=1e-12
        )
        if case % 2 == 0:
            assert f1(first, second) == pytest.approx(metrics.f1_score(second, first, zero_division=0), abs=1e-15)


def test_binary_matthews_is_pearson_of_the_ids() -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        first, second = generator.integers(0, 2, size=(2, 30))
        assert matthews_correlation(first, second) == pytest.approx(pearson(first, second), abs=1e-12)


def test_batches_tensors_and_arrays() -> None:
    metric = GlueMetric("mrpc")
    metric.add_batch(predictions=torch.tensor([1, 0]), references=torch.tensor([1, 1]))
    metric.add_batch(predictions=np.array([1]), references=np.array([1]))
    assert metric.compute() == {"f1": pytest.approx(0.8), "accuracy": pytest.approx(2 / 3)}
    assert metric.compute(predictions=[1], references=[1]) == {"f1": 1.0, "accuracy": 1.0}, "nothing is left over"


def test_marks_keep_their_float64() -> None:
    """In float32 these predictions are one constant."""
    found = compute("stsb", [1.0, 1.0 + 1e-12, 1.0 + 2e-12], [1.0, 2.0, 3.0])
    assert found == {"pearson": pytest.approx(1.0, abs=1e-4), "spearmanr": pytest.approx(1.0)}


def test_a_prediction_that_is_not_finite_shows() -> None:
    found = compute("stsb", [1.0, float("nan"), 2.0], [1.0, 2.0, 3.0])
    assert math.isnan(found["pearson"]) and math.isnan(found["spearmanr"])


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"got 'sst-2'.*Did you mean 'sst2'"):
        GlueMetric("sst-2")
    with pytest.raises(UserError, match=r"row 1 has the label -1, expected 0 to 1.*hidden"):
        compute("rte", [0, 1], [0, -1])
    with pytest.raises(UserError, match="row 0 has the label 3, expected 0 to 2"):
        compute("mnli", [0], [3])
    with pytest.raises(UserError, match="no rows"):
        compute("rte", [], [])
    with pytest.raises(UserError, match=r"shape \(2, 2\).*argmax"):
        compute("sst2", np.zeros((2, 2)), [0, 1])
    with pytest.raises(ValueError, match="Mismatch"):
        compute("sst2", [0], [0, 1])


def test_every_task_has_a_headline_and_known_metrics() -> None:
    assert {name for names in TASK_METRICS.values() for name in names} == set(METRICS)
    assert (headline("mrpc"), headline("stsb"), headline("cola")) == ("f1", "pearson", "matthews_correlation")
    with pytest.raises(UserError, match="GLUE task"):
        headline("mnil")
