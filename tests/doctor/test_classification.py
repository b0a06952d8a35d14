"""The doctor on recipes with a ``task:`` section."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dts_hf.doctor.run import diagnose
from tests.support.examined import (
    classifier,
    problems,
    shown,
    task_recipe,
    texts,
    write_rows,
)


def test_a_clean_task_is_clean(workplace: Path) -> None:
    classifier("classifier")
    diagnosis = diagnose(task_recipe())
    assert diagnosis.status == "ok", texts(diagnosis)
    assert diagnosis["cross-entropy"].values["teacher_accuracy"] > 0.9
    assert diagnosis["steps"].values["steps"] == 3
    assert {segment.text.strip() for row in diagnosis.picture for segment in row.segments[1:]} <= {
        "negative",
        "positive",
    }
    shown(diagnosis, 100)
    json.dumps(diagnosis.as_dict(), allow_nan=False)
    from_labels = diagnose(task_recipe(loss={"kd_ratio": 0.0}))  # the teacher gives the first weights
    assert from_labels.status == "ok" and from_labels["effect"].skipped, texts(from_labels)


def test_faults_of_a_task(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier("classifier", swapped=True)
    path = task_recipe()
    diagnosis = diagnose(path)
    found = problems(diagnosis)
    assert found["labels-swapped"] == "error" and not {"teacher-untrained", "teacher-worse"} & set(found), texts(
        diagnosis
    )
    one_class = [{"id": str(i), "sentence": f"good boat {i}", "label": 1} for i in range(24)]
    write_rows(Path("train.jsonl"), one_class)
    write_rows(Path("valid.jsonl"), one_class)
    found = problems(diagnose(path))
    assert found["class-missing"] == found["leak"] == "warning"
