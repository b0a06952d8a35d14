"""What a training step asks a GPU and then waits for, counted on a CPU: docs/scale.md lists it and says why it stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.tokenised import CountingCollator
from dts_hf.divergences import DIVERGENCES
from dts_hf.loss.selection import IGNORE_INDEX, response_positions
from dts_hf.temperature import temperature_policies
from dts_hf.training.trainer import DistillationTrainer
from tests.support.recorded import options_of
from tests.support.synchronising import Synchronising
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments, encoded, losses, plain, trainer_for

#: Of a step, but of tensors that are on the host wherever the models are.
ON_HOST = {
    ("collators", "tokens", "tensor"),
    ("collators", "more", "tensor"),
    ("packed_attention", "cu_seqlens_mask", "tensor"),
    ("tokenised", "__call__", "__int__"),  # CountingCollator
    ("dts", "_target", "tensor"),
    ("dts", "_target", "__float__"),
    ("plain_rows", "_is_one", "item"),  # behind a question for the device
}
#: Once a run, or once an epoch.
OF_RUN = {
    ("data_loader", "__iter__", "item"),
    ("trainer", "_finalize_training", "item"),
    ("non_finite", "check_weights", "__bool__"),
}
#: transformers asks whether a mask hides anything at all, for each model, and looks at the answer twice.
MASK = ("masking_utils", "_ignore_causal_mask_sdpa", "__bool__")
#: The sums of the step, all of them at once.
SUMS = ("logged_sums", "reduce", "tolist")


class StepsAlone(TrainerCallback):
    """Counts from the end of the second step to the end of the last: what a step costs, and not what a run does."""

    def __init__(self, counting: Synchronising) -> None:
        self.counting, self.steps = counting, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.counting.counts.clear()
        else:
            self.steps += 1


def calls_of(folder: Any, accumulation: int, **options: Any) -> dict[tuple[str, ...], float]:
    """How often each call is made in an optimizer step, by what is not known to be on the host."""
    counting, steps = Synchronising(), 2
    trainer = trainer_for(
        folder, tiny_llama(seed=0), tiny_llama(seed=1), callbacks=[StepsAlone(counting)],
        options={"max_steps": steps + 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation,
                 "logging_steps": 100, "optim": "sgd"},  # AdamW's on a CPU reads its own count of steps
        **options,
    )  # fmt: skip
    with counting:
        trainer.train()
    return {call: number / steps for call, number in counting.counts.items() if call not in ON_HOST | OF_RUN}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_one_transfer_for_each_step_and_none_for_each_chunk(tmp_path: Any, accumulation: int, packing: bool) -> None:
    for budget in (256, 0.01):  # MiB: one chunk, or a dozen of them
        calls = calls_of(tmp_path, accumulation, packing=packing, logits_budget_mb=budget)
        # Attention over packed rows reads their borders once for all layers, and on a CPU alone
        borders = sum(calls.pop(call) for call in [*calls] if call[0].startswith("packed_"))
        assert borders == (accumulation if packing else 0)
        assert calls == {SUMS: 1.0, **({} if packing else {MASK: 4.0 * accumulation})}


def calls_of_loss(trainer: Any, batch: dict[str, torch.Tensor]) -> Counter[tuple[str, ...]]:
    trainer.model.train()
    trainer.temperature.begin_run(4)
    trainer.temperature.begin_step(0.3)
    labels = trainer._get_num_items_in_batch([batch], trainer.args.device)
    with Synchronising() as counting:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=labels).backward()
    return Counter({call: n for call, n in counting.counts.items() if call not in ON_HOST | {MASK}})


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_what_a_policy_asks(tmp_path: Any, name: str) -> None:
    trainer = trainer_for(tmp_path, temperature={"name": name, **options_of(name, 4)}, logits_budget_mb=0.02)
    assert calls_of_loss(trainer, trainer.collate([encoded()[i] for i in range(4)])) == {}


ASKED = {"adaptive_kl"}  # how many tokens the head of a distribution has; for each chunk


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_what_a_divergence_asks(tmp_path: Any, name: str) -> None:
    trainer = trainer_for(tmp_path, divergence=name)
    calls = calls_of_loss(trainer, trainer.collate([encoded()[i] for i in range(4)]))
    assert {module for module, _, _ in calls} == ({name} if name in ASKED else set()), calls


def test_a_temperature_for_each_sequence_asks_for_their_lengths(tmp_path: Any) -> None:
    trainer = trainer_for(tmp_path, temperature={"name": "dts", "granularity": "sequence"})
    calls = calls_of_loss(trainer, trainer.collate([encoded()[i] for i in range(4)]))
    assert {module for module, _, _ in calls} == {"sequence_gap"}


def test_positions_of_known_number_are_those_that_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (1, 7), (5, 1), (4, 33)):
        for share in (0.0, 0.4, 1.0):
            labels = torch.randint(0, 50, shape, generator=generator)
            labels[torch.rand(shape, generator=generator) >= share] = IGNORE_INDEX
            counted = response_positions(labels)
            assert torch.equal(response_positions(labels, len(counted)), counted)


def test_a_batch_brings_the_number_of_its_labels() -> None:
    rows = [encoded()[i] for i in range(4)]
    batch = CountingCollator(PaddedCollator(2))(rows)
    assert batch["num_labels"] == len(response_positions(batch["labels"]))
    assert "num_labels" not in CountingCollator(lambda rows: {"input_ids": torch.ones(1, 2)})(rows)


@pytest.mark.parametrize("how", ["of its own", "in place"])
def test_labels_that_a_subclass_masks_are_counted_again(tmp_path: Any, how: str) -> None:
    """The number that the collator gave is of others; with it, rows without a label would be taken."""

    class Masking(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"] if how == "in place" else inputs["labels"].clone()
            labels[:, :-6] = IGNORE_INDEX
            return super().training_step(model, {**inputs, "labels": labels}, *args, **kwargs)

    rows = plain()[:8]
    options = {"args": arguments(tmp_path, max_steps=2, logging_steps=1), "train_dataset": rows}
    masking = Masking(tiny_llama(seed=0), tiny_llama(seed=1), processing_class=tiny_tokenizer(), **options)
    masking.train()
    width = max(len(row["input_ids"]) for row in rows)
    masked = [
        {**row, "labels": [IGNORE_INDEX if k < width - 6 else label for k, label in enumerate(row["labels"])]}
        for row in rows
    ]
    plainly = DistillationTrainer(
        tiny_llama(seed=0),
        tiny_llama(seed=1),
        processing_class=tiny_tokenizer(),
        **{**options, "train_dataset": masked},
    )
    plainly.train()
    for name in ("ce_loss", "kd_loss"):  # means over the labels that are left
        logged = [[line[name] for line in trainer.state.log_history if name in line] for trainer in (masking, plainly)]
        assert logged[0][0] == pytest.approx(logged[1][0], rel=1e-6)


@pytest.mark.parametrize("filtered", [True, False])
def test_the_filter_of_the_logged_loss_is_the_trainers(tmp_path: Any, filtered: bool, monkeypatch: Any) -> None:
    """``logging_nan_inf_filter``: a broken loss is logged as the mean since the last line, or as it is."""
    trainer = trainer_for(
        tmp_path, temperature=2.0,
        options={"max_steps": 4, "logging_steps": 4, "logging_nan_inf_filter": filtered, "learning_rate": 0.0},
    )  # fmt: skip
    seen: list[float] = []
    compute = trainer.compute_loss

    def broken_once(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        seen.append(loss.item())
        return loss + float("inf") if len(seen) == 3 else loss

    monkeypatch.setattr(trainer, "compute_loss", broken_once)
    trainer.train()
    expected = seen[0] + seen[1] + (seen[0] + seen[1]) / 3 + seen[3] if filtered else float("inf")
    assert losses(trainer) == [pytest.approx(expected / 4, rel=1e-6)]
    assert trainer.args.logging_nan_inf_filter is filtered
