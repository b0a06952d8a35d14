"""A student that is trained for its quantised form, through ``DistillationTrainer``: the laws of every run hold for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.models.fake_quantization import (
    TRAINED_FOR,
    fake_quantized_layers,
    prepare_for_quantization,
    rounded_once,
    trained_for,
    without_fake_quantization,
)
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.training.memory_estimate import Types, _activations
from dts_hf.training.model_shape import ModelShape
from dts_hf.training.workload import Plan, Workload
from tests.support import reference
from tests.support.quantized import INT4, SCHEMES, FakeQuantizedLinear, needs_torchao, round_layers
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.trainers import ROWS, largest_difference, losses, step_gradients, trainer_for

IDS = torch.tensor([[5, 60, 290, 17, 9, 41, 8, 100], [7, 3, 12, 200, 31, 4, 99, 6]])


def batches_of(trainer: Any) -> list[Any]:
    return [dict(batch.items()) for batch in trainer.get_train_dataloader()]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


# ------------------------------------------------------------------------------------- refused, with torchao or without


def test_a_head_that_rounds_its_weight_is_refused(tmp_path: Path) -> None:
    """The loss multiplies with ``lm_head.weight`` itself: an unquantised head would be trained without a word."""
    student = tiny_llama(tie=False)
    head = FakeQuantizedLinear(student.lm_head.in_features, student.lm_head.out_features, bias=False)
    head.weight = student.lm_head.weight
    student.lm_head = head
    with pytest.raises(UserError, match=r"LlamaForCausalLM: the output layer is a FakeQuantizedLinear.*Leave it out"):
        trainer_for(tmp_path, student)
    with pytest.raises(UserError, match="the output layer is a FakeQuantizedLinear"):
        trainer_for(tmp_path, teacher=student)


def test_adapters_do_not_go_with_it(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="quantize: got it beside peft_config: the model has adapters"):
        trainer_for(tmp_path, quantize=INT4, peft_config=lora)
    student = tiny_llama()
    layer = student.model.layers[0].mlp.up_proj
    student.model.layers[0].mlp.up_proj = FakeQuantizedLinear(layer.in_features, layer.out_features, bias=False)
    with pytest.raises(UserError, match="model: its layers round their weights, and the model has adapters"):
        trainer_for(tmp_path, student, peft_config=lora)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("int4", r"quantize: got 'int4', expected a mapping, as in \{'scheme': 'int4_weight_only'\}"),
        ({"scheme": "int4_weight"}, r"quantize.scheme: got .int4_weight., expected .*Did you mean 'int4_weight_only'"),
        ({"scheme": "int4_weight_only", "group_size": 1}, r"quantize.group_size: got 1, expected"),
        ({"scheme": "int4_weight_only", "group": 32}, r"quantize.group: unknown key.*group_size"),
        ({"group_size": 32}, r"quantize.scheme: is missing"),
    ],
)
def test_a_wrong_section_names_key_and_value(given: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        trainer_for(tmp_path, quantize=given)


def test_torchao_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dts_hf.models.fake_quantization.is_torchao_available", lambda: False)
    with pytest.raises(UserError, match=r"needs the package torchao: pip install 'dts-hf\[quantization\]'"):
        trainer_for(tmp_path, quantize=INT4)


@needs_torchao
def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantize.group_size: got 48, but model.layers.0.*has 32 inputs"):
        trainer_for(tmp_path, quantize={**INT4, "group_size": 48})
    with pytest.raises(
        UserError, match=r"quantize.scheme: it is made for nn.Linear, which holds 0% .*GPT2LMHeadModel"
    ):
        trainer_for(tmp_path, tiny_gpt2(), teacher=tiny_gpt2(seed=1), quantize=INT4)
    student = tiny_llama()
    prepare_for_quantization(student, INT4)
    with pytest.raises(UserError, match="round their weights already"):
        trainer_for(tmp_path, student, quantize=INT4)


# ---------------------------------------------------------------------------------------------------------------- laws


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_switched_off_the_run_is_the_plain_run(scheme: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 1e-2}
    plain = trainer_for(tmp_path, options=options)
    plain.train()
    trainer = trainer_for(tmp_path, quantize={**INT4, "scheme": scheme}, options=options)
    with without_fake_quantization(trainer.model):
        trainer.train()
    assert losses(trainer) == losses(plain)
    ours, theirs = weights(trainer.model), weights(plain.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tie", [True, False])
def test_it_acts_on_loss_and_gradient_and_not_on_the_ends(scheme: str, tie: bool, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, tiny_llama(seed=0, tie=tie), quantize={**INT4, "scheme": scheme})
    model, batches = trainer.model, batches_of(trainer)[:1]
    head = model.lm_head
    assert type(head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert (head.weight is model.model.embed_tokens.weight) == tie
    assert set(fake_quantized_layers(model)) == {
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    rounded, on = step_gradients(trainer, batches), float(trainer.compute_loss(model, dict(batches[0])))
    with without_fake_quantization(model):
        plain, off = step_gradients(trainer, batches), float(trainer.compute_loss(model, dict(batches[0])))
    assert on != off and largest_difference(rounded, plain) > 1e-3
    assert rounded.keys() == plain.keys() and all(float(grad.abs().sum()) > 0 for grad in rounded.values())


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_that_of_a_dense_loss_of_the_same_layers(scheme: str, tmp_path: Path) -> None:
    """Dense logits of the same rounded modules, float64 probabilities, autograd: the straight-through derivative."""
    teacher = tiny_llama(seed=1, layers=3)
    trainer = trainer_for(
        tmp_path, teacher=teacher, temperature=2.0, kd_ratio=0.7, quantize={**INT4, "scheme": scheme}
    )
    batch = batches_of(trainer)[0]
    found = step_gradients(trainer, [dict(batch)])
    trainer.model.zero_grad()
    seen = {key: batch[key] for key in ("input_ids", "attention_mask")}
    targets = batch["labels"][:, 1:]
    kept = targets != -100
    z_s = trainer.model(**seen, use_cache=False).logits[:, :-1][kept].double()
    with torch.no_grad():
        z_t = teacher(**seen, use_cache=False).logits[:, :-1][kept].double()
    p, q = reference.softmax(z_t / 2), reference.softmax(z_s / 2)
    hard = -torch.log(reference.softmax(z_s)).gather(1, targets[kept].unsqueeze(1)).mean()
    loss = 0.3 * hard + 0.7 * 4 * reference.forward_kl(p, q).mean()
    loss.backward()
    expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert largest_difference(found, expected) < 2e-5


@needs_torchao
def test_a_weight_of_a_rounded_layer_moves_the_loss_by_steps_and_the_head_smoothly(tmp_path: Path) -> None:
    """The head is not rounded: its gradient is the true derivative of the reported loss."""
    trainer = trainer_for(tmp_path, tiny_llama(seed=0, tie=False), temperature=1.0, quantize=INT4)
    batch = batches_of(trainer)[0]
    gradient = step_gradients(trainer, [dict(batch)])["lm_head.weight"]
    weight, direction = trainer.model.lm_head.weight, gradient / gradient.norm()
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def loss_at(step: float) -> float:
        with torch.no_grad():
            weight.add_(step * direction)
            value = float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count))
            weight.sub_(step * direction)
        return value

    slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3)


@needs_torchao
@pytest.mark.parametrize(
    "changed", [{"packing": True}, {"options": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}]
)
def test_packing_and_micro_batches_do_not_count(changed: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_steps": 2, **changed.get("options", {})}
    one = trainer_for(tmp_path, temperature=2.0, quantize=INT4, options={"max_steps": 2})
    other = trainer_for(tmp_path, temperature=2.0, quantize=INT4, **{**changed, "options": options})
    for trainer in (one, other):
        trainer.train()
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)


@needs_torchao
@pytest.mark.parametrize("option", ["activation_checkpointing", "bf16"])
def test_ways_to_train(option: str, tmp_path: Path) -> None:
    plain = trainer_for(tmp_path, quantize=INT4, options={"max_steps": 2})
    trainer = trainer_for(tmp_path, quantize=INT4, options={"max_steps": 2, option: True})
    for one in (plain, trainer):
        one.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5 if option != "bf16" else 2e-2)


@needs_torchao
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
# torch 2.13.0: tracing an autograd.Function, as torchao's rounding is one, makes an instance of it
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scheme", ["int4_weight_only", "int8_dynamic_activation_int4_weight"])
def test_compiled_layers_round_the_same(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # TrainingArguments set them for good
        monkeypatch.setenv(name, "no")
    torch._dynamo.reset()
    section, steps = {**INT4, "scheme": scheme}, {"max_steps": 2, "learning_rate": 1e-3}
    plain = trainer_for(tmp_path, quantize=section, options=steps)
    compiled = {**steps, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = trainer_for(tmp_path, quantize=section, options=compiled)
    for one in (plain, trainer):
        one.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    torch._dynamo.reset()


@needs_torchao
def test_held_out_losses_are_those_of_the_rounded_student(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, quantize=INT4, eval_dataset=ROWS[:4])
    rounded = trainer.evaluate()["eval_kl"]
    with without_fake_quantization(trainer.model):
        assert trainer.evaluate()["eval_kl"] != pytest.approx(rounded, rel=1e-3)
    # Of itself an unquantised student is 0 away
    teacher = copy.deepcopy(tiny_llama(seed=0))
    own = trainer_for(tmp_path, teacher=teacher, quantize=INT4, eval_dataset=ROWS[:4])
    with without_fake_quantization(own.model):
        assert abs(own.evaluate()["eval_kl"]) < 1e-6
    assert own.evaluate()["eval_kl"] > 1e-4


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_answers_are_those_of_the_rounded_student(scheme: str, tmp_path: Path) -> None:
    """Weights are rounded once for all tokens there, and are afterwards what they were."""
    model = trainer_for(tmp_path, quantize={**INT4, "scheme": scheme}).model
    before, settings = weights(model), GenerationSettings(max_new_tokens=12)
    once = generate(model, IDS.tolist(), settings, eos_token_ids=[], pad_token_id=2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    text = model.eval().generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert [answer.tokens for answer in once] == text[:, IDS.shape[1] :].tolist()
    inside = logits(model)
    with rounded_once(model):
        assert torch.equal(logits(model), inside)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(logits(model), inside)


# ------------------------------------------------------------------------------------------------------ what is written


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, None])
def test_what_is_saved_is_ordinary_and_says_what_it_is_for(
    scheme: str, group_size: int | None, tmp_path: Path
) -> None:
    section = {"scheme": scheme, "group_size": group_size}
    trainer = trainer_for(tmp_path, quantize=section, options={"max_steps": 2, "learning_rate": 1e-2})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert getattr(loaded.config, TRAINED_FOR) == section == trained_for(trainer.model)
    assert weights(loaded).keys() == weights(tiny_llama()).keys()
    with without_fake_quantization(trainer.model):
        assert torch.equal(logits(loaded), logits(trainer.model.eval()))
    prepare_for_quantization(loaded, section)
    assert torch.equal(logits(loaded), logits(trainer.model))
    # Trained on without it, it says nothing of it any more
    plain = trainer_for(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert not hasattr(plain.model.config, TRAINED_FOR)


@needs_torchao
def test_a_resume_is_exact_and_one_without_it_is_refused(tmp_path: Path) -> None:
    def options(steps: int) -> dict[str, Any]:
        return {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}

    whole = trainer_for(tmp_path / "run", quantize=INT4, options=options(4))
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = trainer_for(tmp_path / "run", quantize=INT4, options=options(4))
    again.train(resume_from_checkpoint=checkpoint)
    ours, theirs = weights(again.model), weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(again)[-2:] == losses(whole)[-2:]
    with pytest.raises(UserError, match=TRAINED_FOR):
        trainer_for(tmp_path / "run", options=options(4)).train(resume_from_checkpoint=checkpoint)


@needs_torchao
def test_model_init_makes_a_rounded_student_each_time(tmp_path: Path) -> None:
    from dts_hf.training.trainer import DistillationTrainer
    from tests.support.tiny import tiny_tokenizer
    from tests.support.trainers import arguments

    trainer = DistillationTrainer(
        None, tiny_llama(seed=1), args=arguments(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer(),
        model_init=lambda: tiny_llama(seed=0), quantize=INT4,
    )  # fmt: skip
    trainer.train()
    assert trained_for(trainer.model) == INT4
    first = losses(trainer)
    trainer.train()
    assert losses(trainer)[-1:] == first[-1:]


@needs_torchao
def test_a_model_that_somebody_else_prepared(tmp_path: Path) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    student = tiny_llama()
    known = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
    quantize_(
        student, QATConfig(known, step="prepare"), filter_fn=lambda layer, name: "proj" in name and "self" in name
    )
    assert trained_for(trainer_for(tmp_path, student).model) is not None
    odd = tiny_llama()
    asymmetric = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=False)
    quantize_(
        odd, QATConfig(weight_config=asymmetric, step="prepare"), filter_fn=lambda layer, name: "up_proj" in name
    )
    trainer = trainer_for(tmp_path, odd)
    assert getattr(trainer.model.config, TRAINED_FOR)["scheme"] == "other"
    swapped = tiny_llama()
    quantize_(swapped, QATConfig(known, step="prepare"))
    with pytest.raises(UserError, match="the output layer is a FakeQuantizedLinear"):
        trainer_for(tmp_path, swapped)


@pytest.mark.parametrize("weights_of", ["base", "ema"])
@pytest.mark.parametrize("by", ["stand-in", pytest.param("torchao", marks=needs_torchao)])
def test_its_own_teacher_rounds_nothing(by: str, weights_of: str, tmp_path: Path) -> None:
    """So it teaches what rounding costs from the first step on, and only that."""
    student, own = tiny_llama(seed=0), tiny_llama(seed=0)
    if by == "stand-in":
        round_layers(student)
    trainer = trainer_for(
        tmp_path, student, SelfTeacher(weights_of), temperature=1.0, kd_ratio=1.0,
        quantize=INT4 if by == "torchao" else None, options={"max_steps": 2},
    )  # fmt: skip
    assert torch.equal(logits(trainer.teacher.model), logits(own))
    assert not torch.equal(logits(trainer.model), logits(own)) and fake_quantized_layers(trainer.model)
    batch = batches_of(trainer)[0]
    loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert loss > 1e-6
    with without_fake_quantization(trainer.model):
        assert abs(float(trainer.compute_loss(trainer.model, dict(batch)))) < loss / 100
    trainer.train()
    assert losses(trainer)[0] > 1e-6
    taught = trainer.teacher.model
    plain = copy.deepcopy(own)
    plain.load_state_dict(
        taught.state_dict()
    )  # of "ema": the mean of the weights that are trained, before they are rounded
    assert torch.equal(logits(taught), logits(plain)) and torch.equal(logits(plain), logits(own)) == (
        weights_of == "base"
    )


# ------------------------------------------------------------------------------------------------------- what it costs


@needs_torchao
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_the_graph_keeps_of_rounding_is_what_the_estimate_counts(dtype: torch.dtype | None) -> None:
    """Of one layer, large beside its input: bytes for each weight, the weight itself not counted."""
    layer = nn.Sequential(nn.Linear(512, 512, bias=False))
    plain = kept_bytes(layer, dtype) / layer[0].weight.numel()
    model = tiny_llama()
    model.extra = layer  # ``prepare_for_quantization`` asks for a model with a head
    prepare_for_quantization(model, INT4)
    rounded = kept_bytes(layer, dtype) / layer[0].weight.numel()
    compute = 4 if dtype is None else dtype.itemsize
    shape = ModelShape(
        parameters=10**6 + 1000,
        embedding=1000,
        layers=1,
        hidden=8,
        intermediate=8,
        heads=1,
        kv_heads=1,
        vocab=125,
        tied=True,
    )
    work = Workload(1, 1, 1, autocast=None if dtype is None else "bfloat16", device="cpu")
    estimates = [
        sum(_activations(shape, one, Types.of(one, Plan()))) / 10**6 for one in (work, replace(work, rounded=True))
    ]
    assert estimates[1] == pytest.approx(rounded, rel=0.1) and estimates[1] == pytest.approx(4 + compute, rel=0.01)
    assert estimates[0] == pytest.approx(plain, abs=0.05)


def kept_bytes(layer: nn.Module, dtype: torch.dtype | None) -> int:
    """What autograd keeps of a forward pass besides the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(kept: torch.Tensor) -> torch.Tensor:
        if kept.untyped_storage().data_ptr() not in own:
            seen[kept.untyped_storage().data_ptr()] = kept
        return kept

    context = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept), context:
        layer(torch.randn(1, 512, requires_grad=True))
    return sum(kept.untyped_storage().nbytes() for kept in seen.values())
