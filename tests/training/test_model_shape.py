"""The shape of a model, counted without loading it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, Qwen3Config

from dts_hf.errors import UserError
from dts_hf.models.adapters import add_lora
from dts_hf.recipe.schema import Lora
from dts_hf.training.model_shape import ModelShape
from tests.support.shapes import GPT2, LLAMA, OPT

STUDENT = ModelShape.from_config(LLAMA)


@pytest.mark.parametrize(
    "config",
    [LLAMA, LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": False}), GPT2, OPT],
    ids=["llama", "untied", "gpt2", "opt"],
)
def test_the_shape_of_a_config_is_that_of_its_model(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config)
    assert shape == ModelShape.from_model(model)
    assert shape.parameters == model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert shape.embedding == 512 * 64 and shape.vocab == 512 and shape.layers == 2
    assert shape.tied == config.tie_word_embeddings
    assert shape.gated == (config.model_type == "llama")
    assert 0 < shape.backbone < shape.parameters - shape.embedding


def test_heads_wider_than_their_share_of_the_states() -> None:
    config = Qwen3Config(**{**LLAMA.to_dict(), "model_type": "qwen3", "head_dim": 32})
    shape = ModelShape.from_config(config)
    assert (shape.query_width, shape.kv_width, shape.gated) == (128, 64, True)


def test_a_model_without_attention_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="MambaForCausalLM: its configuration has no num_attention_heads"):
        ModelShape.from_config(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))


def test_adapters_and_partitions_do_not_change_the_shape() -> None:
    model = add_lora(AutoModelForCausalLM.from_config(LLAMA), Lora(r=4))
    assert ModelShape.from_model(model) == STUDENT
    split = AutoModelForCausalLM.from_config(LLAMA)
    for weight in split.parameters():  # as ZeRO-3 leaves them
        weight.ds_numel = weight.numel()
        weight.data = torch.empty(0)
    split.config = LLAMA
    assert ModelShape.from_model(split).parameters == STUDENT.parameters
