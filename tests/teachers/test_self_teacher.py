"""A student that teaches itself, through ``DistillationTrainer``: its first weights, or a running mean of them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from dts_hf.errors import UserError
from dts_hf.loss.statistics import KL
from dts_hf.teachers.self_teacher import CopyTeacher, SelfTeacher, SharedTeacher
from dts_hf.training.self_teaching import EMA_WEIGHTS
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, losses, step_gradients, trainer_for

#: Four names of one thing: who teaches, and whether through an adapter.
KINDS = [("base", False), ("base", True), ("ema", False), ("ema", True)]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def dropping(seed: int = 0) -> torch.nn.Module:
    """A student with dropout."""
    student = tiny_gpt2(seed=seed)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return student


def taught_by_itself(folder, weights="ema", lora=False, model=None, teacher=None, **more):
    given = {"peft_config": LoraConfig(**LORA, lora_dropout=more.pop("lora_dropout", 0.0))} if lora else {}
    model = tiny_llama(seed=0) if model is None else model
    return trainer_for(folder, model, teacher or SelfTeacher(weights), **{"temperature": 2.0, **given, **more})


def batch_of(trainer, size=6):
    return trainer.collate([trainer.train_dataset[k] for k in range(size)])


def kd_of(trainer, batch, training=False):
    """The KL at T = 1 that is reported for a batch, per label."""
    trainer.model.train(training)
    trainer.sums.eval_meter = type(trainer.sums.eval_meter)()
    trainer.sums.step_meter = type(trainer.sums.step_meter)()
    trainer.compute_loss(trainer.model, batch)
    meter = trainer.sums.step_meter if training else trainer.sums.eval_meter
    totals = meter.reduce(trainer.accelerator)
    return KL.number(totals)


# ---------------------------------------------------------------------------------------------------- before step 1


@pytest.mark.parametrize(("weights", "lora"), KINDS)
def test_before_the_first_step_it_has_nothing_to_teach(tmp_path, weights, lora):
    trainer = taught_by_itself(tmp_path, weights, lora, kd_ratio=1.0)
    batch = batch_of(trainer)
    assert abs(kd_of(trainer, batch, training=True)) < 1e-6
    gradients = step_gradients(trainer, [batch])
    alone = step_gradients(taught_by_itself(tmp_path, weights, lora, kd_ratio=0.0), [batch])
    size = max(float(gradient.norm()) for gradient in alone.values())
    assert gradients and max(float(gradient.norm()) for gradient in gradients.values()) < 1e-6 * size


@pytest.mark.parametrize(("weights", "lora"), KINDS)
def test_it_teaches_without_dropout_and_leaves_the_student_as_it_was(tmp_path, weights, lora):
    more = {"options": {"activation_checkpointing": True}, "lora_dropout": 0.3}
    student = dropping()
    student.transformer.h[1].eval()  # one that somebody has frozen
    trainer = taught_by_itself(tmp_path, weights, lora, student, **(more if lora else {"options": more["options"]}))
    batch = batch_of(trainer)
    labels = batch.pop("labels")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    trainer.model.train()
    trainer.model.activation_checkpointing_enable()
    next(iter(trainer.model.modules())).training = True
    before = {name: (module.training, vars(module).get("_disable_adapters"), vars(module).get("gradient_checkpointing"))
              for name, module in trainer.model.named_modules()}  # fmt: skip
    grads = {name: weight.requires_grad for name, weight in trainer.model.named_parameters()}
    first, second = (trainer.teacher.states(inputs, labels) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert {name: weight.requires_grad for name, weight in trainer.model.named_parameters()} == grads
    assert before == {
        name: (module.training, vars(module).get("_disable_adapters"), vars(module).get("gradient_checkpointing"))
        for name, module in trainer.model.named_modules()
    }
    assert kd_of(trainer, {**batch, "labels": labels}, training=True) > 1e-3  # the student alone has dropout


@pytest.mark.parametrize("weights", ["base", "ema"])
def test_the_student_is_as_it_was_after_an_error(tmp_path, weights):
    trainer = taught_by_itself(tmp_path, weights, lora=True)
    trainer.model.train()
    own = {name: weight.data_ptr() for name, weight in trainer.model.named_parameters()}
    with pytest.raises((TypeError, ValueError)):
        trainer.teacher.states({"nothing": None}, torch.zeros(1, 2, dtype=torch.int64))
    assert all(module.training for module in trainer.model.modules())
    assert not any(getattr(module, "_disable_adapters", False) for module in trainer.model.modules())
    assert {name: weight.data_ptr() for name, weight in trainer.model.named_parameters()} == own


# ---------------------------------------------------------------------------------------------------------- no second copy


def storages(*things) -> int:
    """Bytes of all weights, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in things}
    return sum(found.values())


def test_an_adapter_shares_its_base_and_full_training_has_one_frozen_copy(tmp_path):
    trainer = taught_by_itself(tmp_path / "a", "base", lora=True)
    assert isinstance(trainer.teacher, SharedTeacher) and trainer.teacher.model is trainer.model
    assert trainer.teacher.head.weight is trainer.model.get_output_embeddings().weight
    assert not [value for value in vars(trainer.teacher).values() if isinstance(value, torch.Tensor)]

    trainer = taught_by_itself(tmp_path / "b", "ema", lora=True)
    adapter = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    mean = [*trainer.teacher.mean.values.values()]
    assert storages(*mean) == storages(*adapter) and storages(*mean, *adapter) == 2 * storages(*adapter)

    for weights in ("base", "ema"):  # whose embeddings are tied
        trainer = taught_by_itself(tmp_path / "c", weights)
        assert isinstance(trainer.teacher, CopyTeacher)
        student, copied = ([*model.parameters()] for model in (trainer.model, trainer.teacher.model))
        assert storages(*student, *copied) == 2 * storages(*student)
        mean = trainer.teacher.mean
        assert mean is None or storages(*copied, *mean.values.values()) == storages(*copied)
        assert not any(weight.requires_grad for weight in copied)


# ------------------------------------------------------------------------------------------------------------- first weights


class TaughtBy(TrainerCallback):
    """Keeps the teacher's states of one batch at every step."""

    def __init__(self, trainer, batch):
        self.trainer, self.batch, self.found = trainer, batch, []

    def on_step_end(self, *_, **kwargs):
        inputs = {key: self.batch[key] for key in ("input_ids", "attention_mask")}
        self.found.append(self.trainer.teacher.states(inputs, self.batch["labels"]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_its_first_weights_are_a_frozen_copy(tmp_path, lora, packing):
    more = {"packing": packing, "options": {"max_steps": 4, "learning_rate": 1e-2}, "temperature": {"name": "dts"}}
    itself = taught_by_itself(tmp_path / "a", "base", lora, **more)
    torch.manual_seed(7)  # of the adapter
    itself = taught_by_itself(tmp_path / "a", "base", lora, **more)
    torch.manual_seed(7)
    other = taught_by_itself(tmp_path / "b", "base", lora, teacher=copy.deepcopy(tiny_llama(seed=0)), **more)
    itself.train()
    other.train()
    assert losses(itself)[0] > 0 and len(losses(itself)) == 4
    torch.testing.assert_close(losses(itself), losses(other), rtol=1e-6, atol=1e-7)
    assert losses(itself)[3] != losses(itself)[0]
    ours, theirs = itself.model.state_dict(), other.model.state_dict()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6


# ------------------------------------------------------------------------------------------------------------ running mean


class Weights(TrainerCallback):
    """Keeps the trained weights of every step, before the first one and after each."""

    def __init__(self, trainer):
        self.trainer, self.found = trainer, []
        self.keep()

    def keep(self):
        own = {n: w.detach().double().clone() for n, w in self.trainer.model.named_parameters() if w.requires_grad}
        self.found.append(own)

    def on_step_end(self, *_, **kwargs):
        self.keep()


def closed_form(steps, rate, every):
    """(1 - r)^n w_0 + sum of r (1 - r)^(n - k) w_k, over every ``every``-th step."""
    moved = steps[every::every]
    total = len(moved)
    found = {name: (1 - rate) ** total * value for name, value in steps[0].items()}
    for k, weights in enumerate(moved, 1):
        for name, value in found.items():
            found[name] = value + rate * (1 - rate) ** (total - k) * weights[name]
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("rate", "every"), [(0.05, 1), (0.6, 3)])
def test_the_running_mean_is_its_closed_form(tmp_path, lora, rate, every):
    spec = SelfTeacher("ema", ema_rate=rate, ema_every=every)
    more = {"options": {"max_steps": 7, "learning_rate": 1e-2}}
    model = tiny_llama(seed=0).double()
    trainer = taught_by_itself(tmp_path, lora=lora, model=model, teacher=spec, **more)
    for weight in trainer.model.parameters():
        weight.data = weight.data.double()
    trainer.teacher.mean.values = {n: v.double() if lora else v for n, v in trainer.teacher.mean.values.items()}
    seen = Weights(trainer)
    trainer.add_callback(seen)
    trainer.train()
    expected = closed_form(seen.found, rate, every)
    mean = trainer.teacher.mean.values
    assert mean.keys() == expected.keys() and len(seen.found) == 8
    moved = max(float((expected[name] - seen.found[0][name]).abs().max()) for name in expected)
    assert moved > 1e-4
    assert max(float((mean[name] - expected[name]).abs().max()) for name in expected) < 1e-12


def test_the_mean_of_short_weights_is_kept_in_float32(tmp_path):
    model = tiny_llama(seed=0).to(torch.bfloat16)
    trainer = taught_by_itself(tmp_path / "a", "ema", model=model)
    assert {weight.dtype for weight in trainer.teacher.model.parameters()} == {torch.float32}
    trainer = taught_by_itself(tmp_path / "b", "ema", lora=True, model=tiny_llama(seed=0).to(torch.bfloat16))
    assert {value.dtype for value in trainer.teacher.mean.values.values()} == {torch.float32}
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch).isfinite()
    trainer = taught_by_itself(tmp_path / "c", teacher=SelfTeacher("base", dtype=torch.bfloat16))
    assert {weight.dtype for weight in trainer.teacher.model.parameters()} == {torch.bfloat16}


def test_it_teaches_with_the_mean_and_not_with_the_student(tmp_path):
    """LoRA: what answers is the base with the mean of the adapter, which is what a copy with those weights answers."""
    trainer = taught_by_itself(tmp_path, "ema", lora=True, options={"max_steps": 5, "learning_rate": 1e-1})
    batch = batch_of(trainer)
    trainer.train()
    other = copy.deepcopy(trainer.model).eval()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if weight.requires_grad:
                weight.copy_(trainer.teacher.mean.values[name])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    kept = torch.cat([value[:, :-1][batch["labels"][:, 1:] != -100]
                      for value in [other.get_base_model().model(**inputs).last_hidden_state]])  # fmt: skip
    states = trainer.teacher.states(inputs, batch["labels"])
    assert float((states - kept.detach()).abs().max()) < 1e-6
    with trainer.model.disable_adapter():
        base = trainer.model.get_base_model().model(**inputs).last_hidden_state
    assert float((states - base[:, :-1][batch["labels"][:, 1:] != -100]).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("weights", "lora"), KINDS)
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, weights, lora):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}

    def made(folder):
        torch.manual_seed(7)
        return taught_by_itself(folder, weights, lora, options=options, temperature={"name": "dts", "rule": "gap"})

    whole = made(tmp_path / "a")
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / EMA_WEIGHTS).is_file() == (weights == "ema")
    resumed = made(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for one, other in ((whole.model.state_dict(), resumed.model.state_dict()),):
        assert all(torch.equal(one[name], other[name]) for name in one)
    if weights == "ema":
        mean, other = whole.teacher.mean.values, resumed.teacher.mean.values
        assert all(torch.equal(mean[name], other[name]) for name in mean)
        saved = load_file(tmp_path / "a" / "checkpoint-6" / EMA_WEIGHTS)
        assert all(torch.equal(saved[name], mean[name]) for name in mean)


def test_a_checkpoint_with_another_mean_or_none_is_refused(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    taught_by_itself(tmp_path / "a", "ema", options=options).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    more = {"options": {**options, "max_steps": 4, "lr_scheduler_type": "constant"}}
    for teacher, said in (
        (SelfTeacher("base"), "self_teacher"),
        (SelfTeacher("ema", ema_rate=0.1), "ema_rate"),
        (tiny_llama(seed=0), "self_teacher"),
    ):
        with pytest.raises(UserError, match=said):
            taught_by_itself(tmp_path / "b", teacher=teacher, **more).train(resume_from_checkpoint=str(checkpoint))
    path = checkpoint / EMA_WEIGHTS
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match=EMA_WEIGHTS):
        taught_by_itself(tmp_path / "b", "ema", **more).train(resume_from_checkpoint=str(checkpoint))


def test_other_first_weights_are_refused_on_a_resume(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    taught_by_itself(tmp_path / "a", "base", options=options).train()
    with pytest.raises(UserError, match=r"teacher\.weights"):
        again = taught_by_itself(tmp_path / "b", "base", model=tiny_llama(seed=5), options=options)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_an_earlier_checkpoint_of_a_run_is_a_live_teacher(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    first = taught_by_itself(tmp_path / "a", "base", options=options)
    first.train()
    chained = trainer_for(tmp_path / "b", tiny_llama(seed=0), str(tmp_path / "a" / "checkpoint-2"), temperature=2.0)
    ours, theirs = chained.teacher.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in theirs)
    chained.train()
    assert losses(chained)[0] > 0


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "now"}, "weights"),
        ({"ema_rate": 0.0}, "ema_rate"),
        ({"ema_rate": 1.5}, "ema_rate"),
        ({"ema_every": 0}, "ema_every"),
        ({"weights": "ema", "dtype": torch.bfloat16}, "float32"),
    ],
)
def test_values_out_of_their_range(options, said):
    with pytest.raises(UserError, match=said):
        SelfTeacher(**options)


def test_what_does_not_go_with_it_is_refused_by_name(tmp_path):
    trained = taught_by_itself(tmp_path / "a", "ema", lora=True, options={"learning_rate": 1e-1})
    trained.train()
    with pytest.raises(UserError, match="switches the student's adapter off"):
        taught_by_itself(tmp_path / "b", "base", model=trained.model)
    taught_by_itself(tmp_path / "b", "ema", model=trained.model)  # its mean begins where it stands
    pissa = {"peft_config": LoraConfig(**LORA, init_lora_weights="pissa")}
    with pytest.raises(UserError, match="PiSSA"):
        trainer_for(tmp_path / "b", tiny_llama(seed=0), SelfTeacher(), **pissa)
    trained.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"model\.norm\.weight is trained, too"):
        taught_by_itself(tmp_path / "b", "ema", model=trained.model)
    with pytest.raises(UserError, match="teacher_placement"):
        taught_by_itself(tmp_path / "b", "base", teacher_placement="sharded")
    with pytest.raises(UserError, match="leave it out"):
        taught_by_itself(tmp_path / "b", lora=True, teacher=SelfTeacher(dtype=torch.bfloat16))
    several = {"a": SelfTeacher(), "b": tiny_llama(seed=1)}
    with pytest.raises(UserError, match=r"teachers\.a: got SelfTeacher"):
        DistillationTrainer(tiny_llama(seed=0), teachers=several, teacher_weights={"a": 0.5, "b": 0.5},
                            args=arguments(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer())  # fmt: skip
    trainer = DistillationTrainer(
        None, SelfTeacher(), args=arguments(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer(),
        model_init=lambda: tiny_llama(seed=0),
    )  # fmt: skip
    with pytest.raises(UserError, match="model_init"):
        trainer.train()


@pytest.mark.parametrize("rate", ["0.1", True, None, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(UserError, match="ema_rate: got"):
        SelfTeacher("ema", ema_rate=rate)


def test_a_class_is_no_teacher(tmp_path):
    with pytest.raises(UserError, match=r"teacher: got the class SelfTeacher, expected .*SelfTeacher\(\)"):
        taught_by_itself(tmp_path, teacher=SelfTeacher)
