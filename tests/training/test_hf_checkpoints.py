"""Checkpoints: when they are written, which are kept, and how a run goes on from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, logged, plain_trainer, trainer_for
from tests.support.tiny import tiny_llama

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    model: nn.Module = trainer.model
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: DistillationTrainer, other: DistillationTrainer) -> None:
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert one.temperature.state() == other.temperature.state()
    assert logged(one, "loss") == logged(other, "loss") and logged(one, "temperature") == logged(other, "temperature")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistillationTrainer]:
    """A run of four steps with a checkpoint of each."""
    trainer = trainer_for(tmp_path_factory.mktemp("straight"), eval_dataset=ROWS[:3], options=STEPS)
    trainer.train()
    yield trainer


@pytest.fixture
def run(straight: DistillationTrainer, tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(str(straight.args.output_dir), tmp_path / "run"))


# -------------------------------------------------------------------------------------------------------- when, and which

WHEN: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every step": ({}, [1, 2, 3, 4]),
    "every second, and the last": ({"save_steps": 3}, [3, 4]),
    "a share of the steps": ({"save_steps": 0.5}, [2, 4]),
    "each epoch": ({"save_strategy": "epoch"}, [2, 4]),
    "never": ({"save_strategy": "no"}, []),
    "the last two": ({"save_total_limit": 2}, [3, 4]),
    "the last alone": ({"save_total_limit": 1}, [4]),
}


@pytest.mark.parametrize("case", WHEN)
def test_which_checkpoints_there_are(tmp_path: Path, case: str) -> None:
    """works: save_strategy steps, epoch and no, save_steps as a share, save_total_limit"""
    options, expected = WHEN[case]
    trainer_for(tmp_path, options={**STEPS, **options}).train()
    assert checkpoints(tmp_path) == expected


BEST = {
    **STEPS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "ce_loss",
    "greater_is_better": False,
}


def best_step(trainer: DistillationTrainer) -> int:
    values = logged(trainer, "eval_ce_loss")
    return 1 + values.index(min(values))


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize("rate", [1e-2, 1.0], ids=["last is best", "first is best"])
def test_the_best_model_at_the_end(tmp_path: Path, limit: int | None, rate: float) -> None:
    """works: load_best_model_at_end by any held-out number; save_total_limit never drops the best"""
    options = {
        **BEST,
        "load_best_model_at_end": True,
        "save_total_limit": limit,
        "learning_rate": rate,
        "optim": "sgd",
    }
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:3], options=options)
    trainer.train()
    best = best_step(trainer)
    assert trainer.state.best_global_step == best and best in checkpoints(tmp_path)
    assert len(checkpoints(tmp_path)) <= (limit or 4) + (best != 4 and limit == 1)
    assert trainer.evaluate()["eval_ce_loss"] == pytest.approx(min(logged(trainer, "eval_ce_loss")[:4]))


def test_save_the_best_alone(tmp_path: Path) -> None:
    """works: save_strategy best"""
    trainer = trainer_for(
        tmp_path, eval_dataset=ROWS[:3], options={**BEST, "save_strategy": "best", "learning_rate": 1.0}
    )
    trainer.train()
    assert best_step(trainer) in checkpoints(tmp_path) and trainer.state.best_global_step == best_step(trainer)


@pytest.mark.parametrize("metric", ["eval_kl", "kl", "eval_gap", "loss"])
def test_the_name_of_the_best_metric(tmp_path: Path, metric: str) -> None:
    """works: metric_for_best_model with and without eval_, also by the distance to the teacher"""
    options = {**BEST, "max_steps": 1, "metric_for_best_model": metric, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:3], options=options)
    trainer.train()
    assert trainer.state.best_metric == logged(trainer, f"eval_{metric.removeprefix('eval_')}")[0]


def test_a_best_metric_that_is_not_there(tmp_path: Path) -> None:
    """works: an unknown metric_for_best_model is named by transformers when it is looked up"""
    options = {**BEST, "max_steps": 1, "metric_for_best_model": "bleu", "load_best_model_at_end": True}
    with pytest.raises(KeyError, match="bleu"):
        trainer_for(tmp_path, eval_dataset=ROWS[:3], options=options).train()


@pytest.mark.parametrize("name", [
    "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin",
    "rng_state.pth", "tokenizer.json", "temperature.json", "progress.json", "complete.json",
])  # fmt: skip
def test_the_files_of_a_checkpoint(straight: DistillationTrainer, name: str) -> None:
    """works: a checkpoint has all files of transformers', the policy's state, and complete.json once it is whole"""
    assert (Path(str(straight.args.output_dir)) / "checkpoint-2" / name).is_file()


def test_checkpoints_of_weights_alone(tmp_path: Path) -> None:
    """works: save_only_model"""
    trainer_for(tmp_path, options={**STEPS, "max_steps": 1, "save_only_model": True}).train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert "model.safetensors" in names and "optimizer.pt" not in names


# ------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("how", ["the folder", "a path", "true", "the first step", "the last step"])
def test_a_run_goes_on_exactly(straight: DistillationTrainer, run: Path, how: str) -> None:
    """works: resume_from_checkpoint: a folder or True; weights, policy, losses and log are those of the undisturbed run"""
    step = {"the first step": 1, "the last step": 4}.get(how, 2)
    for later in checkpoints(run):
        if later > step:
            shutil.rmtree(run / f"checkpoint-{later}")
    where: Any = {"true": True, "a path": run / f"checkpoint-{step}"}.get(how, str(run / f"checkpoint-{step}"))
    again = trainer_for(run, tiny_llama(seed=9), eval_dataset=ROWS[:3], options=STEPS)
    again.train(resume_from_checkpoint=where)
    assert again.state.global_step == 4
    assert_equal(again, straight)


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "in the middle of an epoch": {"per_device_train_batch_size": 3},
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "grouped by length": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 3},
    "sequential": {"train_sampling_strategy": "sequential"},
    "workers": {"dataloader_num_workers": 1},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
                "metric_for_best_model": "loss"},
    "adafactor": {"optim": "adafactor"},
    "another data seed": {"data_seed": 5},
    "another seed": {"seed": 11},
    "NEFTune": {"neftune_noise_alpha": 1.0},
    "recomputed activations": {"activation_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_goes_on_exactly(tmp_path: Path, variant: str) -> None:
    """works: exact resume with accumulation, within an epoch, drop_last, grouping, workers, schedules, NEFTune, ..."""
    options = {**STEPS, "max_steps": 3, "save_steps": 2, **VARIANTS[variant]}
    make = lambda seed: trainer_for(tmp_path, tiny_llama(seed=seed), eval_dataset=ROWS[:3], options=options)  # noqa: E731
    straight, again = make(0), make(9)
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(again, straight)


def test_frozen_weights_go_on(tmp_path: Path) -> None:
    """works: exact resume with frozen weights"""

    def make() -> DistillationTrainer:
        student = tiny_llama(seed=0)
        student.model.layers[0].requires_grad_(False)
        return trainer_for(tmp_path, student, options={**STEPS, "max_steps": 3, "save_steps": 2})

    straight, again = make(), make()
    before = weights(straight)
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(again, straight)
    frozen_name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[frozen_name], weights(again)[frozen_name])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another batch size": ({"per_device_train_batch_size": 4}, "an optimizer step had 8 rows and would have 4"),
    "another accumulation": ({"gradient_accumulation_steps": 2}, "had 8 rows and would have 16"),
    "rows are not skipped": ({"ignore_data_skip": True}, "ignore_data_skip"),
    "longer": ({"max_steps": 6}, "max_steps|steps"),
    "shorter": ({"max_steps": 1}, "steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_does_not_go_on(run: Path, case: str) -> None:
    """refused: a resume with another batch, ignore_data_skip or another length (transformers goes on, not exactly)"""
    options, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        trainer_for(run, options={**STEPS, **options}).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_longer_run_goes_on_where_nothing_is_scheduled(tmp_path: Path) -> None:
    """works: a longer resume where rate and temperature do not depend on the length of the run"""

    def make(steps: int) -> DistillationTrainer:
        options = {**STEPS, "max_steps": steps, "lr_scheduler_type": "constant"}
        return trainer_for(tmp_path, temperature=2.0, options=options)

    make(2).train()
    longer = make(4)
    longer.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path)
    straight = make(4)
    straight.train()
    assert_equal(longer, straight)


BROKEN = {
    "not there": (lambda folder: shutil.rmtree(folder), "checkpoint-2"),
    "interrupted": (lambda folder: (folder / "complete.json").unlink(), "checkpoint-2"),
    "without its weights": (lambda folder: (folder / "model.safetensors").unlink(), "checkpoint-2"),
    "damaged": (lambda folder: (folder / "temperature.json").write_text("{}"), "temperature.json has 2 of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_cannot_be_gone_on_from(run: Path, case: str) -> None:
    """refused: a checkpoint that is not there, not complete, or damaged"""
    damage, says = BROKEN[case]
    damage(run / "checkpoint-2")
    with pytest.raises(UserError, match=says):
        trainer_for(run, options=STEPS).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_of_another_policy(run: Path) -> None:
    """refused: a checkpoint of another temperature policy"""
    with pytest.raises(UserError, match=r'temperature\.name: was "\w+", now "cosine"'):
        trainer_for(run, temperature="cosine", options=STEPS).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    """refused: resume_from_checkpoint=True in a folder without one"""
    with pytest.raises(UserError, match=str(tmp_path)):
        trainer_for(tmp_path, options=STEPS).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    """refused: a checkpoint of transformers' own Trainer, called by that name"""
    plain_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(UserError, match=r"it was not written by dts_hf: it has no complete\.json"):
        trainer_for(tmp_path, options=STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    """refused: a resume from save_only_model"""
    options = {**STEPS, "save_only_model": True, "max_steps": 2}
    trainer_for(tmp_path, options=options).train()
    with pytest.raises(UserError, match=r"weights alone|save_only_model"):
        trainer_for(tmp_path, options=options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_state_of_the_trainer(straight: DistillationTrainer) -> None:
    """works: trainer_state.json: steps, epochs, log history and batch size"""
    state = json.loads((Path(str(straight.args.output_dir)) / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["train_batch_size"]) == (2, 4, 8)
    assert [line["step"] for line in state["log_history"]] == [1, 2] and state["epoch"] == 1.0


def test_a_retry_with_a_smaller_batch(tmp_path: Path) -> None:
    """works: auto_find_batch_size halves the batch where memory runs out, and begins the run again"""

    class NoMemory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.train_batch_size > 4:
                raise RuntimeError("CUDA out of memory.")

    trainer = trainer_for(tmp_path, callbacks=[NoMemory], options={"auto_find_batch_size": True, "max_steps": 2})
    trainer.train()
    assert trainer.state.train_batch_size == 4 or trainer._train_batch_size <= 4
    assert trainer.state.global_step == 2 and len(logged(trainer, "temperature")) == 2
