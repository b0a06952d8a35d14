"""Optimizers, schedules, precision, and what an optimizer step is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, get_cosine_schedule_with_warmup

from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, arguments, logged, plain, plain_trainer, trainer_for
from tests.support.tiny import tiny_llama, tiny_tokenizer


def moved(trainer: DistillationTrainer) -> bool:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# ----------------------------------------------------------------------------------------------- optimizers and schedules


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_by_name(tmp_path: Path, optim: str) -> None:
    """works: optim by name: AdamW, fused, Adafactor, SGD, Adagrad, RMSprop"""
    assert moved(trainer_for(tmp_path, options={"optim": optim}))


def test_optimizer_options(tmp_path: Path) -> None:
    """works: optim_args, adam_beta1 and weight_decay reach the optimizer; norms and biases do not decay"""
    options = {"optim": "adamw_torch", "adam_beta1": 0.5, "weight_decay": 0.25, "learning_rate": 0.125}
    trainer = trainer_for(tmp_path, options=options)
    groups = trainer.create_optimizer().param_groups
    assert groups[0]["betas"][0] == 0.5 and groups[0]["lr"] == 0.125
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert trainer.get_learning_rates() == [0.125, 0.125]
    assert trainer.get_num_trainable_parameters() == trainer.model.num_parameters()


@pytest.mark.parametrize("scheduler", [None, "cosine"])
def test_an_optimizer_of_ones_own(tmp_path: Path, scheduler: str | None) -> None:
    """works: optimizers=(optimizer, scheduler), with and without a scheduler"""
    student = tiny_llama(seed=0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 2) if scheduler else None
    trainer = trainer_for(tmp_path, student, optimizers=(optimizer, schedule), options={"max_steps": 2})
    assert moved(trainer) and trainer.optimizer.optimizer is optimizer
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 0.5 and (rates[1] == pytest.approx(0.25))


def test_the_class_of_an_optimizer(tmp_path: Path) -> None:
    """works: optimizer_cls_and_kwargs"""
    trainer = trainer_for(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}))
    assert moved(trainer)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_two_optimizers(tmp_path: Path) -> None:
    """refused: optimizers together with optimizer_cls_and_kwargs, as transformers does"""
    student = tiny_llama()
    with pytest.raises(UserError, match=r"optimizers.*optimizer_cls_and_kwargs"):
        trainer_for(tmp_path, student, optimizers=(torch.optim.SGD(student.parameters(), 0.1), None),
                    optimizer_cls_and_kwargs=(torch.optim.SGD, {}))  # fmt: skip


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {}, "cosine": {}, "constant": {}, "constant_with_warmup": {}, "inverse_sqrt": {}, "polynomial": {},
    "cosine_with_restarts": {"num_cycles": 2}, "cosine_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 1}, "reduce_lr_on_plateau": {"patience": 1},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_give_the_rates_of_transformers(tmp_path: Path, schedule: str) -> None:
    """works: ten learning rate schedules with their options: the rates that transformers' Trainer logs"""
    options = {"max_steps": 3, "lr_scheduler_type": schedule, "warmup_steps": 1 if "plateau" not in schedule else 0,
               "lr_scheduler_kwargs": SCHEDULES[schedule], "eval_strategy": "steps", "eval_steps": 1,
               "metric_for_best_model": "loss"}  # fmt: skip
    trainer = trainer_for(tmp_path, rows=plain(), eval_dataset=plain()[:2], options=options)
    theirs = plain_trainer(tmp_path, **options)
    trainer.train()
    theirs.train()
    expected = [line["learning_rate"] for line in theirs.state.log_history if "learning_rate" in line]
    assert logged(trainer, "learning_rate") == expected and len(expected) == 3


# ------------------------------------------------------------------------------------------------ what a step is made of


def sgd(folder: Path, size: int, accumulation: int, **options: Any) -> DistillationTrainer:
    given = {"max_steps": 2, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
             "train_sampling_strategy": "sequential", "optim": "sgd", **options}  # fmt: skip
    trainer = trainer_for(folder, temperature=2.0, options=given)
    trainer.train()
    return trainer


@pytest.mark.parametrize("size, accumulation", [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_a_larger_batch(tmp_path: Path, size: int, accumulation: int) -> None:
    """works: gradient accumulation equals one large batch: the loss is a mean over labels, not over batches"""
    whole, parts = sgd(tmp_path, 8, 1), sgd(tmp_path, size, accumulation)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-6), name


def test_average_tokens_changes_nothing_on_one_process(tmp_path: Path) -> None:
    """works: average_tokens_across_devices, on and off"""
    on, off = (sgd(tmp_path, 8, 1, average_tokens_across_devices=flag) for flag in (True, False))
    assert logged(on, "loss") == logged(off, "loss")


def test_without_a_teacher_training_is_that_of_transformers(tmp_path: Path) -> None:
    """works: kd_ratio 0 without a teacher gives the losses of transformers' own Trainer, step by step"""
    options = {"max_steps": 3, "optim": "sgd"}
    theirs = plain_trainer(tmp_path, **options, train_sampling_strategy="sequential")
    ours = DistillationTrainer(
        tiny_llama(seed=0), None, kd_ratio=0.0, args=arguments(tmp_path, **options, train_sampling_strategy="sequential"),
        train_dataset=plain(), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    ours.train()
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert logged(ours, "loss") == pytest.approx(expected, rel=1e-4)
    for name, value in theirs.model.state_dict().items():
        assert torch.allclose(value, ours.model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_clipping(tmp_path: Path, limit: float) -> None:
    """works: max_grad_norm; the norm before clipping is logged"""
    student = tiny_llama(seed=0)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    options = {"max_grad_norm": limit, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    trainer = trainer_for(tmp_path, student, options=options)
    trainer.train()
    change = sum((value.detach() - before[name]).square().sum() for name, value in student.named_parameters()) ** 0.5
    norm = logged(trainer, "grad_norm")[0]
    assert float(change) == pytest.approx(min(norm, limit), rel=1e-3)


@pytest.mark.parametrize("options, steps", [
    ({"max_steps": 3}, 3), ({"max_steps": -1, "num_train_epochs": 2}, 4), ({"max_steps": -1, "num_train_epochs": 0.5}, 1),
    ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}, 1),
    ({"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5}, 4),
    ({"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5, "dataloader_drop_last": True}, 3),
], ids=str)  # fmt: skip
def test_how_many_steps(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    """works: max_steps, num_train_epochs (a share too), accumulation, drop_last: as many steps as transformers takes"""
    trainer = trainer_for(tmp_path, options=options)
    trainer.train()
    assert trainer.state.global_step == trainer.planned_steps() == steps


# ------------------------------------------------------------------------------------------------------ order of the rows


def order(trainer: Trainer) -> list[int]:
    return [int(row) for batch in trainer.get_train_dataloader() for row in batch["row_id"]]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_the_order_of_the_rows(tmp_path: Path, strategy: str) -> None:
    """works: train_sampling_strategy random, sequential and group_by_length: each row once, by seed and epoch"""
    options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 4}
    first, again = (order(trainer_for(tmp_path, options=options)) for _ in range(2))
    other = order(trainer_for(tmp_path, options={**options, "data_seed": 3}))
    assert first == again and sorted(first) == sorted(other) == list(range(16))
    assert (first == list(range(16))) is (strategy == "sequential") and (first == other) is (strategy == "sequential")


def test_rows_of_like_length_are_together(tmp_path: Path) -> None:
    """works: group_by_length wastes less padding than a random order"""

    def padding(strategy: str) -> int:
        options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 2}
        trainer = trainer_for(tmp_path, rows=plain() * 4, options=options)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())

    assert padding("group_by_length") < padding("random")


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    """works: epochs are shuffled anew"""
    trainer = trainer_for(tmp_path)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        trainer.train_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        epochs.append([int(row) for batch in loader for row in batch["row_id"]])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_a_sampler_of_ones_own(tmp_path: Path) -> None:
    """works: a subclass with its own get_train_dataloader"""

    class Twice(DistillationTrainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    trainer = Twice(tiny_llama(), tiny_llama(seed=1), args=arguments(tmp_path), train_dataset=ROWS,
                    processing_class=tiny_tokenizer())  # fmt: skip
    assert moved(trainer)


def test_training_without_rows(tmp_path: Path) -> None:
    """refused: train() without train_dataset, and an empty one"""
    with pytest.raises((UserError, ValueError), match="train_dataset"):
        trainer_for(tmp_path, rows=None).train()
    with pytest.raises(UserError, match="train_dataset"):
        trainer_for(tmp_path, rows=[])


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_rows_that_fill_no_batch(tmp_path: Path, length: dict[str, Any]) -> None:
    """refused: dataloader_drop_last with fewer rows than a batch, of a list or a stream"""
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 8, **length}
    kinds: list[Any] = [ROWS[:5], *([] if length["max_steps"] < 0 else [lambda: iter(ROWS[:5])])]
    for rows in kinds:
        with pytest.raises(UserError, match=r"dataloader_drop_last: got True.* 5 rows .* fill none of 8"):
            trainer_for(tmp_path, rows=rows, options=options).train()


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("options", [
    {"bf16": True}, {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    {"neftune_noise_alpha": 5.0}, {"skip_memory_metrics": False}, {"seed": 5},
    {"use_cache": False}, {"logging_nan_inf_filter": False}, {"torch_empty_cache_steps": 1},
], ids=str)  # fmt: skip
def test_what_else_training_takes(tmp_path: Path, options: dict[str, Any]) -> None:
    """works: bf16, gradient checkpointing of both kinds, NEFTune, memory metrics, torch_empty_cache_steps"""
    trainer = trainer_for(tmp_path, temperature=2.0, options={**options, "max_steps": 2})
    usual = trainer_for(tmp_path, temperature=2.0, options={"max_steps": 2})
    assert moved(trainer) and moved(usual)
    same = logged(trainer, "loss") == pytest.approx(logged(usual, "loss"), rel=1e-6)
    assert same is not bool({"bf16", "neftune_noise_alpha", "seed"} & options.keys())


def test_neftune_is_not_for_the_teacher(tmp_path: Path) -> None:
    """differs: NEFTune's noise is on the student's embeddings alone; it is gone after training"""
    trainer = trainer_for(tmp_path, options={"neftune_noise_alpha": 5.0})
    ids = torch.tensor([[4, 5, 6]])
    before = trainer.teacher.model(ids).logits
    trainer.train()
    assert torch.equal(trainer.teacher.model(ids).logits, before)
    embeddings: nn.Module = trainer.model.get_input_embeddings()
    assert not embeddings._forward_hooks


def test_weights_in_bf16(tmp_path: Path) -> None:
    """works: a student whose weights are bfloat16"""
    trainer = trainer_for(tmp_path, tiny_llama(seed=0).bfloat16(), options={"learning_rate": 0.1})
    assert moved(trainer) and trainer.model.dtype == torch.bfloat16


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_no_number(tmp_path: Path, persistent: bool) -> None:
    """works: dataloader_num_workers, persistent or not: the same losses"""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
    other, usual = trainer_for(tmp_path, options=options), trainer_for(tmp_path)
    other.train()
    usual.train()
    assert logged(other, "loss") == logged(usual, "loss")


def test_the_seed(tmp_path: Path) -> None:
    """works: the same seed gives the same run, bit for bit; another seed another order"""
    runs = []
    for seed in (7, 7, 8):
        trainer = trainer_for(tmp_path, options={"seed": seed, "max_steps": 2, "per_device_train_batch_size": 4})
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_of_a_subclass(tmp_path: Path) -> None:
    """works: a subclass may add to compute_loss"""

    class Doubled(DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    usual = trainer_for(tmp_path, options={"optim": "sgd", "max_grad_norm": 0.0})
    doubled = Doubled(tiny_llama(seed=0), tiny_llama(seed=1, layers=3), {"name": "dts"}, train_dataset=ROWS,
                      args=arguments(tmp_path, optim="sgd", max_grad_norm=0.0),
                      processing_class=tiny_tokenizer())  # fmt: skip
    usual.train()
    doubled.train()
    assert logged(doubled, "grad_norm")[0] == pytest.approx(2 * logged(usual, "grad_norm")[0], rel=1e-4)
