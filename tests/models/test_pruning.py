"""Pruning of families whose layers are of several kinds: the kinds go with the layers, or one message says what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.models.pruning import prune_layers, pruned_config
from dts_hf.training.model_shape import shapes_from_configs
from tests.support.families import FAMILIES, SIZES, Family
from tests.support.prunable import ALL, JAMBA, logits_of
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama

#: Which layers are kept, by family; the others keep three.
KEPT = {
    "DeepSeek-V3, 2 dense": [0, 2, 3],
    "Qwen3-MoE, every second": [1, 2, 3],
    "Qwen3-MoE, both keys": [1, 3],
    "Jamba": [1, 2, 3],
    "Jamba, one attention layer": [1, 2, 3],
    "SmolLM3, one without rotation": [1, 3],
    "Llama 4 text": [0, 2, 3],
}
every_family = pytest.mark.parametrize("name", ALL)


def without_layers(model: PreTrainedModel, kept: list[int]) -> Tensor:
    """Logits of ``model`` when each layer that is not kept hands on what it is given."""

    def nothing(_layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    stack = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    handles = [
        layer.register_forward_hook(nothing, with_kwargs=True) for k, layer in enumerate(stack) if k not in kept
    ]
    try:
        return logits_of(model)
    finally:
        for handle in handles:
            handle.remove()


def pruned(name: str) -> tuple[PreTrainedModel, PreTrainedModel, list[int]]:
    teacher = ALL[name].build()
    kept = KEPT.get(name, [0, 2, 3])
    return teacher, prune_layers(teacher, kept).eval(), kept


@every_family
def test_a_student_is_the_teacher_without_the_other_layers(name: str) -> None:
    teacher, student, kept = pruned(name)
    torch.testing.assert_close(logits_of(student), without_layers(teacher, kept), rtol=1e-5, atol=2e-5)
    assert (logits_of(student) - logits_of(teacher)).abs().max() > 1e-2


@every_family
def test_the_cache_changes_no_text_of_a_pruned_student(name: str) -> None:
    student = pruned(name)[1]
    prompts = [[5, 60, 300, 17], [9, 41, 8, 100, 7, 12, 250]]
    found = generate(student, prompts, GenerationSettings(max_new_tokens=10), eos_token_ids=[], pad_token_id=3)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = prompt
        for _ in range(10):
            ids = [*ids, int(logits_of(student, torch.tensor([ids]))[0, -1].argmax())]
        assert answer.tokens == ids[-10:]


@every_family
def test_a_pruned_student_is_read_again_as_it_was_saved(name: str, tmp_path: Any) -> None:
    student = pruned(name)[1]
    student.save_pretrained(tmp_path)
    read = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(read), logits_of(student), rtol=1e-6, atol=1e-6)


def test_layers_that_cannot_be_moved_are_refused_with_the_nearest_choice_that_can() -> None:
    """In Jamba attention comes at even distances, here in layers 1, 5 and 9."""
    options = {**JAMBA, "num_hidden_layers": 12, "expert_layer_period": 1, "expert_layer_offset": 0}
    with pytest.raises(UserError) as caught:
        pruned_config(Family("JambaConfig", options).configuration(), [0, 1, 3, 5, 8, 11])
    assert str(caught.value) == (
        "student.init.layers: got [0, 1, 3, 5, 8, 11], but layer 5 of Jamba cannot become layer 3 of 6: its configuration "
        "makes that one another kind of layer (JambaMambaDecoderLayer, not JambaAttentionDecoderLayer). "
        "student.init.layers: [0, 1, 3, 4, 8, 9] can be kept"
    )


@pytest.mark.parametrize(("name", "config"), [("Jamba", "Jamba"), ("LFM2", "Lfm2")])
def test_a_student_without_any_attention_is_refused(name: str, config: str) -> None:
    """It could be trained, but transformers does not know how far its cache has come."""
    says = rf"no attention layer of {config} \(1, 3\) is among them to answer prompts\. .*: \[0, 1\] can be kept"
    with pytest.raises(UserError, match=says):
        prune_layers(FAMILIES[name].build(), [0, 2])


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("DiffLlamaConfig", {}, r"layer 2 of DiffLlama cannot .*self_attn\.lambda_init: .* \[0, 1, 2\] can be kept"),
        ("MiniCPM3Config", {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                            "qk_nope_head_dim": 4, "v_head_dim": 8},
         r"layer 0 of MiniCPM3 cannot .*\(residual_scale: 0\.80\d+, not 0\.7\)\. Choose others, or give student\.model"),
    ],
)  # fmt: skip
def test_a_layer_that_computes_with_its_number_cannot_get_another(config: str, options: Any, says: str) -> None:
    """With the depth itself no choice is left: the advice is tried before it is given."""
    with pytest.raises(UserError, match=says):
        pruned_config(Family(config, {**SIZES, **options}).configuration(), 3)


def test_what_the_configuration_itself_refuses_is_refused_in_our_words() -> None:
    family = Family("OlmoHybridConfig", {
        **SIZES, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8})  # fmt: skip
    with pytest.raises(UserError, match=r"OlmoHybrid cannot be made of them alone: .*at least one 'linear_attention'"):
        pruned_config(family.configuration(), [1, 3])


@pytest.mark.parametrize("training", [False, True])
def test_a_pruned_student_drops_out_where_its_teacher_does(training: bool) -> None:
    teacher = FAMILIES["GPT-2"].build().train(training)
    assert all(module.training is training for module in prune_layers(teacher, 3).modules())


@pytest.mark.parametrize("count", range(1, 9))
def test_the_advice_can_be_followed(count: int) -> None:
    config = Family("JambaConfig", {**JAMBA, "num_hidden_layers": 8}).configuration()
    try:
        assert pruned_config(config, count).num_hidden_layers == count
    except UserError as error:
        if count == 1:  # the first layer is none with attention
            assert str(error).endswith("(1, 5) is among them to answer prompts. Choose others, or give student.model")
            assert pruned_config(config, [5]).num_hidden_layers == 1
            return
        choice = json.loads("[" + str(error).rpartition("[")[2].partition("]")[0] + "]")
        assert len(choice) == count and choice == sorted(set(choice))
        assert pruned_config(config, choice).num_hidden_layers == count


def test_a_refused_choice_ends_the_run_before_it_begins(workplace: Any) -> None:
    """The doctor's estimate and the run agree, from the configuration alone and from the model."""
    Family("JambaConfig", JAMBA).build().save_pretrained("teacher")
    wanted = recipe(student={"init": {"from": "teacher", "layers": [0, 1, 3]}})
    for refused in (shapes_from_configs, distill):
        with pytest.raises(
            UserError, match=r"layer 3 of Jamba cannot become layer 2 of 3: .* \[0, 1, 2\] can be kept"
        ):
            refused(wanted)
    assert not (workplace / "run").exists()


def test_end_tokens_are_no_list_of_layers() -> None:
    """A list that is by chance as long as there are layers."""
    config = tiny_llama(layers=3).config
    config.eos_token_id = [2, 7, 9]
    assert pruned_config(config, 2).eos_token_id == [2, 7, 9]


def test_a_weight_that_depends_on_the_number_of_layers_is_refused() -> None:
    class Deep(type(tiny_llama())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.per_layer = nn.Parameter(torch.zeros(config.num_hidden_layers, 8))

    with pytest.raises(
        UserError, match=r"student\.init: Deep cannot be pruned: per_layer is 4x8 in the teacher and 2x8 "
    ):
        prune_layers(Deep(tiny_llama(layers=4).config), 2)


def test_a_model_class_of_ones_own_is_pruned_into_itself() -> None:
    class Own(type(tiny_llama())):  # type: ignore[misc]
        """Not what ``AutoModelForCausalLM`` would make of its configuration."""

    assert type(prune_layers(Own(tiny_llama(layers=4).config), 2)) is Own
