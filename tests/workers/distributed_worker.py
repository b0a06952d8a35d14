"""What each process of test_distributed.py runs: many small trainings, results written as JSON and safetensors."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.distributed import sharding
from dts_hf.distributed.launch import strategy_of
from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.loss.selection import count_targets, select_response
from dts_hf.models.adapters import add_lora
from dts_hf.models.head import Head, loss_in_head
from dts_hf.recipe.schema import Lora
from dts_hf.teachers.live import LiveTeacher
from dts_hf.temperature import build_temperature
from dts_hf.training.non_finite import local_shard
from dts_hf.training.trainer import DistillationTrainer
from tests.distributed.cases import BATCH, CASES, CLASSIFIERS, MULTI, POLICIES, ROUNDING, ROWS, Case
from tests.support.launching import leave, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer


def rows_of(case: Case) -> list[dict[str, object]]:
    if case.policy != "silent":
        return ROWS[: case.rows]
    ids = [[5 + (7 * row + 3 * place) % 50 for place in range(6 + row % 3)] for row in range(40)]
    return [{"input_ids": row, "labels": row if k % 8 < 4 else [-100] * len(row)} for k, row in enumerate(ids)]


def student_of(case: Case) -> torch.nn.Module:
    student = tiny_llama(seed=0, tie=case.tie)
    if not case.lora:
        return student
    torch.manual_seed(5)  # of the adapters
    student = add_lora(student, Lora(r=4, alpha=8, dropout=0.0))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # zero at first: then half of the gradients are zero too
            torch.nn.init.normal_(parameter, std=0.1)
    return student


def trainer_of(case: Case, strategy: str, out: Path, world: int) -> DistillationTrainer:
    settings = {
        "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "max_steps": case.steps,
    }  # fmt: skip
    args = training_arguments(
        strategy, output_dir=str(out / "trainer"), per_device_eval_batch_size=3,
        per_device_train_batch_size=BATCH // world // case.accumulation, gradient_accumulation_steps=case.accumulation,
        **{**settings, **case.arguments},
    )  # fmt: skip
    return DistillationTrainer(
        student_of(case), tiny_llama(seed=1, layers=1), POLICIES[case.policy], args=args, packing=case.packing,
        train_dataset=rows_of(case), eval_dataset=ROWS[:7], processing_class=tiny_tokenizer(),
    )  # fmt: skip


def round_gradients(trainer: DistillationTrainer) -> None:
    """From now on, gradients have the error of an fp32 sum whose terms come in another order.

    An entry of a gradient is a sum over the K tokens of the step. Partial sums of k terms of random sign are about
    sqrt(k) terms large and are rounded by ROUNDING relative to that, so that the error of all K roundings together is
    about ROUNDING sqrt(K / 2) sqrt(K) terms, where the sum itself is about sqrt(K) terms large: sqrt(K) roundings of a
    typical entry of the tensor. What this does to later losses, norms and weights is for the training to show.
    """
    generator = torch.Generator().manual_seed(11)
    seen: list[int] = []

    def count(_module: torch.nn.Module, _args: object, told: dict[str, torch.Tensor]) -> None:
        seen.append(told["position_ids"].numel() if "position_ids" in told else int(told["attention_mask"].sum()))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)

    def round_one(weight: torch.Tensor) -> None:
        typical = weight.grad.square().mean().sqrt()
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad.add_(noise * typical * ROUNDING * math.sqrt(seen[-1]))

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(round_one)


def unsharded_init(trainer: DistillationTrainer, strategy: str) -> dict[str, torch.Tensor]:
    """The trainable weights by name; what ZeRO-3 and FSDP2 spread over ranks is put together on every rank."""
    named = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if strategy == "fsdp2":
        state = trainer.model.state_dict()
        assert all(isinstance(value, DTensor) for value in state.values()), "the weights are not sharded"
        return {name: state[name].full_tensor().detach().clone() for name in named}
    if strategy != "zero3":
        return {name: parameter.detach().clone() for name, parameter in named.items()}
    import deepspeed

    shares = [parameter.ds_tensor.numel() / parameter.ds_numel for parameter in named.values()]
    assert max(shares) < 0.6 and not any(p.numel() for p in named.values()), "the weights are not sharded"
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def wrapper_of(trainer: DistillationTrainer) -> str:
    """``DistributedDataParallel``, or the engine with its stage and the optimizer that partitions."""
    wrapped = trainer.model_wrapped
    if type(wrapped).__name__ != "DeepSpeedEngine":
        return type(wrapped).__name__
    return f"DeepSpeedEngine {wrapped.zero_optimization_stage()} {type(wrapped.optimizer).__name__}"


def run(case: Case, strategy: str, out: Path, world: int, rank: int) -> None:
    trainer = trainer_of(case, strategy, out, world)
    if case.rounded:
        round_gradients(trainer)
    trainer.train()
    held_out = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    result = {
        "wrapper": wrapper_of(trainer),
        "strategy": strategy_of(trainer.accelerator),
        "world": trainer.accelerator.num_processes,
        "recomputed": any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()),
        "state": trainer.temperature.state(),
        "tokens": trainer.tokens_seen,
        "eval_loss": held_out["eval_loss"],
        "eval_rows": held_out["eval_rows"],
        "held_out": {
            name: held_out[f"eval_{name}"] for name in ("reverse_kl", "ece", "teacher_ece", "student_entropy")
        },
        **{key: [log[key] for log in logs] for key in ("loss", "temperature", "grad_norm", "kl")},
    }
    (out / f"{strategy}.{case.name}.{rank}.json").write_text(json.dumps(result))
    save_file(unsharded_init(trainer, strategy), str(out / f"{strategy}.{case.name}.{rank}.safetensors"))
    trainer.accelerator.free_memory()


def classify(strategy: str, out: Path, world: int, rank: int) -> None:
    """SST-2 and the regression of STS-B over epochs of 9 rows: 8, then 1, when the second process has dummy rows alone."""
    from tests.support.classifiers import SST2, STSB, classifier, rows_of

    for task in (SST2, STSB):
        with sharding.unsharded_init():
            student, teacher = (classifier("llama", task, seed=seed) for seed in (1, 2))
        args = training_arguments(
            strategy, output_dir=str(out / "trainer"), max_steps=4, per_device_train_batch_size=BATCH // world,
            optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = ClassificationDistillationTrainer(
            student, teacher, task=task, args=args, processing_class=tiny_tokenizer(),
            train_dataset=rows_of(task, 9), eval_dataset=rows_of(task, 7),
        )  # fmt: skip
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        values = {"loss": torch.tensor([*losses, trainer.evaluate()["eval_loss"]])}
        save_file(
            values | unsharded_init(trainer, strategy), str(out / f"{strategy}.{task.subset}.{rank}.safetensors")
        )
        record = {"wrapper": wrapper_of(trainer), "tokens": trainer.tokens_seen}
        (out / f"{strategy}.{task.subset}.{rank}.json").write_text(json.dumps(record))
        trainer.accelerator.free_memory()


def split_before(out: Path, rank: int) -> None:
    """A student made while ZeRO-3's arguments exist is in pieces before anybody could check it."""
    args = training_arguments("zero3", output_dir=str(out / "trainer"), report_to="none")
    student = AutoModelForCausalLM.from_config(tiny_llama().config)
    try:
        DistillationTrainer(student, tiny_llama(), args=args, processing_class=tiny_tokenizer())
    except UserError as error:
        (out / f"split_before.{rank}.txt").write_text(str(error))


def padded_part(out: Path, rank: int, world: int) -> None:
    """ZeRO-3 cuts 5 weights into parts of 3; whatever stands behind the last of them is no weight."""
    import deepspeed

    config = {"train_batch_size": world, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        weight = torch.nn.Linear(5, 1, bias=False).weight
    if rank == world - 1:
        weight.ds_tensor[2:] = math.nan
    (out / f"padded_part.{rank}.json").write_text(json.dumps(local_shard(weight).tolist()))


def hand_written_loop(out: Path, rank: int, world: int) -> None:
    """Our loss in a loop of one's own: ``fully_shard`` on half of the batch against a whole model on all of it."""
    ids = torch.arange(8 * 12).reshape(8, 12) % 300
    labels = torch.where(torch.arange(12) < 1 + torch.arange(8)[:, None], -100, ids)  # ever fewer labels
    apart = {}
    for tie in (True, False):
        start, whole, sharded = (tiny_llama(seed=0, tie=tie) for _ in range(3))
        mesh = init_device_mesh("cpu", (world,))
        for module in (*sharded.model.layers, sharded):
            fully_shard(module, mesh=mesh)
        labelled = int(count_targets(labels))
        steps_by_hand(whole, ids, labels, labelled)
        steps_by_hand(sharded, ids[rank::world], labels[rank::world], labelled / world)
        state = sharded.state_dict()
        assert all(isinstance(value, DTensor) for value in state.values())
        for (name, value), first in zip(whole.named_parameters(), start.parameters(), strict=True):
            difference, moved = state[name].full_tensor() - value, value - first
            apart[f"{name} {tie}"] = (float(difference.norm() / value.norm()), float(moved.norm() / value.norm()))
    (out / f"loop.{rank}.json").write_text(json.dumps(apart))


def steps_by_hand(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, normalizer: float) -> None:
    teacher = LiveTeacher(tiny_llama(seed=1, layers=1))
    loss = DistillationLoss("jsd", temperature=build_temperature("dts", rule="gap"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    answers = teacher.states({"input_ids": ids}, labels)

    def loss_of_states(states: torch.Tensor, head: Head) -> torch.Tensor:
        rows, targets = select_response(states, labels)
        return loss(rows, head, answers, teacher.head, targets, normalizer).loss

    for _ in range(5):
        with loss_in_head(model, loss_of_states):
            model(input_ids=ids, use_cache=False).logits.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    gc.freeze()  # the Trainer collects garbage twice a run: let it not walk through every module each time
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for strategy in MULTI if world > 1 else ("single",):
        for case in CASES:
            if strategy in case.strategies:
                run(case, strategy, out, world, rank)
                gc.collect()
        if strategy in CLASSIFIERS:
            classify(strategy, out, world, rank)
    if world > 1:
        hand_written_loop(out, rank, world)
        split_before(out, rank)
        padded_part(out, rank, world)
        leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
