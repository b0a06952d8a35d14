"""Models: pruning, the head and the loss in it, vocabularies, LoRA, saving, GGUF. Tiny random weights throughout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from dts_hf.errors import RunError, UserError
from dts_hf.models.adapters import add_lora
from dts_hf.models.head import Head, backbone_of, check_head, head_of, loss_in_head, output_module
from dts_hf.models.loading import ModelSource, load_model, load_student, load_tokenizer
from dts_hf.models.pruning import evenly_spaced, prune_layers
from dts_hf.models.saving import save_student
from dts_hf.models.vocabulary import align_vocabularies
from dts_hf.recipe.schema import Lora, Student
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MIXED = ["full_attention", "sliding_attention"] * (LAYERS // 2)


def random_model(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(layers=LAYERS),
    "llama, untied": lambda: tiny_llama(layers=LAYERS, tie=False),
    "gpt2": lambda: tiny_gpt2(layers=LAYERS),
    "qwen2": lambda: random_model(
        Qwen2Config(**SIZES, layer_types=MIXED, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    ),
    "gemma2": lambda: random_model(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, sliding_window=4, layer_types=MIXED)
    ),
    "cohere": lambda: random_model(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: random_model(GraniteConfig(**SIZES, logits_scaling=4.0)),
}
IDS = torch.tensor([[5, 60, 300, 17, 9, 41, 8, 100]])
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


# ------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    ("count", "total", "kept"),
    [
        (1, 6, [0]),
        (2, 6, [0, 5]),
        (3, 5, [0, 2, 4]),
        (4, 6, [0, 2, 3, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0]),
        (12, 30, [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]),
    ],
)
def test_evenly_spaced(count: int, total: int, kept: list[int]) -> None:
    assert evenly_spaced(count, total) == kept


@pytest.mark.parametrize("total", range(1, 40))
def test_evenly_spaced_keeps_both_ends_and_no_layer_twice(total: int) -> None:
    for count in range(2, total + 1):
        kept = evenly_spaced(count, total)
        assert kept == sorted(set(kept)) and len(kept) == count and (kept[0], kept[-1]) == (0, total - 1)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(
        module for module in backbone_of(model).modules() if isinstance(module, nn.ModuleList) and len(module) > 1
    )


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is output_module(model).weight


def test_the_families_are_tied_and_untied() -> None:
    assert [name for name in FAMILIES if is_tied(FAMILIES[name]())] == ["llama", "gpt2", "gemma2", "cohere"]


@every_family
@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 3]), ([1, 2, 3], [1, 2, 3])])
def test_prune_layers(family: str, layers: int | list[int], kept: list[int]) -> None:
    teacher = FAMILIES[family]()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = prune_layers(teacher, layers)

    for new, old in zip(layers_of(student), (layers_of(teacher)[index] for index in kept), strict=True):
        for (name, value), (_, expected) in zip(new.named_parameters(), old.named_parameters(), strict=True):
            assert torch.equal(value, expected), name
            assert value.data_ptr() != expected.data_ptr(), "the student must not share memory with the teacher"
    for module, original in (
        (student.get_input_embeddings(), teacher.get_input_embeddings()),
        (output_module(student), output_module(teacher)),
    ):
        assert torch.equal(module.weight, original.weight)  # type: ignore[arg-type]
    assert is_tied(student) == is_tied(teacher)

    assert student.config.num_hidden_layers == len(kept)
    if hasattr(teacher.config, "layer_types") and teacher.config.layer_types is not None:
        assert student.config.layer_types == [teacher.config.layer_types[index] for index in kept]
    indices = {getattr(module, "layer_idx", None) for module in student.modules()} - {None}
    assert indices == set(range(len(kept)))
    assert teacher.config.num_hidden_layers == LAYERS
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@every_family
def test_a_pruned_model_generates_the_same_with_and_without_the_cache(family: str) -> None:
    student = prune_layers(FAMILIES[family](), 3).eval()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with_cache = student.generate(IDS, use_cache=True, **options)  # type: ignore[operator]
    without = student.generate(IDS, use_cache=False, **options)  # type: ignore[operator]
    assert torch.equal(with_cache, without)


@every_family
def test_all_layers_kept_is_the_same_function(family: str) -> None:
    teacher = FAMILIES[family]()
    assert torch.equal(logits_of(prune_layers(teacher, LAYERS).eval()), logits_of(teacher))


def test_a_pruned_model_keeps_the_precision_and_the_generation_settings() -> None:
    teacher: Any = tiny_llama(layers=3).bfloat16()
    assert teacher.generation_config is not None
    teacher.generation_config.eos_token_id = [2, 3]
    student = prune_layers(teacher, 2)
    assert student.dtype == torch.bfloat16
    assert student.generation_config is not None and student.generation_config.eos_token_id == [2, 3]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (0, "got 0, expected a number from 1 to 4"),
        (5, "got 5, expected a number from 1 to 4"),
        ([], r"got \[\], expected different indices"),
        ([2, 1], r"got \[2, 1\], .* ascending order from 0 to 3"),
        ([1, 1], r"got \[1, 1\]"),
        ([0, 4], r"got \[0, 4\]"),
        ([-1, 0], r"got \[-1, 0\]"),
    ],
)
def test_layers_that_are_not_there(layers: int | list[int], says: str) -> None:
    with pytest.raises(UserError, match=f"student.init.layers: {says}"):
        prune_layers(tiny_llama(layers=LAYERS), layers)


# ---------------------------------------------------------------------------------------------------------------- head


@every_family
def test_the_head_gives_the_logits_of_the_model(family: str) -> None:
    model = FAMILIES[family]()
    check_head(model, role="student")
    states = backbone_of(model)(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(head_of(model)(states), logits_of(model), rtol=1e-5, atol=1e-5)


def test_the_head_knows_scale_and_soft_cap() -> None:
    assert head_of(FAMILIES["gemma2"]()).softcap == 3.0
    assert head_of(FAMILIES["cohere"]()).logit_scale == 0.25
    assert head_of(FAMILIES["granite"]()).logit_scale == 0.25
    plain = head_of(FAMILIES["llama"]())
    assert (plain.softcap, plain.logit_scale, plain.bias, plain.vocab_size) == (None, 1.0, None, TINY_VOCAB)


@every_family
def test_checking_the_head_changes_nothing(family: str) -> None:
    model = FAMILIES[family]().train()
    check_head(model)
    assert model.training and not output_module(model)._forward_pre_hooks


class OddLlama(LlamaForCausalLM):
    """Does something of its own to the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.abs()
        return output


def test_a_model_that_changes_its_logits_is_refused_by_name() -> None:
    model = OddLlama(tiny_llama().config)
    model.config.name_or_path = "somewhere/odd"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    with pytest.raises(UserError, match=r"teacher: OddLlama \(somewhere/odd\) changes its logits .*soft-cap"):
        check_head(model, role="teacher")


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"LlamaModel has no output embedding .* causal language models"):
        output_module(tiny_llama().model)


@pytest.mark.parametrize("size", [1, 100, TINY_VOCAB])
def test_a_cut_head_gives_the_leading_logits(size: int) -> None:
    model = FAMILIES["gemma2"]()
    states = backbone_of(model)(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(head_of(model).cut(size)(states), logits_of(model)[..., :size], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- loss in the head


def dense_loss(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)[..., 7].sum()


@every_family
@pytest.mark.parametrize("lora", [False, True])
def test_loss_in_head_sees_the_final_states_and_gives_the_same_gradient(family: str, lora: bool) -> None:
    model: nn.Module = FAMILIES[family]()
    expected_states = backbone_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
    if lora:  # the adapters start at zero, so the function is the same
        model = add_lora(model, Lora(target_modules=["q_proj"] if family != "gpt2" else ["c_attn"])).eval()
    dense_loss(model(input_ids=IDS, use_cache=False).logits).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen: list[Tensor] = []

    def fn(states: Tensor, head: Head) -> Tensor:
        seen.append(states)
        return dense_loss(head(states))

    with loss_in_head(model, fn):
        loss = model(input_ids=IDS, use_cache=False).logits
    loss.backward()

    assert len(seen) == 1 and loss.shape == ()
    torch.testing.assert_close(seen[0], expected_states, rtol=1e-5, atol=1e-5)
    assert expected and expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@every_family
def test_the_models_own_scale_and_cap_stay_out_of_the_loss(family: str) -> None:
    """What ``fn`` returns comes out unchanged: neither scaled nor squashed."""
    model = FAMILIES[family]()
    with loss_in_head(model, lambda states, head: torch.tensor(1234.5)):
        assert model(input_ids=IDS, use_cache=False).logits.item() == 1234.5


@every_family
@pytest.mark.parametrize("fails", [False, True])
def test_loss_in_head_puts_everything_back(family: str, fails: bool) -> None:
    model = FAMILIES[family]()
    before, config = logits_of(model), model.config.to_dict()
    scale = getattr(model, "logit_scale", None)

    def fn(states: Tensor, head: Head) -> Tensor:
        if fails:
            raise RuntimeError("in the loss")
        return states.sum()

    try:
        with loss_in_head(model, fn):
            model(input_ids=IDS, use_cache=False)
    except RuntimeError as error:
        assert fails and str(error) == "in the loss"
    assert "forward" not in vars(output_module(model))
    assert model.config.to_dict() == config
    assert getattr(model, "logit_scale", None) == scale
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("fails", [False, True])
def test_loss_in_head_gives_an_output_layer_its_hook_back(fails: bool) -> None:
    """accelerate puts what moves a dispatched model's inputs and weights where the loss is put: into ``forward``."""
    model = FAMILIES["llama"]()
    add_hook_to_module(output_module(model), AlignDevicesHook("cpu"))
    hooked = vars(output_module(model))["forward"]
    with contextlib.suppress(RuntimeError), loss_in_head(model, lambda states, head: states.sum()):
        model(input_ids=IDS, use_cache=False)
        if fails:
            raise RuntimeError
    assert vars(output_module(model))["forward"] is hooked


# -------------------------------------------------------------------------------------------------------- vocabularies


def with_words_swapped(tokenizer: PreTrainedTokenizerFast, first: int, second: int) -> PreTrainedTokenizerFast:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    words = {index: word for word, index in vocabulary.items()}
    vocabulary[words[first]], vocabulary[words[second]] = second, first
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>")


def with_more_words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["<one>", "<two>"])
    return tokenizer


def test_strict_takes_equal_widths_whole() -> None:
    plan = align_vocabularies(tiny_llama(vocab=352), tiny_gpt2(vocab=352), tiny_tokenizer(), tiny_tokenizer(pad="own"))
    assert (plan.size, plan.note) == (352, "")


def test_strict_refuses_padded_widths_and_says_what_to_do() -> None:
    with pytest.raises(
        UserError, match=r"vocab_alignment: strict, .* 336 rows .* 352\b.*320 entries.*truncate_to_token"
    ):
        align_vocabularies(tiny_llama(vocab=336), tiny_llama(vocab=352), tiny_tokenizer(), tiny_tokenizer())


@pytest.mark.parametrize("mode", ["truncate_to_tokenizer", "intersect"])
def test_padding_is_cut_and_noted(mode: str) -> None:
    models = tiny_llama(vocab=336), tiny_llama(vocab=352)
    plan = align_vocabularies(*models, tiny_tokenizer(), tiny_tokenizer(), mode)
    assert plan.size == TINY_VOCAB
    assert plan.note == (
        f"vocabulary cut to 320 ids ({mode}): left out 16 of the student's 336 and 32 of the teacher's 352"
    )


def test_nothing_to_cut_is_not_noted() -> None:
    plan = align_vocabularies(tiny_llama(), tiny_llama(), tiny_tokenizer(), tiny_tokenizer(), "truncate_to_tokenizer")
    assert (plan.size, plan.note) == (TINY_VOCAB, "")


@pytest.mark.parametrize("mode", ["strict", "truncate_to_tokenizer", "intersect"])
def test_other_tokenizers_are_refused_with_the_first_id_that_differs(mode: str) -> None:
    other = with_words_swapped(tiny_tokenizer(), 40, 41)
    ours, theirs = tiny_tokenizer().convert_ids_to_tokens(40), other.convert_ids_to_tokens(40)
    with pytest.raises(UserError, match=f"different tokenizers.* id 40 is {ours!r} .* {theirs!r} for the teacher"):
        align_vocabularies(tiny_llama(), tiny_llama(), tiny_tokenizer(), other, mode)


@pytest.mark.parametrize("mode", ["strict", "truncate_to_tokenizer"])
def test_extra_words_are_refused_unless_only_the_shared_ids_are_wanted(mode: str) -> None:
    larger = with_more_words(tiny_tokenizer())
    models = tiny_llama(), tiny_llama(vocab=322)
    with pytest.raises(UserError, match=r"student does not know the tokens from id 320 on .*'<one>', '<two>'"):
        align_vocabularies(*models, tiny_tokenizer(), larger, mode)
    plan = align_vocabularies(*models, tiny_tokenizer(), larger, "intersect")
    assert plan.size == TINY_VOCAB and "2 of the teacher's 322" in plan.note


# ------------------------------------------------------------------------------------------------------ LoRA and saving


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved small model, as a student that is loaded by name."""
    tiny_llama(seed=4).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted_student(base: Path, **options: Any) -> nn.Module:
    model = load_student(Student(model=str(base), lora=Lora(r=4, **options)), tiny_llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("merge", [True, False])
def test_a_saved_lora_student_is_the_trained_one(
    base: Path, tmp_path: Path, targets: str | list[str], merge: bool
) -> None:
    model = adapted_student(base, target_modules=targets)
    trained = logits_of(model)
    assert not torch.allclose(trained, logits_of(tiny_llama(seed=4)), atol=1e-2), "the adapters do nothing"
    save_student(model, tiny_tokenizer(), tmp_path / "final", merge_lora=merge)

    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert ("model.safetensors" in files) == merge and ("adapter_model.safetensors" in files) != merge
    loaded = load_model(str(tmp_path / "final"), key="model").eval()
    torch.testing.assert_close(logits_of(loaded), trained, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in loaded.named_parameters()) or not merge


def test_lora_trains_the_adapters_alone(base: Path) -> None:
    model = adapted_student(base)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_wrong_lora_layers(base: Path) -> None:
    with pytest.raises(
        UserError, match=r"target_modules: got \['q_prj'\], expected 'all-linear' or .*q_proj"
    ) as caught:
        adapted_student(base, target_modules=["q_prj"])
    assert "lm_head" not in str(caught.value)
    with pytest.raises(UserError, match="adapter sits on the output layer"):
        adapted_student(base, target_modules=["q_proj", "lm_head"])


def test_adapted_model_that_cannot_run_is_named() -> None:
    """PhiMoE's router is a linear layer that returns a tuple, which an adapter on it cannot read."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = PhimoeConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, pad_token_id=0, **sizes)
    adapted = add_lora(PhimoeForCausalLM(config), Lora(r=2, alpha=4))
    with pytest.raises(UserError, match=r"student: PeftModelForCausalLM cannot answer a few tokens: .*tuple"):
        check_head(adapted, role="student")


@every_family
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model, tokenizer = prune_layers(FAMILIES[family](), 2).eval(), tiny_tokenizer()
    model.config.use_cache = False  # as the Trainer leaves it
    save_student(model, tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    loaded = load_model(str(tmp_path), key="model").eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.use_cache and loaded.config.num_hidden_layers == 2
    words = load_tokenizer(str(tmp_path), key="model")
    assert words("Name three trees.")["input_ids"] == tokenizer("Name three trees.")["input_ids"]
    assert words.chat_template == tokenizer.chat_template and words.eos_token_id == tokenizer.eos_token_id


def test_a_saved_student_is_whole_at_every_moment(tmp_path: Path) -> None:
    """Seen before each change to a file or folder, which is where a kill can come between."""
    final, seen, watching = tmp_path / "final", [], True

    def look(event: str, _: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            seen.append(frozenset(os.listdir(final)) if os.path.lexists(final) else None)

    sys.addaudithook(look)  # for the rest of the process
    for seed in (1, 2):
        save_student(tiny_llama(seed=seed), tiny_tokenizer(), final)
    watching = False
    whole = frozenset(os.listdir(final))
    assert set(seen) == {None, whole} and "model.safetensors" in whole and len(whole) > 3
    assert os.listdir(tmp_path) == ["final"]
    assert torch.equal(logits_of(load_model(str(final), key="model").eval()), logits_of(tiny_llama(seed=2).eval()))


def test_a_failed_save_leaves_the_student_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    save_student(tiny_llama(seed=1), tiny_tokenizer(), final)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_student(tiny_llama(seed=2), tiny_tokenizer(), final)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["final"]
    assert torch.equal(logits_of(load_model(str(final), key="model").eval()), logits_of(tiny_llama(seed=1).eval()))


def test_a_student_is_not_saved_behind_a_link(tmp_path: Path) -> None:
    """What else lies there would be gone. A folder that lies behind a link is another matter."""
    (tmp_path / "drive" / "student").mkdir(parents=True)
    (tmp_path / "drive" / "student" / "thesis.tex").write_text("x")
    for name in ("final", ".final.unfinished"):
        (tmp_path / name).symlink_to(tmp_path / "drive" / "student")
        with pytest.raises((RunError, FileExistsError), match=name):
            save_student(tiny_llama(), tiny_tokenizer(), tmp_path / "final")
        (tmp_path / name).unlink()
    assert os.listdir(tmp_path / "drive" / "student") == ["thesis.tex"]
    (tmp_path / "runs").symlink_to(tmp_path / "drive")
    for _ in range(2):
        save_student(tiny_llama(), tiny_tokenizer(), tmp_path / "runs" / "final")
    assert (tmp_path / "drive" / "final" / "model.safetensors").is_file()
    assert sorted(os.listdir(tmp_path / "drive")) == ["final", "student"]


def test_a_tokenizer_without_an_end_is_refused_and_one_without_padding_is_given_one(tmp_path: Path) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "endless")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path / "padless")
    with pytest.raises(UserError, match=r"teacher.model: the tokenizer of .* has no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "endless"), key="teacher.model")
    tokenizer = load_tokenizer(str(tmp_path / "padless"), key="teacher.model")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and len(tokenizer) == TINY_VOCAB


def test_weights_that_are_not_in_the_files_are_never_made_up(tmp_path: Path) -> None:
    model = tiny_llama(tie=False)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "lm_head" not in k})
    with pytest.raises(UserError, match=r"teacher.model: the files .* lack 1 weights of LlamaForCausalLM.*lm_head"):
        load_model(str(tmp_path), key="teacher.model")


# ------------------------------------------------------------------------------------------------- where models are


def test_a_name_or_a_folder_is_taken_as_it_is() -> None:
    assert ModelSource.resolve("owner/name", "teacher.model") == ModelSource("owner/name")
    assert ModelSource.resolve("owner/name", "teacher.model").options == {}


def test_a_gguf_file_is_a_folder_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    source = ModelSource.resolve(str(tmp_path / "m.gguf"), "teacher.model")
    assert source == ModelSource(str(tmp_path), "m.gguf") and source.options == {"gguf_file": "m.gguf"}


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llm_of_ours"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('its dependencies are not there')")
    (folder / "m.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("llm_of_ours", "llm-of-ours"):  # the import name, or the name that pip knows
        assert ModelSource.resolve(f"package:{name}/m.gguf", "k") == ModelSource(str(folder), "m.gguf")
    with pytest.raises(UserError, match=r"k: no file 'n.gguf' .* the folder holds m.gguf\. Did you mean 'm.gguf'\?"):
        ModelSource.resolve("package:llm_of_ours/n.gguf", "k")


def test_a_gguf_file_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^teacher.model: '.*m.gguf' .* package gguf: pip install 'dts-hf\[gguf\]'$"):
        ModelSource.resolve(str(tmp_path / "m.gguf"), "teacher.model")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("package:no_llm/m.gguf", "needs the Python package 'no_llm', which is not installed: .*no-llm"),
        ("package:/m.gguf", "needs the Python package ''"),
        ("package:../x/m.gguf", "needs the Python package '..'"),
        ("package:json/m.gguf", "no file 'm.gguf'"),
        ("nowhere/m.gguf", "no file 'm.gguf' for 'nowhere/m.gguf'"),
    ],
)
def test_a_model_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^teacher.model: .*{says}"):
        ModelSource.resolve(name, "teacher.model")


# ---------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, tensors_per_file: int = 0
) -> dict[str, Tensor]:
    """Write ``model`` in 8-bit blocks (vectors in full); returns the weights that a reader must find.

    ``tensors_per_file``: several files as llama.cpp splits them, ``NAME-00001-of-00003.gguf``; 0: one.
    """
    gguf = pytest.importorskip("gguf")
    config, kept = model.config, {}
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_file)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    short = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in short.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = gguf.GGMLQuantizationType.Q8_0
    for ours, theirs in names.items():
        values = model.state_dict()[ours].numpy()
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
            kept[ours] = torch.from_numpy(values)
            continue
        count = next((n for word, n in heads.items() if f".{word}." in theirs), None)
        rows = values if count is None else rotated(values, count)
        blocks = gguf.quants.quantize(np.ascontiguousarray(rows), kind)
        writer.add_tensor(theirs, blocks, raw_dtype=kind)
        read = gguf.quants.dequantize(blocks, kind)
        kept[ours] = torch.from_numpy(read if count is None else rotated_back(read, count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """From halves to pairs: GGUF's order of the rows of a head for rotary positions."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rotated_back(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_file_is_read_dequantised_trainable_and_savable(tmp_path: Path) -> None:
    original, tokenizer = tiny_llama(), tiny_tokenizer()
    weights = write_gguf(original, tokenizer, tmp_path / "tiny.gguf")
    source = str(tmp_path / "tiny.gguf")

    words = load_tokenizer(source, key="teacher.model")
    assert words("Name three fruits.")["input_ids"] == tokenizer("Name three fruits.")["input_ids"]
    assert words.eos_token_id == tokenizer.eos_token_id

    model = load_model(source, key="teacher.model").eval()
    assert type(model) is LlamaForCausalLM and not getattr(model, "is_quantized", False)
    state = model.state_dict()
    for name, expected in weights.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-6)
    original.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits_of(model), logits_of(original), rtol=1e-4, atol=1e-4)
    check_head(model, role="teacher")

    student = prune_layers(model, 1)
    student(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    for name, saved in (("whole", model), ("pruned", student)):
        save_student(saved, words, tmp_path / name)
        assert torch.equal(logits_of(load_model(str(tmp_path / name), key="model")), logits_of(saved.eval()))
        assert AutoTokenizer.from_pretrained(tmp_path / name)("Name.")["input_ids"] == words("Name.")["input_ids"]


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_a_split_gguf_file_is_the_whole_one(tmp_path: Path, hf_home: Path) -> None:
    weights = write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.gguf", tensors_per_file=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2
    for _ in range(2):  # put together once, then found
        model = load_model(str(parts[0]), key="teacher.model")
        for name, expected in weights.items():
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-6)
    assert [path.name for path in hf_home.rglob("*.gguf")] == ["tiny.gguf"]
    assert load_tokenizer(str(parts[0]), key="k")("Name.")["input_ids"] == tiny_tokenizer()("Name.")["input_ids"]
    parts[1].unlink()
    with pytest.raises(
        UserError, match=r"^teacher.model: .*tiny-00001-of.* is in parts, of which there is no part 2$"
    ):
        load_model(str(parts[0]), key="teacher.model")


@pytest.mark.parametrize("name", ["package:big-llm/big.gguf", "package:big_llm"])
def test_pieces_in_several_packages_are_joined(
    name: str, tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "big.gguf")
    content = (tmp_path / "big.gguf").read_bytes()
    third = len(content) // 3 + 1
    for number in range(4):
        folder = tmp_path / "site" / f"big_llm{f'_part{number}' if number else ''}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        if number:
            (folder / f"big.gguf.part0{number - 1}").write_bytes(content[(number - 1) * third : number * third])
    sums = tmp_path / "site" / "big_llm" / "data" / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(content).hexdigest()}  big.gguf\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = ModelSource.resolve(name, "k")
    assert (Path(source.location) / "big.gguf").read_bytes() == content and source.gguf_file == "big.gguf"
    assert Path(source.location).is_relative_to(hf_home)
    (tmp_path / "site" / "big_llm_part2" / "data" / "big.gguf.part01").unlink()
    with pytest.raises(UserError, match=r"^k: 'package:big.llm.*' is in parts, of which there is no part 1$"):
        ModelSource.resolve(name, "k")
    (tmp_path / "site" / "big_llm_part2" / "data" / "big.gguf.part01").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"the parts do not make the file of .*SHA256SUMS: one is damaged or missing"):
        ModelSource.resolve(name, "k")
    assert not list(hf_home.rglob("*.tmp"))


def test_a_large_tokenizer_of_a_gguf_file_is_converted_once(
    tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import gguf as conversion

    write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    converted = []
    convert = conversion.convert_gguf_tokenizer
    monkeypatch.setattr(conversion, "convert_gguf_tokenizer", lambda *a: converted.append(a) or convert(*a))
    source = str(tmp_path / "tiny.gguf")
    load_tokenizer(source, key="k")
    assert len(converted) == 1 and not hf_home.exists()  # a small one is not worth a file
    monkeypatch.setattr("dts_hf.models.gguf_files.LARGE_VOCABULARY", 10)
    first, second = (load_tokenizer(source, key="k") for _ in range(2))
    assert len(converted) == 2
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str() and type(first) is type(second)
    assert first.name_or_path == second.name_or_path
    for number, tokenizer in enumerate((first, second)):
        tokenizer.save_pretrained(tmp_path / str(number))
    saved = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("0", "1")]
    assert saved[0]["tokenizer.json"] == saved[1]["tokenizer.json"]
    configs = [json.loads(files["tokenizer_config.json"]) for files in saved]
    assert configs[0] == configs[1]
    os.utime(source, ns=(1, 1))  # another file, for all we know
    load_tokenizer(source, key="k")
    assert len(converted) == 3
    for file in hf_home.rglob("tokenizer.json"):
        file.write_text("{")
    load_tokenizer(source, key="k")
    assert len(converted) == 4


def test_gguf_weights_are_asked_for_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed blocks are slow and cannot be trained; a tiny model is unpacked anyway, so look at what is asked for."""
    asked: dict[str, Any] = {}

    def look(location: str, **options: Any) -> None:
        asked.update(options)
        raise OSError("seen enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", look)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="seen enough"):
        load_model(str(tmp_path / "m.gguf"), key="teacher.model", dtype="bfloat16")
    assert asked["quantization_config"].dequantize and asked["dtype"] == torch.bfloat16
    with pytest.raises(UserError, match="seen enough"):
        load_model(str(tmp_path), key="teacher.model")
    assert asked["use_safetensors"] is True and asked["trust_remote_code"] is False


def test_quantisation_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match=r"teacher.model: .* is a GGUF file, which is dequantised; expected .* 'none'"):
        load_model(str(tmp_path / "m.gguf"), key="teacher.model", quantization="4bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_needs_bitsandbytes(base: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.quantization: '8bit' needs the package bitsandbytes: pip install"):
        load_model(str(base), key="teacher.model", quantization="8bit")
