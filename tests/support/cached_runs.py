"""Runs of a cached teacher beside those of the live one."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.distill import distill
from dts_hf.language_modeling.caching import cache_teacher
from tests.support.recipes import recipe

LIVE = {"model": "teacher", "dtype": "float32"}
CACHED = {**LIVE, "kind": "cached", "cache": "states"}
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 6}
#: Without what is not looked at here.
QUICK = {"evaluation": {"models": [], "every_steps": None}}


def quick(teacher=LIVE, folder="run", **sections):
    """A run without scores and figures."""
    output = {"dir": folder, "report": False}
    return distill(recipe(**{"training": SGD, "teacher": teacher, "output": output, **QUICK, **sections}))


def log_of(run, key):
    return torch.tensor([line[key] for line in run.read_log() if line["kind"] == "train"])


def cache(folder="states", **sections):
    options = sections.pop("options", None)
    return cache_teacher(recipe(**sections), Path(folder), options)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])
