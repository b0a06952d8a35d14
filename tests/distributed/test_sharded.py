"""Sharded weights on two processes: teacher spread over them, students of ZeRO-3 and FSDP2 scored and saved whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationMethod

from dts_hf.distill import distill
from dts_hf.distributed.sharding import check_can_shard, is_sharded, place_teacher, shard_teacher, unsharded_init
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from tests.distributed.cases import SHARDED_TRAININGS
from tests.support.launching import WORKERS, deepspeed_config, launch
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.workers import sharded_worker

#: What trains the student.
WRAPPERS = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPLlamaForCausalLM"}
#: "Peak memory per process of a ZeRO-3 run with sharded teacher <= 0.65 x that of DDP", where weights dominate.
MEMORY_BAR = 0.65

trained = pytest.mark.parametrize(
    ("strategy", "case"), [(strategy, case) for strategy in WRAPPERS for case in SHARDED_TRAININGS[strategy]]
)


class Runs:
    """What the worker has found; one launch of two processes runs all strategies."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        write_recipe(folder)
        # Freed blocks go back to the system, so that resident memory is memory in use
        small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        done = launch(WORKERS / "sharded_worker.py", 2, [str(folder), *WRAPPERS], env=small, timeout=800)
        assert done.returncode == 0, done.stderr[-3000:]
        sharded_worker.main(["single"], folder)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            sharded_worker.whole_run(folder, 1)

    def __call__(self, strategy: str, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / strategy / f"{rank}.json").read_text())

    def weights(self, strategy: str, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / strategy / name
        return load_file(next(path.glob("*.safetensors")) if path.is_dir() else path.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharded"), pytest.MonkeyPatch())


def write_recipe(folder: Path) -> None:
    tiny_llama(seed=0, layers=4).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    rows = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": f"yes {i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "zero3.json").write_text(json.dumps(deepspeed_config(3)))
    recipe = {
        "student": {"init": {"from": "teacher", "layers": 2}, "lora": {"r": 4}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "prompt_template": "chat", "responses": "teacher",
                 "teacher_max_new_tokens": 6},
        "training": {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01,
                     "logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2},
        "evaluation": {"rows": 5, "max_new_tokens": 6, "every_steps": 2, "own_text": {"rows": 5, "max_new_tokens": 6}},
        "output": {"report": False, "dir": "run"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((other[key] - value).norm() / value.norm()) for key, value in one.items() if value.any())


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.slow
@trained
def test_the_launch_was_what_it_claims(runs, strategy, case):
    """Wrapper, world size and kind of weights first: what follows would also hold for a silent DDP."""
    for rank in (0, 1):
        found = runs(strategy, rank)[case]
        assert found["world"] == 2
        assert found["wrapper"].replace("PeftModel", "Llama") == WRAPPERS[strategy]
        assert found["student_is_sharded"] == (strategy != "ddp")
        sharded = case.endswith("sharded")
        assert found["teacher_is_sharded"] == sharded
        assert found["teacher_kind"] == (["DTensor"] if sharded else ["Parameter"])
        assert found["teacher_held"] == pytest.approx(0.5 if sharded else 1.0, abs=0.01)
        single = runs("single")[case]
        assert found["parameters"] == single["parameters"], "weights elsewhere count too"


@pytest.mark.slow
@trained
def test_where_the_weights_are_changes_no_number(runs, strategy, case):
    """Losses, temperature, held-out loss, and the text of student (in the middle, at the end) and teacher."""
    one, two = runs("single")[case], runs(strategy)[case]
    for key in ("loss", "temperature"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    for key, value in one["held_out"].items():
        assert two["held_out"][key] == pytest.approx(value, rel=1e-5), key
    for who in ("midway", "student", "teacher"):
        assert two[who] == one[who], who
        assert any(two[who]), "some text"
    assert runs(strategy, 1)[case] == two, "the processes agree on everything"
    assert len(set(two["temperature"])) > 1 and two["loss"][-1] < two["loss"][0]


@pytest.mark.slow
def test_the_placement_of_the_teacher_changes_no_bit(runs):
    whole, spread = runs("ddp")["tied"], runs("ddp")["tied-sharded"]  # the latter with checkpointing, too
    assert whole["loss"] == spread["loss"] and whole["held_out"] == spread["held_out"]
    one, other = runs.weights("ddp", "tied/"), runs.weights("ddp", "tied-sharded/")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@trained
def test_the_saved_student_is_the_trained_one(runs, strategy, case):
    """Complete, loadable, and to the bit what DeepSpeed's or PyTorch's own gathering gives."""
    saved = runs.weights(strategy, f"{case}/")
    assert difference(runs.weights("single", f"{case}/"), saved) < 1e-5
    trained = runs.weights(strategy, case)
    if case == "lora-sharded":
        trained = merged(trained)
        assert all(torch.allclose(saved[key], trained[key], rtol=0, atol=1e-6) for key in saved)
    else:
        assert all(torch.equal(saved[key], trained[key]) for key in saved)
    folder = runs.folder / strategy / case
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and model.config.use_cache
    start = tiny_llama(seed=0, tie=case != "untied-sharded").state_dict()
    assert difference({key: start[key] for key in saved}, saved) > 1e-3, "and training has changed it"
    assert not list(folder.parent.glob(".*")), "nothing unfinished is left"


def merged(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + alpha / r B A of the adapters (arXiv 2106.09685), under the names of the model without them."""
    found = {}
    for name, weight in trained.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            found[plain] = weight
        if ".base_layer" in name:
            a, b = (trained[name.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            found[plain] = (weight.double() + 32 / 4 * b.double() @ a.double()).float()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ("fsdp2", "zero3"))
def test_an_adapter_alone_is_saved_too(runs, strategy):
    one, two = (runs.weights(name, "lora-sharded-adapter/") for name in ("single", strategy))
    assert len(one) == 2 * 2 * 7 and difference(one, two) < 1e-5


@pytest.mark.slow
def test_classifiers_remember_their_sharded_teacher_together(runs):
    """One process knows all its rows already, the other does not: both must run the teacher, or wait for ever."""
    one, two = runs("single")["classify"], runs("zero3")["classify"]
    assert two["teacher_is_sharded"] and not one["teacher_is_sharded"]
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-5)
    assert difference(runs.weights("single", "classifier/"), runs.weights("zero3", "classifier/")) < 1e-5


@pytest.mark.slow
def test_what_fails_on_the_first_process_ends_on_all(runs):
    first, second = (runs("ddp", rank)["failures"] for rank in (0, 1))
    assert first["user"] == second["user"] == "UserError: no room"
    assert first["system"] == "OSError: [Errno 28] No space left on device"
    assert second["system"] == "RunError: OSError: [Errno 28] No space left on device"
    assert first["result"] == second["result"] == "of 0"
    assert "quantised" in first["quantized"] and "replicated" in first["quantized"]


@pytest.mark.slow
def test_zero3_with_a_sharded_teacher_needs_at_most_this_share_of_the_memory_of_ddp(runs):
    ddp, zero3 = ([runs(strategy, rank)["memory"] for rank in (0, 1)] for strategy in ("ddp", "zero3"))
    for found, wrapper, teacher in (
        (ddp, "DistributedDataParallel", "Parameter"),
        (zero3, "DeepSpeedEngine", "DTensor"),
    ):
        assert all((f["wrapper"], f["world"], f["teacher"]) == (wrapper, 2, teacher) for f in found)
        # Whole student and teacher, gradients and two moments cannot be missing in what was measured
        assert max(f["weights_mb"] for f in found) > 4e-6 * sum(found[0]["parameters"].values())
    assert zero3[0]["loss"] == pytest.approx(ddp[0]["loss"], rel=1e-5)
    ratio = max(f["weights_mb"] for f in zero3) / max(f["weights_mb"] for f in ddp)
    assert ratio <= MEMORY_BAR, f"{ratio:.3f}: {zero3} against {ddp}"


# ------------------------------------------------------------------------------------------------------ a whole run


@pytest.mark.slow
def test_a_whole_run_under_zero3_with_a_sharded_teacher_is_that_of_one_process(runs):
    """Teacher answers, scores, held-out losses, log and student. (test_distributed.py launches the command itself.)"""
    folder = runs.folder
    first, second = (json.loads((folder / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert set(second["models"]) == {"teacher", "student_before", "student"}
    for name, entry in first["models"].items():
        assert second["models"][name]["sets"] == entry["sets"], name
        assert second["models"][name]["parameters"] == entry["parameters"]
        forced = entry["teacher_forced"]
        assert second["models"][name]["teacher_forced"] == pytest.approx(forced, rel=1e-5), name
        if name != "teacher":
            found, expected = (dict(one["own_text"]) for one in (second["models"][name], entry))
            assert found.pop("fingerprint") == expected.pop("fingerprint")
            assert found == pytest.approx(expected, rel=1e-5), name
    logs = [[json.loads(line) for line in (folder / name / "log.jsonl").open()] for name in ("one", "two")]
    assert [(line["kind"], line["step"]) for line in logs[1]] == [(line["kind"], line["step"]) for line in logs[0]]
    for line, other in zip(*logs, strict=True):
        for key in {"loss", "eval_loss", "temperature", "rougeL", "kl"} & line.keys():
            assert other[key] == pytest.approx(line[key], rel=1e-5), (line["kind"], line["step"], key)
    answers = [next((folder / name).glob("*.json")).read_text() for name in ("one-cache", "two-cache")]
    assert answers[0] == answers[1]
    weights = [load_file(folder / name / "final" / "model.safetensors") for name in ("one", "two")]
    assert difference(*weights) < 1e-5
    AutoModelForCausalLM.from_pretrained(folder / "two" / "final")


# ------------------------------------------------------------------------------------------------------ one process


def test_a_teacher_is_spread_over_several_processes_only():
    model = tiny_llama()
    with pytest.raises(UserError, match=r"teacher.placement: sharded, but there is one process.*accelerate launch"):
        shard_teacher(model, "cpu")
    with pytest.raises(UserError, match="one process"):
        check_can_shard(quantized=True)
    assert not is_sharded(model)


def test_packed_weights_are_not_split(tmp_path):
    values = {
        "student": {"model": "m"},
        "teacher": {"model": "t", "placement": "sharded", "quantization": "4bit"},
        "data": {"train": "rows.jsonl"},
        "output": {"dir": "run"},
    }
    with pytest.raises(UserError, match=r"placement is 'sharded' and quantization '4bit'.*'replicated'"):
        Recipe.from_dict(values, deep=False)
    values["teacher"]["placement"] = "replicated"
    assert Recipe.from_dict(values, deep=False).required_teacher.placement == "replicated"


def test_the_command_refuses_a_sharded_teacher_on_one_process(tmp_path, monkeypatch):
    """Before anything is read or loaded: neither the rows nor the models exist."""
    monkeypatch.chdir(tmp_path)
    values = {
        "student": {"model": "m"},
        "teacher": {"model": "t", "placement": "sharded"},
        "data": {"train": "rows.jsonl"},
        "training": {"use_cpu": True},
        "output": {"dir": "run"},
    }
    with pytest.raises(UserError, match="one process"):
        distill(Recipe.from_dict(values, deep=False))
    assert os.listdir(tmp_path) == []


def test_a_quantised_teacher_is_not_moved():
    """bitsandbytes has put it on its device, and its ``to`` raises; a teacher of torchao goes where the run is."""
    model = tiny_llama()
    model.is_quantized = True
    model.to = None
    place_teacher(model, "replicated", "cpu")
    moved: list[str] = []
    model.quantization_method, model.to = QuantizationMethod.TORCHAO, moved.append
    place_teacher(model, "replicated", "cpu")
    assert moved == ["cpu"]


def test_models_are_whole_while_zero3_arguments_are_alive(tmp_path, monkeypatch):
    """transformers looks at a global weak reference; inside ``unsharded_init`` there is none, and afterwards it is back."""
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self) -> bool:
            return True

    alive = Config()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: alive)
    assert deepspeed.is_deepspeed_zero3_enabled()
    with unsharded_init():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), unsharded_init():
        raise KeyError
    assert deepspeed.is_deepspeed_zero3_enabled()
