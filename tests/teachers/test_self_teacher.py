"""A student that teaches itself, through ``DistillationTrainer``: its first weights, or a running mean of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from dts_hf.errors import UserError
from dts_hf.teachers.self_teacher import CopyTeacher, SelfTeacher, SharedTeacher
from dts_hf.training.self_teaching import EMA_WEIGHTS
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, largest_difference, losses, step_gradients, trainer_for

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
    return totals["kl_sum"] / totals["rows"]


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
