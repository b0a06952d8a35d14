"""Runs that share a teacher: which may, what is spared, and that they are the runs that they would be alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.experiments.shared_teacher import FOLDER, cannot_share, groups_of
from dts_hf.experiments.sweep import plan
from dts_hf.teachers.shared_answers import VARIABLE, SharedAnswers
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer

STEPS = 20
SWEEP = ["sweep", "recipe.yaml", "--set", "temperature=1,{name: dts, rule: gap}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write_rows(tmp_path / "train.jsonl", 0, 12)
    write_rows(tmp_path / "valid.jsonl", 12, 2)
    training = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(
        recipe(training=training, evaluation={"rows": 2, "max_new_tokens": 2, "every_steps": None}).to_yaml()
    )
    return tmp_path


@pytest.fixture
def models(here: Path) -> Path:
    tiny_llama(seed=1, layers=3).save_pretrained(here / "teacher")
    tiny_tokenizer().save_pretrained(here / "teacher")
    return here


def groups(here: Path, product, most: int = 4, seeds=(1,), changes=()) -> list[tuple[int, str]]:
    study = plan("recipe.yaml", changes, here / "out", product, {}, seeds)
    found = groups_of(study, study.runs, most)
    assert sorted(run.id for group in found for run in group.runs) == sorted(run.id for run in study.runs)
    assert len({group.folder for group in found}) == len(found)
    assert all(bool(group.environment) == (len(group.runs) > 1) for group in found)
    return [(len(group.runs), group.alone) for group in found]


@pytest.mark.parametrize(
    ("product", "most", "sizes"),
    [
        ({"temperature": [1, 2], "training.learning_rate": [1e-4, 1e-3], "loss.kd_ratio": [0.5, 0.9]}, 8, [8]),
        ({"temperature": [1, 2, 3, 4, 5]}, 2, [2, 2, 1]),
        ({"temperature": [1, 2], "data.max_length": [80, 96]}, 4, [2, 2]),
        ({"temperature": [1, 2], "training.per_device_train_batch_size": [1, 2]}, 4, [2, 2]),
        ({"temperature": [1, 2], "teacher.dtype": ["float32", "bfloat16"]}, 4, [2, 2]),
        ({"temperature": [1, 2], "training.max_steps": [10, 20]}, 4, [2, 2]),
    ],
)
def test_runs_of_the_same_batches_and_teacher_are_a_group(here, product, most, sizes) -> None:
    assert [size for size, _ in groups(here, product, most)] == sizes


def test_other_seeds_have_another_order(here: Path) -> None:
    assert [size for size, _ in groups(here, {"temperature": [1, 2]}, seeds=[1, 2])] == [2, 2]


def test_rows_that_change_are_other_batches(here: Path) -> None:
    def folder() -> Path:
        study = plan("recipe.yaml", [], here / "out", {"temperature": [1, 2]}, {}, [1])
        return groups_of(study, study.runs, 2)[0].folder

    before = folder()
    assert folder() == before
    write_rows(here / "train.jsonl", 1, 12)
    assert folder() != before


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"teacher": {"model": "teacher", "kind": "cached", "cache": "states"}, "student": {"model": "s"}}, "cached"),
        ({"data": {"on_policy": {"fraction": 0.5}}}, "own"),
        ({"teacher": None, "student": {"model": "s"}, "loss": {"kd_ratio": 0}}, "no teacher"),
    ],
)
def test_what_cannot_be_shared_runs_alone(sections, why: str) -> None:
    assert why in cannot_share(recipe(**sections)) and not cannot_share(recipe())


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--jobs", "2"], "--jobs"), (["--devices", "0,1"], "--devices"), (["--print-commands"], "--print-commands")],
)
def test_what_does_not_go_together_is_refused_by_name(here, options, said) -> None:
    found = CliRunner().invoke(app, [*SWEEP, "--share-teacher", "2", *options])
    assert found.exit_code != 0 and said in f"{found.output}{found.exception}"


def test_dry_run_shows_the_groups(here: Path) -> None:
    found = CliRunner().invoke(app, [*SWEEP, "--seeds", "1,2", "--share-teacher", "2", "--dry-run"])
    assert found.exit_code == 0 and found.output.count("one teacher for 2") == 2


def test_a_group_forgets_what_a_killed_one_left_but_not_under_living_students(here: Path) -> None:
    study = plan("recipe.yaml", [], here / "out", {"temperature": [1, 2]}, {}, [1])
    (group,) = groups_of(study, study.runs, 2)
    answers = SharedAnswers(group.folder, 2)
    group.open()
    assert group.folder.is_dir()
    answers.close()
    group.open()
    assert not group.folder.exists() and not group.close()


# ------------------------------------------------------------------------------------------------------ the whole command


def sweep(here: Path, folder: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dts_hf", *SWEEP, "--seeds", "1", "--output", folder, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def students(folder: Path) -> dict[str, dict]:
    return {
        path.parents[1].name: load_file(path)
        for path in sorted(folder.glob("*/final/model.safetensors"))
    }  # fmt: skip


def same(one: Path, other: Path) -> None:
    ours, theirs = students(one), students(other)
    assert ours.keys() == theirs.keys() and len(ours) == 2
    assert all(ours[run][name].equal(theirs[run][name]) for run in ours for name in ours[run])
    for run in ours:
        scores = [json.loads((folder / run / "metrics.json").read_text())["models"] for folder in (one, other)]
        assert scores[0]["student"]["teacher_forced"] == scores[1]["student"]["teacher_forced"]
        assert (one / run / "log.jsonl").is_file()


@pytest.mark.soak  # the law is held by tests/teachers/test_shared_answers.py through the trainer
@pytest.mark.timeout(900)
def test_a_sweep_that_shares_makes_the_runs_of_one_that_does_not(models: Path) -> None:
    """Through the command: equal weights and scores under equal names, and half of the forwards."""
    for folder, options in (("alone", ("--jobs", "2")), ("shared", ("--share-teacher", "2"))):
        process = sweep(models, folder, *options)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
    same(models / "alone", models / "shared")
    assert "shared teacher: " in said
    facts = said.partition("shared teacher: ")[2].split()
    forwards, batches = int(facts[0]), int(facts[3])
    assert batches == 2 * forwards >= 2 * STEPS
    assert not list((models / "shared" / FOLDER).glob("*"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("whole", [False, True], ids=["one student", "all of it"])
def test_kills_change_nothing(models: Path, whole: bool) -> None:
    process = sweep(models, "alone", "--jobs", "2")
    assert process.communicate(timeout=900) and process.returncode == 0
    folder = models / "killed"
    process = sweep(models, folder.name, "--share-teacher", "2")
    end = time.monotonic() + 600
    while not list(folder.glob("*/checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.05)
    children = _children(process.pid)
    assert len(children) == 2
    if whole:
        process.kill()  # first: it would start them again
    for child in children if whole else children[:1]:
        os.kill(child, signal.SIGKILL)
    if whole:
        process.communicate(timeout=900)
        process = sweep(models, folder.name, "--share-teacher", "2")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    same(models / "alone", folder)


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "train" in command:
            found.append(int(status.parent.name))
    return found


def test_the_variable_of_a_group_names_its_folder(here: Path) -> None:
    study = plan("recipe.yaml", [], here / "out", {"temperature": [1, 2]}, {}, [1])
    (group,) = groups_of(study, study.runs, 2)
    count, _, folder = group.environment[VARIABLE].partition(":")
    assert count == "2" and Path(folder) == group.folder.resolve()
