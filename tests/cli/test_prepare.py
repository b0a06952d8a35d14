"""``dts-hf prepare`` and the recipes that come with the package: found by name, in any folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.cli.prepare import SETS
from dts_hf.errors import UserError
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.shipped import resolve_recipe, shipped_folder, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_prepares_a_set_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Do", "output": "Done"}) + "\n")
    done = invoke("prepare", "vicuna", "--source", "rows.jsonl", "--allow-other-counts")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "data" / "vicuna" / "test.jsonl").read_text())["output"] == "Done"


def test_wrong_input_is_one_message(tmp_path: Path) -> None:
    missing = invoke("prepare", "vicuna", "--source", "nothing.jsonl")
    assert missing.exit_code == 2 and missing.stderr.startswith("Error: --source: nothing.jsonl: no such file")
    assert missing.stdout == "" and list(tmp_path.iterdir()) == []
    other = invoke("prepare", "dolyl")
    assert other.exit_code == 2 and "Did you mean 'dolly'?" in other.stderr
    assert invoke("prepare", "vicuna", "--sourec", "x").exit_code == 2


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_it_lists_what_it_can_prepare(arguments: tuple[str, ...]) -> None:
    shown = invoke("prepare", *arguments)
    assert shown.exit_code == 0 and all(f" {name} " in shown.stdout for name in SETS)
    assert "MiniLLM/dolly@d131636" in shown.stdout


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_help_with_examples(name: str) -> None:
    done = invoke("prepare", name, "--help")
    assert done.exit_code == 0 and done.stdout.startswith(f"usage: dts-hf prepare {name} ")
    assert f"\n    dts-hf prepare {name}" in done.stdout


@pytest.mark.parametrize(("given", "name"), [("SelfInst", "self_instruct"), ("s-ni", "s_ni"), ("uinst", "unni")])
def test_names_of_the_papers_are_known(given: str, name: str) -> None:
    assert invoke("prepare", given, "--help").stdout.startswith(f"usage: dts-hf prepare {name} ")


def test_shipped_recipes_are_found_by_name(tmp_path: Path) -> None:
    names = shipped_recipes()
    assert {"quickstart", "dolly/gpt2-xl_to_gpt2/kd", "glue/sst2/dts"} <= set(names)
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert resolve_recipe(name) == shipped_folder() / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text("# mine")
    assert resolve_recipe("quickstart.yaml") == Path("quickstart.yaml")  # what is here comes first
    with pytest.raises(UserError, match=r"no name of `dts-hf list recipes`\. Did you mean 'quickstart'\?"):
        resolve_recipe("quikstart")
    assert resolve_recipe("nothing.yaml") == Path("nothing.yaml")  # whoever reads it says that it is missing


def test_a_shipped_recipe_loads_in_any_folder() -> None:
    recipe = load_recipe("quickstart", ["output.dir=here"])
    assert Path(str(recipe.data.train)).is_file() and Path(str(recipe.data.validation)).is_file()
    base = load_recipe("dolly/smollm2_pruned/dts")
    assert base.data.train == "data/dolly/train.jsonl" and base.student.init is not None  # extends quickstart.yaml


def test_recipes_are_copied_and_never_over_changed_ones(tmp_path: Path) -> None:
    assert invoke("prepare", "recipes", "--output", "mine").exit_code == 0
    copied = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert {Path("quickstart.yaml"), Path("accelerate/ddp.yaml"), Path("slurm/train.sbatch")} <= copied
    assert load_recipe("mine/quickstart.yaml").data.train == "mine/data/quickstart_train.jsonl"
    assert invoke("prepare", "recipes", "--output", "mine").exit_code == 0  # the same again changes nothing
    (tmp_path / "mine" / "quickstart.yaml").write_text("mine")
    refused = invoke("prepare", "recipes", "--output", "mine")
    assert refused.exit_code == 2 and "1 files differ" in refused.stderr
    assert (tmp_path / "mine" / "quickstart.yaml").read_text() == "mine"


def test_the_quickstarts_rows_are_what_the_repository_has() -> None:
    assert invoke("prepare", "quickstart", "--output", ROOT / "recipes" / "data", "--check").exit_code == 0
    assert invoke("prepare", "quickstart").exit_code == 0
    for name in ("quickstart_train.jsonl", "quickstart_validation.jsonl"):
        assert Path("recipes", "data", name).read_bytes() == (ROOT / "recipes" / "data" / name).read_bytes()
    Path("recipes", "data", "quickstart_train.jsonl").write_text("")
    assert invoke("prepare", "quickstart", "--check").exit_code == 2
