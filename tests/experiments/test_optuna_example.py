"""``examples/optuna_search.py``: what a trial is worth, and a search that goes on where it was killed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dts_hf.experiments.sweep import Planned, Study
from tests.support.planted_sweep import WORKER, noted
from tests.support.recipes import recipe, short_yaml, write_rows

FILE = Path(__file__).parents[2] / "examples/optuna_search.py"
VALUES = {"temperature": 2.0, "loss.kd_ratio": 0.5, "training.learning_rate": 1e-4}


@pytest.fixture
def example() -> ModuleType:
    if not FILE.is_file():
        pytest.skip("the tests run away from the repository")
    spec = importlib.util.spec_from_file_location("optuna_search", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs that take moments; the KL of each is 1, unless something else lies under its name."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 0, 6)
    write_rows(tmp_path / "valid.jsonl", 6, 3)
    (tmp_path / "recipe.yaml").write_text(short_yaml(recipe()))

    def command(_: Study, run: Planned) -> list[str]:
        return [sys.executable, str(WORKER), str(run.path), "0.01", "ends"]

    monkeypatch.setattr(Study, "command", command)
    return tmp_path


def test_a_trial_is_the_mean_over_seeds_and_none_where_a_run_diverged(here: Path, example: ModuleType) -> None:
    folder = here / "out"
    assert example.score(Path("recipe.yaml"), folder, VALUES, [1, 2]) == 1.0
    runs = sorted(folder.glob("temperature=*"))
    assert len(runs) == 2 and example.score(Path("recipe.yaml"), folder, VALUES, [1, 2]) == 1.0
    assert noted(folder, "ends") == {run.name: 1 for run in runs}  # the second time nothing was done
    for kl, mean in ((2.0, 1.5), (None, None)):
        scores: Any = {"models": {"student": {"teacher_forced": {"kl": kl}}}}
        (runs[0] / "metrics.json").write_text(json.dumps(scores))
        assert example.score(Path("recipe.yaml"), folder, VALUES, [1, 2]) == mean


def test_a_search_goes_on_where_it_was_killed(
    here: Path, example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    arguments = ["recipe.yaml", "--output", "out", "--trials"]
    asked: list[dict[str, Any]] = []

    def killed(recipe: Path, folder: Path, values: dict[str, Any], *_: Any) -> float:
        asked.append(values)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return values["temperature"]  # type: ignore[no-any-return]

    monkeypatch.setattr(example, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        example.main([*arguments, "3"])
    example.main([*arguments, "3"])
    assert len(asked) == 4 and asked[2] == asked[1]  # asked for again; three count
    assert f"best: {min(one['temperature'] for one in asked):.4f}" in capsys.readouterr().out
    example.main([*arguments, "3"])
    assert len(asked) == 4
