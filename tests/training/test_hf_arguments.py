"""The arguments of a trainer: as transformers' Trainer takes them, or refused by name."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from dts_hf.errors import UserError
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.recipe.schema import Data, Loss, Recipe, Teacher
from dts_hf.temperature import build_policy
from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, arguments, plain, trainer_for
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

# ------------------------------------------------------------------------------------------------- one table of defaults


def defaults() -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(DistillationTrainer.__init__).parameters.items()}


@pytest.mark.parametrize("section, names", [
    (Data, ["prompt_template", "train_on", "max_length", "max_prompt_length", "long_rows", "packing"]),
    (Loss, ["kd_ratio", "temperature_scaling", "logits_budget_mb", "kernels", "logits_dtype", "router_aux_loss"]),
    (Teacher, ["vocab_alignment"]),
])  # fmt: skip
def test_defaults_are_those_of_a_recipe(section: Any, names: list[str]) -> None:
    """differs: defaults are those of a recipe, not of the papers: one table for both"""
    for name in names:
        assert defaults()[name] == section.model_fields[name].default, name


def test_the_default_policy_divergence_and_placement_are_those_of_a_recipe() -> None:
    """differs: without a temperature the policy is DTS by the gap, as in a recipe"""
    of_recipe = Recipe.model_fields["temperature"].default.model_dump()
    ours, theirs = build_policy(defaults()["temperature"]), build_policy(of_recipe)
    assert ours.name == theirs.name == "dts" and ours.describe() == theirs.describe()
    assert defaults()["divergence"] == Loss.model_fields["divergence"].default.name
    assert defaults()["teacher_placement"] == Teacher.model_fields["placement"].default


def test_a_teacher_by_name_is_loaded_as_a_recipe_loads_it(tmp_path: Path) -> None:
    """works: models by name or folder; a teacher by name is in bfloat16, as in a recipe"""
    for role, seed in (("student", 0), ("teacher", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
    trainer = DistillationTrainer(
        str(tmp_path / "student"), str(tmp_path / "teacher"), args=arguments(tmp_path), train_dataset=ROWS
    )
    assert trainer.teacher.model.dtype == getattr(torch, Teacher.model_fields["dtype"].default) == torch.bfloat16
    assert trainer.model.dtype == torch.float32 and trainer.facts["teacher"] == str(tmp_path / "teacher")


# ---------------------------------------------------------------------------------------- left as they are, and mix-ups


@pytest.mark.parametrize("more", [
    {}, {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer(pad="own"))}, {"packing": True},
], ids=["plain", "collator", "packing"])  # fmt: skip
def test_the_arguments_of_the_caller_stay_as_they_are(tmp_path: Path, more: dict[str, Any]) -> None:
    """differs: the trainer works on a copy of args; the caller's are as they were after training"""
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, logging_steps=1)
    before = copy.deepcopy(args.to_dict())
    trainer = DistillationTrainer(
        tiny_llama(), tiny_llama(seed=1), args=args, train_dataset=plain(), processing_class=tiny_tokenizer(), **more
    )
    assert trainer.args is not args and trainer.args.to_dict() == before
    trainer.train()
    assert args.to_dict() == before and not hasattr(args, "distillation")


def test_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """works: no args at all: a run in runs/distillation"""
    monkeypatch.chdir(tmp_path)
    trainer = DistillationTrainer(tiny_llama(), tiny_llama(seed=1), train_dataset=ROWS,
                                  processing_class=tiny_tokenizer())  # fmt: skip
    assert Path(trainer.args.output_dir) == Path("runs/distillation")


STUDENT, TEACHER = tiny_llama(seed=0), tiny_llama(seed=1)
ARGS = TrainingArguments("nowhere", use_cpu=True, report_to="none")
MIX_UPS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "the order of Trainer": ((STUDENT, ARGS), {"train_dataset": ROWS}, "teacher: got TrainingArguments; here the second"),
    "the order of Trainer, teacher by name": ((STUDENT, ARGS), {"teacher": TEACHER}, "the second argument is the teacher"),
    "two teachers": ((STUDENT, TEACHER), {"teacher": TEACHER}, "teacher: got two, by its place and by its name"),
    "arguments first": ((ARGS, STUDENT), {}, "model: got TrainingArguments, expected the student"),
    "args by name as the teacher": ((STUDENT,), {"teacher": ARGS}, "teacher: got TrainingArguments"),
    "no teacher": ((STUDENT,), {"args": ARGS}, r"teacher: got None with kd_ratio 0\.5"),
    "no student": ((None, TEACHER), {"args": ARGS}, "model: got None, expected the student"),
    "args that are none": ((STUDENT, TEACHER), {"args": {"output_dir": "x"}}, "args: got dict, expected transformers"),
    "the same object": ((STUDENT, STUDENT), {"args": ARGS, "processing_class": tiny_tokenizer()}, "is the same object"),
    "no tokenizer": ((STUDENT, TEACHER), {"args": ARGS}, "processing_class: got None, expected the student's"),
    "a path to nothing": (
        (STUDENT, "/no/such/folder"), {"args": ARGS, "processing_class": tiny_tokenizer()},
        "teacher: cannot load '/no/such/folder': expected a folder made by save_pretrained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIX_UPS)
def test_models_and_arguments_in_each_others_places(case: str) -> None:
    """refused: DistillationTrainer(model, args) in Trainer's order, two teachers, none, or what is no model"""
    positional, named, says = MIX_UPS[case]
    with pytest.raises(UserError, match=says):
        DistillationTrainer(*positional, **named)


TYPOS = {
    "kd_ration": "Did you mean 'kd_ratio'",
    "temprature": "Did you mean 'temperature'",
    "eval_datasets": "Did you mean 'eval_dataset'",
    "tokenizer": "expected processing_class",
    "teacher_model": "expected teacher",
    "alpha": "expected kd_ratio",
    "learning_rate": r"expected it in args=TrainingArguments\(learning_rate=...\)",
    "max_seq_length": "expected max_length",
    "qqqqqqqqqq": "See its documentation",
}


@pytest.mark.parametrize("name", TYPOS)
def test_a_mistyped_keyword(name: str) -> None:
    """refused: an unknown keyword, with the nearest right word, before anything is loaded"""
    with pytest.raises(UserError, match=f"^{name}: no argument of th.*{TYPOS[name]}"):
        DistillationTrainer(STUDENT, TEACHER, args=ARGS, **{name: 1})


def test_every_argument_of_the_trainer_is_known() -> None:
    """works: every argument of transformers.Trainer is taken, or refused by a message of its own"""
    from dts_hf.training.arguments import PASSED_ON

    assert {*inspect.signature(Trainer.__init__).parameters} - {"self"} <= PASSED_ON
    parameters = inspect.signature(DistillationTrainer).parameters
    assert [*parameters][:2] == ["model", "teacher"] and "kwargs" in parameters  # what help() and editors show


def test_a_student_larger_than_its_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """works: student and teacher that were swapped train, with a warning"""
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path, tiny_llama(layers=3), tiny_llama(seed=1, layers=1))
    assert "parameters and the teacher 19,552: are they in each other's places?" in caplog.text
    caplog.clear()
    trainer_for(tmp_path, tiny_llama(layers=1), tiny_llama(seed=1, layers=3))
    assert "places?" not in caplog.text


# --------------------------------------------------------------------------------------- what would have no effect


@pytest.mark.parametrize("name", ["compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_of_logits(tmp_path: Path, name: str) -> None:
    """refused: compute_loss_func and preprocess_logits_for_metrics: there are no logits"""
    with pytest.raises(UserError, match=f"{name}: the loss needs no logits"):
        trainer_for(tmp_path, **{name: lambda *_: {}})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, r"args.label_smoothing_factor: got 0\.1, expected 0"),
    "split batches": ({"accelerator_config": {"split_batches": True}}, "got split_batches: True, expected split_batches"),
    "even batches": ({"accelerator_config": {"even_batches": False}}, "got even_batches: False, expected even_batches"),
    "no held-out rows": ({"eval_strategy": "steps"}, "you didn't pass an `eval_dataset`"),
    "best without a metric": ({"save_strategy": "best"}, "metric_for_best_model"),
    "an optimizer that is not installed": ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "galore"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_training_arguments_that_cannot_be_honoured(tmp_path: Path, case: str) -> None:
    """refused: label smoothing, split_batches, even_batches, and what transformers itself refuses, as a UserError"""
    options, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        trainer_for(tmp_path, options=options).train()


def test_arguments_of_other_libraries(tmp_path: Path) -> None:
    """refused: TRL's configurations, whose temperature, beta or lmbda would have no effect"""
    from dataclasses import dataclass

    @dataclass
    class SFTLike(TrainingArguments):
        max_length: int = 100

    with pytest.raises(UserError, match="args: SFTLike has max_length, which would have no effect"):
        DistillationTrainer(STUDENT, TEACHER, args=SFTLike(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("option", [{"generation_max_length": 9}, {"generation_num_beams": 2}], ids=str)
def test_arguments_of_seq2seq(tmp_path: Path, option: dict[str, Any]) -> None:
    """refused: generation_max_length and generation_num_beams of Seq2SeqTrainingArguments: give generation={...}"""
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **option)
    with pytest.raises(UserError, match=rf"args\.{next(iter(option))}: got"):
        DistillationTrainer(STUDENT, TEACHER, args=args, processing_class=tiny_tokenizer())


# ------------------------------------------------------------------------------------------------- models that do not fit


def encoder_decoder(kind: str) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    small = {"d_model": 16, "vocab_size": 320, "decoder_start_token_id": 0}
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(d_ff=16, d_kv=8, num_heads=2, num_layers=1, **small))
    return BartForConditionalGeneration(
        BartConfig(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, **small)
    )


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models(tmp_path: Path, kind: str, role: str) -> None:
    """refused: T5 and BART: they are no causal language models"""
    models = {"model": tiny_llama(), "teacher": tiny_llama(seed=1)}
    models["model" if role == "student" else "teacher"] = encoder_decoder(kind)
    with pytest.raises(UserError, match=rf"{role}: .* is an encoder-decoder model"):
        trainer_for(tmp_path, **models)


def test_llama_4(tmp_path: Path) -> None:
    """works: Llama4ForCausalLM, which names a prefix that it does not have"""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, pad_token_id=2, eos_token_id=2,
    )  # fmt: skip
    trainer = trainer_for(tmp_path, Llama4ForCausalLM(config))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_student_that_is_an_adapter_on_its_teacher(tmp_path: Path) -> None:
    """refused: an adapter on the teacher's own weights: training would change the teacher"""
    teacher = tiny_llama(seed=1)
    student = peft.get_peft_model(teacher, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"teacher: shares .* weights with the student"):
        trainer_for(tmp_path, student, teacher)


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    """works: a tokenizer without a padding token, given as an object"""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    trainer_for(tmp_path, processing_class=tokenizer).train()
    assert tokenizer.pad_token_id is None  # it is the caller's


# ---------------------------------------------------------------------------------------------------- peft_config


LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(**LORA),
    "lora without a task": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_by_its_configuration(tmp_path: Path, kind: str) -> None:
    """works: peft_config=: LoRA, rsLoRA, DoRA, IA3, LoHa; the base stays as it is"""
    trainer = trainer_for(tmp_path, peft_config=copy.deepcopy(ADAPTERS[kind]), options={"learning_rate": 0.1})
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert moved and moved <= trained and len(trained) < len(before)


def test_an_adapter_that_peft_has_put_on(tmp_path: Path) -> None:
    """works: a model that is wrapped already is the same as peft_config="""
    torch.manual_seed(3)
    wrapped = trainer_for(tmp_path, peft.get_peft_model(tiny_llama(seed=0), peft.LoraConfig(**LORA)))
    torch.manual_seed(3)
    configured = trainer_for(tmp_path, peft_config=peft.LoraConfig(**LORA))
    assert wrapped.model.state_dict().keys() == configured.model.state_dict().keys()
    wrapped.train()
    configured.train()
    for name, value in wrapped.model.state_dict().items():
        assert torch.equal(value, configured.model.state_dict()[name]), name


def test_gpt2_with_an_adapter_trains_with_recomputed_activations(tmp_path: Path) -> None:
    """works: peft_config with gradient checkpointing"""
    trainer = trainer_for(
        tmp_path, tiny_gpt2(seed=0), tiny_gpt2(seed=1), peft_config=peft.LoraConfig(**LORA),
        options={"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def wrapped_student() -> nn.Module:
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**LORA))  # type: ignore[no-any-return]


WRONG_ADAPTERS: dict[str, tuple[Any, Any, str]] = {
    "prompt tuning": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), None, "PROMPT_TUNING, which puts virtual"
    ),
    "prefix tuning": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), None, "PREFIX_TUNING, which puts virtual"
    ),
    "lm_head adapter": (peft.LoraConfig(r=2, target_modules=["lm_head"]), None, "LORA sits on the output layer"),
    "lm_head trained as a whole": (
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), None, "leave lm_head out of"
    ),
    "a layer that is not there": (peft.LoraConfig(r=2, target_modules=["c_attn"]), None, "LORA does not fit the model"),
    "another task": (peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"), None, "task_type is 'SEQ_CLS'"),
    "no configuration": ({"r": 2}, None, r"peft_config: got dict, expected one of peft's, as in peft\.LoraConfig"),
    "together with an adapter": (peft.LoraConfig(**LORA), wrapped_student, "the model has an adapter already"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_adapters_that_cannot_be_distilled(tmp_path: Path, case: str) -> None:
    """refused: peft_config of prompt learning, on lm_head, for another task, or on a model that has an adapter"""
    config, make, says = WRONG_ADAPTERS[case]
    with pytest.raises(UserError, match=f"peft_config: .*{says}" if not says.startswith("peft") else says):
        trainer_for(tmp_path, make() if make else None, peft_config=config)


def test_prompt_tuning_that_peft_has_put_on(tmp_path: Path) -> None:
    """refused: a student that peft has given virtual tokens"""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="adapter for prompt tuning, which puts virtual tokens"):
        trainer_for(tmp_path, peft.get_peft_model(tiny_llama(), config))


# ---------------------------------------------------------------------------------------------------- of other rooms


@pytest.mark.parametrize("spec", [2.0, 2, "dts", {"name": "cosine"}], ids=str)
def test_the_loss_takes_what_the_trainer_takes(spec: Any) -> None:
    """works: a temperature as a number, a name or a mapping, in the trainer and in DistillationLoss"""
    loss = DistillationLoss(temperature=spec)
    assert loss.temperature.describe() == build_policy(spec).describe()


def test_an_unknown_dtype_of_an_evaluation() -> None:
    """refused: EvaluationOptions(dtype="bfloat") with the nearest right word"""
    with pytest.raises(UserError, match=r"dtype: got 'bfloat', expected one of .* Did you mean 'bfloat16'"):
        EvaluationOptions(dtype="bfloat")
    assert EvaluationOptions(dtype="bfloat16").dtype == "bfloat16" and EvaluationOptions().dtype is None
