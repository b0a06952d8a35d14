"""A folder with a teacher that knows its rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.examined import (
    rows_between,
    save_model,
    write_rows,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(str(folder / "teacher"), 60)
    return folder


@pytest.fixture()
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(models / "teacher", "teacher")
    write_rows(Path("train.jsonl"), rows_between(0, 24))
    write_rows(Path("valid.jsonl"), rows_between(50, 55))
    return tmp_path
