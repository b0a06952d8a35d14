"""The command line: exit codes, one message, what is handed to the functions behind it."""

from __future__ import annotations

import dataclasses
import getpass
import inspect
import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.cli import evaluate as evaluate_cli
from dts_hf.errors import UserError
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory

COMMANDS = tuple(module.__name__.rpartition(".")[2].replace("_", "-") for module in cli.COMMANDS)
RECIPE = """\
student: {init: {from: teacher, layers: 2}}
teacher: {model: some/teacher}
data: {train: rows.jsonl}
output: {dir: runs/x}
"""


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """Stand in for a module whose real work (models, training) is tested elsewhere."""
    replacement = types.ModuleType(module)
    vars(replacement).update(functions)
    monkeypatch.setitem(sys.modules, module, replacement)


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """Replace training by a function that keeps the recipe it was given and returns a small run."""
    seen: list[Recipe] = []

    def distill(recipe: Recipe, resume: bool = False) -> RunDirectory:
        seen.append(recipe)
        run = RunDirectory.create(tmp_path / "run")
        run.save_recipe(recipe)
        run.final_path.mkdir()
        run.report_path.write_text("<html>")
        run.write_metrics({"format": 1, "models": {}})
        return run

    stub(monkeypatch, "dts_hf.distill", distill=distill)
    stub(monkeypatch, "dts_hf.reporting.tables", summary_table=lambda run: f"scores of {run.path.name}")
    return seen


# ----------------------------------------------------------------------------------------------------------- the frame


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom dts_hf.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'evaluate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dts-hf {command}" in result.output
    # The help is read as rich's markup: a word in brackets, such as an extra, is a style there and would not be printed.
    (module,) = (each for each in cli.COMMANDS if each.__name__.rpartition(".")[2].replace("_", "-") == command)
    (summary, *_) = (inspect.getdoc(module.command) or "").replace("\\[", "[").split("\n\n")
    assert " ".join(summary.split()) in " ".join(result.output.split())


def test_python_dash_m() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "dts_hf", "--help"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "dts-hf [OPTIONS] COMMAND" in done.stdout


def test_unknown_command_and_option() -> None:
    assert invoke("trian").exit_code == 2
    assert invoke("train", "x.yaml", "--outptu", "y").exit_code == 2
    assert invoke().exit_code == 2


def test_user_error_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    result = invoke("train", tmp_path / "nope.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path / 'nope.yaml'}: no such recipe file.\n"
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_interrupt(monkeypatch: pytest.MonkeyPatch, recipe_path: Path) -> None:
    def interrupt(recipe: Recipe, resume: bool) -> RunDirectory:
        raise KeyboardInterrupt

    stub(monkeypatch, "dts_hf.distill", distill=interrupt)
    result = invoke("train", recipe_path)
    assert result.exit_code == 130
    assert result.stderr.startswith("Stopped: Ctrl-C.") and "--resume" in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, recipe_path: Path) -> None:
    def fail(recipe: Recipe, resume: bool) -> RunDirectory:
        raise RuntimeError("a bug")

    stub(monkeypatch, "dts_hf.distill", distill=fail)
    result = invoke("train", recipe_path)
    assert result.exit_code == 1 and result.stderr.startswith("Traceback")
    assert result.stderr.endswith("RuntimeError: a bug\n")


# ------------------------------------------------------------------------------------------------------------ commands


def test_train(trained: list[Recipe], recipe_path: Path, tmp_path: Path) -> None:
    result = invoke("train", recipe_path, "loss.kd_ratio=0.7", "--output", "runs/a: b", "--overwrite")
    assert result.exit_code == 0, result.output
    assert trained[0].loss.kd_ratio == 0.7
    assert trained[0].output.dir == "runs/a: b" and trained[0].output.overwrite
    assert result.stdout.splitlines() == [
        "scores of run",
        f"report: {tmp_path / 'run' / 'report.html'}",
        f"student: {tmp_path / 'run' / 'final'}",
    ]


def test_train_json(trained: list[Recipe], recipe_path: Path) -> None:
    assert json.loads(invoke("train", recipe_path, "--json").stdout) == {"format": 1, "models": {}}


def test_only_the_first_process_prints(
    trained: list[Recipe], recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    good, bad = invoke("train", recipe_path), invoke("train", recipe_path, "loss.kd_ratio=7")
    assert (good.exit_code, good.output) == (0, "")
    assert (bad.exit_code, bad.output) == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine, where the recipe may be another
    bad = invoke("train", recipe_path, "loss.kd_ratio=7")
    assert bad.exit_code == 2 and bad.output.startswith("Error (process 9): ")


@pytest.mark.parametrize(("everywhere", "printed"), [(True, ""), (False, "Error (process 1): no room\n")])
def test_an_error_that_is_everywhere_is_printed_by_the_first_process(
    monkeypatch: pytest.MonkeyPatch, recipe_path: Path, everywhere: bool, printed: str
) -> None:
    def fail(recipe: Recipe, resume: bool) -> RunDirectory:
        raise UserError("no room", everywhere=everywhere)

    stub(monkeypatch, "dts_hf.distill", distill=fail)
    assert invoke("train", recipe_path).stderr == "Error: no room\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = invoke("train", recipe_path)
    assert (result.exit_code, result.stderr) == (2, printed)


def test_wrong_input_on_one_process_is_not_silent(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    environment.pop("LOCAL_RANK", None)
    words = [sys.executable, "-m", "dts_hf", "train", str(tmp_path / "nope.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("Error (process 1): ") and "no such recipe" in done.stderr


def test_train_reports_every_problem_of_the_recipe(trained: list[Recipe], recipe_path: Path) -> None:
    result = invoke("train", recipe_path, "loss.kd_ratio=7", "training.lerning_rate=1", "data.trian=x")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 3
    assert not trained


def test_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def evaluate(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        one, many = {"mean": 0.125, "sd": None}, {"mean": 0.25, "sd": 0.5}
        scores = {"n": 3, "seeds": [1, 2], "rougeL": many, "exact_match": one, "mean_tokens": {"mean": 7.0, "sd": 1.0}}
        scores |= {"cut_at_limit": one, "empty": one, "repeats_4gram": one}
        protocol = {"name": "minillm", "fingerprint": "f" * 16}
        return {"source": "m", "protocol": protocol, "models": {"model": {"sets": {"dolly": scores}}}}

    stub(monkeypatch, "dts_hf.evaluation.evaluate", evaluate=evaluate)
    options = ("--sets", "dolly, s_ni", "--data", "d.jsonl", "--seeds", "1,2", "--max-new-tokens", "5")
    result = CliRunner().invoke(cli.app, ["evaluate", "m", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    expected = EvaluationOptions(["dolly", "s_ni"], data="d.jsonl", seeds=[1, 2], max_new_tokens=5)
    assert calls[0] == ("m", expected)
    for text in ("dolly", "25.00 ± 50.00", "12.50", "7.0 ± 1.0", "minillm", "f" * 16):
        assert text in result.stdout
    assert json.loads(invoke("evaluate", "m", "--json").stdout)["protocol"]["name"] == "minillm"
    assert calls[1] == ("m", EvaluationOptions([]))
    assert invoke("evaluate", "m", "--seeds", "1;2").exit_code == 2


def test_every_option_of_an_evaluation_can_be_given_and_has_its_default() -> None:
    flags = inspect.signature(evaluate_cli.command).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EvaluationOptions)}
    assert flags.keys() - {"model", "as_json"} == fields.keys() - {"data_dir"}, "the data folder is $DTS_HF_DATA"
    different = {name for name, flag in flags.items() if name in fields and flag.default != fields[name]}
    assert different == {"sets"} and flags["sets"].default is None and fields["sets"] == ()


def test_score(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"n": 2, "rougeL": 0.24239311}
    stub(monkeypatch, "dts_hf.evaluation.score", score_file=lambda path: {**scores, "path": str(path)})
    assert json.loads(invoke("score", "a.jsonl", "--json").stdout) == {**scores, "path": "a.jsonl"}
    assert "24.2393" in invoke("score", "a.jsonl").stdout, "x 100 with four decimals, as the literature logs it"
    by_set = {"sets": {"dolly": scores, "vicuna": {"n": 1, "rougeL": 0.5}}}
    stub(monkeypatch, "dts_hf.evaluation.score", score_file=lambda path: by_set)
    shown = invoke("score", "a.jsonl").stdout
    assert all(text in shown for text in ("a.jsonl: dolly", "24.2393", "a.jsonl: vicuna", "50.0000"))


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, "dts_hf.reporting.report", write_report=lambda run: run.report_path)
    assert invoke("report", tmp_path).exit_code == 2
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert invoke("report", tmp_path).stdout == f"{tmp_path / 'report.html'}\n"


def test_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text("# The first one\n" + RECIPE)
    monkeypatch.chdir(tmp_path)
    listed = json.loads(invoke("list", "--json").stdout)
    assert set(listed) == {"temperatures", "divergences", "templates", "recipes", "sets", "protocols"}
    policies = {row["name"]: row for row in listed["temperatures"]}
    assert {"constant", "linear", "cosine", "dts"} <= set(policies)
    assert policies["dts"]["options"].startswith("rule=gap, t_init=3.0, t_min=1.0, t_max=3.0, momentum=0.9")
    assert all(row["about"] for rows in listed.values() for row in rows)
    names = [row["name"] for row in listed["recipes"]]
    assert listed["recipes"][0] == {"name": "recipes/one.yaml", "about": "The first one"}
    assert {"quickstart", "dolly/gpt2-xl_to_gpt2/kd", "glue/sst2/dts"} <= set(names) and "glue/_base" not in names
    table = invoke("list", "templates").stdout
    assert "alpaca" in table and "constant" not in table
    assert invoke("list", "template").exit_code == 2


def test_schema_is_json() -> None:
    assert json.loads(invoke("schema").stdout)["title"] == "dts_hf recipe"


def test_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


def test_version() -> None:
    assert invoke("--version").stdout.startswith("dts-hf ")


def test_env_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.chdir(tmp_path)
    shown = invoke("env").stdout
    assert all(f"\n{name}:" in shown for name in ("python", "torch", "memory", "extras", "gpu", "hub cache"))
    secrets = {"hf_a", str(tmp_path), str(Path.home()), platform.node(), getpass.getuser() + "@"}
    assert not [secret for secret in secrets if secret and len(secret) > 2 and secret in shown]
    assert json.loads(invoke("env", "--json").stdout)["torch"]


def test_tables_are_not_folded_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    lines = invoke("list", "temperatures").stdout.splitlines()
    (dts,) = [line for line in lines if line.startswith("│ dts ")]
    assert "gap_source=measured, seed=null" in dts and dts.rstrip().endswith("│")


@pytest.mark.parametrize("value", ["2.0", "2", "'2.0'", "1e0"])
def test_a_number_is_a_constant_temperature(trained: list[Recipe], recipe_path: Path, value: str) -> None:
    assert invoke("train", recipe_path, f"temperature={value}").exit_code == 0
    assert trained[0].temperature.model_dump() == {"name": "constant", "value": float(value.strip("'"))}


def test_a_wrong_number_is_told_as_a_temperature(recipe_path: Path) -> None:
    message = invoke("train", recipe_path, "temperature=-1").stderr
    assert "temperature.value: got -1 for policy 'constant', expected a number above 0" in message
    message = invoke("train", recipe_path, "loss.divergence=2").stderr
    assert "loss.divergence: got 2, expected" in message and "quotes" not in message
