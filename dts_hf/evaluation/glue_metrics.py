"""The metrics of the GLUE tasks (Wang et al. 2018, arXiv 1804.07461) as one ``evaluate.Metric``, in float64.

``GlueMetric("mrpc").compute(predictions=[...], references=[...])`` gives ``{"accuracy": ..., "f1": ...}``. Values are
from 0 to 1 (correlations from -1 to 1); tables show them x 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from dts_hf.errors import UserError, nearest

Array = NDArray[Any]

# In the order in which they are reported; the first one is the task's headline. MNLI: the same metric on two sets.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def headline(task: str) -> str:
    """Name of the metric that stands for ``task`` where one number is needed, as for the choice of a checkpoint."""
    return TASK_METRICS[_checked(task)][0]


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task.

    Args:
        task: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli`` (or ``mnli_matched``, ``mnli_mismatched``),
            ``qnli``, ``rte`` or ``wnli``.
        options: of ``evaluate.Metric``; by default the rows are kept in memory.

    ``compute`` takes class ids (``stsb``: numbers) and returns the metrics of ``TASK_METRICS``. A quotient with the
    denominator 0 (one class only, a constant) is 0.0, as in scikit-learn; a prediction that is not finite makes a
    correlation NaN.

    Raises:
        UserError: an unknown task, no rows, or a reference that is no class of the task, such as the -1 of GLUE's
            hidden test labels.
    """

    def __init__(self, task: str, **options: Any) -> None:
        super().__init__(config_name=_checked(task), **{"keep_in_memory": True, **options})

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        features: Any = datasets.Features({"predictions": kind, "references": kind})  # type: ignore[arg-type]
        return evaluate.MetricInfo(
            description=f"GLUE, {self.config_name}: {', '.join(TASK_METRICS[str(self.config_name)])}",
            citation="",
            inputs_description="",
            # Lists, because format="numpy" would make float32 of the marks
            features=features,
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float] | None:
        """See the class; without arguments the rows given to ``add_batch`` count."""
        # `evaluate` itself fails on empty columns with an IndexError
        if references is not None and len(references) == 0:
            raise UserError(f"GLUE metric of {self.task}: no rows, expected at least one")
        if predictions is not None and np.ndim(predictions) != 1:
            raise UserError(
                f"GLUE metric of {self.task}: predictions have the shape {np.shape(predictions)}, expected one "
                f"{'number' if self.task == 'stsb' else 'class id'} a row (take the argmax of logits first)"
            )
        values: dict[str, float] | None = super().compute(predictions=predictions, references=references, **options)
        return values

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:  # type: ignore[override]
        predicted, expected = np.asarray(predictions), np.asarray(references)
        if self.task != "stsb":
            classes = 3 if self.task.startswith("mnli") else 2
            bad = np.flatnonzero((expected < 0) | (expected >= classes))
            if len(bad):
                raise UserError(
                    f"GLUE metric of {self.task}: row {bad[0]} has the label {expected[bad[0]]}, expected 0 to "
                    f"{classes - 1}. The labels of GLUE's test splits are hidden (-1): score the validation split"
                )
        return {name: METRICS[name](predicted, expected) for name in TASK_METRICS[self.task]}


def accuracy(predicted: Array, expected: Array) -> float:
    """Share of rows whose class is right."""
    return float(np.mean(predicted == expected))


def f1(predicted: Array, expected: Array) -> float:
    """Harmonic mean of precision and recall of class 1."""
    hits = float(np.sum((predicted == 1) & (expected == 1)))
    total = float(np.sum(predicted == 1) + np.sum(expected == 1))
    return 2 * hits / total if total else 0.0


def matthews_correlation(predicted: Array, expected: Array) -> float:
    """Correlation of two lists of class ids (Matthews 1975; for several classes Gorodkin 2004)."""
    classes, ids = np.unique(np.concatenate([expected, predicted]), return_inverse=True)
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (ids[: len(expected)], ids[len(expected) :]), 1.0)
    rows, in_truth, in_prediction = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = np.trace(counts) * rows - in_truth @ in_prediction
    variances = (rows**2 - in_truth @ in_truth) * (rows**2 - in_prediction @ in_prediction)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def pearson(predicted: Array, expected: Array) -> float:
    """Linear correlation."""
    first, second = (np.asarray(values, dtype=np.float64) for values in (predicted, expected))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    # Rounding leaves a constant list with deviations of 1e-17: compare before subtracting
    if np.all(first == first[0]) or np.all(second == second[0]):
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    return float(np.clip(first @ second, -1.0, 1.0))


def spearmanr(predicted: Array, expected: Array) -> float:
    """Linear correlation of the ranks; equal values share the mean of their ranks."""
    if not (np.isfinite(predicted).all() and np.isfinite(expected).all()):
        return float("nan")
    return pearson(_ranks(predicted), _ranks(expected))


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}


def _ranks(values: Array) -> Array:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def _checked(task: str) -> str:
    if task not in TASK_METRICS:
        raise UserError(
            f"GLUE task: got {task!r}, expected one of {', '.join(TASK_METRICS)}.{nearest(str(task), TASK_METRICS)}"
        )
    return task
