"""One row of the DTS paper: the runs are the ones that are meant, and nothing is claimed before the gates."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dts_hf.experiments.kinds import baseline_of, read_kinds
from dts_hf.experiments.sweep import plan
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.yaml_files import leaves
from dts_hf.runs.directory import RunDirectory
from tests.support.made_run import make_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROW = RECIPES / "dts_row"
SEEDS = [10, 20, 30, 40, 50]

pytestmark = pytest.mark.skipif(not ROW.is_dir(), reason="needs the repository's recipes/ folder")


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROW))
    return importlib.import_module("gates")


@pytest.fixture
def recipes(workplace: Path) -> list[Recipe]:
    """The runs of the row, planned where Dolly's rows lie."""
    folder = workplace / "data" / "dolly"
    folder.mkdir(parents=True)
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / name).write_text('{"instruction": "a", "output": "b"}\n')
    runs = plan(ROW / "row.yaml", [], workplace / "runs", {}, {}, []).runs
    return [load_recipe(ROW / "row.yaml", [*run.overrides, "sweep=null"]) for run in runs]


def changed(one: Recipe, other: Recipe) -> set[str]:
    first, second = (leaves(recipe.model_dump(mode="json")) for recipe in (one, other))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def planted(folder: Path, recipe: Recipe, score: float, name: str = "minillm", rows: int = 500) -> Path:
    """A finished run of ``recipe`` with this ROUGE-L on Dolly, in points."""
    run = make_run(folder, recipe={**recipe.model_dump(mode="json"), "output": {"dir": str(folder)}})
    metrics = run.read_metrics()
    metrics["protocol"]["name"] = name
    scores = {**metrics["models"]["student"]["sets"]["validation"], "n": rows}
    metrics["models"]["student"]["sets"]["dolly"] = {**scores, "rougeL": {"mean": score / 100}}
    run.metrics_path.write_text(json.dumps(metrics))
    return folder


def all_runs(folder: Path, recipes: Sequence[Recipe], plain: Sequence[float]) -> Path:
    scores = iter(plain)
    for number, recipe in enumerate(recipes):
        score = next(scores) if recipe.temperature.name == "constant" else 26.0
        planted(folder / f"run-{number:02}", recipe, score)
    return folder


def test_the_sweep_is_plain_kd_and_three_rules_with_five_seeds(recipes: list[Recipe]) -> None:
    assert [recipe.seed for recipe in recipes] == [seed for seed in SEEDS for _ in range(4)]
    named = [(recipe.temperature.name, recipe.temperature.options.get("rule")) for recipe in recipes[:4]]
    assert named == [("constant", None), ("dts", "paper"), ("dts", "code"), ("dts", "gap")]
    kd = load_recipe(RECIPES / "dolly" / "opt-13b_to_opt-1.3b" / "kd.yaml")
    for recipe in recipes:
        assert {key.partition(".")[0] for key in changed(recipe, recipes[0])} <= {"temperature", "training"}
        assert {key for key in changed(recipe, recipes[0]) if key.startswith("training")} <= {"training.seed"}
        of_loss = {key for key in changed(recipe, kd) if key.startswith(("loss", "data", "student"))}
        assert not of_loss, "the setting of the published KD row"
        training = recipe.training
        assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 128
        assert all(
            training[key] == kd.training[key] for key in ("learning_rate", "num_train_epochs", "lr_scheduler_type")
        )
        assert recipe.evaluation.protocol == "minillm" and recipe.evaluation.every_steps is None


def test_the_rules_are_those_of_the_recipes_of_the_paper(recipes: list[Recipe]) -> None:
    folder = RECIPES / "dolly" / "opt-13b_to_opt-1.3b"
    for recipe, name in ((recipes[1], "dts_paper"), (recipes[3], "dts_gap")):
        assert recipe.temperature == load_recipe(folder / f"{name}.yaml").temperature
    code = load_recipe(folder / "dts_code.yaml").temperature.options
    assert recipes[2].temperature.options == {**code, "epochs": 10}, "the authors' script has 7 epochs"


def test_the_control_is_a_cosine_and_nothing_else(recipes: list[Recipe]) -> None:
    control = load_recipe(ROW / "matched_cosine.yaml", ["temperature.match_mean_of=runs/gap", "training.seed=20"])
    gap = next(recipe for recipe in recipes if recipe.seed == 20 and recipe.temperature.options.get("rule") == "gap")
    assert {key.partition(".")[0] for key in changed(control, gap)} == {"temperature", "output"}
    assert control.temperature.options["t_min"] == gap.temperature.options["t_min"]
    assert control.sweep is None


def test_the_teacher_of_the_row_is_the_one_that_is_trained(recipes: list[Recipe]) -> None:
    teacher = load_recipe(ROW / "teacher_sft.yaml")
    assert recipes[0].teacher is not None and recipes[0].teacher.model == f"{teacher.output.dir}/final"
    assert teacher.student.model == "facebook/opt-13b" and teacher.evaluation.protocol == "minillm"


def test_headers_say_what_is_unknown_and_quote_no_value_of_the_paper() -> None:
    text = " ".join((ROW / "row.yaml").read_text().replace("#", " ").split())
    assert "could not be obtained, so none are quoted" in text
    for unknown in ("the range of T", "kd_ratio and epochs", "seeds and spread", "whether the KD term had a gradient"):
        assert unknown in text
    assert all("Not run by us." in path.read_text() for path in ROW.glob("*.yaml"))


@pytest.mark.parametrize(
    ("teacher", "plain", "words"),
    [
        (29.8, (24.4, 24.4, 24.4, 24.4, 24.4), ("pass (29.80", "pass (24.40", "is reproduced")),
        (28.5, (25.4, 25.4, 25.4, 25.4, 25.4), ("fail (28.50", "pass (25.40", "not reproduced")),
        (29.2, (26.0, 27.0, 28.0, 27.0, 27.0), ("pass (29.20", "fail (27.00", "no row of the paper")),
    ],
)
def test_gates(
    gates: ModuleType, recipes: list[Recipe], workplace: Path, capsys: Any, teacher: float, plain: Any, words: Any
) -> None:
    of_teacher = planted(workplace / "teacher", load_recipe(ROW / "teacher_sft.yaml"), teacher)
    row = all_runs(workplace / "row", recipes, plain)
    status = gates.main([str(of_teacher), str(row)])
    shown = capsys.readouterr().out
    assert status == (0 if "is reproduced" in words else 1)
    assert all(word in shown for word in words), shown
    assert "(recalled)" in shown


def test_what_was_not_measured_under_the_protocol_passes_nothing(
    gates: ModuleType, recipes: list[Recipe], workplace: Path, capsys: Any
) -> None:
    teacher = planted(workplace / "teacher", load_recipe(ROW / "teacher_sft.yaml"), 29.2, rows=100)
    for seed, recipe in zip(SEEDS, recipes[::4], strict=True):
        planted(workplace / "row" / f"{seed}", recipe, 25.4, name="minillm, seeds=[10]" if seed == 50 else "minillm")
    assert gates.main([str(teacher), str(workplace / "row")]) == 1
    assert gates.main([str(workplace / "nothing"), str(workplace / "nothing")]) == 1
    shown = capsys.readouterr().out
    assert "not measured (0 of 1 seeds" in shown and "not measured (4 of 5 seeds" in shown and "pass" not in shown


def test_the_printed_commands_are_the_controls_and_a_comparison(
    gates: ModuleType, recipes: list[Recipe], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    row = all_runs(Path("row"), recipes, [25.4] * 5)
    commands = [shlex.split(line) for line in gates.next_commands(gates.runs_of(row), row)]
    assert [command[:3] for command in commands[:-1]] == [
        ["dts-hf", "train", "recipes/dts_row/matched_cosine.yaml"]
    ] * 5
    for seed, command in zip(SEEDS, commands[:-1], strict=True):
        output = Path(command[command.index("--output") + 1])
        control = load_recipe(ROW / "matched_cosine.yaml", command[3 : command.index("--output")])
        replayed = RunDirectory(str(control.temperature.options["match_mean_of"])).read_recipe()
        assert control.seed == replayed.seed == seed and replayed.temperature.options["rule"] == "gap"
        planted(output, control, 26.0)
    assert len(gates.next_commands(gates.runs_of(row), row)) == 1, "what is done is not asked for again"
    paths = [path for pattern in commands[-1][2:4] for path in sorted(Path().glob(pattern))]
    kinds = read_kinds(paths)
    assert [sorted(kind.runs) for kind in kinds] == [SEEDS] * 5
    baseline = baseline_of(kinds, commands[-1][commands[-1].index("--baseline") + 1])
    assert {run.recipe.temperature.name for run in baseline.runs.values()} == {"constant"}
