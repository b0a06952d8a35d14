"""How batches come to a GPU: made by a process of their own, and copied while it computes. The numbers do not change."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate import DataLoaderConfiguration
from transformers import TrainingArguments

from dts_hf.recipe.training_arguments import worker_defaults
from dts_hf.training.trainer import DistillationTrainer
from tests.support.trainers import trainer_for

WORKER = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.parametrize(
    ("training", "on_gpu", "expected"),
    [
        ({}, True, WORKER),
        ({}, False, {}),
        ({"dataloader_num_workers": 0}, True, {}),  # torch refuses to keep workers that are not there
        ({"dataloader_num_workers": 4}, True, {**WORKER, "dataloader_num_workers": 4}),
        ({"use_cpu": True}, True, {}),
    ],
)
def test_a_gpu_gets_a_worker_unless_the_recipe_says_otherwise(
    training: dict[str, Any], on_gpu: bool, expected: dict[str, Any]
) -> None:
    assert worker_defaults(training, on_gpu) == expected


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_worker_changes_no_number_and_a_resume_is_exact(tmp_path: Any) -> None:
    """Two epochs and a half, in which the loader is begun anew twice; stopped in the middle of the second."""
    options = {
        "max_steps": 10, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 6,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    alone = trainer_for(tmp_path / "alone", options=options)
    alone.train()
    helped = trainer_for(tmp_path / "helped", options={**options, **WORKER})
    helped.train()
    resumed = trainer_for(tmp_path / "helped", options={**options, **WORKER})
    resumed.train(resume_from_checkpoint=str(tmp_path / "helped" / "checkpoint-6"))
    expected = weights(alone)
    for trainer in (helped, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize(
    ("device", "pinned", "expected"), [("cpu", True, False), ("cuda", True, True), ("cuda", False, False)]
)
def test_batches_are_copied_to_a_gpu_while_it_computes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool, expected: bool
) -> None:
    trainer = trainer_for(tmp_path)
    trainer.args.dataloader_pin_memory = pinned
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    config = DataLoaderConfiguration()
    trainer._build_accelerator_args(dataloader_config=config)
    assert config.non_blocking is expected
