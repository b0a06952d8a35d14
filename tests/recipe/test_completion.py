"""What the Tab key offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dts_hf.cli.printing import complete_recipe
from dts_hf.recipe import completion


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.getbasetemp() / "completion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("temp", ["temperature.", "temperature="]),
        ("temperature.ru", ["temperature.rule=", "temperature.run="]),
        ("temperature.rule=", ["temperature.rule=paper", "temperature.rule=code", "temperature.rule=gap"]),
        ("temperature=dt", ["temperature=dtkd", "temperature=dts"]),
        ("loss.divergence=rev", ["loss.divergence=reverse_kl"]),
        ("data.long_rows=", ["data.long_rows=drop", "data.long_rows=cut"]),
        ("training.bf16=", ["training.bf16=true", "training.bf16=false"]),
        ("training.learning_r", ["training.learning_rate="]),
        ("nothing.like", []),
    ],
)
def test_keys_and_values(typed: str, offered: list[str]) -> None:
    assert completion.completions(typed) == offered


def test_the_schema_is_made_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completion.completions("temp")
    (kept,) = (own_cache / "dts_hf").glob("schema-*.json")
    kept.write_text('{"properties": {"tempest": {}}}')
    assert completion.completions("temp") == ["tempest="]
    kept.unlink()


def test_recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quick_one.yaml", "quick.txt", "_base.yaml", "quiet/deep.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert complete_recipe("qui") == ["quick_one.yaml", "quiet/", "quickstart"]
    assert complete_recipe("quiet/d") == ["quiet/deep.yaml"]
