"""The recipes of the papers: complete, consistent with their headers, and different only where they should be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dts_hf.evaluation.benchmark_sets import INSTRUCTION_SETS, KNOWN_SETS
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe

DOLLY = Path(__file__).resolve().parents[2] / "recipes" / "dolly"
PAIRS = {"gpt2-xl_to_gpt2": 32, "opt-13b_to_opt-1.3b": 128, "llama-13b_to_llama-7b": 64}  # rows a step
METHODS = ("teacher_sft", "sft", "kd", "seqkd", "reverse_kl", "skew_reverse_kl", "dts_paper", "dts_gap", "dtkd", "ctkd",
           "adakd")  # fmt: skip

pytestmark = pytest.mark.skipif(not DOLLY.is_dir(), reason="needs the repository's recipes/ folder")


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in lines), path
    return re.sub(r"\s+", " ", " ".join(line.lstrip("# ").removesuffix("\\") for line in lines))


def changed(one: Any, other: Any, prefix: str = "") -> set[str]:
    """Dotted keys in which two recipes differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return set() if one == other else {prefix}
    keys = one.keys() | other.keys()
    return {found for key in keys for found in changed(one.get(key), other.get(key), f"{prefix}.{key}".lstrip("."))}


def load(pair: str, method: str) -> Recipe:
    return load_recipe(DOLLY / pair / f"{method}.yaml")


@pytest.mark.parametrize("pair", PAIRS)
def test_paper_recipes(pair: str) -> None:
    there = {path.stem for path in (DOLLY / pair).glob("*.yaml")}
    assert there == {*METHODS, "_base"} | ({"dts_code"} if pair.startswith("opt") else set())
    for method in sorted(there - {"_base"}):
        path, recipe = DOLLY / pair / f"{method}.yaml", load(pair, method)
        assert recipe.output.dir == f"runs/dolly/{pair}/{method}"
        text = header(path)
        assert f"-m dts_hf train recipes/dolly/{pair}/{method}.yaml" in text
        command = f"dts-hf evaluate {recipe.output.dir} --protocol minillm --sets {','.join(INSTRUCTION_SETS)}"
        assert command in text
        for word in ("Hardware: ", "Expected ROUGE-L", "Differs from the published run", "Not run by us."):
            assert word in text, f"{path}: the header has no '{word}'"
        assert ("Tolerance: " in text) == bool(re.search(r"\d\d\.\d+ /", text)), path
        launch = text[: text.index(f"train recipes/dolly/{pair}/{method}.yaml")].rpartition("--num_processes ")[2]
        processes = int(launch.split()[0])
        training = recipe.training
        rows = processes * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        if method not in ("teacher_sft", "dts_code"):
            assert rows == PAIRS[pair]
        # Scores after every epoch, and a whole number of them.
        assert recipe.evaluation.every_steps == KNOWN_SETS["dolly"].rows["train"] // rows
        assert training["save_total_limit"] == training["num_train_epochs"]
        uses_teacher = recipe.loss.kd_ratio > 0 or recipe.data.responses == "teacher"
        teacher = load(pair, "teacher_sft").output.dir + "/final"
        assert (recipe.teacher is not None and recipe.teacher.model == teacher) == uses_teacher
        assert (recipe.teacher is None) == (method in ("sft", "teacher_sft"))
        assert (f"{pair}/teacher_sft.yaml" in text) == (uses_teacher or method == "teacher_sft")


@pytest.mark.parametrize("pair", PAIRS)
def test_a_temperature_method_changes_the_temperature_alone(pair: str) -> None:
    kd, reverse = (load(pair, method).model_dump(mode="json") for method in ("kd", "reverse_kl"))
    for method, base in (("dts_paper", kd), ("dts_gap", kd), ("adakd", reverse)):
        keys = changed(load(pair, method).model_dump(mode="json"), base)
        assert {key.partition(".")[0] for key in keys} == {"temperature", "output"}, method
    for method in ("dtkd", "ctkd"):  # the weights are the papers'
        keys = changed(load(pair, method).model_dump(mode="json"), kd)
        assert {key for key in keys if not key.startswith("temperature")} == {"output.dir", "loss.kd_ratio"}, method


def test_published_hyper_parameters() -> None:
    gpt2, opt, llama = (load(pair, "kd") for pair in PAIRS)
    for recipe, rate, epochs in ((gpt2, 5e-4, 20), (opt, 5e-5, 10), (llama, 1e-5, 10)):
        assert (recipe.training["learning_rate"], recipe.training["num_train_epochs"]) == (rate, epochs)
        assert recipe.training["lr_scheduler_kwargs"] == {"min_lr": 1e-7} and recipe.training["weight_decay"] == 0.01
        assert (recipe.data.max_length, recipe.data.max_prompt_length, recipe.loss.kd_ratio) == (512, 256, 0.5)
        assert recipe.temperature.model_dump() == {"name": "constant", "value": 1.0}
    rates = [load(pair, "teacher_sft").training["learning_rate"] for pair in PAIRS]
    assert rates == [5e-5, 1e-5, 1e-5]
    authors = load("opt-13b_to_opt-1.3b", "dts_code")
    assert (authors.loss.kd_ratio, authors.training["num_train_epochs"], authors.data.responses) == (0.9, 7, "teacher")
    assert authors.temperature.options["rule"] == "code"
