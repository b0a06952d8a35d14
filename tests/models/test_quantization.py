"""A quantised teacher: what is refused, what torchao makes of one on a CPU, and what the trainer makes of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_torchao_available

from dts_hf.distill import distill
from dts_hf.distributed.sharding import place_teacher
from dts_hf.errors import UserError
from dts_hf.models import quantization
from dts_hf.models.head import Head, check_head
from dts_hf.models.loading import load_model
from dts_hf.models.quantization import check_quantization, check_quantized, compare_heads, stored
from dts_hf.recipe.schema import QUANTIZED_BY, Quantization, Recipe
from dts_hf.reporting.facts import describe_teacher, gather
from dts_hf.reporting.model_card import render_model_card
from dts_hf.teachers.live import LiveTeacher
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import losses, trainer_for

needs_torchao = pytest.mark.skipif(
    not is_torchao_available(), reason="torchao is not installed: pip install 'dts-hf[quantization]'"
)
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 60, 290, 17, 9, 41, 8, 100], [7, 3, 12, 200, 31, 4, 99, 6]])


@pytest.fixture()
def folder(tmp_path: Path) -> str:
    tiny_llama(layers=3, seed=1).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def values(**teacher: Any) -> dict[str, Any]:
    return {
        "student": {"model": "m"},
        "teacher": {"model": "t", **teacher},
        "data": {"train": "rows.jsonl"},
        "output": {"dir": "run"},
    }


# ------------------------------------------------------------------------------------------------------------ refused


def test_every_kind_has_its_package() -> None:
    assert set(get_args(Quantization)) == {"none", *QUANTIZED_BY}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchao_is_asked_for_by_name(kind: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: False)
    expected = rf"teacher.quantization: '{kind}' needs the package torchao: pip install 'dts-hf\[quantization\]'"
    with pytest.raises(UserError, match=expected):
        load_model(folder, key="teacher.model", quantization=kind, dtype="bfloat16")


def test_fp8_needs_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: True)
    with pytest.raises(UserError, match=r"'fp8' needs a GPU of compute capability 8.9.*this is a CPU.*'int8'"):
        check_quantization("fp8", CPU)
    of: dict[int, tuple[int, int]] = {0: (8, 0), 1: (8, 9), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[device.index])
    with pytest.raises(UserError, match=r"this is a GPU of compute capability 8.0; expected 'int8'"):
        check_quantization("fp8", torch.device("cuda", 0))
    for index in (1, 2):
        check_quantization("fp8", torch.device("cuda", index))
    for kind in ("int8", "none"):
        check_quantization(kind, CPU)


def test_the_command_refuses_fp8_on_a_cpu_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the rows nor the models exist; and where there is a GPU, ``use_cpu`` keeps the run off it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: True)
    with pytest.raises(UserError, match="'fp8' needs a GPU"):
        distill(Recipe.from_dict({**values(quantization="fp8"), "training": {"use_cpu": True}}, deep=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": {"quantization": "fp8", "dtype": "float32"}}, r"'fp8' and dtype 'float32', expected dtype 'bfloat16'"),
        (
            {"teacher": {"quantization": "int8", "placement": "sharded"}},
            r"'sharded' and quantization 'int8', but the packed weights of torchao.*'replicated'",
        ),
        (
            {"teacher": {"quantization": "int8"}, "student": {"init": {"from": "teacher", "layers": 2}}},
            r"student.init: from teacher, but teacher.quantization is 'int8'.*give student.model",
        ),
        ({"teacher": {"quantization": "int4"}}, r"got \"int4\".*Did you mean 'int8'"),
        ({"student": {"model": "m", "quantization": "int8"}}, r"student.quantization"),
    ],
    ids=["fp8 in fp32", "sharded", "student of it", "unknown", "for the student"],
)  # fmt: skip
def test_the_recipe_refuses(changes: dict[str, Any], expected: str) -> None:
    whole = {**values(**changes.get("teacher", {})), **{key: changes[key] for key in changes if key != "teacher"}}
    with pytest.raises(UserError, match=expected):
        Recipe.from_dict(whole, deep=False)


def test_a_model_that_nothing_was_done_to_is_refused() -> None:
    """torchao passes over GPT-2's ``Conv1D`` without a word; bitsandbytes knows it."""
    model = tiny_gpt2()
    with pytest.raises(
        UserError, match=r"teacher.model: quantization 'int8'.*nn.Linear, which holds 0%.*GPT2LMHeadModel"
    ):
        check_quantized(model, "int8", "teacher.model")
    for kind in ("none", "4bit"):
        check_quantized(model, kind, "teacher.model")


class Scaled(torch.Tensor):
    """Stands for a weight of torchao, which has its scales beside it."""


def test_stored_is_the_scales_where_there_are_some() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    assert stored(weight) is weight
    packed = torch.ones(2, 3).as_subclass(Scaled)
    packed.scale = torch.tensor([1.0, float("nan")])  # type: ignore[attr-defined]
    assert not torch.isfinite(stored(packed)).all()


# ----------------------------------------------------------------------------------------------------------- the error


def test_compare_heads_is_the_kl_of_the_softmaxes() -> None:
    torch.manual_seed(0)
    states, other = torch.randn(37, 8, dtype=torch.float64), torch.randn(37, 6, dtype=torch.float64)
    heads = Head(torch.randn(11, 8, dtype=torch.float64)), Head(torch.randn(11, 6, dtype=torch.float64), softcap=5.0)
    found = compare_heads(states, heads[0], other, heads[1], rows=10)
    p, q = heads[0](states).softmax(-1), heads[1](other).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["kl_99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found["agreement"] < 1
    same = compare_heads(states, heads[0], states, heads[0])
    assert same["kl"] == pytest.approx(0, abs=1e-12) and same["agreement"] == 1.0


# ---------------------------------------------------------------------------------------------------- torchao on a CPU


def states_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(IDS, use_cache=False).last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]


def error_of(model: PreTrainedModel, full: PreTrainedModel) -> dict[str, float]:
    return compare_heads(states_of(full), Head(full.lm_head.weight), states_of(model), Head(model.lm_head.weight))


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_packs_the_layers_and_nothing_else(folder: str, dtype: str) -> None:
    precision, options = torch.get_float32_matmul_precision(), torch._inductor.config.coordinate_descent_tuning
    full = load_model(folder, key="teacher.model", dtype=dtype)
    model = load_model(folder, key="teacher.model", dtype=dtype, quantization="int8")
    for name, weight in model.named_parameters():
        packed = ".layers." in name and "norm" not in name
        assert (stored(weight) is not weight) == packed, name
        assert packed or torch.equal(weight, full.get_parameter(name))
    # Tied as it was, and the head's weight as the loss reads it
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == full.dtype
    check_head(model, role="teacher")
    found = error_of(model, full)
    assert 1e-6 < found["kl"] < 0.02 and found["kl"] < found["kl_99"] and found["agreement"] > 0.8, found
    # Nothing of this process has changed with it: torchao's recommendations would be the student's too
    assert torch.get_float32_matmul_precision() == precision
    assert torch._inductor.config.coordinate_descent_tuning == options
    place_teacher(model, "replicated", "cpu")


@needs_torchao
def test_gpt2_is_refused_and_an_own_head_stays(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        load_model(str(tmp_path / "gpt2"), key="teacher.model", quantization="int8")
    tiny_llama(tie=False).save_pretrained(tmp_path / "untied")
    model = load_model(str(tmp_path / "untied"), key="teacher.model", quantization="int8")
    assert stored(model.lm_head.weight) is model.lm_head.weight


@needs_torchao
def test_fp8_by_the_same_code(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU multiplies fp8 matrices slowly, but it does: with both questions for the device answered yes."""
    import torchao.quantization.quant_api as torchao

    monkeypatch.setattr(torchao, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(quantization, "check_quantization", lambda kind, device: None)
    full = load_model(folder, key="teacher.model", dtype="bfloat16")
    model = load_model(folder, key="teacher.model", dtype="bfloat16", quantization="fp8")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.float8_e4m3fn and weight.scale.shape == (64, 1)
    check_head(model, role="teacher")
    found = error_of(model, full)
    assert error_of(load_model(folder, key="t", dtype="bfloat16", quantization="int8"), full)["kl"] < found["kl"] < 0.2
    assert states_of(model).dtype == torch.bfloat16


@needs_torchao
def test_a_step_with_an_int8_teacher(folder: str, tmp_path: Path) -> None:
    full = load_model(folder, key="teacher.model", dtype="bfloat16")
    model = load_model(folder, key="teacher.model", dtype="bfloat16", quantization="int8")
    trainer = trainer_for(tmp_path, teacher=model, options={"max_steps": 2}, kd_ratio=0.7)
    assert isinstance(trainer.teacher, LiveTeacher)
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("row_id", None)
    labels = batch.pop("labels")
    states = trainer.teacher.states(batch, labels)
    assert states.dtype == torch.bfloat16 == trainer.teacher.head.weight.dtype
    assert not torch.equal(states, LiveTeacher(full).states(batch, labels))
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert len(logs) == 2 and all(0 < log["grad_norm"] < 1e3 for log in logs)
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    # The same steps with the full teacher: the losses are near, and not the same
    other = trainer_for(tmp_path, teacher=full, options={"max_steps": 2}, kd_ratio=0.7)
    other.train()
    assert losses(trainer) != losses(other)
    assert losses(trainer) == pytest.approx(losses(other), rel=0.02)


@needs_torchao
def test_a_run_says_how_its_teacher_was_quantised(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(seed=5).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    write_rows(tmp_path / "train.jsonl", 0, 12)
    write_rows(tmp_path / "valid.jsonl", 50, 3)
    run = distill(
        recipe(
            student={"model": "student"}, teacher={"model": "teacher", "dtype": "float32", "quantization": "int8"},
            training={"max_steps": 2}, evaluation={"rows": 2, "every_steps": None}, data={"packing": True},
        )
    )  # fmt: skip
    assert "teacher: quantised to int8 by torchao" in capsys.readouterr().err
    assert "quantised to int8 by torchao" in describe_teacher(gather(run))
    assert "quantised to int8 by torchao" in render_model_card(run)
    assert "torchao" in render_model_card(run).partition("versions")[2]
    assert "quantised to int8 by torchao" in run.report_path.read_text(encoding="utf-8")
    assert run.read_recipe().required_teacher.quantization == "int8"
    assert "torchao" in run.read_environment()["packages"]
    assert json.loads((run.path / "metrics.json").read_text())["models"]["teacher"]
