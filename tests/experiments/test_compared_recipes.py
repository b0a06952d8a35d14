"""``dts-hf compare RECIPE... --seeds``: each recipe with each seed once, then compared."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.errors import Interrupted, UserError
from dts_hf.experiments.made import is_recipe, make_runs, plan_runs
from dts_hf.experiments.sweep import Planned, Study, Sweep
from tests.support.planted_runs import plant
from tests.support.planted_sweep import Planted, planted
from tests.support.recipes import recipe, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """T = 1, 2 and 9 (which fails), in a folder of their own, and runs of them that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_rows(tmp_path / "train.jsonl", 0, 8)
    write_rows(tmp_path / "valid.jsonl", 8, 4)
    (tmp_path / "teacher").mkdir()
    for value in (1, 2, 9):
        settings = recipe(temperature={"name": "constant", "value": value})
        Path(f"t{value}.yaml").write_text(settings.to_yaml())
    worker = str(ROOT / "tests/workers/planted_training.py")

    def command(self: Study, run: Planned) -> list[str]:
        return [
            sys.executable,
            worker,
            self.recipe,
            *run.overrides,
            "sweep=null",
            "--output",
            str(run.path),
            "--resume",
        ]

    monkeypatch.setattr(Study, "command", command)
    return [Path(f"t{value}.yaml") for value in (1, 2, 9)]


def invoke(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_recipes_are_trained_once_with_each_seed_and_compared(recipes: list[Path], tmp_path: Path) -> None:
    before = plant(tmp_path / "before", 4.0, 1)
    arguments = ["t1.yaml", "t2.yaml", str(before), "--seeds", "1,2", "--baseline", "t2.yaml", "--output", "out"]
    said = invoke(*arguments)
    began = Path("out/runs/began.txt").read_text().split()
    assert [name.partition("-")[0] for name in began] == ["seed"] * 4
    assert [name[:6] for name in began] == ["seed-1", "seed-1", "seed-2", "seed-2"], "seeds are outermost"
    runs = sorted(path.parent.parent.name for path in Path("out/runs").glob("*/*/metrics.json"))
    assert runs == ["t1", "t1", "t2", "t2"]
    assert "baseline: temperature.value=2" in said and "temperature.value=4" in said
    assert Path("out/report.html").is_file()
    assert invoke(*arguments).splitlines()[-1] == said.splitlines()[-1]
    assert Path("out/runs/began.txt").read_text().split() == began, "nothing is trained twice"


def test_a_recipe_that_fails_is_said_and_the_others_are_compared(recipes: list[Path], tmp_path: Path) -> None:
    before = plant(tmp_path / "before", 2.0, 1)
    said = invoke("t1.yaml", "t9.yaml", str(before), "--output", "out")
    assert "has failed: RuntimeError: this one always fails; see" in said
    assert "temperature.value=9" not in said and "temperature.value=2" in said
    # tried once more, then given up
    began = Path("out/runs/began.txt").read_text().split()
    assert len(began) == 3 and len(set(began)) == 2


def test_runs_that_have_a_directory_are_returned_whatever_became_of_them(tmp_path: Path) -> None:
    study, said = planted(tmp_path, count=2, seconds=0.05, failing=1), []
    assert make_runs([(Path("recipe.yaml"), study)], said.append) == list(study.runs)
    assert any("run-2 has failed: RuntimeError: this run always fails" in line for line in said)


def test_a_baseline_is_the_recipe_however_it_is_written(recipes: list[Path]) -> None:
    said = invoke("./t1.yaml", "./t2.yaml", "--baseline", "./t2.yaml", "--output", "out")
    assert "baseline: temperature.value=2" in said
    again = invoke("t1.yaml", "t2.yaml", "--baseline", str(Path("t2.yaml").absolute()), "--output", "out")
    assert "baseline: temperature.value=2" in again


def test_what_is_wrong_without_a_run_is_refused_before_any_is_trained(recipes: list[Path], tmp_path: Path) -> None:
    """It may take days."""
    for options, said in (
        (["--output", "out", "--margin", "-1"], "margin: got -1.0"),
        (["--output", "out", "--baseline", "t3.yaml"], "baseline: 't3.yaml' is none of the recipes given"),
        (["--output", "t1.yaml"], "--output: t1.yaml is a file"),
        (["--output", "t1.yaml/out"], "t1.yaml is a file, expected a folder"),
    ):  # fmt: skip
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["compare", "t1.yaml", "t2.yaml", *options])
        assert result.exit_code == 2 and said in result.output, result.output
    Path("again.yaml").write_text(recipes[0].read_text().replace("logging_steps: 2", "logging_steps: 2\n  seed: 7"))
    for one_kind in (["t1.yaml", "--seeds", "1,2"], ["t1.yaml", "again.yaml"]):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["compare", *one_kind, "--output", "out"])
        assert result.exit_code == 2 and "expected at least two kinds of runs" in result.output, result.output
    assert not list(tmp_path.rglob("began.txt"))


def test_a_terminal_has_the_table_of_sweep(tmp_path: Path) -> None:
    """Runs that were done before count; a recipe that has nothing left to do has no table."""
    study, said = planted(tmp_path, count=2, seconds=0.4), []

    def shown(runs: Sequence[Planned]) -> str:
        file = io.StringIO()
        screen = Console(file=file, force_terminal=True, width=120, color_system=None)
        given = Planted(study.recipe, study.folder, runs, study.seconds)
        make_runs([(Path("a.yaml"), given)], said.append, screen)
        return file.getvalue()

    assert "1 of 1 done" in shown(study.runs[:1])
    text = shown(study.runs)
    assert "1 of 2 done, 1 at work" in text and "2 of 2 done" in text and "KL" in text
    assert any("run 1" in line for line in text.splitlines()) and "run 0" not in text
    assert not shown(study.runs)
    assert said == [f"compare: a.yaml (1 of 1): {done} runs done" for done in ("0 of 1", "1 of 2", "2 of 2")]


def test_elsewhere_there_is_a_line_whenever_a_run_begins_or_ends(recipes: list[Path]) -> None:
    said = [
        line for line in invoke("t1.yaml", "t2.yaml", "--output", "out").splitlines() if line.startswith("compare:")
    ]
    assert [line.partition("; about")[0] for line in said] == [
        "compare: t1.yaml (1 of 2): 0 of 1 runs done", "compare: 0 of 1 done, 1 at work; at work: seed 42",
        "compare: 1 of 1 done", "compare: t2.yaml (2 of 2): 0 of 1 runs done",
        "compare: 0 of 1 done, 1 at work; at work: seed 42", "compare: 1 of 1 done",
    ]  # fmt: skip


def test_a_stop_counts_the_runs_of_all_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = planted(tmp_path / "a", 1, seconds=20.0), planted(tmp_path / "b", 2, seconds=20.0)
    monkeypatch.setattr(Sweep, "_collect", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"^compare: stopped with 3 runs not done; give the same command again"):
        make_runs([(Path("a.yaml"), first), (Path("b.yaml"), second)])


def test_what_is_no_run_and_no_recipe_is_named(recipes: list[Path]) -> None:
    assert is_recipe(Path("quickstart")) and is_recipe(Path("t1.yaml")) and not is_recipe(Path("teacher"))
    with pytest.raises(UserError, match=r"t1\.yml: there is no such run directory.*t1\.yaml"):
        is_recipe(Path("t1.yml"))


def test_recipes_need_an_output_and_differ_and_runs_have_their_seeds(recipes: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected --output"):
        plan_runs(recipes, [1], None)
    Path("again.yaml").write_text(recipes[0].read_text().replace("logging_steps: 2", "logging_steps: 3"))
    with pytest.raises(UserError, match=r"again\.yaml and t1\.yaml are the same run"):
        plan_runs([recipes[0], Path("again.yaml")], [1], tmp_path / "out")
    done = [str(plant(tmp_path / f"run-{value}", value, 1)) for value in (1.0, 2.0)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", *done, "--seeds", "1,2"])
    assert result.exit_code == 2 and "seeds: they are of recipes" in result.output


def test_recipes_of_one_name_have_folders_of_their_own(recipes: list[Path]) -> None:
    Path("other").mkdir()
    other = Path("other/t1.yaml")
    other.write_text(recipes[1].read_text())
    studies = plan_runs([recipes[0], other], [1], Path("out"))
    assert [study.folder for _, study in studies] == [Path("out/runs/t1-1"), Path("out/runs/t1-2")]
