"""``training.torch_compile``: the layers of both models are compiled one by one, once, and nothing else is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GPT2LMHeadModel

from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.models.compilation import compile_layers
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.trainers import encoded, trainer_for

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
#: No code is generated: graphs are made, and run as they were.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
#: The backward pass is not made into a graph either: where it is not what the test is about.
FORWARD = {**COMPILED, "torch_compile_backend": "eager"}

# torch 2.13.0, torch/_dynamo/variables/builder.py:358: asks every input of a graph for its gradient, and hides the warning.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # TrainingArguments set them for good
        monkeypatch.setenv(name, "no")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batches(packed: bool = False) -> list[dict[str, Tensor]]:
    """Micro-batches of other lengths each, of two to five rows; all of the padded ones have padding."""
    data, collator = encoded(), PackedCollator(cu_seqlens=True) if packed else PaddedCollator(2, pad_to_multiple_of=3)
    cuts = ((0, 2), (2, 5), (1, 6), (5, 8), (3, 7))
    return [collator([data[i] for i in range(*cut)]) for cut in cuts]


def gradients(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.temperature.begin_step(0.0)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(one: Any, other: Any) -> None:
    assert one[1].keys() == other[1].keys()
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "packed"),
    [("llama", False), pytest.param("gpt2", False, marks=pytest.mark.soak), ("gpt2", True)],
    ids=["llama", "gpt2", "packed"],
)
def test_one_graph_for_all_layers_and_lengths(tmp_path: Any, kind: str, packed: bool) -> None:
    models = MODELS[kind](layers=3, seed=0), MODELS[kind](layers=4, seed=1)
    plain = trainer_for(tmp_path, copy.deepcopy(models[0]), copy.deepcopy(models[1]), packing=packed)
    compiled = trainer_for(tmp_path, *models, packing=packed, options=FORWARD if packed else COMPILED)
    counts = []
    for batch in batches(packed):
        assert_same(gradients(compiled, batch), gradients(plain, batch))
        counts.append(graphs())
    # The student's with a gradient and the teacher's without; attention over packed rows stands between graphs.
    assert counts[0] == counts[-1] == (8 if packed else 2), counts


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", "lora"), pytest.param("gpt2", "recomputed", marks=pytest.mark.soak)]
)
def test_adapters_and_recomputed_activations(tmp_path: Any, kind: str, how: str) -> None:
    def student() -> nn.Module:
        model = MODELS[kind](layers=3, seed=0)
        if how == "lora":
            torch.manual_seed(0)
            adapters = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
            model = get_peft_model(model, adapters)
        else:
            model.activation_checkpointing_enable()
        return model

    teacher = MODELS[kind](layers=2, seed=1)
    plain = trainer_for(tmp_path, student(), copy.deepcopy(teacher))
    compiled = trainer_for(tmp_path, student(), teacher, options=COMPILED)
    counts = []
    for batch in batches()[:3]:
        assert_same(gradients(compiled, batch), gradients(plain, batch))
        counts.append(graphs())
    assert counts[0] == counts[-1], counts


def test_a_run_its_checkpoints_and_its_held_out_rows(tmp_path: Any) -> None:
    """Trained, evaluated and resumed: the files and the weights of a run that is not compiled, and no more graphs."""

    def run(name: str, resume: bool = False, **options: Any) -> DistillationTrainer:
        trainer = trainer_for(
            tmp_path / name, tiny_gpt2(seed=0), tiny_gpt2(seed=1, layers=3), eval_dataset=batch_rows(),
            options={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4,
                     "eval_strategy": "steps", "eval_steps": 2, **options},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2") if resume else None)
        trainer.save_model(str(tmp_path / name / "saved"))
        return trainer

    plain, compiled = run("plain"), run("compiled", **FORWARD)
    made = graphs()
    assert made > 0
    resumed = run("compiled", resume=True, **FORWARD)
    assert graphs() <= 2 * made  # of other objects; within a run no length makes another one
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    names = {
        name: sorted(p.name for p in (tmp_path / name / "checkpoint-4").iterdir()) for name in ("plain", "compiled")
    }
    assert names["plain"] == names["compiled"]
    weights = {name: load_file(tmp_path / name / "saved" / "model.safetensors") for name in names}
    assert weights["plain"].keys() == weights["compiled"].keys()
    GPT2LMHeadModel.from_pretrained(tmp_path / "compiled" / "saved")
    for key, value in compiled.model.state_dict().items():
        torch.testing.assert_close(value, plain.model.state_dict()[key], rtol=1e-4, atol=1e-6)
        assert torch.equal(value, resumed.model.state_dict()[key])
    logs = [[log for log in trainer.state.log_history if "eval_loss" in log] for trainer in (plain, compiled)]
    assert len(logs[0]) == 2
    for one, other in zip(*logs):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
        assert one["eval_kl"] == pytest.approx(other["eval_kl"], rel=1e-4)


def batch_rows() -> list[dict[str, Any]]:
    data = encoded()
    return [{key: data[i][key] for key in ("input_ids", "labels")} for i in range(7)]


def test_answers_are_made_without_graphs(tmp_path: Any) -> None:
    trainer = trainer_for(tmp_path, tiny_llama(seed=0), options=COMPILED)
    prompts, settings = [[5, 6, 7], [8, 9], [10] * 9], GenerationSettings(max_new_tokens=7, batch_size=2)
    options: Any = {"eos_token_ids": [2], "pad_token_id": 2}
    answers = generate(trainer.model, prompts, settings, **options)
    assert graphs() == 0
    assert answers == generate(tiny_llama(seed=0), prompts, settings, **options)


def test_accelerate_compiles_nothing_and_the_next_trainer_starts_from_plain_layers(tmp_path: Any) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    compiled = trainer_for(tmp_path, student, teacher, options={**COMPILED, "torch_compile_mode": "default"})
    layers = [*student.model.layers, *teacher.model.layers]
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert AcceleratorState().dynamo_plugin.backend == "NO"
    assert compiled.model is student and "_orig_mod" not in str(list(student.state_dict()))
    trainer_for(tmp_path, student, teacher)  # its checks of the heads would have made graphs, too
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert graphs() == 0


def test_the_arguments_reach_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    trainer_for(tmp_path, tiny_llama(layers=2), tiny_llama(layers=3), options={"torch_compile_mode": "max-autotune"})
    assert asked == [{"backend": "inductor", "mode": "max-autotune", "dynamic": True}] * 5


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("mode", "max-autotun", r"got 'max-autotun', expected one of default, .* Did you mean 'max-autotune'"),
     ("backend", "inductr", r"got 'inductr', expected one of .* Did you mean 'inductor'")],
)  # fmt: skip
def test_words_that_torch_does_not_know_are_refused(tmp_path: Any, name: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"training.torch_compile_{name}: {says}"):
        trainer_for(tmp_path, options={f"torch_compile_{name}": value})


def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("dts_hf.training.resumable_trainer.strategy_of", lambda accelerator: "zero3")
    with pytest.raises(UserError, match=r"training.torch_compile: got true under ZeRO-3"):
        trainer_for(tmp_path, options=COMPILED)


def test_a_model_without_layers_is_refused() -> None:
    model = tiny_llama()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match=r"torch_compile: the student \(LlamaForCausalLM\) has no stack of layers"):
        compile_layers(model, "the student", backend="aot_eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", MODELS)
def test_a_card_compiles_with_inductor(tmp_path: Any, kind: str) -> None:
    models = MODELS[kind](layers=3, seed=0), MODELS[kind](layers=4, seed=1)
    plain = trainer_for(tmp_path, copy.deepcopy(models[0]), copy.deepcopy(models[1]), options={"use_cpu": False})
    compiled = trainer_for(tmp_path, *models, options={"use_cpu": False, "torch_compile": True})
    counts = []
    for batch in batches():
        there = {name: value.cuda() for name, value in batch.items()}
        one, other = gradients(compiled, there), gradients(plain, there)
        torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-4)
        for name, gradient in other[1].items():
            torch.testing.assert_close(one[1][name], gradient, rtol=1e-2, atol=1e-4)
        counts.append(graphs())
    assert counts[0] == counts[-1] == 2, counts
