"""Which models a trainer takes: what cannot be distilled is refused in one message before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from dts_hf.errors import UserError
from dts_hf.models.adapters import add_lora
from dts_hf.models.head import Head, check_head, loss_in_head
from dts_hf.models.pruning import prune_layers
from dts_hf.recipe.schema import Lora
from dts_hf.teachers.live import LiveTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.families import HIDDEN, SIZES, VOCAB
from tests.support.tiny import tiny_llama, tiny_tokenizer

ENCODER = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
ROWS = [{"input_ids": [5, 6, 7, 8 + k], "labels": [-100, 6, 7, 8 + k]} for k in range(4)]


def trainer(folder: Any, student: Any, teacher: Any, **arguments: Any) -> DistillationTrainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2, **arguments,
    )  # fmt: skip
    return DistillationTrainer(
        student, teacher, args=args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tiny_tokenizer()
    )


def with_virtual_tokens(kind: type) -> nn.Module:
    return peft.get_peft_model(tiny_llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))  # type: ignore[return-value]


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, **heads)
    return transformers.BartForConditionalGeneration(config)


def recurrent_gemma() -> nn.Module:
    config = transformers.RecurrentGemmaConfig(**{**ENCODER, "num_hidden_layers": 3}, lru_width=32)
    return transformers.RecurrentGemmaForCausalLM(config)


class Capped(transformers.LlamaForCausalLM):
    """Bounds its logits under a name of its own; random logits are far below the bound, so that nothing shows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1000.0 * torch.tanh(output.logits / 1000.0)
        return output


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "T5": (t5, "T5ForConditionalGeneration is an encoder-decoder model; dts_hf distils causal"),
    "BART": (bart, "BartForConditionalGeneration is an encoder-decoder model"),
    "BERT": (
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**ENCODER)),
        "BertLMHeadModel is not causal",
    ),
    "XLNet": (
        lambda: transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)
        ),
        "XLNetLMHeadModel is not causal: its answer for one token depends on the tokens behind it",
    ),
    "RecurrentGemma": (
        recurrent_gemma,
        "RecurrentGemmaForCausalLM changes its logits in a way that dts_hf does not know",
    ),
    "xLSTM": (
        lambda: transformers.xLSTMForCausalLM(
            transformers.xLSTMConfig(vocab_size=VOCAB, hidden_size=32, num_blocks=2, num_heads=4)
        ),
        "xLSTMForCausalLM cannot compute a loss in the place of its output layer",
    ),
    "a soft-cap of its own": (
        lambda: Capped(tiny_llama().config),
        "Capped changes its logits in a way that dts_hf does not know",
    ),
    "prompt tuning": (
        lambda: with_virtual_tokens(peft.PromptTuningConfig),
        "has an adapter for prompt tuning, which puts virtual tokens before every row.* Use LoRA",
    ),
    "prefix tuning": (
        lambda: with_virtual_tokens(peft.PrefixTuningConfig),
        "has an adapter for prefix tuning, which puts virtual tokens",
    ),
    "no head": (lambda: tiny_llama().model, "LlamaModel has no output embedding"),
    "no language model": (lambda: nn.Linear(4, 4), "Linear has no output embedding"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_distilled_is_refused_in_one_message(name: str, role: str, tmp_path: Any) -> None:
    make, says = REFUSED[name]
    models: dict[str, nn.Module] = {"student": tiny_llama(), "teacher": tiny_llama(seed=1), role: make()}
    with pytest.raises(UserError, match=says) as caught:
        trainer(tmp_path, models["student"], models["teacher"])
    assert "\n" not in str(caught.value)


def test_check_head_says_whose_model_it_is() -> None:
    model = bart()
    model.config.name_or_path = "somewhere/bart"  # type: ignore[union-attr, assignment]
    with pytest.raises(UserError, match=r"^teacher: BartForConditionalGeneration \(somewhere/bart\) is an encoder"):
        check_head(model, role="teacher")


def test_llama4_text_is_distilled_and_pruned(tmp_path: Any) -> None:
    """Its class names a backbone that it does not have under that name."""
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8,
        interleave_moe_layer_step=2,
    )  # fmt: skip
    teacher = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_(std=0.2)  # its experts come without values
    same = trainer(tmp_path, copy.deepcopy(teacher), teacher)
    assert abs(same.evaluate()["eval_kl"]) <= 1e-6
    run = trainer(tmp_path, prune_layers(teacher, [0, 3]), teacher)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_gemma3n_keeps_its_soft_cap(tmp_path: Any) -> None:
    """Its configuration takes nothing but a number for the soft-cap, so that it was not to be switched off."""
    config = transformers.Gemma3nTextConfig(
        **SIZES, head_dim=8, num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
        laurel_rank=8, final_logit_softcapping=3.0, activation_sparsity_pattern=None,
        layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    teacher = transformers.Gemma3nForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_(std=0.3)
    student = copy.deepcopy(teacher)
    run = trainer(tmp_path, student, teacher)
    assert abs(run.evaluate()["eval_kl"]) <= 1e-6
    run.train()
    assert student.config.final_logit_softcapping == 3.0


# ------------------------------------------------------------------------------------------------ teacher and student


def lora_on(model: Any) -> nn.Module:
    return add_lora(model, Lora(target_modules=["q_proj"]))


def shared_storage(teacher: Any) -> nn.Module:
    student = copy.deepcopy(teacher)
    student.load_state_dict(teacher.state_dict(), assign=True)
    return student  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda teacher: teacher, "teacher: is the same object as the student; load the model twice"),
        (lora_on, r"teacher: shares \d+ weights with the student, such as .* Load the model twice"),
        (shared_storage, r"teacher: shares 20 weights with the student, such as model\.embed_tokens\.weight"),
    ],
    ids=["object", "lora", "storage"],
)
def test_a_teacher_that_is_the_student_is_refused_and_not_frozen(
    make: Callable[[Any], nn.Module], says: str, wrapped: bool, tmp_path: Any
) -> None:
    teacher = tiny_llama()
    student = make(teacher)
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    with pytest.raises(UserError, match=says):
        trainer(tmp_path, student, LiveTeacher(teacher) if wrapped else teacher)
    if not wrapped:  # LiveTeacher itself freezes what it is given
        assert [name for name, weight in student.named_parameters() if weight.requires_grad] == trained


def test_lora_on_a_copy_of_the_teacher_is_taken(tmp_path: Any) -> None:
    teacher = tiny_llama()
    assert abs(trainer(tmp_path, lora_on(copy.deepcopy(teacher)), teacher).evaluate()["eval_kl"]) <= 1e-6


# ------------------------------------------------------------------------------------------------------ a second trainer


@pytest.mark.parametrize("second", [False, True])
def test_a_student_of_an_earlier_trainer_is_trained_as_a_new_one_would_be(second: bool, tmp_path: Any) -> None:
    """Autocast of the first trainer must neither be refused, nor stay on, nor keep that of the second one away."""
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    trainer(tmp_path, student, teacher, bf16=True).train()
    new = tiny_llama()
    new.load_state_dict(student.state_dict())
    found, expected = (trainer(tmp_path, model, teacher, bf16=second) for model in (student, new))
    for run in (found, expected):
        run.train()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, new.state_dict()[name]), name
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


@pytest.mark.parametrize("second", [False, True])
def test_a_student_of_an_earlier_trainer_teaches_as_a_new_model_would(second: bool, tmp_path: Any) -> None:
    """As in a chain of assistants, or a born-again student."""
    teacher = tiny_llama(seed=1)
    trainer(tmp_path, teacher, tiny_llama(seed=2), bf16=True).train()
    new = tiny_llama()
    new.load_state_dict(teacher.state_dict())
    losses = [trainer(tmp_path, tiny_llama(), model, bf16=second).evaluate()["eval_loss"] for model in (teacher, new)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_compiled_student_of_an_earlier_trainer_leaves_its_autocast(role: str, tmp_path: Any) -> None:
    """As ``trainer.model_wrapped`` of a trainer with ``torch_compile`` in a notebook: it was refused."""
    student = tiny_llama()
    trainer(tmp_path, student, tiny_llama(seed=1), bf16=True).train()
    compiled = torch.compile(student, backend="eager")  # behind autocast, as accelerate does it
    models = {"student": tiny_llama(seed=2), "teacher": tiny_llama(seed=3), role: compiled}
    second = trainer(tmp_path, models["student"], models["teacher"])
    assert (second.model if role == "student" else second.teacher.model) is compiled  # type: ignore[attr-defined]
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & {*vars(student)}


@pytest.mark.parametrize("hooked", [False, True])
def test_a_student_of_an_earlier_trainer_has_its_own_forward_again(hooked: bool, tmp_path: Any) -> None:
    """Transformers' own decorators are a part of it: without one, ``return_dict=False`` was an error."""
    student, calls = tiny_llama(), []
    if hooked:
        own = student.forward
        student.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)  # type: ignore[method-assign]
    before = vars(student).get("forward")
    trainer(tmp_path, student, tiny_llama(seed=1), bf16=True).train()
    copied = copy.deepcopy(student)
    for model in (student, copied):
        if model is student or not hooked:  # a function in the place of a method is no copy's own
            trainer(tmp_path, model, tiny_llama(seed=1))
            assert isinstance(model(input_ids=torch.tensor([[1, 2]]), return_dict=False), tuple)
    assert vars(student).get("forward") is before and bool(calls) == hooked
    assert hooked or copied.forward.__self__ is copied  # type: ignore[attr-defined]


def in_autocast(model: Any) -> Any:
    """With what accelerate puts around a forward in mixed precision: bf16 inside, fp32 outside."""
    from accelerate.utils import convert_outputs_to_fp32

    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))
    return model


def test_the_probe_knows_the_precision_in_which_a_wrapped_forward_computes() -> None:
    check_head(in_autocast(tiny_llama(hidden=64)))
    with pytest.raises(UserError, match="changes its logits in a way"):
        check_head(in_autocast(Capped(tiny_llama().config)))


def test_the_probe_leaves_no_trace() -> None:
    model = tiny_llama().train()
    state = torch.get_rng_state()
    check_head(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_sees_what_the_loss_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is right outside of the loss and wrong inside is refused: Gemma 2's soft-cap was lost in this way."""
    import dts_hf.models.head as head_module

    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    check_head(model)

    def without_cap(owner: nn.Module, fn: Callable[..., Any]) -> Any:
        return loss_in_head(owner, lambda states, head: fn(states, Head(head.weight, head.bias)))

    monkeypatch.setattr(head_module, "loss_in_head", without_cap)
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes its logits"):
        check_head(model)
