"""Links inside a run directory: refused by name before anything is loaded, and not followed where the look was in vain."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.errors import RunError, UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.reporting import plots
from dts_hf.runs import checkpoints, directory
from dts_hf.runs.checkpoints import COMPLETE, mark_complete
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import LOCK, lock, unlock
from tests.support.trainers import trainer_for

VALUES = {
    "student": {"model": "no-such-model"},
    "teacher": {"model": "no-such-model"},
    "data": {"train": "rows.jsonl", "prompt_template": "plain"},
    "temperature": {"name": "constant", "value": 2},
    "training": {"use_cpu": True, "max_steps": 2},
    "output": {"dir": "run"},
}


def content(folder: Path) -> dict[str, bytes | str]:
    """All that lies in ``folder``: the bytes of files, where links lead."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
        found[str(path.relative_to(folder))] = kind
    return found


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """What somebody would not like to lose: it looks like all that a run makes."""
    folder = tmp_path / "precious"
    for name in ("thesis.tex", "model.safetensors", COMPLETE, "teacher.jsonl", "temperature.png", ".teacher.jsonl.1.tmp",
                 "checkpoint-1/weights", f"checkpoint-1/{COMPLETE}"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine\n" * 10)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(VALUES))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    made = RunDirectory.create(tmp_path / "run")
    made.save_recipe(Recipe.from_dict(VALUES, deep=False))
    return made


def train(*arguments: str) -> str:
    """What ``dts-hf train`` says, which is refused."""
    with torch.random.fork_rng(devices=[]):
        result = CliRunner().invoke(app, ["train", "recipe.yaml", *arguments])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    return " ".join(result.output.split())


# -------------------------------------------------------------------------------------------------- refused by name

#: What in a run is a link, to what of the victim's, and how the run is started.
ATTACKS = [
    (".lock", "thesis.tex", []),
    (".lock", "thesis.tex", ["--resume"]),
    ("final", "", ["--resume"]),
    ("log.jsonl", "thesis.tex", ["--resume"]),
    ("predictions", "", ["--resume"]),
    ("interrupted", "", ["--resume"]),
    ("checkpoint-9", "", ["--overwrite"]),
    ("metrics.json", "thesis.tex", ["--resume"]),
    ("figures", "", ["--overwrite"]),
    ("recipe.yaml", "thesis.tex", ["--overwrite"]),
    ("predictions/teacher.jsonl", "teacher.jsonl", ["--resume"]),
    ("interrupted/checkpoint-1", "checkpoint-1", ["--overwrite"]),
    ("checkpoint-2/complete.json", "complete.json", ["--overwrite"]),
    (".final.unfinished", "", ["--resume"]),
    (".recipe.yaml.1.tmp", "thesis.tex", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "to", "how"), ATTACKS)
def test_a_link_is_refused_before_anything_is_loaded(
    run: RunDirectory, victim: Path, name: str, to: str, how: list[str]
) -> None:
    link = run.path / name
    if not how or name == "recipe.yaml":  # a folder with nothing else in it
        run.recipe_path.unlink()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim / to)
    before = content(run.path.parent)
    says = train(*how)
    assert f"run/{name} is a link to {victim / to}" in says and "no-such-model" not in says
    assert content(run.path.parent) == before


@pytest.mark.parametrize("how", [["--resume"], ["--overwrite"]])
def test_what_is_no_link_or_not_ours_is_let_through(run: RunDirectory, victim: Path, how: list[str]) -> None:
    """The control: so far that the models are looked for. The run directory itself may be a link."""
    (run.path / "notes").symlink_to(victim)
    run.append_log({"step": 1})
    run.path.rename(run.path.parent / "drive")
    run.path.symlink_to(run.path.parent / "drive")
    before = content(run.path.parent)
    assert "no-such-model" in train(*how)
    assert content(run.path.parent) == before


@pytest.mark.parametrize("how", [["--resume"], ["--overwrite"]])
def test_a_link_of_the_users_beside_the_checkpoints_is_let_be(
    run: RunDirectory, victim: Path, how: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "checkpoint-4").mkdir()
    for name in ("checkpoint-best", "checkpoint-4-copy", "checkpoint-"):
        (run.path / name).symlink_to("checkpoint-4")
    assert "no-such-model" in train(*how)
    RunDirectory.create(run.path, overwrite=True)
    assert sorted(os.listdir(run.path)) == ["checkpoint-", "checkpoint-4-copy", "checkpoint-best"]


@pytest.mark.parametrize("name", [LOCK, "log.jsonl"])
def test_pipes_are_refused(run: RunDirectory, name: str) -> None:
    os.mkfifo(run.path / name)
    assert f"{name} is neither a file nor a folder" in train("--resume")


@pytest.mark.parametrize("how", [["--resume"], ["--overwrite"]])
def test_a_second_name_is_no_hindrance_and_nothing_is_written_there(
    run: RunDirectory, victim: Path, how: list[str]
) -> None:
    """A backup by ``cp -al``: of the lock that a killed run has left, too."""
    run.append_log({"step": 1})
    before = content(victim)
    for name in (LOCK, "log.jsonl"):
        (run.path / name).unlink(missing_ok=True)
        os.link(victim / "thesis.tex", run.path / name)
    os.link(run.recipe_path, victim.parent / "backup.yaml")  # replaced as a whole, never written in place
    assert "no-such-model" in train(*how)
    assert content(victim) == before
    run.cut_log(7)
    run.append_log({"step": 2})
    assert run.log_path.read_bytes() == b'mine\n{"step": 2}\n' and content(victim) == before


# ------------------------------------------------------------------------------- where the look was in vain, or long ago


def test_the_lock_is_not_taken_through_a_link(
    run: RunDirectory, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / LOCK).symlink_to(victim / "thesis.tex")
    with pytest.raises(UserError, match=r"\.lock is a link"):
        lock(run.path)
    monkeypatch.setattr("dts_hf.runs.lock.refuse_links", lambda *_, **__: None)
    with pytest.raises(RunError, match=r"\.lock: it is a link"):
        lock(run.path)
    (run.path / LOCK).unlink()
    try:
        lock(run.path)
        (run.path / LOCK).unlink()
        (run.path / LOCK).symlink_to(victim / "thesis.tex")
    finally:
        unlock()
    assert (run.path / LOCK).is_symlink() and (victim / "thesis.tex").read_text() == "mine\n" * 10


WRITES: list[tuple[str, str, Callable[[RunDirectory], Any]]] = [
    ("log.jsonl", "thesis.tex", lambda run: run.append_log({"step": 1})),
    ("log.jsonl", "thesis.tex", lambda run: run.cut_log(3)),
    ("predictions", "", lambda run: run.write_predictions("teacher", [])),
    ("figures", "", plots.write_figures),
]


@pytest.mark.parametrize(("name", "to", "write"), WRITES)
def test_nothing_is_written_through_a_link(
    run: RunDirectory, victim: Path, name: str, to: str, write: Callable[[RunDirectory], Any]
) -> None:
    write(run)
    target = run.path / name
    if target.is_dir():
        target.rename(run.path / "moved")
    target.unlink(missing_ok=True)
    target.symlink_to(victim / to)
    before = content(victim)
    with pytest.raises(RunError, match=rf"cannot write .*{name}: it is a link to"):
        write(run)
    assert content(victim) == before


def link_all(run: RunDirectory, victim: Path, names: Iterable[str]) -> dict[str, bytes | str]:
    for name in names:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).symlink_to(victim)
    return content(victim)


def test_nothing_is_removed_through_a_link(run: RunDirectory, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "checkpoint-9",
        "interrupted/checkpoint-8",
        "predictions",
        "figures",
        "final",
        ".final.unfinished",
        ".dts_hf-1",
    )
    before = link_all(run, victim, names)
    monkeypatch.setattr(directory, "refuse_links", lambda *_, **__: None)  # planted after the look
    RunDirectory.create(run.path, overwrite=True)
    assert os.listdir(run.path) == [] and content(victim) == before
    link_all(run, victim, ["interrupted", "scores.json", "broken_step-3.rank0.json"])
    run.clean_up()
    assert content(victim) == before


def test_a_linked_checkpoint_is_none(run: RunDirectory, victim: Path) -> None:
    mark_complete(victim / "checkpoint-1", step=1, resumable=True)
    before = link_all(run, victim / "checkpoint-1", ["checkpoint-1", "interrupted/checkpoint-2"])
    assert checkpoints.checkpoints(run.path) == [] and checkpoints.newest_complete(run.path) is None
    checkpoints.rotate(run.path, 9, 1)
    with pytest.raises(RunError, match="checkpoint-1: it is a link"):
        checkpoints.remove(run.path / "checkpoint-1")
    (run.path / "interrupted" / "checkpoint-2").unlink()
    (run.path / "interrupted").rmdir()
    (run.path / "interrupted").symlink_to(victim)
    checkpoints.rotate(run.path, 9, 1)
    assert checkpoints.checkpoints(run.path) == [] and content(victim / "checkpoint-1") == before


# ------------------------------------------------------------------------------------------------------- from Python


class Plant(TrainerCallback):
    """A link that appears in the first step."""

    def __init__(self, link: Path, to: Path) -> None:
        self.link, self.to = link, to

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.link.symlink_to(self.to)


@pytest.mark.parametrize("name", ["checkpoint-1", "interrupted"])
def test_the_trainer_refuses_linked_checkpoints(tmp_path: Path, victim: Path, name: str) -> None:
    before = content(victim)
    trainer = trainer_for(tmp_path / "out", options={"save_strategy": "steps", "save_steps": 1})
    (tmp_path / "out" / "final").symlink_to(victim)  # that is the user's own affair here
    (tmp_path / "out" / name).symlink_to(victim)
    for resume in (None, True):
        with pytest.raises(UserError, match=f"{name} is a link to"):
            trainer.train(resume_from_checkpoint=resume)
    (tmp_path / "out" / name).unlink()
    trainer.add_callback(Plant(tmp_path / "out" / name, victim))
    if name == "interrupted":
        trainer.train()
        with pytest.raises(RunError, match="interrupted: it is a link to"):
            trainer.save_checkpoint_now()
    else:
        with pytest.raises(RunError, match="checkpoint-1: it is a link to"):
            trainer.train()
    assert content(victim) == before
