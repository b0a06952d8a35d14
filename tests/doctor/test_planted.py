"""Each planted fault is found under its code, and nothing else is hurt by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import dts_hf.doctor.walk as doctor_walk
from dts_hf.data.collators import PaddedCollator
from dts_hf.doctor import resources
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.runs import memory
from tests.support.examined import (
    own_student,
    problems,
    recipe,
    rows_between,
    save_model,
    texts,
    write_rows,
)
from tests.support.recorded import record
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer


def added_token_without_resize() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained("teacher")
    return {}


def wrong_tokenizer() -> dict[str, Any]:
    text = tiny_tokenizer().backend_tokenizer.to_str()
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    by_id = {index: token for token, index in vocab.items()}
    vocab[by_id[300]], vocab[by_id[310]] = 310, 300
    student = own_student()
    Path("student/tokenizer.json").write_text(json.dumps(swapped))
    return {"student": student}


def swapped_special_tokens() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    return {"student": own_student(tokenizer)}


def special_tokens_swapped_in_the_only_tokenizer() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    tokenizer.save_pretrained("teacher")
    return {}


def other_end_token() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    return {"student": own_student(tokenizer), "data": {"prompt_template": "plain"}}


def end_token_that_the_model_does_not_stop_at() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained("teacher")
    return {"data": {"prompt_template": "plain"}}


def end_token_written_into_the_rows() -> dict[str, Any]:
    rows = rows_between(0, 24)
    write_rows(Path("train.jsonl"), [{**row, "output": "Well,<|im_end|>" + row["output"]} for row in rows])
    return {}


def beginning_written_twice() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<|endoftext|><|endoftext|>" + CHAT_TEMPLATE
    tokenizer.save_pretrained("teacher")
    return {}


def many_rows_cut() -> dict[str, Any]:
    rows = rows_between(0, 24)
    long = [{**row, "output": "plums " * 60} if i % 4 == 0 else row for i, row in enumerate(rows)]
    write_rows(Path("train.jsonl"), long)
    return {"data": {"long_rows": "cut"}}


def every_row_cut() -> dict[str, Any]:
    rows = [{**row, "output": "apples and pears and plums and more of them"} for row in rows_between(0, 24)]
    write_rows(Path("train.jsonl"), rows)
    return {"data": {"max_length": 44, "max_prompt_length": 40, "long_rows": "cut"}}


def many_rows_dropped() -> dict[str, Any]:
    rows = rows_between(0, 24)
    write_rows(
        Path("train.jsonl"), [{**row, "output": "plums " * 60} if i % 4 == 0 else row for i, row in enumerate(rows)]
    )
    return {}


def validation_rows_in_training() -> dict[str, Any]:
    write_rows(Path("valid.jsonl"), rows_between(3, 8))
    return {}


def broken_row() -> dict[str, Any]:
    with open("train.jsonl", "a") as file:
        file.write('{"instruction": "no answer"}\n')
    return {}


def other_chat_template() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['role']", "message['role'] | upper")
    return {"student": own_student(tokenizer)}


def template_that_ends_no_turn() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    tokenizer.save_pretrained("teacher")
    return {}


def template_that_ignores_the_system() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    tokenizer.save_pretrained("teacher")
    rows = rows_between(0, 24)
    write_rows(Path("train.jsonl"), [{"id": row["id"], "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["output"]}]} for row in rows])  # fmt: skip
    return {}


def template_that_marks_the_user() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ '<|im_start|>' +", "{% generation %}{{ '<|im_start|>' +").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}")  # fmt: skip
    tokenizer.save_pretrained("teacher")
    rows = rows_between(0, 24)
    write_rows(Path("train.jsonl"), [{"id": row["id"], "messages": [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["output"]}]} for row in rows])  # fmt: skip
    return {}


def template_without_generation_prompt() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
    tokenizer.save_pretrained("teacher")
    return {}


def teacher_that_is_not_there() -> dict[str, Any]:
    Path("teacher/model.safetensors").unlink()
    return {}


def broken_weights() -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained("teacher")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("teacher")
    return {}


def untrained_teacher() -> dict[str, Any]:
    save_model("teacher", 0)
    return {}


def teacher_worse_than_the_student() -> dict[str, Any]:
    save_model("poor", 12)
    return {"student": {"model": "teacher"}, "teacher": {"model": "poor"}}


def teacher_for_nothing() -> dict[str, Any]:
    save_model("poor", 12)
    return {"student": {"model": "poor"}, "loss": {"kd_ratio": 0.0}}


def too_few_positions() -> dict[str, Any]:
    save_model("teacher", 60, max_positions=72)
    return {"evaluation": {"max_new_tokens": 64}}


def run_directory_in_use() -> dict[str, Any]:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("of another run")
    return {}


def padding_masked_by_id(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def by_id(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        batch["labels"][batch["input_ids"] == self.pad_token_id] = -100
        return batch

    monkeypatch.setattr(PaddedCollator, "__call__", by_id)
    return {}


def prompt_not_masked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def unmasked(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    monkeypatch.setattr(PaddedCollator, "__call__", unmasked)
    return {}


def beginning_of_the_answer_masked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = PaddedCollator.__call__

    def shifted(self: PaddedCollator, examples: Any) -> dict[str, torch.Tensor]:
        batch = right(self, examples)
        first = (batch["labels"] != -100).int().argmax(dim=1)
        batch["labels"][torch.arange(len(first)), first] = -100
        return batch

    monkeypatch.setattr(PaddedCollator, "__call__", shifted)
    return {}


def unknown_head(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = right(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    return {"student": own_student()}


def estimate_far_too_low(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    read = memory.PeakMemory.read
    monkeypatch.setattr(memory.PeakMemory, "read", lambda self: (read(self) or 0) + 300_000_000)
    return {}


def too_little_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=320, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    Path("teacher/model.safetensors").unlink()  # nobody may try to load it
    config.save_pretrained("teacher")
    real = memory.device_of
    monkeypatch.setattr(doctor_walk, "device_of", lambda args: {**real(args), "memory": 24e9})
    return {}


def disk_full(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage)
    return {}


Sections = dict[str, Any]
#: What is planted: (check, code and level under which it is found, sections of the recipe or what makes them in the folder).
FAULTS: dict[str, tuple[str, str, str, Sections | Callable[[], Sections]]] = {
    "padded_vocabulary": ("vocabulary", "refused", "error", lambda: {"student": own_student(vocab=384)}),
    "added_token_without_resize": ("vocabulary", "token-without-row", "error", added_token_without_resize),
    "wrong_tokenizer": ("tokenizers", "tokenizers-differ", "error", wrong_tokenizer),
    "swapped_special_tokens": ("special-tokens", "special-tokens-swapped", "error", swapped_special_tokens),
    "special_tokens_swapped_in_the_only_tokenizer": (
        "special-tokens",
        "special-tokens-swapped",
        "error",
        special_tokens_swapped_in_the_only_tokenizer,
    ),
    "other_end_token": ("special-tokens", "end-tokens-differ", "warning", other_end_token),
    "end_token_that_the_model_does_not_stop_at": (
        "special-tokens",
        "end-token-unknown",
        "warning",
        end_token_that_the_model_does_not_stop_at,
    ),
    "end_token_written_into_the_rows": (
        "special-tokens",
        "special-token-in-answer",
        "warning",
        end_token_written_into_the_rows,
    ),
    "beginning_written_twice": ("special-tokens", "bos-doubled", "warning", beginning_written_twice),
    "many_rows_cut": ("data", "many-rows-cut", "warning", many_rows_cut),
    "every_row_cut": ("data", "every-row-cut", "error", every_row_cut),
    "every_row_dropped": ("data", "refused", "error", {"data": {"max_length": 12, "max_prompt_length": 10}}),
    "many_rows_dropped": ("data", "many-rows-dropped", "warning", many_rows_dropped),
    "validation_rows_in_training": ("rows", "leak", "warning", validation_rows_in_training),
    "broken_row": ("rows", "refused", "error", broken_row),
    "other_chat_template": ("template", "chat-templates-differ", "warning", other_chat_template),
    "template_that_ends_no_turn": ("template", "chat-template-no-end", "warning", template_that_ends_no_turn),
    "template_that_ignores_the_system": (
        "template",
        "chat-template-ignores",
        "warning",
        template_that_ignores_the_system,
    ),
    "template_that_marks_the_user": ("data", "refused", "error", template_that_marks_the_user),
    "template_without_generation_prompt": (
        "template",
        "chat-template-prompt",
        "warning",
        template_without_generation_prompt,
    ),
    "chat_template_unused": (
        "cross-entropy",
        "chat-template-unused",
        "warning",
        {"data": {"prompt_template": "plain"}},
    ),
    "teacher_that_is_not_there": ("teacher", "refused", "error", teacher_that_is_not_there),
    "broken_weights": ("teacher", "weights-not-finite", "error", broken_weights),
    "untrained_teacher": ("cross-entropy", "teacher-untrained", "error", untrained_teacher),
    "teacher_worse_than_the_student": ("cross-entropy", "teacher-worse", "warning", teacher_worse_than_the_student),
    "student_is_the_teacher": ("effect", "kd-gradient-zero", "error", {"student": {"model": "teacher"}}),
    "temperature_without_effect": (
        "effect",
        "temperature-without-effect",
        "error",
        {"loss": {"divergence": "logit_mse"}},
    ),
    "teacher_for_nothing": ("effect", "teacher-without-effect", "warning", teacher_for_nothing),
    "temperature_far_too_high": (
        "effect",
        "kd-hardly-counts",
        "warning",
        {"temperature": {"name": "constant", "value": 30.0}, "loss": {"temperature_scaling": "none"}},
    ),
    "schedule_without_a_range": (
        "temperature",
        "temperature-never-moves",
        "warning",
        {"temperature": {"name": "dts", "rule": "gap", "t_init": 2.0, "t_min": 2.0, "t_max": 2.0}},
    ),
    "rule_that_cannot_fire": (
        "temperature",
        "gap-without-effect",
        "warning",
        {"temperature": {"name": "dts", "rule": "paper"}},
    ),
    "supports_that_this_teacher_does_not_have": (
        "temperature",
        "refused",
        "error",
        {"temperature": {"name": "dts", "range": "auto", "support_max": 80.0, "support_min": 1.0}},
    ),
    "more_tokens_on_offer_than_there_are": (
        "labels",
        "refused",
        "error",
        {"temperature": {"name": "dts", "range": "auto", "support_max": 1e5}},
    ),
    "no_such_run_to_replay": ("recipe", "refused", "error", {"temperature": {"name": "replay", "run": "runs/none"}}),
    "a_run_of_another_length_to_replay": (
        "temperature",
        "refused",
        "error",
        lambda: {
            "temperature": {"name": "dts", "gap_source": {"replay": record(Path("run_of_6"), {"gap": [1.0] * 6})}}
        },
    ),
    "too_few_positions": ("positions", "refused", "error", too_few_positions),
    "learning_rate_that_explodes": (
        "steps",
        "step-not-finite",
        "error",
        {"training": {"learning_rate": 1000, "weight_decay": 1000}},
    ),
    "learning_rate_of_five": ("training", "learning-rate-too-high", "warning", {"training": {"learning_rate": 5.0}}),
    "learning_rate_of_five_for_sgd": (
        "training",
        "learning-rate-too-high",
        "warning",
        {"training": {"learning_rate": 5.0, "optim": "sgd"}},
    ),
    "learning_rate_of_one_tenth": ("steps", "loss-explodes", "warning", {"training": {"learning_rate": 0.1}}),
    "student_that_pruning_destroyed": (
        "cross-entropy",
        "student-worse-than-guessing",
        "warning",
        {"student": {"init": {"from": "teacher", "layers": [2, 3]}}},
    ),
    "student_with_random_weights_and_no_teacher": (
        "cross-entropy",
        "student-worse-than-guessing",
        "warning",
        lambda: {"student": own_student(), "teacher": None, "loss": {"kd_ratio": 0.0}},
    ),
    "learning_rate_without_effect": ("steps", "weights-do-not-move", "error", {"training": {"learning_rate": 1e-30}}),
    "steps_rounded_away": (
        "student",
        "steps-too-small",
        "warning",
        {
            "student": {"init": {"from": "teacher", "layers": 2}, "dtype": "bfloat16"},
            "training": {"learning_rate": 1e-5},
        },
    ),
    "warmup_that_never_ends": ("training", "warmup-too-long", "warning", {"training": {"warmup_steps": 40}}),
    "arguments_that_contradict": (
        "training",
        "refused",
        "error",
        {"training": {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}},
    ),
    "run_directory_in_use": ("output", "output-not-empty", "warning", run_directory_in_use),
    "upload_without_a_hub": ("hub", "hub-not-checked", "warning", {"training": {"push_to_hub": True}}),
    "misspelt_key": ("recipe", "refused", "error", {"loss": {"kd_rate": 0.5}}),
}
#: What is planted in the package itself, for the length of a test.
PATCHES: dict[str, tuple[str, str, str, Callable[[pytest.MonkeyPatch], Sections]]] = {
    "padding_masked_by_id": ("labels", "end-token-masked", "error", padding_masked_by_id),
    "prompt_not_masked": ("labels", "prompt-learned", "error", prompt_not_masked),
    "beginning_of_the_answer_masked": ("labels", "answer-masked", "error", beginning_of_the_answer_masked),
    "unknown_head": ("teacher", "head", "error", unknown_head),
    "estimate_far_too_low": ("steps", "memory-above-estimate", "warning", estimate_far_too_low),
    "too_little_memory": ("memory", "too-little-memory", "error", too_little_memory),
    "disk_full": ("output", "disk-full", "error", disk_full),
}


def plant(name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe with this fault."""
    if name in PATCHES:
        return recipe(**PATCHES[name][3](monkeypatch))
    sections = FAULTS[name][3]
    return recipe(**(sections() if callable(sections) else sections))


@pytest.mark.parametrize("name", [*FAULTS, *PATCHES])
def test_planted_fault_is_found(workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check, code, level = (FAULTS.get(name) or PATCHES[name])[:3]
    diagnosis = diagnose(plant(name, monkeypatch))
    found = {problem.code: problem.level for problem in diagnosis[check].problems}
    assert found.get(code) == level, f"{check}: {diagnosis[check].summary}\n{texts(diagnosis)}"
    assert diagnosis.status == ("error" if "error" in problems(diagnosis).values() else "warning")
    assert not [problem for problem in diagnosis.problems if problem.code == "failed"], texts(diagnosis)


def test_a_missing_run_is_said_once(workplace: Path) -> None:
    """The recipe, the effect test, the schedule and the three steps all need it."""
    diagnosis = diagnose(recipe(temperature={"name": "replay", "run": "runs/none"}))
    assert [problem.code for problem in diagnosis.problems] == ["refused"], texts(diagnosis)
    assert diagnosis["effect"].skipped == diagnosis["steps"].skipped == "not checked: see 'recipe'"


def test_a_fault_hides_no_other(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("teacher/model.safetensors").unlink()
    write_rows(Path("valid.jsonl"), rows_between(3, 8))
    diagnosis = diagnose(recipe(training={"warmup_steps": 50}))
    assert set(problems(diagnosis)) == {"refused", "leak", "warmup-too-long"}, texts(diagnosis)
    skipped = {check.name for check in diagnosis.checks if check.status == "skipped"}
    assert {"student", "cross-entropy", "effect", "steps"} <= skipped
    assert diagnosis["data"].status == diagnosis["template"].status == diagnosis["memory"].status == "ok"


@pytest.mark.parametrize("name", ["padded_vocabulary", "wrong_tokenizer", "teacher_that_is_not_there"])
def test_labels_are_shown_without_models_that_fit(workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    diagnosis = diagnose(plant(name, monkeypatch))
    assert [problem.level for problem in diagnosis.problems].count("error") == 1, texts(diagnosis)
    assert diagnosis["labels"].status == "ok" and len(diagnosis.picture) == 2
    assert diagnosis["steps"].status == "skipped"


def test_broken_rows_leave_the_models_checked(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(plant("broken_row", monkeypatch))
    assert diagnosis["rows"].status == "error" and "line 25" in diagnosis["rows"].problems[0].text
    for name in ("tokenizers", "teacher", "student", "vocabulary", "special-tokens"):
        assert diagnosis[name].status == "ok", name


def test_too_big_models_are_not_loaded(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(plant("too_little_memory", monkeypatch), devices=64)
    assert diagnosis["teacher"].status == diagnosis["student"].status == "skipped"
    assert diagnosis.memory[0]["devices"] == 64 and not diagnosis.memory[0]["fits"]
    assert diagnosis["memory"].status == "warning"  # 64 devices are enough for zero3 with a sharded teacher
    advice = diagnosis["memory"].problems[0].advice
    assert "accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 64" in advice
    assert "teacher.placement=sharded" in advice


def test_of_several_processes_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        diagnose("recipe.yaml")
