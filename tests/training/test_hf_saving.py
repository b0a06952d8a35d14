"""What ``save_model`` and checkpoints hold, and how it comes back."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, trainer_for  # noqa: F401
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistillationTrainer]:
    """A trained student with a checkpoint, saved into ``saved``."""
    folder = tmp_path_factory.mktemp("saving")
    trainer = trainer_for(folder, options={"save_strategy": "steps", "save_steps": 1, "max_steps": 2})
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    yield trainer


@pytest.fixture
def saved(trained: DistillationTrainer) -> Path:
    return Path(str(trained.args.output_dir)) / "saved"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_the_files_of_save_model(saved: Path) -> None:
    """works: save_model writes safetensors, configuration, tokenizer, chat template and training_args.bin"""
    assert {path.name for path in saved.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "training_args.bin",
    }  # fmt: skip


@pytest.mark.parametrize("where", ["saved", "checkpoint-1", "checkpoint-2"])
def test_what_is_saved_can_generate(trained: DistillationTrainer, where: str) -> None:
    """differs: use_cache is true and the end tokens are there in what is saved, also in checkpoints (transformers: false)"""
    folder = Path(str(trained.args.output_dir)) / where
    assert read(folder / "config.json")["use_cache"] is True
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.use_cache and generation.eos_token_id == 2 and generation.pad_token_id == 2


def test_training_goes_on_as_it_was_after_a_checkpoint(tmp_path: Path) -> None:
    """works: saving in the middle of training leaves the model's configuration as training has it"""
    seen: list[Any] = []
    trainer = trainer_for(tmp_path, options={"save_strategy": "steps", "save_steps": 1, "max_steps": 2})
    save = trainer._save

    def save_and_look(*args: Any, **kwargs: Any) -> None:
        before = trainer.model.config.use_cache, trainer.model.generation_config.to_dict()
        save(*args, **kwargs)
        seen.append(before == (trainer.model.config.use_cache, trainer.model.generation_config.to_dict()))

    trainer._save = save_and_look  # type: ignore[method-assign]
    trainer.train()
    assert seen == [True, True] and trainer.model.config.use_cache is True


def test_an_end_token_that_the_model_does_not_know(tmp_path: Path) -> None:
    """works: the generation config has the end of turn of the tokenizer and that of the chat template"""
    student = tiny_llama(seed=0)
    student.generation_config.eos_token_id = student.config.eos_token_id = 0
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|im_end|>
    trainer = trainer_for(tmp_path, student, processing_class=tokenizer)
    trainer.save_model(str(tmp_path / "saved"))
    assert read(tmp_path / "saved" / "generation_config.json")["eos_token_id"] == [0, 2]


def test_the_saved_student_answers_as_the_trained_one(trained: DistillationTrainer, saved: Path) -> None:
    """works: from_pretrained gives the trained student: equal logits, and pipeline answers with it"""
    ids = torch.tensor([[5, 6, 7, 8]])
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(again(ids).logits, trained.model(ids).logits)
    answer = pipeline("text-generation", model=again, tokenizer=AutoTokenizer.from_pretrained(saved))
    assert isinstance(answer("Say it", max_new_tokens=2)[0]["generated_text"], str)


def test_the_tokenizer_is_the_students(saved: Path) -> None:
    """works: the tokenizer is saved as it was given, chat template included"""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template and len(tokenizer) == len(tiny_tokenizer())


def test_the_teacher_is_in_no_file(trained: DistillationTrainer, saved: Path) -> None:
    """differs: neither teacher nor policy is part of the saved model; a checkpoint has the policy's state"""
    checkpoint = Path(str(trained.args.output_dir)) / "checkpoint-2"
    assert (checkpoint / "temperature.json").is_file() and not (saved / "temperature.json").exists()
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == trained.model.num_parameters()
    assert not {"teacher", "kd_ratio"} & set(read(saved / "config.json"))


def test_training_arguments_are_saved(trained: DistillationTrainer, saved: Path) -> None:
    """works: training_args.bin holds the arguments, without a token"""
    arguments = torch.load(saved / "training_args.bin", weights_only=False)
    assert arguments.learning_rate == trained.args.learning_rate and arguments.hub_token is None


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_is_saved_alone(tmp_path: Path, kind: str) -> None:
    """works: with an adapter save_model writes the adapter; PeftModel.from_pretrained gives equal logits"""
    config = {
        "lora": peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    }[kind]
    trainer = trainer_for(tmp_path, peft_config=config, options={"learning_rate": 0.1})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    ends = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert set(trainer.end_token_ids()) <= {*(ends if isinstance(ends, list) else [ends])}
    assert f"eos_token_id={trainer.end_token_ids()})" in trainer.card("org/name")
    again = peft.PeftModel.from_pretrained(tiny_llama(seed=0), tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, trainer.model(ids).logits)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights(tmp_path: Path, tie: bool) -> None:
    """works: tied and untied output layers, without a warning of missing keys on a resume"""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    first = trainer_for(tmp_path, tiny_llama(seed=0, tie=tie), options=options)
    first.train()
    again = trainer_for(tmp_path, tiny_llama(seed=0, tie=tie), options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("adapter", ["none", "lora", "lora and embeddings", "wrapped before"])
def test_no_false_warning_of_missing_keys_on_a_tied_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """works: a resumed student with tied weights, with and without an adapter; what is really missing is still said"""
    warned: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: warned.append(str(text)))
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    saved = ["embed_tokens"] if "embeddings" in adapter else None
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=saved)

    def trainer() -> DistillationTrainer:
        model: Any = tiny_llama(seed=0, tie=True)
        given = {"peft_config": config} if adapter.startswith("lora") else {}
        return trainer_for(tmp_path, peft.get_peft_model(model, config) if "wrapped" in adapter else model,
                           options=options, **given)  # fmt: skip

    first = trainer()
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert not [text for text in warned if "missing" in text or "lm_head" in text], warned
    result = namedtuple("result", "missing_keys unexpected_keys")
    again._issue_warnings_after_load(result(["lm_head.weight", "model.norm.weight"], []))
    assert any("model.norm.weight" in text for text in warned)


def test_the_folder_of_the_run_by_default(tmp_path: Path) -> None:
    """works: save_model() without a folder writes into output_dir"""
    trainer = trainer_for(tmp_path, tiny_gpt2(seed=0), tiny_gpt2(seed=1))
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
