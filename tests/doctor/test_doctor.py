"""``dts-hf doctor``: a clean recipe is clean, each planted fault is found under its code, and nothing else is hurt by it."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

import dts_hf.doctor.resources as resources
import dts_hf.doctor.walk as doctor_walk
import dts_hf.runs.machine as machine
from dts_hf.cli import app as cli
from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import encode_rows
from dts_hf.data.prompt_templates import get_template
from dts_hf.data.sources import rows_from_dataset
from dts_hf.divergences import DIVERGENCES
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.effect import Sample, check_effect, check_schedule, gradient
from dts_hf.doctor.report import screen
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature, temperature_policies
from tests.support.recorded import a_run, options_of, record
from tests.support.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

INSTRUCTIONS = ["Name a fruit", "Say yes", "Count to three", "Name a colour", "Say no", "Write a word"]
ANSWERS = ["apples and pears", "yes", "one two three", "the boat is white", "no", "lake"]


def rows_between(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"id": f"row-{i}", "instruction": f"{INSTRUCTIONS[i % 6]} {i}", "input": "", "output": ANSWERS[i % 6]}
        for i in range(start, stop)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def trained(steps: int, layers: int = 4) -> dict[str, torch.Tensor]:
    """Weights of a tiny model that knows the rows, the better the more steps."""
    model = tiny_llama(layers=layers, seed=3)
    tokenizer = tiny_tokenizer()
    template = get_template("chat")
    data, _ = encode_rows(
        rows_from_dataset(rows_between(0, 24)), tokenizer, template, max_length=96, max_prompt_length=64
    )
    batch = PaddedCollator(2)([data[index] for index in range(len(data))])
    batch.pop("row_id")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def save_model(folder: str, steps: int, layers: int = 4, **options: Any) -> None:
    model = tiny_llama(layers=layers, seed=3, **options)
    model.load_state_dict(trained(steps, layers))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(str(folder / "teacher"), 60)
    return folder


@pytest.fixture()
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(models / "teacher", "teacher")
    write_rows(Path("train.jsonl"), rows_between(0, 24))
    write_rows(Path("valid.jsonl"), rows_between(50, 55))
    return tmp_path


def recipe(**sections: Any) -> Path:
    """A clean recipe, changed section by section, as a file."""
    values: dict[str, Any] = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "chat", "max_length": 96,
                 "max_prompt_length": 64},
        "temperature": {"name": "dts", "rule": "gap"},
        "training": {"use_cpu": True, "max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"max_new_tokens": 8},
        "output": {"dir": "run"},
    }  # fmt: skip
    for name, section in sections.items():
        whole = section is None or name in ("student", "temperature")
        values[name] = section if whole else {**values.get(name, {}), **section}
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def problems(diagnosis: Diagnosis) -> dict[str, str]:
    return {problem.code: problem.level for problem in diagnosis.problems}


def texts(diagnosis: Diagnosis) -> str:
    return "\n".join(f"{problem.code}: {problem.text}" for problem in diagnosis.problems)


# ------------------------------------------------------------------------------------------------------ clean recipes


def test_a_clean_recipe_is_clean(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    assert diagnosis.status == "ok", texts(diagnosis)
    assert all(check.status == "ok" and check.summary for check in diagnosis.checks)
    assert [check.name for check in diagnosis.checks] == [
        "recipe", "training", "rows", "tokenizers", "data", "template", "memory", "teacher", "student",
        "special-tokens", "vocabulary", "positions", "labels", "cross-entropy", "effect", "temperature", "steps", "output",
    ]  # fmt: skip
    found = diagnosis["cross-entropy"].values
    assert found["teacher_ce"] < found["student_ce"] < 2 * found["guess"]
    steps = diagnosis["steps"].values
    assert steps["steps"] == 3 and steps["steps_of_run"] == 40 and steps["tensors_moved"] > 0
    assert len(steps["seconds"]) == len(steps["tokens"]) == 3 and steps["peak_bytes"] > 0


CLEAN: dict[str, dict[str, Any]] = {
    "packed": {"data": {"packing": True}},
    "lora": {"student": {"model": "poor", "lora": {"r": 2}}},
    "labels alone": {"student": {"model": "teacher"}, "teacher": None, "loss": {"kd_ratio": 0.0}},
    "accumulated": {"training": {"gradient_accumulation_steps": 2, "activation_checkpointing": True}},
    "epochs": {"training": {"max_steps": -1, "num_train_epochs": 2}},
    "seqkd": {"data": {"responses": "teacher", "teacher_max_new_tokens": 8}},
    "seqkd alone": {
        "student": {"model": "poor"},
        "data": {"responses": "teacher", "teacher_max_new_tokens": 8},
        "loss": {"kd_ratio": 0.0},
    },
    "first weights alone": {"loss": {"kd_ratio": 0.0}},
}
#: What a recipe without a word of the teacher's in its loss is not asked.
WITHOUT_KD = {"effect", "temperature"}


@pytest.mark.parametrize("name", CLEAN)
def test_other_clean_recipes_are_clean(workplace: Path, name: str) -> None:
    if CLEAN[name].get("student", {}).get("model") == "poor":
        save_model("poor", 12)
    diagnosis = diagnose(recipe(**CLEAN[name]))
    assert diagnosis.status == "ok", texts(diagnosis)
    alone = CLEAN[name].get("loss") == {"kd_ratio": 0.0}
    assert {check.name for check in diagnosis.checks if check.status == "skipped"} == (WITHOUT_KD if alone else set())


def test_steps_follow_the_real_schedule(workplace: Path) -> None:
    diagnosis = diagnose(recipe(training={"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}))
    assert diagnosis["steps"].values["steps_of_run"] == 9  # 24 rows, 4 x 2 a step, 3 epochs


def test_devices_and_dropped_rows_make_fewer_steps(workplace: Path) -> None:
    path = recipe(training={"max_steps": -1, "num_train_epochs": 3})
    steps = diagnose(path, devices=2)["steps"]
    assert steps.values["steps_of_run"] == 9 and steps.values["devices"] == 2  # 24 rows, 4 x 2 a step
    assert "9 steps on 2 devices" in steps.summary
    rows = [{**row, "output": "plums " * 60} if i % 2 else row for i, row in enumerate(rows_between(0, 24))]
    write_rows(Path("train.jsonl"), rows)
    assert diagnose(path)["steps"].values["steps_of_run"] == 9  # 12 rows are left


def test_the_time_of_a_step_leaves_warming_up_out(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 2 are made slow by a second each."""
    count, right = 0, DistillationLoss.forward

    def slow(self: DistillationLoss, states: torch.Tensor, *args: Any) -> Any:
        nonlocal count
        count += states.requires_grad and self.training
        if states.requires_grad and self.training and count <= 2:
            time.sleep(1.0)
        return right(self, states, *args)

    path = recipe()
    real = doctor_walk.check_steps

    def patched(*args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(DistillationLoss, "forward", slow)
            real(*args, **kwargs)

    monkeypatch.setattr(doctor_walk, "check_steps", patched)
    steps = diagnose(path)["steps"]
    assert min(steps.values["seconds"][:2]) >= 1.0, steps
    assert steps.values["seconds_per_step"] < 1.0 and "by the last of 3" in steps.summary


def test_nothing_is_written(workplace: Path) -> None:
    path = recipe(data={"responses": "teacher", "teacher_max_new_tokens": 8}, output={"dir": "deep/run"})
    before = sorted(str(file) for file in workplace.rglob("*"))
    diagnosis = diagnose(path)
    assert diagnosis["steps"].status == "ok", texts(diagnosis)
    assert sorted(str(file) for file in workplace.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------- planted faults

Plant = Callable[[pytest.MonkeyPatch], dict[str, Any]]
FAULTS: dict[str, tuple[Plant, str, str, str]] = {}


def fault(check: str, code: str, level: str = "error") -> Callable[[Plant], Plant]:
    """Plants a fault by changing the folder, and returns the sections of the recipe; it is to be found under ``code``."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (plant, check, code, level)
        return plant

    return register


def own_student(tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """A student of its own in the folder ``student``."""
    model = tiny_llama(layers=2, seed=5, **options)
    model.save_pretrained("student")
    (tokenizer or tiny_tokenizer()).save_pretrained("student")
    return {"model": "student"}


@fault("vocabulary", "refused")
def padded_vocabulary(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"student": own_student(vocab=384)}


@fault("vocabulary", "token-without-row")
def added_token_without_resize(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained("teacher")
    return {}


@fault("tokenizers", "tokenizers-differ")
def wrong_tokenizer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    text = tiny_tokenizer().backend_tokenizer.to_str()
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    by_id = {index: token for token, index in vocab.items()}
    vocab[by_id[300]], vocab[by_id[310]] = 310, 300
    student = own_student()
    Path("student/tokenizer.json").write_text(json.dumps(swapped))
    return {"student": student}


@fault("special-tokens", "special-tokens-swapped")
def swapped_special_tokens(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    return {"student": own_student(tokenizer)}


@fault("special-tokens", "special-tokens-swapped")
def special_tokens_swapped_in_the_only_tokenizer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    tokenizer.save_pretrained("teacher")
    return {}


@fault("special-tokens", "end-tokens-differ", "warning")
def other_end_token(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    return {"student": own_student(tokenizer)}


@fault("special-tokens", "end-token-unknown", "warning")
def end_token_that_the_model_does_not_stop_at(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained("teacher")
    return {}


@fault("special-tokens", "special-token-in-answer", "warning")
def end_token_written_into_the_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = rows_between(0, 24)
    write_rows(Path("train.jsonl"), [{**row, "output": row["output"] + "<|im_end|>"} for row in rows])
    return {}


@fault("special-tokens", "bos-doubled", "warning")
def beginning_written_twice(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<|endoftext|><|endoftext|>" + CHAT_TEMPLATE
    tokenizer.save_pretrained("teacher")
    return {}


@fault("labels", "end-token-masked")
def padding_masked_by_id(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def by_id(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        batch["labels"][batch["input_ids"] == self.pad_token_id] = -100
        return batch

    monkeypatch.setattr(PaddedCollator, "__call__", by_id)
    return {}


@fault("labels", "prompt-learned")
def prompt_not_masked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def unmasked(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    monkeypatch.setattr(PaddedCollator, "__call__", unmasked)
    return {}


@fault("labels", "answer-masked")
def beginning_of_the_answer_masked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def shifted(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        first = (batch["labels"] != -100).int().argmax(dim=1)
        batch["labels"][torch.arange(len(first)), first] = -100
        return batch

    monkeypatch.setattr(PaddedCollator, "__call__", shifted)
    return {}


@fault("data", "many-rows-cut", "warning")
def many_rows_cut(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = rows_between(0, 24)
    long = [{**row, "output": "plums " * 60} if i % 4 == 0 else row for i, row in enumerate(rows)]
    write_rows(Path("train.jsonl"), long)
    return {"data": {"long_rows": "cut"}}


@fault("data", "every-row-cut")
def every_row_cut(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = [{**row, "output": "apples and pears and plums and more of them"} for row in rows_between(0, 24)]
    write_rows(Path("train.jsonl"), rows)
    return {"data": {"max_length": 44, "max_prompt_length": 40, "long_rows": "cut"}}


@fault("data", "refused")
def every_row_dropped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"data": {"max_length": 12, "max_prompt_length": 10}}


@fault("data", "many-rows-dropped", "warning")
def many_rows_dropped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = rows_between(0, 24)
    write_rows(
        Path("train.jsonl"), [{**row, "output": "plums " * 60} if i % 4 == 0 else row for i, row in enumerate(rows)]
    )
    return {}


@fault("rows", "leak", "warning")
def validation_rows_in_training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    write_rows(Path("valid.jsonl"), rows_between(3, 8))
    return {}


@fault("rows", "refused")
def broken_row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with open("train.jsonl", "a") as file:
        file.write('{"instruction": "no answer"}\n')
    return {}


@fault("template", "chat-templates-differ", "warning")
def other_chat_template(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['role']", "message['role'] | upper")
    return {"student": own_student(tokenizer)}


@fault("template", "chat-template-end", "warning")
def template_that_ends_with_another_token(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|pad|>")
    tokenizer.save_pretrained("teacher")
    return {}


@fault("template", "chat-template-prompt", "warning")
def template_without_generation_prompt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
    tokenizer.save_pretrained("teacher")
    return {}


@fault("cross-entropy", "chat-template-unused", "warning")
def chat_template_unused(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"data": {"prompt_template": "plain"}}


@fault("teacher", "refused")
def teacher_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    Path("teacher/model.safetensors").unlink()
    return {}


@fault("teacher", "weights-not-finite")
def broken_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained("teacher")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("teacher")
    return {}


@fault("teacher", "head")
def unknown_head(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = right(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    return {"student": own_student()}


@fault("cross-entropy", "teacher-untrained")
def untrained_teacher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    save_model("teacher", 0)
    return {}


@fault("cross-entropy", "teacher-worse", "warning")
def teacher_worse_than_the_student(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    save_model("poor", 12)
    return {"student": {"model": "teacher"}, "teacher": {"model": "poor"}}


@fault("effect", "kd-gradient-zero")
def student_is_the_teacher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"student": {"model": "teacher"}}


@fault("effect", "temperature-without-effect")
def temperature_without_effect(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"loss": {"divergence": "logit_mse"}}


@fault("effect", "teacher-without-effect", "warning")
def teacher_for_nothing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    save_model("poor", 12)
    return {"student": {"model": "poor"}, "loss": {"kd_ratio": 0.0}}


@fault("effect", "kd-hardly-counts", "warning")
def temperature_far_too_high(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "constant", "value": 30.0}, "loss": {"temperature_scaling": "none"}}


@fault("temperature", "temperature-never-moves", "warning")
def schedule_without_a_range(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "dts", "rule": "gap", "t_init": 2.0, "t_min": 2.0, "t_max": 2.0}}


@fault("temperature", "gap-without-effect", "warning")
def rule_that_cannot_fire(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "dts", "rule": "paper"}}


@fault("temperature", "refused")
def supports_that_this_teacher_does_not_have(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "dts", "range": "auto", "support_max": 80.0, "support_min": 1.0}}


@fault("labels", "refused")
def more_tokens_on_offer_than_there_are(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "dts", "range": "auto", "support_max": 1e5}}


@fault("recipe", "refused")
def no_such_run_to_replay(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "replay", "run": "runs/none"}}


@fault("temperature", "refused")
def a_run_of_another_length_to_replay(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"temperature": {"name": "dts", "gap_source": {"replay": record(Path("run_of_6"), {"gap": [1.0] * 6})}}}


@fault("positions", "refused")
def too_few_positions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    save_model("teacher", 60, max_positions=72)
    return {"evaluation": {"max_new_tokens": 64}}


@fault("steps", "step-not-finite")
def learning_rate_that_explodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"learning_rate": 1e30}}


@fault("training", "learning-rate-too-high", "warning")
def learning_rate_of_five(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"learning_rate": 5.0}}


@fault("training", "learning-rate-too-high", "warning")
def learning_rate_of_five_for_sgd(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"learning_rate": 5.0, "optim": "sgd"}}


@fault("steps", "loss-explodes", "warning")
def learning_rate_of_one_tenth(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"learning_rate": 0.1}}


@fault("cross-entropy", "student-worse-than-guessing", "warning")
def student_that_pruning_destroyed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"student": {"init": {"from": "teacher", "layers": [2, 3]}}}


@fault("cross-entropy", "student-worse-than-guessing", "warning")
def student_with_random_weights_and_no_teacher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"student": own_student(), "teacher": None, "loss": {"kd_ratio": 0.0}}


@fault("steps", "memory-above-estimate", "warning")
def estimate_far_too_low(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    read = machine.PeakMemory.read
    monkeypatch.setattr(machine.PeakMemory, "read", lambda self: (read(self) or 0) + 300_000_000)
    return {}


@fault("steps", "weights-do-not-move")
def learning_rate_without_effect(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"learning_rate": 1e-30}}


@fault("student", "steps-too-small", "warning")
def steps_rounded_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {
        "student": {"init": {"from": "teacher", "layers": 2}, "dtype": "bfloat16"},
        "training": {"learning_rate": 1e-5},
    }


@fault("training", "warmup-too-long", "warning")
def warmup_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"warmup_steps": 40}}


@fault("training", "refused")
def arguments_that_contradict(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}}


@fault("memory", "too-little-memory")
def too_little_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=320, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    Path("teacher/model.safetensors").unlink()  # nobody may try to load it
    config.save_pretrained("teacher")
    real = machine.device_of
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**real(args), "memory": 24e9})
    return {}


@fault("output", "disk-full")
def disk_full(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage)
    return {}


@fault("output", "output-not-empty", "warning")
def run_directory_in_use(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("of another run")
    return {}


@fault("recipe", "refused")
def misspelt_key(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"loss": {"kd_rate": 0.5}}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plant, check, code, level = FAULTS[name]
    diagnosis = diagnose(recipe(**plant(monkeypatch)))
    found = {problem.code: problem.level for problem in diagnosis[check].problems}
    assert found.get(code) == level, f"{check}: {diagnosis[check].summary}\n{texts(diagnosis)}"
    assert diagnosis.status == ("error" if "error" in problems(diagnosis).values() else "warning")
    assert not [problem for problem in diagnosis.problems if problem.code == "failed"], texts(diagnosis)


def test_a_fault_hides_no_other(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("teacher/model.safetensors").unlink()
    write_rows(Path("valid.jsonl"), rows_between(3, 8))
    diagnosis = diagnose(recipe(training={"warmup_steps": 50}))
    assert set(problems(diagnosis)) == {"refused", "leak", "warmup-too-long"}, texts(diagnosis)
    skipped = {check.name for check in diagnosis.checks if check.status == "skipped"}
    assert {"student", "cross-entropy", "effect", "steps"} <= skipped
    assert diagnosis["data"].status == diagnosis["template"].status == diagnosis["memory"].status == "ok"


@pytest.mark.parametrize("plant", [padded_vocabulary, wrong_tokenizer, teacher_that_is_not_there])
def test_labels_are_shown_without_models_that_fit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    diagnosis = diagnose(recipe(**plant(monkeypatch)))
    assert [problem.level for problem in diagnosis.problems].count("error") == 1, texts(diagnosis)
    assert diagnosis["labels"].status == "ok" and len(diagnosis.picture) == 2
    assert diagnosis["steps"].status == "skipped"


def test_broken_rows_leave_the_models_checked(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_row(monkeypatch)
    diagnosis = diagnose(recipe())
    assert diagnosis["rows"].status == "error" and "line 25" in diagnosis["rows"].problems[0].text
    for name in ("tokenizers", "teacher", "student", "vocabulary", "special-tokens"):
        assert diagnosis[name].status == "ok", name


@pytest.mark.skipif(torch.accelerator.is_available(), reason="wants a machine that has only a CPU")
def test_a_recipe_for_a_gpu_is_examined_on_a_cpu(workplace: Path) -> None:
    diagnosis = diagnose(recipe(training={"use_cpu": False, "bf16": True}))
    assert [(check.name, check.status) for check in diagnosis.checks if check.status != "ok"] == [
        ("training", "error")
    ]
    assert "bf16" in diagnosis["training"].problems[0].text
    assert diagnosis["steps"].values["steps"] == 3


def test_memory_that_is_tight_is_a_warning(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    needed = diagnose(path)["memory"].values["needed"]
    real = machine.device_of
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**real(args), "memory": needed / 0.95})
    diagnosis = diagnose(path)
    assert [problem.code for problem in diagnosis["memory"].problems] == ["memory-tight"]
    assert diagnosis["teacher"].status == "ok"


def test_too_big_models_are_not_loaded(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(recipe(**too_little_memory(monkeypatch)), devices=64)
    assert diagnosis["teacher"].status == diagnosis["student"].status == "skipped"
    assert diagnosis.memory[0]["devices"] == 64 and not diagnosis.memory[0]["fits"]
    assert diagnosis["memory"].status == "warning"  # 64 devices are enough for zero3 with a sharded teacher
    advice = diagnosis["memory"].problems[0].advice
    assert "accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 64" in advice
    assert "teacher.placement=sharded" in advice


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_every_way_of_placing_the_teacher_is_in_the_table(workplace: Path, placement: str) -> None:
    diagnosis = diagnose(recipe(teacher={"placement": placement}), devices=8)
    listed = [(entry["strategy"], entry["placement"]) for entry in diagnosis.memory]
    assert listed[0] == ("ddp", placement)
    assert {("zero3", "sharded"), ("fsdp2", "sharded"), ("zero2", "replicated")} <= set(listed)
    assert len(listed) == len(set(listed))


def limited(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    real = machine.device_of
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**real(args), "memory": memory})


def test_what_needs_several_devices_is_examined_on_one(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch does not fit, zero3 does, and the models alone fit here: everything but the three steps is checked."""
    path = recipe(training={"per_device_train_batch_size": 1})
    table = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(path, devices=8).memory}
    divided, whole = table["zero3", "sharded"]["total"], table["ddp", "replicated"]
    loads = whole["student"] + whole["teacher"] + whole["loss"]
    room = max(1.2 * divided, 1.01 * loads)
    assert room < whole["total"], "the sizes of this test are wrong"
    limited(monkeypatch, room)
    diagnosis = diagnose(path, devices=8)
    assert problems(diagnosis) == {"too-little-memory": "warning"}, texts(diagnosis)
    assert diagnosis["effect"].status == diagnosis["cross-entropy"].status == diagnosis["labels"].status == "ok"
    assert "do not fit" in (diagnosis["steps"].skipped or "")
    # On a machine of one device the launch that is meant would fail, and the advice says what would not
    alone = diagnose(path)["memory"]
    assert alone.status == "error" and "zero3.yaml --num_processes 8" in alone.problems[0].advice


def test_autocast_counts_for_a_low_precision_student(workplace: Path) -> None:
    """accelerate holds fp32 weights under FSDP2 with bf16, whatever the type of the student's files."""
    path = recipe(student={"init": {"from": "teacher", "layers": 2}, "dtype": "bfloat16"}, training={"bf16": True})
    table = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(path, devices=8).memory}
    plain = recipe(training={"bf16": True})
    in_fp32 = {(entry["strategy"], entry["placement"]): entry for entry in diagnose(plain, devices=8).memory}
    assert table["fsdp2", "replicated"]["student"] == in_fp32["fsdp2", "replicated"]["student"]
    assert table["ddp", "replicated"]["student"] == in_fp32["ddp", "replicated"]["student"] / 2


def test_disk_of_weights_alone_and_of_the_largest_strategy(workplace: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    whole = diagnose(recipe(training=saving))["output"]
    weights = diagnose(recipe(training={**saving, "save_only_model": True}))["output"]
    student = (whole.values["needed"] - 3 * (whole.values["needed"] / 10)) / 7 * 10  # 3 x (1 + 2) + 1 students
    assert weights.values["needed"] == pytest.approx(0.4 * student, rel=0.01)  # 3 x 1 + 1
    assert "save_only_model" in weights.summary and "--resume" in weights.summary
    assert "--resume" not in whole.summary and weights.status == "ok"
    of_many = diagnose(recipe(training={**saving, "bf16": True}), devices=8)["output"]
    assert of_many.values["needed_at_most"] > 1.2 * of_many.values["needed"]
    assert f"under {of_many.values['at_most_with']}" in of_many.summary


def test_of_several_processes_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        diagnose("recipe.yaml")


# ------------------------------------------------------------------------------------------------------ the effect test


def a_sample(rows: int = 40, vocab: int = 50, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    states, teacher = (torch.randn(rows, 16, generator=generator) for _ in range(2))
    weights = [Head(torch.randn(vocab, 16, generator=generator)) for _ in range(2)]
    targets = (teacher @ weights[1].weight.T).argmax(-1)  # the teacher is the better one
    return Sample(states, weights[0], teacher, weights[1], targets, torch.arange(rows) // 5)


def dense_gradient(sample: Sample, kd_ratio: float, temperature: float) -> torch.Tensor:
    states = sample.student_states.double().requires_grad_()
    z = states @ sample.student_head.weight.double().T
    z_t = sample.teacher_states.double() @ sample.teacher_head.weight.double().T
    ce = torch.nn.functional.cross_entropy(z, sample.targets)
    p, q = (x / temperature for x in (z_t, z))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    loss = (1 - kd_ratio) * ce + kd_ratio * temperature**2 * kl
    return torch.autograd.grad(loss, states)[0]


def test_parts_of_the_gradient_are_those_of_a_dense_loss() -> None:
    sample = a_sample()
    loss = DistillationLoss(temperature=build_temperature("constant", value=3.0), kd_ratio=0.3)
    with Diagnosis("x").check("effect") as check:
        check_effect(check, loss, sample)
    whole, ce = dense_gradient(sample, 0.3, 3.0), 0.7 * dense_gradient(sample, 0.0, 3.0)
    kd, pull = whole - ce, dense_gradient(sample, 1.0, 3.0)
    assert torch.allclose(gradient(loss, sample).double(), whole, rtol=1e-4, atol=1e-7)
    values = check.values
    assert values["ce_norm"] == pytest.approx(float(ce.norm()), rel=1e-4)
    assert values["kd_norm"] == pytest.approx(float(kd.norm()), rel=1e-4)
    assert values["kd_share"] == pytest.approx(float(kd.norm() / (kd.norm() + ce.norm())), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(ce.flatten(), kd.flatten(), dim=0)
    assert values["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    change = (dense_gradient(sample, 1.0, 3.75) - pull).norm() / pull.norm()
    assert values["change"] == pytest.approx(float(change), rel=1e-4)
    assert not check.problems


@pytest.mark.parametrize("name", temperature_policies())
def test_every_policy_has_an_effect(name: str) -> None:
    options = options_of(name, 100)
    loss = DistillationLoss(temperature=build_temperature(name, **options), kd_ratio=0.5)
    diagnosis = Diagnosis("x")
    with diagnosis.check("effect") as check:
        check_effect(check, loss, a_sample())
    with diagnosis.check("temperature") as check:
        check_schedule(check, loss, a_sample(), 100)
    assert not diagnosis.problems, texts(diagnosis)
    state = loss.temperature.state()
    assert state == build_temperature(name, **options).state(), "the doctor changed the policy that trains"


def planted(teacher: torch.Tensor, student: torch.Tensor) -> Sample:
    """Rows whose logits are these."""
    head = Head(torch.eye(teacher.shape[-1]))
    return Sample(
        student, head, teacher, head, torch.zeros(len(teacher), dtype=torch.int64), torch.arange(len(teacher))
    )


def two_level(top: float, vocab: int, rows: int = 8) -> torch.Tensor:
    """One token at ``top``, the others at 0."""
    logits = torch.zeros(rows, vocab)
    logits[:, 0] = top
    return logits


def support(top: float, vocab: int, t: float) -> float:
    others = (vocab - 1) * math.exp(-top / t)
    return math.exp(math.log1p(others) + (top / t) * others / (1 + others))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"name": "dts"}, [3.0, 1.0]),
        ({"name": "dts", "t_init": 4.0, "t_min": 2.0}, [4.0, 2.0]),
        ({"name": "cosine", "t_init": 2.0}, [2.0, 1.0]),
        ({"name": "linear", "t_init": 1.0, "t_end": 2.0}, [1.0, 2.0]),
        ({"name": "constant", "value": 2.0, "teacher_value": 3.0}, [3.0]),
        ({"name": "replay"}, [4.0, 2.5 + 1.5 / 12]),
    ],
    ids=lambda value: value["name"] + str(len(value)) if isinstance(value, dict) else "",
)
def test_the_doctor_says_how_many_tokens_the_teacher_offers(options: dict[str, Any], ends: list[float]) -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    policy = build_temperature(**options, **options_of(options["name"]))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, DistillationLoss(temperature=policy), sample, 12)
    assert not check.problems, check.problems
    found = check.values["support"]
    assert [entry["temperature"] for entry in found] == pytest.approx(ends)
    for entry in found:
        expected = support(9.0, 1000, entry["temperature"])
        assert entry["support"] == pytest.approx(expected, rel=1e-3) and entry["of"] == 1000
        t, share = entry["temperature"], f"{expected / 10:.2g} %"
        assert re.search(rf"about [\d.]+ of 1,000 tokens at T = {t:.3g} \({re.escape(share)}\)", check.summary)


def test_the_doctor_shows_what_auto_solves_to() -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    loss = DistillationLoss(temperature=build_temperature("dts", range="auto", support_max=100, support_min=5))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, loss, sample, 100)
    assert not check.problems
    for entry, wanted in zip(check.values["support"], (100, 5), strict=True):
        assert entry["support"] == pytest.approx(wanted, rel=0.1)  # all rows melt at once: the hardest case
        assert support(9.0, 1000, entry["temperature"]) == pytest.approx(entry["support"], rel=1e-3)
    assert "about 110 of 1,000 tokens at T = 1.37 (11 %)" in check.summary
    assert loss.temperature.state()["solved_range"] == []  # that of the run is its own first step's


def test_the_gap_of_this_run_is_not_missed_where_another_ones_is_replayed() -> None:
    sample = planted(two_level(9.0, 1000), torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    policy = build_temperature("dts", gap_source={"replay": a_run(), "order": "permuted"}, momentum=0.5)
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, DistillationLoss(temperature=policy), sample, 12)
    assert not check.problems and "if the gap closes" not in check.summary


def test_a_task_offers_classes() -> None:
    sample = planted(two_level(2.0, 3), torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    loss = DistillationLoss(temperature=build_temperature("constant", value=1.0))
    with Diagnosis("x").check("temperature") as check:
        check_schedule(check, loss, sample, 10, classes="classes")
    assert f"about {support(2.0, 3, 1.0):.2g} of 3 classes at T = 1" in check.summary


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_gets_an_answer(name: str) -> None:
    loss = DistillationLoss(name, temperature=build_temperature("constant", value=2.0), kd_ratio=0.5)
    diagnosis = Diagnosis("x")
    with diagnosis.check("effect") as check:
        check_effect(check, loss, a_sample())
    expected = ["temperature-without-effect"] if name == "logit_mse" else []
    assert list(problems(diagnosis)) == expected


def test_a_loss_that_loses_its_teacher_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say a change of the loss drops the soft part: the trainer's own gradient is looked at, not a copy of the formula."""
    loss = DistillationLoss(temperature=build_temperature("constant", value=2.0), kd_ratio=0.5)
    right = DistillationLoss.forward

    def forgetful(self: DistillationLoss, *args: Any) -> Any:
        own = self.kd_ratio if self.temperature.kd_ratio is None else self.temperature.kd_ratio
        output = right(DistillationLoss(temperature=build_temperature("constant"), kd_ratio=0.0), *args)
        return (
            output._replace(loss=output.loss * (1 - own))
            if hasattr(output, "_replace")
            else type(output)(output.loss * (1 - own), output.sums)
        )

    monkeypatch.setattr(DistillationLoss, "forward", forgetful)
    with Diagnosis("x").check("effect") as check:
        check_effect(check, loss, a_sample())
    assert "kd-gradient-zero" in {problem.code for problem in check.problems}


# ---------------------------------------------------------------------------------------------------- screen and JSON


def shown(diagnosis: Diagnosis, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(screen(diagnosis))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_one_screen(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    text = shown(diagnosis, 120)
    assert len(text.splitlines()) <= 40
    assert "nothing wrong found" in text and "CE" in text and "zero3 x 8, teacher too" in text
    assert all(len(line) <= 80 for line in shown(diagnosis, 80).splitlines())
    # The picture has the row as the loss sees it
    for row in diagnosis.picture:
        kinds = [segment.kind for segment in row.segments]
        assert kinds[:3] == ["masked", "learned", "end"] and kinds[3:] in ([], ["padding"])
        assert row.segments[0].text.endswith("<|im_start|>assistant\n")
        assert row.segments[1].text in ANSWERS and row.segments[2].text == "<|im_end|>"


def test_colours_tell_what_is_learned(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    console = Console(
        width=120, file=io.StringIO(), force_terminal=True, color_system="standard", legacy_windows=False
    )
    console.print(screen(diagnosis))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    answer = diagnosis.picture[0].segments[1].text
    assert f"\x1b[32m{answer}" in text


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])


def test_command_line(workplace: Path) -> None:
    clean = invoke(recipe(), "--json")
    assert clean.exit_code == 0 and clean.stderr == ""
    found = json.loads(clean.stdout)
    assert found["status"] == "ok" and found["errors"] == found["warnings"] == 0 and found["format"] == 1
    assert {"name", "status", "summary", "problems", "values", "skipped", "seconds"} == set(found["checks"][0])
    warned = invoke(recipe(), "training.warmup_steps=40")
    assert warned.exit_code == 0 and "1 warning" in warned.stdout
    wrong = invoke(recipe(), "loss.divergence=logit_mse", "--json")
    assert wrong.exit_code == 1 and json.loads(wrong.stdout)["errors"] == 1
    misspelt = invoke(recipe(), "loss.kd_rate=1")
    assert misspelt.exit_code == 1 and "kd_rate" in misspelt.stdout


# ------------------------------------------------------------------------------------------------------ classification


def classifier(folder: str, *, swapped: bool = False) -> None:
    """A tiny classifier of 'good' and 'bad'."""
    config = AutoConfig.from_pretrained("teacher")
    config.num_labels = 2
    config.id2label = {0: "negative", 1: "positive"}
    config.label2id = {"negative": 0, "positive": 1}
    config.pad_token_id = 2
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    tokenizer = tiny_tokenizer()
    texts_and_labels = [(f"{word} boat {i}", label) for i in range(12) for label, word in enumerate(("bad", "good"))]
    batch = tokenizer([text for text, _ in texts_and_labels], return_tensors="pt", padding=True)
    labels = torch.tensor([label != swapped for _, label in texts_and_labels]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def task_recipe(**sections: Any) -> Path:
    rows = [
        {"id": str(2 * i + label), "sentence": f"{word} boat {i}", "label": label}
        for i in range(12)
        for label, word in enumerate(("bad", "good"))
    ]
    write_rows(Path("train.jsonl"), rows)
    write_rows(Path("valid.jsonl"), [{**row, "sentence": row["sentence"] + " more"} for row in rows])
    data = {"prompt_template": "alpaca", "max_length": 512, "max_prompt_length": 256, **sections.pop("data", {})}
    task = {"name": "glue", "subset": "sst2", "max_length": 32}
    return recipe(task=task, data=data, teacher={"model": "classifier"}, **sections)


def test_a_clean_task_is_clean(workplace: Path) -> None:
    classifier("classifier")
    diagnosis = diagnose(task_recipe())
    assert diagnosis.status == "ok", texts(diagnosis)
    assert diagnosis["cross-entropy"].values["teacher_accuracy"] > 0.9
    assert diagnosis["steps"].values["steps"] == 3
    assert {segment.text.strip() for row in diagnosis.picture for segment in row.segments[1:]} <= {
        "negative",
        "positive",
    }
    shown(diagnosis, 100)
    json.dumps(diagnosis.as_dict(), allow_nan=False)
    from_labels = diagnose(task_recipe(loss={"kd_ratio": 0.0}))  # the teacher gives the first weights
    assert from_labels.status == "ok" and from_labels["effect"].skipped, texts(from_labels)


def test_faults_of_a_task(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier("classifier", swapped=True)
    path = task_recipe()
    diagnosis = diagnose(path)
    found = problems(diagnosis)
    assert found["labels-swapped"] == "error" and not {"teacher-untrained", "teacher-worse"} & set(found), texts(
        diagnosis
    )
    one_class = [{"id": str(i), "sentence": f"good boat {i}", "label": 1} for i in range(24)]
    write_rows(Path("train.jsonl"), one_class)
    write_rows(Path("valid.jsonl"), one_class)
    found = problems(diagnose(path))
    assert found["class-missing"] == found["leak"] == "warning"
