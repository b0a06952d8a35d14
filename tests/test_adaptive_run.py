"""A recipe with an adaptive share and replay from end to end: the run, its log, its card, a resume, the doctor."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from dts_hf.distill import distill
from dts_hf.doctor.run import diagnose
from tests.support.recipes import recipe

OWN = {"fraction": 0.8, "adaptive": {"eps": 0.0, "capacity": 4}, "max_new_tokens": 6}


def wanted(folder: str):
    training = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 6,
                "logging_steps": 1, "per_device_train_batch_size": 2}  # fmt: skip
    return recipe(
        data={"on_policy": OWN}, training=training, evaluation={"every_steps": None, "rows": 2}, output={"dir": folder}
    )


def lines_of(run, *names):
    return [[line.get(name) for name in names] for line in run.read_log() if "on_policy_fraction" in line]


def test_a_run_and_its_resume(workplace):
    run = distill(wanted("run"))
    columns = ("step", "loss", "on_policy_fraction", "generated_share", "replayed_share", "replay_rows")
    log = lines_of(run, *columns)
    assert len(log) == 6 and log[-1][-1] == 4 and any(line[4] for line in log)
    card = (run.path / "README.md").read_text()
    assert "the share followed the held-out loss (DistiLLM)" in card
    weights = load_file(run.final_path / "model.safetensors")
    # The same again, killed behind its first checkpoint
    shutil.copytree("run", "other")
    for name in ("checkpoint-6", "final", "final.json", "metrics.json"):
        path = run.path.parent / "other" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    again = distill(wanted("other"), resume=True)
    assert lines_of(again, *columns) == log
    assert all(
        (load_file(again.final_path / "model.safetensors")[name] == value).all() for name, value in weights.items()
    )
    assert sorted(path.name for path in (again.path / "checkpoint-6").glob("replay_*")) == [
        "replay_0.json", "replay_0.safetensors"
    ]  # fmt: skip


def test_the_doctor_takes_its_steps(workplace):
    """They look at no held-out rows, whose loss an adaptive share follows."""
    path = workplace / "recipe.json"
    path.write_text(json.dumps(wanted("run").model_dump(mode="json", by_alias=True)))
    assert diagnose(path)["steps"].values["steps"] == 3


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_person_sees_each_line_of_a_run_on_own_text(workplace, capsys, fraction):
    """A step of the student's own text alone has no gap of data to show."""
    training = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": False}
    run = distill(recipe(data={"on_policy": {"fraction": fraction, "max_new_tokens": 4}}, training=training))
    shown = [line for line in capsys.readouterr().err.splitlines() if " tok/s" in line]
    log = [line for line in run.read_log() if "tokens_per_second" in line]
    gaps = [line.get("gap") is not None for line in log]
    assert len(shown) == len(log) == 4 and any(gaps) == (fraction < 1)
    assert ["  gap " in line for line in shown] == gaps
    assert all("  kl " in line and "  T " in line for line in shown)
