"""Shared fixtures. Tests marked ``shared_data`` use real rows laid beside the checkout and skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# `make fuzz`: see test_fuzz.py
settings.register_profile("fuzz", print_blob=True)

SHARED_DATA = Path(os.environ.get("DTS_HF_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not beside this checkout")
    return SHARED_DATA


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder for this test, with the teacher and the rows that ``tests.support.recipes.recipe`` names."""
    from tests.support.recipes import write_rows
    from tests.support.tiny import tiny_llama, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    tiny_llama(seed=0, layers=4).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    write_rows(tmp_path / "train.jsonl", 0, 12)
    write_rows(tmp_path / "valid.jsonl", 50, 5)
    return tmp_path


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are named by their argument: pytest would spell them out, and a gzip header holds the clock.

    Workers that disagree on a name run nothing. What else names depend on is for test_collection.py to find.
    """
    return argname if isinstance(val, bytes) else None
