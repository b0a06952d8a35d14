"""The run directory: what is written is read back, half-written files do no harm, nobody's files are deleted."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.files import write_json_atomic, write_text_atomic
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RECIPE_HEADER, RunDirectory
from dts_hf.runs.environment import environment, where_it_trains
from dts_hf.runs.outline import outline

VALUES = {
    "student": {"model": "small"},
    "teacher": {"model": "large"},
    "data": {"train": "rows.jsonl"},
    "output": {"dir": "runs/x"},
    "temperature": {"name": "constant", "value": 2},
}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.from_dict(VALUES, deep=False)


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "runs" / "x")
    run.save_recipe(recipe)
    return run


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------- reading and writing


def test_recipe_round_trip(run: RunDirectory, recipe: Recipe) -> None:
    assert run.read_recipe() == recipe
    assert load_recipe(run.recipe_path) == recipe
    assert RunDirectory.open(run.path).path == run.path


def test_json_files_round_trip_and_are_empty_when_absent(run: RunDirectory) -> None:
    for name in ("environment", "data_manifest", "metrics"):
        assert getattr(run, f"read_{name}")() == {}
        values = {"format": 1, "deep": {"list": [1, 2.5, None, True, "ünïcode"]}}
        getattr(run, f"write_{name}")(values)
        assert getattr(run, f"read_{name}")() == values
    assert tree(run.path) == ["data_manifest.json", "environment.json", "final.json", "metrics.json", "recipe.yaml"]


def test_broken_json_is_a_user_error(run: RunDirectory) -> None:
    run.metrics_path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"metrics.json: broken JSON"):
        run.read_metrics()


def test_tensors_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    values = {
        "t": torch.tensor(2),
        "n": np.float32(0.5),
        "i": np.int64(3),
        "nan": math.nan,
        "p": tmp_path,
        "s": (1, 2),
    }
    write_json_atomic(tmp_path / "a.json", {**values, 7: [-math.inf]})
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert read == {"t": 2, "n": 0.5, "i": 3, "nan": None, "p": str(tmp_path), "s": [1, 2], "7": [None]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text_atomic(tmp_path / "a.txt", "old")

    def fail(*paths: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_text_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and tree(tmp_path) == ["a.txt"]


def test_writers_with_the_same_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers that share a cache: the second one writes while the first one is about to rename."""
    replace, path = os.replace, tmp_path / "a.txt"

    def beside(*paths: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_text_atomic(path, "of the second")
        assert path.read_text() == "of the second"
        replace(*paths)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "replace", beside)
    write_text_atomic(path, "of the first")
    assert path.read_text() == "of the first" and tree(tmp_path) == ["a.txt"]


def test_log_round_trip(run: RunDirectory) -> None:
    assert run.read_log() == []
    run.append_log({"kind": "train", "step": 1, "loss": 2.5, "gap": math.nan})
    run.append_log({"kind": "eval", "step": 1, "eval_loss": 2.0})
    assert run.read_log() == [
        {"kind": "train", "step": 1, "loss": 2.5, "gap": None},
        {"kind": "eval", "step": 1, "eval_loss": 2.0},
    ]


@pytest.mark.parametrize("rest", ['{"kind": "train", "st', '{"kind": "tr\u00fc', "{"])
def test_half_written_last_log_line_is_left_out_and_then_replaced(run: RunDirectory, rest: str) -> None:
    run.append_log({"step": 1})
    with run.log_path.open("ab") as file:
        file.write(rest.encode()[:-1] or b"{")
    assert run.read_log() == [{"step": 1}]
    run.append_log({"step": 2})
    assert run.read_log() == [{"step": 1}, {"step": 2}]


def test_half_written_first_log_line(run: RunDirectory) -> None:
    run.log_path.write_text('{"step"')
    assert run.read_log() == []
    run.append_log({"step": 1})
    assert run.read_log() == [{"step": 1}]


def test_broken_line_inside_the_log_is_named(run: RunDirectory) -> None:
    run.log_path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl: line 2: broken JSON"):
        run.read_log()


def test_predictions(run: RunDirectory) -> None:
    rows = [{"id": "1", "prediction": "line one\nline two\u2028three"}, {"id": "2", "prediction": ""}]
    for name in ("student", "other", "teacher", "student_before"):
        run.write_predictions(name, rows)
    assert run.predictions_names() == ["teacher", "student_before", "student", "other"]
    assert run.read_predictions("student") == rows
    assert RunDirectory(run.path / "nothing").predictions_names() == []


# -------------------------------------------------------------------------------------------------- making and opening


def refused(path: Path, overwrite: bool = False) -> str:
    before = tree(path.parent) if path.parent.is_dir() else []
    with pytest.raises(UserError) as checked:
        RunDirectory.check_can_create(path, overwrite)
    with pytest.raises(UserError) as created:
        RunDirectory.create(path, overwrite)
    assert str(checked.value) == str(created.value)
    assert (tree(path.parent) if path.parent.is_dir() else []) == before
    return str(checked.value)


def test_check_makes_nothing_and_create_makes_parents(tmp_path: Path) -> None:
    RunDirectory.check_can_create(tmp_path / "a" / "b")
    assert tree(tmp_path) == []
    assert RunDirectory.create(tmp_path / "a" / "b").path.is_dir()
    RunDirectory.create(tmp_path / "a" / "b")  # still empty


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file")
    assert "is a file" in refused(tmp_path / "file", overwrite=True)
    assert "is a file" in refused(tmp_path / "file" / "below" / "it")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a file" in refused(tmp_path / "dangling")


def test_a_folder_with_something_in_it(run: RunDirectory, tmp_path: Path) -> None:
    assert "Choose another folder, go on with the unfinished run in it (--resume), or replace" in refused(run.path)
    run.write_metrics({"format": 1})
    assert "is not empty. Choose another folder, or replace" in refused(run.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "mine" / "recipe.yaml").write_text("student: {}")
    assert "holds no run of dts_hf" in refused(tmp_path / "mine", overwrite=True)


def test_overwrite_removes_our_files_only(run: RunDirectory) -> None:
    run.append_log({"step": 1})
    run.write_predictions("student", [])
    (run.path / "checkpoint-10").mkdir()
    (run.path / "checkpoint-10" / "weights").write_text("x")
    (run.path / "notes.txt").write_text("mine")
    (run.path / "broken_step-3.rank0.json").write_text("{}")
    RunDirectory.check_can_create(run.path, overwrite=True)
    assert (run.path / "log.jsonl").is_file()
    RunDirectory.create(run.path, overwrite=True)
    assert tree(run.path) == ["notes.txt"]
    assert run.path.parent.is_dir()


def test_resume_keeps_everything(run: RunDirectory) -> None:
    run.append_log({"step": 1})
    RunDirectory.check_can_create(run.path, resume=True)
    assert RunDirectory.create(run.path, overwrite=True, resume=True).read_log() == [{"step": 1}]


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> str:  # root may write everywhere, so chmod proves nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert f"cannot write in {tmp_path} (Permission denied)" in refused(tmp_path / "new" / "run")


def test_mkdir_that_fails_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match="No space left"):
        RunDirectory.create(tmp_path / "run")


def test_open_refuses_what_is_no_run(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run directory. Did you mean 'x'\?"):
        RunDirectory.open(run.path.parent / "X")
    with pytest.raises(UserError, match=r"is no run directory of dts_hf"):
        RunDirectory.open(tmp_path)
    with pytest.raises(UserError, match="no such run directory"):
        RunDirectory.open(run.recipe_path)


# --------------------------------------------------------------------------------------------------------- environment


def test_environment_says_enough_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environmentSecret123")
    home = Path.home()
    monkeypatch.setattr(sys, "argv", [f"{home}/bin/dts-hf", "train", "x=hf_abcdefGHIJ1234", f"output.dir={home}/runs"])
    found = environment(torch.device("cpu"))
    assert found["argv"] == ["~/bin/dts-hf", "train", "x=hf_***", "output.dir=~/runs"]
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"].startswith("3.") and found["cpu_count"] >= 1
    assert found["gpus"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert found["device"] == "CPU"
    assert "environmentSecret" not in json.dumps(found)


def test_environment_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(torch.device("cpu"))["git_commit"] is None
    monkeypatch.setenv("PATH", "")
    assert environment(torch.device("cpu"))["git_commit"] is None


# ----------------------------------------------------------------------------------------------------------- the device


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this machine one with so many cards, under a torch that is built for them or not."""

    def there_are(count: int, cuda: str | None = "13.0") -> None:
        properties = SimpleNamespace(total_memory=84_987_740_160)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    return there_are


@pytest.mark.parametrize(
    ("count", "cuda", "device", "world", "says"),
    [
        (1, "13.0", "cuda", 1, "NVIDIA H100 80GB HBM3, 85.0 GB"),
        (8, "13.0", "cuda:3", 8, "NVIDIA H100 80GB HBM3, 85.0 GB, 8 processes with one each"),
        (0, "13.0", "cpu", 1, "the CPU (2 threads); no CUDA device is visible"),
        (0, None, "cpu", 4, f"the CPU (2 threads, 4 processes); torch {torch.__version__} is a build without CUDA"),
        (1, "13.0", "cpu", 1, "the CPU (2 threads); training.use_cpu leaves NVIDIA H100 80GB HBM3 idle"),
        (0, None, "mps", 1, "MPS"),
    ],
)
def test_one_line_names_the_device(
    cards: Any, count: int, cuda: str | None, device: str, world: int, says: str
) -> None:
    cards(count, cuda)
    args: Any = SimpleNamespace(device=torch.device(device), world_size=world)
    assert where_it_trains(args) == f"training on {says}"


# ---------------------------------------------------------------------------------------------------- several lives


def test_a_log_is_cut_to_where_a_checkpoint_stood(run: RunDirectory) -> None:
    assert run.log_size() == 0
    run.cut_log(10)
    run.append_log({"step": 1})
    size = run.log_size()
    run.append_log({"step": 2})
    run.cut_log(size)
    assert run.read_log() == [{"step": 1}] and run.log_size() == size
    run.cut_log(size + 100)
    assert run.log_size() == size


def test_what_a_killed_process_left_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (path / ".dts_hf-probe").mkdir(parents=True)
    (path / ".recipe.yaml.17.tmp").write_text("student:")
    for resume in (False, True):
        RunDirectory.check_can_create(path, resume=resume)
    RunDirectory.create(path, resume=True)
    assert list(path.iterdir()) == []
    (path / ".notes.tmp").write_text("mine")
    (path / ".recipe.yaml.17-0a.tmp").write_text("student:")
    with pytest.raises(UserError, match="holds no run of dts_hf"):
        RunDirectory.create(path, resume=True)
    (path / "recipe.yaml").write_text(RECIPE_HEADER)
    RunDirectory.create(path, resume=True)
    assert tree(path) == [".notes.tmp", "recipe.yaml"]
    (path / ".notes.tmp").unlink()
    (path / "recipe.yaml").unlink()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no run of dts_hf, so it is not resumed"):
        RunDirectory.check_can_create(path, resume=True)


def test_overwriting_that_is_cut_short_leaves_nothing_to_resume(run: RunDirectory) -> None:
    """Whatever was removed by then: the run does not look finished, and no checkpoint looks whole without the others."""
    for name in ("metrics.json", "checkpoint-5/complete.json", "interrupted/checkpoint-6/complete.json", "final/x"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("{}")
    (run.path / "recipe.yaml").write_text("x")
    order = [path.relative_to(run.path).as_posix() for path in run._our_files()]
    assert order[:3] == ["metrics.json", "checkpoint-5/complete.json", "interrupted/checkpoint-6/complete.json"]
    assert order[-1] == "recipe.yaml" and {"final", "checkpoint-5", "interrupted"} <= {*order}


def test_a_finished_run_keeps_nothing_of_an_unfinished_one(run: RunDirectory) -> None:
    run.write_scores({})
    for name in ("interrupted/checkpoint-6/complete.json", "broken_step-3.rank0.json", "checkpoint-5/complete.json"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("{}")
    run.clean_up()
    assert tree(run.path) == ["checkpoint-5", "checkpoint-5/complete.json", "recipe.yaml", "scores.json"]
    run.clean_up()  # nothing is there to remove


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000123", "lost+found", ".ipynb_checkpoints"])
def test_what_systems_put_into_any_folder_is_nothing(tmp_path: Path, recipe: Recipe, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_text("x")
    for overwrite, resume in ((False, False), (False, True), (True, False)):
        RunDirectory.check_can_create(tmp_path, overwrite, resume)
    RunDirectory.create(tmp_path).save_recipe(recipe)
    RunDirectory.create(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == [name]


def test_the_longest_name_that_a_file_may_have(tmp_path: Path) -> None:
    """The temporary one beside it must not be longer, or work would be lost at its end."""
    for name in ("x" * 255, "é" * 127, "x.jsonl"):
        write_text_atomic(tmp_path / name, name)
        write_text_atomic(tmp_path / name, f"{name} again")
        assert (tmp_path / name).read_text() == f"{name} again"
    assert len([*tmp_path.iterdir()]) == 3
    run = RunDirectory.create(tmp_path / ("r" * 255))
    run.append_log({"step": 1})
    run.write_metrics({})
    assert RunDirectory(run.path).read_log() == [{"step": 1}]


def test_the_plan_says_whose_answers_are_trained_on(recipe: Recipe) -> None:
    """``cached`` would read as if they were there already."""
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"responses": "teacher"})})
    plan = outline(asked, SimpleNamespace(max_steps=4))
    assert "tokens each), where no earlier run has kept its answers; " in plan and "cached" not in plan
    assert "kept its answers" not in outline(recipe, SimpleNamespace(max_steps=4))
