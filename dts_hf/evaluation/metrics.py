"""The scores of answers as ``evaluate.Metric`` classes, to be instantiated: ``RougeL(keep_in_memory=True)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from dts_hf.evaluation.text_metrics import best_rouge_l, exact_match


def _info(description: str) -> evaluate.MetricInfo:
    text = datasets.Value("string")
    features: Any = datasets.Features({"predictions": text, "references": datasets.List(text)})  # type: ignore[arg-type]
    return evaluate.MetricInfo(description=description, citation="", inputs_description="", features=features)


class RougeL(evaluate.Metric):
    """Mean ROUGE-L (0 to 1) over examples, each against its best reference.

    ``compute(predictions=[...], references=[[...], ...], use_stemmer=True, per_example=False)`` returns ``{"rougeL":
    mean}``, with ``per_example`` also ``"rougeL_scores"``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE-L F-measure, best reference of each example")

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        use_stemmer: bool = True,
        per_example: bool = False,
    ) -> dict[str, Any]:
        scores = [best_rouge_l(p, r, use_stemmer) for p, r in zip(predictions, references, strict=True)]
        means = {"rougeL": sum(scores) / len(scores)}
        return {**means, "rougeL_scores": scores} if per_example else means


class ExactMatch(evaluate.Metric):
    """Share of predictions (0 to 1) equal to a reference once case, punctuation and spaces are set aside."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exact match after normalisation, any reference of each example")

    def _compute(  # type: ignore[override]
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        hits = [exact_match(p, list(r)) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}
