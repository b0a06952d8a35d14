"""``evaluation.harness`` through ``distill``, with a stand-in for ``lm_eval`` that has its documented interface."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.evaluation import harness as module
from dts_hf.evaluation.harness import check_harness
from dts_hf.recipe.schema import Harness
from tests.support.recipes import recipe

QUIET = {"dir": "run", "report": False}
#: It seeds the global generators and sets a padding token, as the package does, and notes what it was called with.
EVALUATOR = """
import json, random, numpy, torch
from lm_eval.models.huggingface import HFLM

def simple_evaluate(model, tasks, num_fewshot=None, limit=None, apply_chat_template=False, log_samples=True):
    assert isinstance(model, HFLM) and not model.pretrained.training
    random.seed(0), numpy.random.seed(1234), torch.manual_seed(1234)
    model.tokenizer.pad_token = "Z"
    asked = {"tasks": tasks, "num_fewshot": num_fewshot, "limit": limit, "chat": apply_chat_template,
             "batch_size": model.batch_size, "weights": sum(p.numel() for p in model.pretrained.parameters())}
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps(asked) + "\\n")
    if "broken" in tasks:
        raise ConnectionError("rows of 'broken' cannot be\\nfetched")
    scores = {"alias": "little", "acc,none": numpy.float64(0.75), "acc_stderr,none": "N/A", "sample_len": 4}
    return {"results": {"little": scores},
            "versions": {"little": 1.5}, "n-shot": {"little": 0}, "n-samples": {"little": {"original": 9, "effective": 4}}}
"""
FILES = {
    "__init__.py": "from lm_eval.evaluator import simple_evaluate\n",
    "evaluator.py": EVALUATOR,
    "models/__init__.py": "",
    "models/huggingface.py": "class HFLM:\n    def __init__(self, pretrained, tokenizer, batch_size):\n"
    "        self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size\n",
    "tasks/__init__.py": "class TaskManager:\n    all_tasks = ['hellaswag', 'little', 'broken']\n",
}


@pytest.fixture
def lm_eval(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in, installed for this test."""
    for name, text in FILES.items():
        file = workplace / "packages" / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    about = workplace / "packages" / "lm_eval-0.4.99.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.4.99\n")
    others = [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]
    for name in others:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(workplace / "packages"))
    importlib.invalidate_caches()
    yield workplace
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def asked(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def test_student_and_teacher_are_scored_and_training_does_not_feel_it(lm_eval: Path) -> None:
    harness = {
        "tasks": ["little"],
        "models": ["teacher", "student"],
        "limit": 4,
        "num_fewshot": 2,
        "chat_template": True,
    }
    run = distill(recipe(output=QUIET, evaluation={"harness": harness}))
    models = run.read_metrics()["models"]
    expected = {"version": 1.5, "num_fewshot": 0, "samples": 4, "measures": {"acc,none": 0.75}}
    whole = {"lm_eval": "0.4.99", "limit": 4, "chat_template": True, "tasks": {"little": expected}}
    assert models["teacher"]["harness"] == models["student"]["harness"] == whole
    assert "harness" not in models["student_before"]
    teacher, student = asked(lm_eval)
    assert teacher["weights"] == models["teacher"]["parameters"] > student["weights"]
    assert (student["limit"], student["num_fewshot"], student["chat"], student["batch_size"]) == (4, 2, True, 32)
    without = distill(recipe(output={**QUIET, "dir": "without"}))
    weights = [AutoModelForCausalLM.from_pretrained(one.final_path).state_dict() for one in (run, without)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    saved = [json.loads((one.final_path / "tokenizer_config.json").read_text()) for one in (run, without)]
    assert saved[0] == saved[1]
    assert run.read_metrics()["protocol"] == without.read_metrics()["protocol"]


def test_tasks_by_name_alone_and_where_nothing_else_is_scored(lm_eval: Path) -> None:
    run = distill(recipe(output=QUIET, evaluation={"harness": ["little"], "models": [], "every_steps": None}))
    models = run.read_metrics()["models"]
    assert set(models) == {"student"} and models["student"]["harness"]["tasks"]["little"]["samples"] == 4
    assert models["student"]["sets"] == {} and len(asked(lm_eval)) == 1


def test_a_failure_after_training_is_noted_and_the_student_is_there(
    lm_eval: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distill(recipe(output=QUIET, evaluation={"harness": ["broken"]}))
    found = run.read_metrics()["models"]["student"]["harness"]
    assert found["error"] == "ConnectionError: rows of 'broken' cannot be fetched" and "tasks" not in found
    assert "evaluation.harness: not scored (ConnectionError" in capsys.readouterr().err
    assert (run.final_path / "model.safetensors").is_file()


def test_what_would_fail_late_is_refused_early(lm_eval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"evaluation.harness: lm_eval 0.4.99 has no task 'hellaswagg'.* 'hellaswag'"):
        distill(recipe(evaluation={"harness": ["hellaswagg"]}))
    assert not Path("run").exists()
    monkeypatch.setattr(module, "process", lambda: (0, 2))
    with pytest.raises(UserError, match="got 2 processes"):
        check_harness(Harness(tasks=["little"]))


def test_a_missing_package_is_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=r"evaluation\.harness: needs the package lm_eval.*pip install lm_eval"):
        check_harness(Harness(tasks=["hellaswag"]))
    with pytest.raises(UserError, match=r"evaluation\.harness"):
        recipe(evaluation={"harness": []})
