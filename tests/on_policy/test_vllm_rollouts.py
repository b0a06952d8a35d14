"""Answers from vLLM with a stand-in in its place: which weights it has when it answers, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dts_hf.errors import RunError, UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.on_policy.vllm_rollouts import VllmRollouts, check_installed, push_weights
from dts_hf.on_policy.whole_weights import check_has_whole_weights, whole_weights
from tests.support.families import FAMILIES
from tests.support.quantized import round_layers
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.trainers import trainer_for

peft = pytest.importorskip("peft")
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
KEYS = ["a", "b", "c"]


class Module(torch.nn.Module):
    """A model of vLLM: its weights come through ``load_weights`` alone, which says what it has taken."""

    def __init__(self, model, deaf=()):
        super().__init__()
        self.inner, self.deaf, self.loaded = model, deaf, []

    def load_weights(self, weights):
        own = dict(self.inner.named_parameters())
        taken = set()
        for name, value in weights:
            if name in self.deaf:
                continue
            own[name].data.copy_(value)  # KeyError: a name that the class does not have
            taken.add(name)
        self.loaded += taken
        return taken


class StandIn:
    """What ``vllm.LLM`` does with these options, as its documentation says it; it answers by our own engine."""

    def __init__(self, fresh, deaf=(), **options):
        self.options = options
        self.config = json.loads((Path(options["model"]) / "config.json").read_text()) if "model" in options else None
        self.module, self.caches = Module(fresh, deaf), 0

    def apply_model(self, function):
        return [function(self.module)]

    def reset_prefix_cache(self):
        self.caches += 1

    def generate(self, requests, parameters, use_tqdm):
        settings = GenerationSettings(max_new_tokens=parameters[0].max_tokens, do_sample=False)
        prompts = [request["prompt_token_ids"] for request in requests]
        ends = parameters[0].stop_token_ids
        for one in generate(self.module.inner, prompts, settings, eos_token_ids=ends, pad_token_id=0):
            tokens = one.tokens + ([ends[0]] if one.finished else [])
            yield SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=tokens, finish_reason="stop" if one.finished else "length")]
            )


@pytest.fixture
def vllm(monkeypatch):
    """The package, and the engines that were made."""
    made = []

    def llm(**options):
        made.append(StandIn(tiny_llama(seed=99), **options))
        return made[-1]

    package = SimpleNamespace(LLM=llm, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return made


def answers(rollouts, model, prompts=PROMPTS):
    settings = GenerationSettings(max_new_tokens=6, do_sample=True)
    return rollouts(model, prompts, settings, eos_token_ids=[2], pad_token_id=0, row_keys=KEYS[: len(prompts)])


def greedy(model):
    settings = GenerationSettings(max_new_tokens=6)
    return generate(model, PROMPTS, settings, eos_token_ids=[2], pad_token_id=0)


def moved(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def test_it_answers_with_the_weights_of_now(vllm):
    model, rollouts = tiny_llama(seed=0), VllmRollouts(0.3, 64)
    said = []
    for seed in range(3):
        moved(model, seed)
        found = answers(rollouts, model)
        assert [one.tokens for one in found] == [one.tokens for one in greedy(model)]
        said.append([one.tokens for one in found])
    assert said[0] != said[1] != said[2]
    (engine,) = vllm  # made once
    assert engine.caches == 3


def test_the_engine_is_made_of_the_configuration_alone(vllm):
    model = tiny_llama(seed=0).to(torch.bfloat16)
    answers(VllmRollouts(0.25, 48), model)
    (engine,) = vllm
    options = {name: value for name, value in engine.options.items() if name != "model"}
    assert options == {
        "load_format": "dummy", "skip_tokenizer_init": True, "tensor_parallel_size": 1, "dtype": "bfloat16",
        "gpu_memory_utilization": 0.25, "max_model_len": 48, "trust_remote_code": False,
    }  # fmt: skip
    assert engine.config["hidden_size"] == model.config.hidden_size
    assert not Path(engine.options["model"]).exists()


def test_a_weight_that_is_not_taken_is_an_error(vllm):
    model = tiny_llama(seed=0)
    name = [name for name, _ in model.named_parameters()][3]
    engine = StandIn(tiny_llama(seed=1), deaf=(name,))
    with pytest.raises(RunError, match=f"did not take the weight {name}"):
        answers(VllmRollouts(0.3, engine=engine), model)


def test_a_process_without_prompts_still_pushes(vllm):
    """Where weights are sharded the others need those that lie here."""
    engine = StandIn(tiny_llama(seed=1))
    assert answers(VllmRollouts(0.3, engine=engine), tiny_llama(seed=0), []) == []
    assert engine.module.loaded


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_whole_weights_are_those_of_the_model(build, tie):
    model = build(seed=0, tie=tie)
    found = dict(whole_weights(model))
    assert found.keys() == dict(model.named_parameters()).keys()  # of tied ones one name
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in found.items())


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.trains])
def test_whole_weights_are_those_of_a_checkpoint(tmp_path, family):
    """vLLM reads what ``save_pretrained`` writes: experts one by one, names as they were, saved buffers as well."""
    model = FAMILIES[family].build()
    model.save_pretrained(tmp_path)
    saved = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    found = dict(whole_weights(model))
    assert found.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("also", [None, ["norm", "ln_f"]])
def test_adapters_are_merged_into_copies(build, also):
    plain = build(seed=0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=also)
    model = moved(peft.get_peft_model(copy.deepcopy(plain), config), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = dict(whole_weights(model))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # to the last bit
    assert found.keys() == dict(plain.named_parameters()).keys()
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, value in found.items():
        assert torch.allclose(value, merged[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True), "LoRA with use_dora"),
        (
            lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]),
            "with trainable_token_indices",
        ),
        (
            lambda: peft.LoraConfig(r=2, target_modules=["k_proj"], target_parameters=["q_proj.weight"]),
            "LoRA with target_parameters",
        ),
        (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "of the kind IA3"),
    ],
)
def test_adapters_of_other_kinds_are_refused(config, match):
    model = peft.get_peft_model(tiny_llama(seed=0), config())
    with pytest.raises(UserError, match=match):
        next(whole_weights(model))


def test_adapters_on_sharded_weights_are_refused():
    model = peft.get_peft_model(tiny_llama(seed=0), peft.LoraConfig(r=2, target_modules="all-linear"))
    check_has_whole_weights(model, sharded=False)
    check_has_whole_weights(tiny_llama(seed=0), sharded=True)
    with pytest.raises(UserError, match="an adapter on sharded weights"):
        check_has_whole_weights(model, sharded=True)


def test_a_student_that_rounds_its_weights_is_refused(vllm, tmp_path):
    """vLLM would have them unrounded, and its text would be another student's."""
    student = tiny_llama(seed=0)
    round_layers(student)
    with pytest.raises(UserError, match=r"backend: vllm would answer with the weights .* before student\.quantize"):
        trainer_for(tmp_path, student, on_policy={"backend": "vllm"})


def test_a_training_whose_student_answers_in_vllm(vllm, tmp_path):
    """Through the trainer: each generated step has the weights of now, and an answer's rows are those of the engine."""
    options = {"max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    chosen = {"fraction": 1.0, "max_new_tokens": 5, "backend": "vllm", "vllm_memory": 0.2}
    trainer = trainer_for(tmp_path, options=options, on_policy=chosen, temperature=1.0)
    trainer.train()
    (engine,) = vllm
    assert engine.caches == 3 and engine.options["gpu_memory_utilization"] == 0.2
    assert engine.options["max_model_len"] == max(trainer.train_dataset.lengths) + 5
    assert trainer.state.log_history[0]["generated_share"] == 1.0
    push_weights(engine, trainer.model)
    pairs = zip(engine.module.inner.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_head_that_is_wider_than_the_shared_vocabulary_is_refused(vllm, tmp_path):
    with pytest.raises(UserError, match=r"rows of the student.s head.* first 320 of them"):
        trainer_for(
            tmp_path, tiny_llama(vocab=336), on_policy={"backend": "vllm"}, vocab_alignment="truncate_to_tokenizer"
        )


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError, match="vLLM is not installed: pip install vllm, or backend: own"):
        check_installed()
