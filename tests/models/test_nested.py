"""A language model inside another model, as Gemma 3 from 4B up and LLaVA: pruned into the text-only class, and whole."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.models.pruning import prune_layers
from dts_hf.training.model_shape import shapes_from_configs
from dts_hf.training.trainer import DistillationTrainer
from tests.support.families import SIZES
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28,
          "patch_size": 14}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}


def gemma3() -> Any:
    """As many layers in the vision tower as in the language model: those are not to be pruned."""
    config = transformers.Gemma3Config(
        text_config={**SIZES, **WINDOW}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300
    )
    return build(transformers.Gemma3ForConditionalGeneration, config)


def llava() -> Any:
    text = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=300
    )
    return build(transformers.LlavaForConditionalGeneration, config)


def build(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if model.can_generate():
        model.generation_config.eos_token_id = [2, 7]
    return model


NESTED = {"gemma3": (gemma3, "Gemma3ForCausalLM"), "llava": (llava, "LlamaForCausalLM")}
every_wrapper = pytest.mark.parametrize("wrapper", NESTED)
IDS = torch.tensor([[5, 60, 290, 17, 9, 41, 8, 100]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@every_wrapper
def test_all_layers_kept_are_the_language_model(wrapper: str) -> None:
    make, text_only = NESTED[wrapper]
    model = make()
    student = prune_layers(model, 4).eval()
    assert type(student).__name__ == text_only
    torch.testing.assert_close(logits_of(student), logits_of(model), rtol=1e-5, atol=1e-5)
    assert student.generation_config is not None and student.generation_config.eos_token_id == [2, 7]
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, student)]
    assert tied[0] == tied[1]


@every_wrapper
def test_some_layers_kept_are_those_of_the_language_model(wrapper: str, tmp_path: Any) -> None:
    model = NESTED[wrapper][0]()
    student = prune_layers(model, [1, 3]).eval()
    for new, old in enumerate([1, 3]):
        layers = [dict(m.get_decoder().layers[k].named_parameters()) for m, k in ((student, new), (model, old))]
        assert layers[0].keys() == layers[1].keys()
        assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    student.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(student))


@every_wrapper
@pytest.mark.parametrize("pruned", [True, False])
def test_the_cache_changes_no_text_and_an_empty_prompt_is_started(wrapper: str, pruned: bool) -> None:
    model = NESTED[wrapper][0]()
    model = prune_layers(model, 3).eval() if pruned else model
    prompts = [[5, 60, 290, 17], [9, 41, 8, 100, 7, 12, 250], []]
    settings = GenerationSettings(max_new_tokens=12, batch_size=2)
    found = generate(model, prompts, settings, eos_token_ids=[], pad_token_id=3)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = prompt or [0]
        for _ in range(12):
            with torch.no_grad():
                ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        assert answer.tokens == ids[-12:]


@every_wrapper
def test_the_positions_of_the_language_model_limit_generation(wrapper: str) -> None:
    with pytest.raises(UserError, match=r"prompt 0 has 120 tokens: .* more than the 128 positions"):
        generate(
            NESTED[wrapper][0](), [[5] * 120], GenerationSettings(max_new_tokens=9), eos_token_ids=[2], pad_token_id=3
        )


@every_wrapper
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("pruned", [True, False])
def test_two_steps_through_the_trainer(wrapper: str, packing: bool, pruned: bool, tmp_path: Any) -> None:
    teacher = NESTED[wrapper][0]()
    student = prune_layers(teacher, 2) if pruned else copy.deepcopy(teacher)
    rows = [{"input_ids": [5, 6, 7, 8 + k], "labels": [-100, 6, 7, 8 + k]} for k in range(4)]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student,
        teacher,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        packing=packing,
    )
    before = trainer.evaluate()
    assert pruned or abs(before["eval_kl"]) <= 1e-6
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.evaluate()["eval_loss"] != before["eval_loss"]


def test_gemma3_through_the_recipe(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the wrapped teacher's folder to a text-only student's: pruned, trained, generating, saved and read again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    gemma3().save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    write_rows(tmp_path / "train.jsonl", 0, 8)
    write_rows(tmp_path / "valid.jsonl", 50, 3)
    wanted = recipe(training={"max_steps": 2, "logging_steps": 1}, evaluation={"rows": 3, "every_steps": 2})
    shapes = shapes_from_configs(wanted)
    assert shapes is not None and [shape.layers for shape in shapes if shape] == [2, 4]
    run = distill(wanted)
    config = json.loads((run.final_path / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["use_cache"] is True
    assert config["num_hidden_layers"] == 2 and config["layer_types"] == ["sliding_attention", "full_attention"]
    student = AutoModelForCausalLM.from_pretrained(run.final_path)
    assert type(student).__name__ == "Gemma3ForCausalLM"
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert set(metrics["models"]) >= {"teacher", "student"}


def test_a_wrapped_classifier_is_pruned_with_its_classes() -> None:
    config = transformers.Gemma3Config(text_config={**SIZES, **WINDOW}, vision_config=VISION, mm_tokens_per_image=4)
    config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    teacher = build(transformers.Gemma3ForSequenceClassification, config)
    student = prune_layers(teacher, 4).eval()
    assert type(student).__name__ == "Gemma3TextForSequenceClassification"
    assert student.config.id2label == config.id2label and prune_layers(teacher, 2).config.num_labels == 3
    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=1e-5, atol=1e-5)


def test_a_wrapper_whose_language_model_has_no_class_of_its_own_is_refused() -> None:
    config = AutoConfig.for_model("qwen2_vl", text_config={**SIZES})
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(config)
    with pytest.raises(
        UserError, match=r"student\.init: Qwen2VLConfig wraps .* no model class .* Give student\.model"
    ):
        prune_layers(model, 2)
