"""Packed rows without a dense mask: the same states and gradients as each row alone, for every kind of model we meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PhimoeConfig,
    PhimoeForCausalLM,
    TrainingArguments,
)

from dts_hf.data.collators import PackedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.errors import UserError
from dts_hf.models.packed_attention import NAME, cu_seqlens_mask, is_cu_seqlens
from dts_hf.models.packing_check import check_packing
from dts_hf.training.trainer import DistillationTrainer
from tests.support.families import FAMILIES
from tests.support.packing import (
    bloom,
    build,
    mistral,
    opt,
    packed_inputs,
    qwen,
    rows_alone,
    states_and_gradient,
    without_dropout,
)
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, mistral, qwen, opt])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_each_row_alone(make, checkpointing):
    model = make().double().train() if make in (tiny_llama, tiny_gpt2) else make().double()
    without_dropout(model)
    inputs = packed_inputs()
    alone = rows_alone(inputs)
    expected, expected_grad = states_and_gradient(model, alone)
    assert check_packing(model) is True and model.config._attn_implementation == NAME
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    together, grad = states_and_gradient(model, [inputs])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


def test_other_calls_of_the_model_do_not_change():
    model = tiny_llama().eval()
    ids = torch.arange(5, 25)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    check_packing(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), answer)


def test_the_switch_is_not_saved(tmp_path):
    model = tiny_llama()
    check_packing(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_check_packing_accepts_and_leaves_the_mode(make, dtype):
    model = make().to(dtype).train()
    assert check_packing(model)
    assert model.training


def test_check_packing_keeps_to_position_ids_off_the_cpu_and_for_other_attention():
    model = tiny_llama()
    assert check_packing(model, device=torch.device("meta")) is False
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert check_packing(model) is False and model.config._attn_implementation == "eager"


def test_check_packing_refuses_a_family_that_ignores_the_borders():
    model = bloom()
    with pytest.raises(
        UserError, match=r"data\.packing: the teacher \(BloomForCausalLM\) does not keep packed rows apart"
    ):
        check_packing(model, "the teacher")
    assert model.config._attn_implementation != NAME


def test_a_window_that_only_the_mask_knows_is_not_lost():
    """PhiMoE limits attention through the mask alone: rows shorter than the window, as in the probe, hide that."""
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 16, "num_local_experts": 2}
    model = build(PhimoeForCausalLM, PhimoeConfig, **options)
    assert check_packing(model) is False and model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------------- packed rows are alone

PACKED = [name for name, family in FAMILIES.items() if family.trains and family.packs]
#: The others route tokens to experts, whose matrices have other shapes when the first row goes to others.
DENSE = {name for name in PACKED if not any("expert" in key for key in FAMILIES[name].options)}


def behind(model: Any, cu_seqlens: bool, first: torch.Tensor) -> torch.Tensor:
    """Logits of the second of two packed rows, the first one being ``first``."""
    second = torch.arange(9, 9 + 8 * 7, 7)
    lengths = [len(first), len(second)]
    with torch.no_grad():
        return model(  # type: ignore[no-any-return]
            input_ids=torch.cat([first, second])[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            attention_mask=cu_seqlens_mask(lengths) if cu_seqlens else None,
            use_cache=False,
        ).logits[:, lengths[0] :]


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("attention", ["own", "eager"])
def test_the_second_row_does_not_know_what_the_first_one_says(family: str, attention: str) -> None:
    """To the bit, but for routed experts."""
    model = FAMILIES[family].build()
    if attention == "eager":
        model.set_attn_implementation("eager")
    try:
        cu_seqlens = check_packing(model)
    except UserError:
        assert (family, attention) == ("OPT", "eager")  # it reads the cu_seqlens from nothing but the packed attention
        return
    one, other = (
        behind(model, cu_seqlens, first) for first in (torch.arange(20, 40), torch.arange(320, 300, -1) % 320)
    )
    if family in DENSE:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.trains and not family.packs])
def test_a_family_that_leaks_is_refused_by_the_trainer(family: str, role: str, tmp_path: Any) -> None:
    leaking = FAMILIES[family].build()
    models = {"student": tiny_llama(), "teacher": tiny_llama(seed=1), role: leaking}
    says = rf"data\.packing: the {role} \({type(leaking).__name__}\) does not keep packed rows apart"
    with pytest.raises(UserError, match=says):
        DistillationTrainer(
            models["student"], models["teacher"], args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            processing_class=tiny_tokenizer(), packing=True,
        )  # fmt: skip


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("family", ["OPT", "BLOOM"])
def test_a_collator_of_the_users_that_packs_is_asked_too(family: str, role: str, tmp_path: Any) -> None:
    """Its batches have positions alone, which OPT does not look at: ours are what makes it pack."""
    models = {"student": FAMILIES["LLaMA"].build(), "teacher": FAMILIES["LLaMA"].build(1)}
    rows = [{"input_ids": [5, 6, 7 + k], "labels": [5, 6, 7 + k]} for k in range(4)]
    options = {
        "args": TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), "train_dataset": rows,
        "processing_class": tiny_tokenizer(), "data_collator": DataCollatorWithFlattening(),
    }  # fmt: skip
    DistillationTrainer(models["student"], models["teacher"], **options)
    models[role] = FAMILIES[family].build()
    with pytest.raises(UserError, match=rf"the {role} .* does not keep packed rows apart"):
        DistillationTrainer(models["student"], models["teacher"], **options)


def test_a_student_that_needs_the_borders_is_not_packed_beside_a_teacher_that_knows_none(tmp_path: Any) -> None:
    teacher = FAMILIES["LLaMA"].build(1)
    teacher.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"the student \(OPTForCausalLM\) does not keep packed rows apart"):
        DistillationTrainer(
            FAMILIES["OPT"].build(), teacher, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            processing_class=tiny_tokenizer(), packing=True,
        )  # fmt: skip


@pytest.mark.parametrize("family", ["Jamba", "LFM2"])
def test_a_model_as_it_is_initialised_is_refused_too(family: str) -> None:
    """Close to the identity: LFM2's convolution then moves logits by 1.6e-4."""
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        check_packing(AutoModelForCausalLM.from_config(FAMILIES[family].configuration()))


def leaky(share: float, dtype: torch.dtype) -> Any:
    model = tiny_llama().to(dtype)

    def leak(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + share * output.roll(1, dims=1)

    model.model.layers[0].input_layernorm.register_forward_hook(leak)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6])
def test_no_leak_is_too_small_to_be_found(share: float, dtype: torch.dtype) -> None:
    """In bfloat16 a share of 1e-6 moves no logit at all, and yet it is one."""
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        check_packing(leaky(share, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_run_on_are_no_leak_but_refused(dtype: torch.dtype) -> None:
    model = tiny_gpt2().to(dtype)
    positions = model.transformer.wpe
    positions.register_forward_pre_hook(lambda module, args: (torch.arange(args[0].shape[-1])[None],))
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        check_packing(model)


def test_check_packing_leaves_no_trace() -> None:
    model = tiny_llama().requires_grad_(False)
    check_packing(model)
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_an_attention_that_does_not_know_borders_fails_aloud():
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        tiny_llama()(**packed_inputs(), use_cache=False)  # plain sdpa


def test_the_collator_gives_the_borders_where_asked():
    dataset = EncodedDataset(["a", "b"], [[5, 6, 7], [8, 9]], [1, 1])
    rows = [dataset[0], dataset[1]]
    assert "cu_seqlens" not in PackedCollator()(rows)
    cu_seqlens = PackedCollator(cu_seqlens=True)(rows)["cu_seqlens"]
    assert cu_seqlens.flatten().tolist() == [0, 3, 5] and is_cu_seqlens(cu_seqlens)
    assert (
        not is_cu_seqlens(None) and not is_cu_seqlens(torch.ones(1, 1, 3, 3)) and not is_cu_seqlens(torch.ones(2, 3))
    )
