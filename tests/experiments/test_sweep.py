"""Every run of a grid once: plans, kills, two sweeps at a time, runs that fail, clusters."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.errors import Interrupted, UserError
from dts_hf.experiments.grid import combinations, overrides_of, short, varied
from dts_hf.experiments.sweep import Sweep, plan, shard, shell_commands, slurm_script
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.yaml_files import parse_yaml
from tests.support.planted_sweep import noted, planted, start
from tests.support.recipes import recipe, short_yaml, write_rows

MINUTE = 60


# -------------------------------------------------------------------------------------------------------------- the grid


def test_seeds_are_outermost_and_zipped_values_go_together() -> None:
    product = varied(["temperature=1,2", "loss.divergence={name: jsd, beta: 0.1},forward_kl"], "--set")
    together = varied(["loss.kd_ratio=0.1,0.9", "training.learning_rate=1e-4,1e-3"], "--zip")
    found = list(combinations(product, together, [1, 2]))
    assert len(found) == 2 * 2 * 2 * 2 and [seed for _, seed in found] == [1] * 8 + [2] * 8
    assert {(one["loss.kd_ratio"], one["training.learning_rate"]) for one, _ in found} == {(0.1, 1e-4), (0.9, 1e-3)}
    assert overrides_of(found[0][0], 1) == [
        "loss.kd_ratio=0.1", "training.learning_rate=0.0001", "temperature=1",
        'loss.divergence={"name": "jsd", "beta": 0.1}', "training.seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("product", "together", "seeds", "said"),
    [
        ({"a": [1]}, {"a": [2]}, [1], "in set and in zip"),
        ({}, {"a": [1, 2], "b": [1]}, [1], "as many values"),
        ({"a": []}, {}, [1], "a has no values"),
        ({"training.seed": [5]}, {}, [1], "expected seeds for it"),
        ({}, {"output.dir": ["a"]}, [1], "expected --output for it"),
        ({"a": range(200), "b": range(200)}, {}, [1], "at most 10,000"),
    ],
)
def test_grids_that_cannot_be_are_refused(product, together, seeds, said) -> None:
    with pytest.raises(UserError, match=said):
        list(combinations(product, together, seeds))


@pytest.mark.parametrize("text", ["temperature", "=1,2", "temperature=", "temperature=[1"])
def test_values_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        varied([text], "--set")


@pytest.mark.parametrize("value", ["😀 a", 'it\'s $HOME "x"\n', math.inf, 1e-5, None, {"name": "𝔘", "a": [1]}])
def test_values_come_back_as_they_were(value: Any) -> None:
    _, _, text = overrides_of({"a": value}, 1)[0].partition("=")
    assert parse_yaml(text, "here") == value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 0, 6)
    write_rows(tmp_path / "valid.jsonl", 6, 3)
    (tmp_path / "recipe.yaml").write_text(short_yaml(recipe()))
    return tmp_path


def test_plan_reads_the_recipes_section_too(here: Path) -> None:
    section = {"set": {"loss.kd_ratio": [0.1, 0.9]}, "seeds": [1, 2]}
    (here / "recipe.yaml").write_text(short_yaml(recipe(sweep=section)))
    study = plan("recipe.yaml", [], here / "out", {"temperature": [1, 2]}, {}, [])
    assert len(study.runs) == 8 and len({run.id for run in study.runs}) == 8
    made = load_recipe("recipe.yaml", [*study.runs[-1].overrides, "sweep=null"])
    assert (made.loss.kd_ratio, made.temperature.options, made.training["seed"]) == (0.9, {"value": 2}, 2)
    again = plan("recipe.yaml", ["training.logging_steps=1"], here / "elsewhere", {"temperature": [1, 2]}, {}, [])
    assert [run.id for run in again.runs] == [run.id for run in study.runs]


def test_the_recipes_own_seed_may_be_0(here: Path) -> None:
    assert (
        plan("recipe.yaml", ["training.seed=0"], here, {"temperature": [1]}, {}, []).runs[0].label.endswith("seed 0")
    )


def test_folders_that_can_be_none_are_refused(here: Path) -> None:
    for folder, said in (("recipe.yaml", "is a file"), ("a\nrm -rf b", "control characters"), ("x" * 300, "bytes")):
        with pytest.raises(UserError, match=f"--output: .*{said}"):
            plan("recipe.yaml", [], Path(folder), {"temperature": [1]}, {}, [1])


def test_wrong_runs_are_refused_before_any_begins(here: Path) -> None:
    with pytest.raises(UserError, match="kd_ratio"):
        plan("recipe.yaml", [], here, {"loss.kd_ratio": [0.5, 7]}, {}, [1])
    with pytest.raises(UserError, match="are the same run"):
        plan("recipe.yaml", [], here, {"training.logging_steps": [1, 2]}, {}, [1])


# --------------------------------------------------------------------------------------------------------------- the work


def test_every_run_once_and_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    study = planted(tmp_path)
    Sweep(study, study.runs, jobs=2).run()
    assert {study.state(run) for run in study.runs} == {"done"}
    Sweep(study, study.runs).run()
    assert noted(tmp_path, "ends") == {run.path.name: 1 for run in study.runs}


def test_runs_that_fail_are_tried_again_and_then_stay_visible(tmp_path: Path) -> None:
    study = planted(tmp_path, count=2, failing=1)
    Sweep(study, study.runs, retries=2).run()
    assert [study.state(run) for run in study.runs] == ["done", "done", "failed"]
    assert study.failures(study.runs[2]) == 3 and "always fails" in study.why(study.runs[2])
    Sweep(study, study.runs, retries=2).run()
    assert study.failures(study.runs[2]) == 3  # given up
    study.forgive(study.runs[2])
    assert study.state(study.runs[2]) == "stale"


def test_devices_are_handed_out_one_a_run(tmp_path: Path) -> None:
    study = planted(tmp_path, count=3, seconds=0.3)
    sweep = Sweep(study, study.runs, devices=["0", "3"])
    seen: list[list[str]] = []
    sweep.on_change = lambda: seen.append(sorted(device for *_, device in sweep.at_work.values()))
    sweep.run()
    assert ["0", "3"] in seen and max(map(len, seen)) == 2 and sorted(sweep.free) == ["0", "3"]


def test_two_sweeps_on_one_study_do_each_run_once(tmp_path: Path) -> None:
    both = [start(tmp_path, 6, 0.3) for _ in range(2)]
    assert [process.wait(5 * MINUTE) for process in both] == [0, 0]
    study = planted(tmp_path, 6)
    assert {study.state(run) for run in study.runs} == {"done"} and not any(map(study.failures, study.runs))
    assert noted(tmp_path, "ends") == {run.path.name: 1 for run in study.runs}


def test_sigterm_stops_the_runs_at_work_and_can_be_gone_on_with(tmp_path: Path) -> None:
    sweep = start(tmp_path, 4, 20.0)
    study = planted(tmp_path, 4)
    deadline = time.monotonic() + MINUTE
    while study.state(study.runs[0]) != "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(MINUTE) == 75
    assert study.state(study.runs[0]) == "stale" and study.failures(study.runs[0]) == 0


def test_what_is_left_counts_the_runs_that_were_stopped(tmp_path: Path) -> None:
    study = planted(tmp_path, 3, seconds=20.0)
    sweep = Sweep(study, study.runs, jobs=2)
    sweep.on_look = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped with 3 runs left"):
        sweep.run()
    assert not sweep.at_work and "running" not in sweep.states.values()


# ---------------------------------------------------------------------------------------------------- machines and command


def test_shards_share_the_runs_out(tmp_path: Path) -> None:
    runs = planted(tmp_path, 7).runs
    parts = [shard(runs, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(run.id for part in parts for run in part) == [run.id for run in runs]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and shard(runs, None) == list(runs)
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(UserError, match="shard"):
            shard(runs, wrong)


def test_commands_and_job_array_start_what_is_left(here: Path) -> None:
    study = plan("recipe.yaml", [], here / "out dir", {"temperature": [1, 2]}, {}, [1])
    lines = shell_commands(study, study.runs)
    words = shlex.split(lines[1])
    assert words[:3] == ["dts-hf", "train", "recipe.yaml"] and str(here / "out dir") in words[-2]
    assert load_recipe(words[2], words[3:-3]).temperature.options == {"value": 2}
    script = slurm_script(study, study.runs)
    # The array alone, by bash itself: each line is one word that holds a command
    shown = subprocess.run(
        ["bash", "-c", script.replace('exec bash -c "exec ', 'echo "').replace("dts-hf train", "echo ran")],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "temperature=2" in shown.stdout and "#SBATCH --array=0-1" in script
    # There is no srun, so no job step: without B: SLURM signals steps alone, and what the script has become none
    assert re.search(r"^#SBATCH --signal=B:TERM@\d+$", script, re.MULTILINE) and "\nexec bash" in script


def test_command_shows_a_plan_and_starts_nothing(here: Path) -> None:
    arguments = ["sweep", "recipe.yaml", "--set", "temperature=1,2", "--seeds", "1,2", "--output", "out"]
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("missing") == 4 and not (here / "out").exists()
    printed = CliRunner().invoke(app, [*arguments, "--print-commands", "--shard", "1/2"])
    assert printed.stdout.count("dts-hf train") == 2
    written = CliRunner().invoke(app, [*arguments, "--slurm", "array.sh"])
    assert written.exit_code == 0 and (here / "array.sh").is_file()
    assert (here / "out/.sweep/logs").is_dir()  # SLURM makes none, and starts no task without it
    for wrong in ("no/array.sh", "out"):
        refused = CliRunner().invoke(app, [*arguments, "--slurm", wrong])
        assert refused.exit_code == 2 and f"--slurm: {wrong} " in refused.output, refused.output
    for devices in ("0,", "", "1,1"):
        assert CliRunner().invoke(app, [*arguments, "--devices", devices]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments[:-4], "--seeds", "one"]).exit_code == 2


def test_real_runs_and_their_comparison(workplace: Path) -> None:
    """Two temperatures end to end: swept, compared, and neither trained a second time."""
    (workplace / "recipe.yaml").write_text(recipe(output={"report": False}).to_yaml())
    arguments = ["sweep", "recipe.yaml", "--set", "temperature=1,2", "--output", "out", "--jobs", "2"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    runs = sorted(path for path in (workplace / "out").iterdir() if not path.name.startswith("."))
    written = [(path / "metrics.json").stat().st_mtime_ns for path in runs]
    assert len(runs) == 2 and "next: dts-hf compare" in first.stdout
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and [(path / "metrics.json").stat().st_mtime_ns for path in runs] == written
    more = CliRunner().invoke(
        app, ["sweep", "recipe.yaml", "--set", "temperature=1,2,4", "--output", "out", "--dry-run"]
    )
    assert re.search(r"runs left: 1, about [\d.]+ (s|min) by the steps of 2 that are done", more.stdout), more.output
    compared = CliRunner().invoke(app, ["compare", *map(str, runs), "--output", "table"])
    assert compared.exit_code == 0, compared.output
    text = (workplace / "table/comparison.md").read_text()
    assert "temperature.value=1" in text and "no verdict" in text  # one seed says nothing


def test_looking_forgives_nothing(here: Path) -> None:
    study = plan("recipe.yaml", [], here / "out", {"temperature": [1, 2]}, {}, [1])
    study.add_failure(study.runs[0], "why")
    arguments = [
        "sweep",
        "recipe.yaml",
        "--set",
        "temperature=1,2",
        "--seeds",
        "1",
        "--output",
        "out",
        "--retry-failed",
    ]
    assert CliRunner().invoke(app, [*arguments, "--dry-run"]).exit_code == 0
    assert study.failures(study.runs[0]) == 1


def test_two_constants_have_two_labels() -> None:
    assert short({"name": "constant", "value": 1}) == "constant value=1" != short({"name": "constant", "value": 2})
    assert short("dts") == "dts" and short({"init": {"layers": 4}}) == "{init: {layers: 4}}"
