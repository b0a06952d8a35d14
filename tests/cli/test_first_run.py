"""From a teacher and one file to an answer of the student, by the commands alone: init, doctor, train, chat, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.recipe.effective import RESULT_KEYS
from dts_hf.recipe.loading import load_recipe
from dts_hf.runs.directory import RunDirectory
from tests.support.examined import rows_between, save_model, write_rows


def invoke(*arguments: str, typed: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), input=typed)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that knows its rows, and one file of rows."""
    folder = tmp_path_factory.mktemp("first")
    save_model(str(folder / "teacher"), steps=60)
    write_rows(folder / "my.jsonl", rows_between(0, 48))
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def trained(here: Path) -> Path:
    """The run of the recipe that init has written; made once."""
    if not (here / "runs/my/metrics.json").is_file():
        made = invoke("init", "--teacher", "teacher", "--data", "my.jsonl", "--preset", "quick", "--layers", "3")
        assert made.exit_code == 0, made.output
        assert made.stdout.splitlines()[1:] == [
            "  dts-hf doctor my.yaml", "  dts-hf train my.yaml", "  dts-hf chat runs/my",
        ]  # fmt: skip
        examined = invoke("doctor", "my.yaml")
        assert examined.exit_code == 0, examined.output
        run = invoke("train", "my.yaml", "training.max_steps=4", "output.report=false")
        assert run.exit_code == 0, run.output
        assert "\nplan: read and encode the rows; load teacher and student; " in "\n" + run.stderr
    return here / "runs/my"


def test_the_recipe_says_why_and_is_made_for_the_rows(trained: Path) -> None:
    text = Path("my.yaml").read_text()
    recipe = load_recipe("my.yaml")
    keys = [line for line in text.splitlines() if line.startswith(("  ", "    ")) and not line.strip().startswith("#")]
    assert sum(" # " in line for line in keys) >= 15
    longest = 64  # 99 % of these rows are shorter, in steps of 32
    assert recipe.data.max_length == longest and recipe.data.max_prompt_length < longest
    assert isinstance(recipe.data.validation, float) and recipe.student.init is not None
    assert recipe.student.init.layers == 3 and yaml.safe_load(text)["data"]["max_length"] == longest


def test_init_overwrites_nothing_and_asks_for_what_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("kept.yaml").write_text("mine")
    command = ("init", "--teacher", "teacher", "--data", "my.jsonl", "--output", "kept.yaml")
    refused = invoke(*command)
    assert refused.exit_code == 2 and "kept.yaml is there already" in refused.stderr
    assert Path("kept.yaml").read_text() == "mine"
    assert invoke(*command, "--overwrite").exit_code == 0 and "student:" in Path("kept.yaml").read_text()
    missing = invoke("init", "--data", "my.jsonl")
    assert missing.exit_code == 2 and "--teacher is missing" in missing.stderr
    assert "--layers: got 9, but the teacher has 4" in invoke(*command, "--overwrite", "--layers", "9").stderr


def test_a_dry_run_plans_and_writes_nothing(here: Path) -> None:
    assert (
        invoke("init", "--teacher", "teacher", "--data", "my.jsonl", "--output", "dry.yaml", "--overwrite").exit_code
        == 0
    )
    before = sorted(here.rglob("*"))
    shown = invoke("train", "dry.yaml", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert sorted(here.rglob("*")) == before
    assert "rows:      40 to train on, 8 held out" in shown.stdout and "optimizer steps of 16 rows" in shown.stdout
    recipe = yaml.safe_load(shown.stdout.partition("# The effective recipe")[2].partition("\n")[2])
    assert recipe["temperature"]["momentum"] == 0.9 and recipe["training"]["optim"]
    wrong = invoke("train", "dry.yaml", "--dry-run", "data.max_length=10", "data.max_prompt_length=5")
    assert wrong.exit_code == 2 and wrong.stdout == ""


def test_the_effective_recipe_of_the_run_has_every_default_and_trains_the_same(trained: Path) -> None:
    run = RunDirectory.open(trained)
    saved = yaml.safe_load(run.recipe_path.read_text())
    assert saved["temperature"] == {
        "name": "dts", "rule": "gap", "t_init": 3.0, "t_min": 1.0, "t_max": 3.0, "momentum": 0.9, "granularity": "batch",
        "decoupled": False, "range": "manual", "gap_source": "measured",
    }  # fmt: skip
    assert {"learning_rate", "adam_beta2", "optim", "seed", "per_device_train_batch_size"} <= saved["training"].keys()
    assert saved["training"].keys() <= {*RESULT_KEYS, "num_train_epochs"}
    assert load_recipe(run.recipe_path) == run.read_recipe()
    again = invoke("train", str(run.recipe_path), "output.dir=runs/again")
    assert again.exit_code == 0, again.output
    weights = [(folder / "final/model.safetensors").read_bytes() for folder in (trained, Path("runs/again"))]
    assert weights[0] == weights[1]
    resumed = invoke("train", "my.yaml", "training.max_steps=4", "output.report=false", "--resume")
    assert resumed.exit_code == 0 and "this run is finished" in resumed.stderr
    other = invoke("train", "my.yaml", "training.max_steps=4", "temperature.momentum=0.5", "--resume")
    assert other.exit_code == 2 and "temperature.momentum: was 0.9, now 0.5" in other.stderr


def test_the_held_out_share_is_the_same_for_the_run_and_for_evaluate(trained: Path) -> None:
    scores = json.loads(invoke("evaluate", str(trained), "--json").stdout)
    of_run = RunDirectory.open(trained).read_metrics()
    both = [metrics["models"]["student"]["sets"]["validation"] for metrics in (scores, of_run)]
    assert both[0]["rougeL"] == both[1]["rougeL"] and both[0]["n"] == both[1]["n"] == 8


def test_chat_answers_what_is_piped_and_ends(trained: Path) -> None:
    both = invoke(
        "chat", str(trained), "--max-new-tokens", "8", typed="Name a fruit 0\n/system Be brief\n\nSay yes 1\n"
    )
    assert both.exit_code == 0, both.output
    labels = [line.partition(":")[0] for line in both.stdout.splitlines() if ": " in line or line.endswith(":")]
    assert [label for label in labels if label in ("student", "teacher")] == ["student", "teacher"] * 2
    assert "the system says: Be brief" in both.stderr
    one = invoke("chat", str(trained), "--no-teacher", "--max-new-tokens", "8", typed="Name a fruit 0\n/exit\nnever\n")
    assert one.exit_code == 0 and "student:" not in one.stdout and one.stdout.count("\n") >= 1
    first = next(line for line in both.stdout.splitlines() if line.startswith("student: "))
    assert first == f"student: {one.stdout.splitlines()[0]}"


def test_generated_answers_can_be_scored(trained: Path) -> None:
    made = invoke("generate", str(trained), "--data", "my.jsonl", "--rows", "5", "--max-new-tokens", "8",
                  "--output", "out/answers.jsonl")  # fmt: skip
    assert made.exit_code == 0, made.output
    rows = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"row-{k}" for k in range(5)] and rows[0]["references"] == [
        "apples and pears"
    ]
    assert invoke("score", "out/answers.jsonl", "--json").exit_code == 0
    Path("asked.jsonl").write_text(
        '{"prompt": "Name a fruit 0"}\n{"messages": [{"role": "user", "content": "Say yes 1"}]}\n'
    )
    shown = json.loads(invoke("generate", str(trained), "--data", "asked.jsonl", "--json").stdout)["answers"]
    assert [row["prompt"] for row in shown] == ["Name a fruit 0", "Say yes 1"] and "references" not in shown[0]
    alone = invoke("generate", str(trained), "--prompt", "Name a fruit 0", "--max-new-tokens", "8")
    assert alone.stdout.strip() == rows[0]["prediction"].strip()
    assert "give either --prompt TEXT" in invoke("generate", str(trained)).stderr


def test_generate_replaces_nothing_and_says_so_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, rows_between(0, 4))
    Path("kept.jsonl").write_text("mine")
    Path("folder").mkdir()
    Path("link.jsonl").symlink_to("rows.jsonl")
    before = rows.read_bytes()
    command = ("generate", "no-such-model", "--data", "rows.jsonl", "--output")
    for output, words in (
        ("folder", "is a folder"),
        ("kept.jsonl", "is there already"),
        ("rows.jsonl", "the file of --data"),
        ("./link.jsonl", "the file of --data"),
        ("kept.jsonl/answers.jsonl", "cannot make this folder"),
    ):
        for options in ((), ("--overwrite",)):
            refused = invoke(*command, output, *options)
            assert refused.exit_code == 2, refused.output
            if not options or output != "kept.jsonl":
                assert f"--output: {output.removeprefix('./').removesuffix('/answers.jsonl')}" in refused.stderr
                assert words in refused.stderr
            else:
                assert "no-such-model" in refused.stderr
    assert Path("kept.jsonl").read_text() == "mine" and rows.read_bytes() == before


def test_text_that_asks_nothing_is_not_generated_from(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time"}\n')
    refused = invoke("generate", "no-such-model", "--data", str(tmp_path / "text.jsonl"))
    assert refused.exit_code == 2 and "is a text, which asks nothing" in refused.stderr


def test_sampled_answers_follow_their_seed(trained: Path) -> None:
    options = ("--prompt", "Name a fruit 0", "--temperature", "2", "--max-new-tokens", "8", "--seed")
    first, again, other = (invoke("generate", str(trained), *options, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
