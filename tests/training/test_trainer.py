"""DistillationTrainer: gradients against the dense reference, invariance to how a step is split, logs, checkpoints."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.errors import RunError, UserError
from dts_hf.loss.logged_sums import SumMeter
from dts_hf.loss.selection import IGNORE_INDEX, count_targets, select_response
from dts_hf.teachers.live import LiveTeacher
from dts_hf.training.trainer import DistillationTrainer, DTSDistillationTrainer
from tests.support import reference
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import (
    ROWS,
    arguments,
    encoded,
    largest_difference,
    step_gradients,
    temperatures,
    trainer_for,
)

MODELS = {"llama_tied": lambda s: tiny_llama(seed=s, tie=True), "llama_untied": lambda s: tiny_llama(seed=s, tie=False),
          "gpt2": lambda s: tiny_gpt2(seed=s)}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the shift


def test_select_response_is_the_shift_by_hand():
    states = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    labels = torch.tensor([[5, IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 8, IGNORE_INDEX, IGNORE_INDEX]])
    rows, targets = select_response(states, labels)
    assert rows.squeeze(-1).tolist() == [1.0, 2.0, 4.0]  # the state before each label; the label of position 0 is none
    assert targets.tolist() == [6, 7, 8]
    assert count_targets(labels).item() == 3


@pytest.mark.parametrize("labels", [torch.full((2, 3), IGNORE_INDEX), torch.tensor([[4]])], ids=["none", "one_token"])
def test_select_response_of_nothing(labels):
    rows, targets = select_response(torch.randn(*labels.shape, 5), labels)
    assert rows.shape == (0, 5) and targets.shape == (0,) and count_targets(labels).item() == 0


# ------------------------------------------------------------------------------------------------- gradients of a step


@pytest.mark.parametrize("kind", MODELS)
def test_step_gradients_equal_the_dense_loss(tmp_path, kind):
    """The whole road (collator, shift, head swap, chunks) against logits of the whole model and autograd, float64."""
    student, teacher = MODELS[kind](0).double(), MODELS[kind](1).double()
    trainer = trainer_for(tmp_path, student, teacher, kd_ratio=0.3, logits_budget_mb=0.05)
    batch = PaddedCollator(2)([encoded()[i] for i in range(6)])
    gradients = step_gradients(trainer, [batch])
    student.zero_grad()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask = batch["labels"][:, 1:] != IGNORE_INDEX
    z_s = student(**inputs).logits[:, :-1][mask]
    with torch.no_grad():
        z_t = teacher(**inputs).logits[:, :-1][mask]
    targets = batch["labels"][:, 1:][mask]
    t = trainer.temperature.temperature
    reference.distillation_loss(
        z_s, z_t, targets, "forward_kl", {}, t, t, 0.3, True, len(targets)
    ).backward()  # fmt: skip
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert largest_difference(gradients, expected) < 1e-10


@pytest.mark.parametrize("kind", MODELS)
def test_step_gradients_do_not_depend_on_the_split(tmp_path, kind):
    data = encoded()
    examples = [data[i] for i in range(8)]
    padded, packed = PaddedCollator(2), PackedCollator()
    results = {}
    for name, collator, size in [("1x8", padded, 8), ("2x4", padded, 4), ("8x1", padded, 1), ("packed", packed, 8),
                                 ("packed 4x2", packed, 2)]:  # fmt: skip
        trainer = trainer_for(tmp_path, MODELS[kind](0), MODELS[kind](1))
        batches = [collator(examples[i : i + size]) for i in range(0, 8, size)]
        results[name] = step_gradients(trainer, batches)
    for name, gradients in results.items():
        assert largest_difference(gradients, results["1x8"]) < 1e-5, name


def test_more_padding_changes_nothing(tmp_path):
    examples = [encoded()[i] for i in range(4)]
    one = step_gradients(trainer_for(tmp_path), [PaddedCollator(2)(examples)])
    other = step_gradients(trainer_for(tmp_path), [PaddedCollator(2, pad_to_multiple_of=64)(examples)])
    assert largest_difference(one, other) < 1e-5


def test_a_micro_batch_without_labels_adds_nothing(tmp_path):
    batch = PaddedCollator(2)([encoded()[i] for i in range(4)])
    silent = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    alone = step_gradients(trainer_for(tmp_path), [batch])
    together = step_gradients(trainer_for(tmp_path), [silent, batch])
    assert largest_difference(together, alone) < 1e-6


def train_three_steps(tmp_path, size, accumulation, **arguments):
    options = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
               "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd"}  # fmt: skip
    trainer = trainer_for(tmp_path, options=options, **arguments)
    trainer.train()
    return trainer


POLICIES = [
    {"name": "dts", "rule": "gap"},
    {"name": "dts", "granularity": "token"},
    {"name": "dts", "granularity": "sequence"},
    {"name": "dts", "decoupled": True},
    {"name": "dts", "range": "auto"},
    {"name": "dtkd", "w_kd": 0.5},
    {"name": "ctkd", "ramp": 0.1},
    "adakd",
    {"name": "adakd", "keep": 0.4},
    "ats",
    {"name": "cist", "factor": "product"},
    "taid",
    "norm_kd",
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_training_does_not_depend_on_the_split(tmp_path, policy):
    """Three optimizer steps through Trainer.train itself: equal weights, temperatures and state for any split or packing."""
    expected = train_three_steps(tmp_path, 8, 1, temperature=policy)
    fresh = type(expected.temperature)().state()
    assert not fresh or expected.temperature.state() != fresh  # what has a state has moved
    for size, accumulation, packing in [(4, 2, False), (1, 8, False), (4, 2, True)]:
        trainer = train_three_steps(tmp_path, size, accumulation, temperature=policy, packing=packing)
        name = f"{size} x {accumulation}, packing {packing}"
        assert largest_difference(trainer.model.state_dict(), expected.model.state_dict()) < 1e-5, name
        for one, other in zip(temperatures(trainer), temperatures(expected), strict=True):
            assert one == pytest.approx(other, rel=2e-5), name
        for key, value in expected.temperature.state().items():
            found = trainer.temperature.state()[key]
            same = found is None if value is None else found == pytest.approx(value, rel=1e-4, abs=1e-6)
            assert same, (name, key)


def test_packing_through_the_trainer_equals_padding(tmp_path):
    losses = {}
    for packing in (False, True):
        trainer = trainer_for(
            tmp_path, packing=packing, options={"train_sampling_strategy": "sequential", "max_steps": 2}
        )
        trainer.train()
        losses[packing] = [log["loss"] for log in trainer.state.log_history if "kl" in log]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_lora_student_trains_and_its_base_stays(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(tiny_llama(seed=0), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = trainer_for(tmp_path, student, options={"max_steps": 2, "activation_checkpointing": True})
    trainer.train()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora" in name for name in moved)


# ---------------------------------------------------------------------------------------------------- logs and held out


def test_what_is_logged(tmp_path):
    trainer = trainer_for(tmp_path, options={"max_steps": 4, "logging_steps": 2})
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert [log["step"] for log in logs] == [2, 4]
    wanted = {"loss", "ce_loss", "kd_loss", "teacher_ce", "gap", "kl", "temperature", "temperature_cosine",
              "student_entropy", "teacher_entropy", "effective_support", "top1_agreement", "tokens_per_second",
              "learning_rate", "grad_norm"}  # fmt: skip
    for log in logs:
        assert wanted <= set(log)
        assert log["gap"] == pytest.approx(log["ce_loss"] - log["teacher_ce"])
        assert log["loss"] == pytest.approx(0.5 * log["ce_loss"] + 0.5 * log["kd_loss"], rel=0.05)
        assert log["effective_support"] == pytest.approx(math.exp(log["teacher_entropy_at_t"]))
    json.dumps(logs)


@pytest.mark.parametrize("temperature", [1.0, 4.0, {"name": "dts"}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_held_out_loss_depends_on_neither_batch_size_nor_temperature(tmp_path, batch_size, temperature):
    options = {"per_device_eval_batch_size": batch_size}
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:7], temperature=temperature, options=options)
    values = trainer.evaluate()
    one_by_one = trainer_for(tmp_path, eval_dataset=ROWS[:7], temperature=2.0).evaluate()
    for name in ("eval_loss", "eval_ce_loss", "eval_kl", "eval_teacher_ce", "eval_labels", "eval_rows"):
        assert values[name] == pytest.approx(one_by_one[name], rel=1e-6), name
    assert values["eval_kd_loss"] == pytest.approx(values["eval_kl"])


def test_evaluation_leaves_training_as_it_was(tmp_path):
    """Same losses with and without evaluation in between: no meter, no temperature and no generator moves."""
    losses = []
    for strategy in ("no", "steps"):
        options = {"max_steps": 4, "eval_strategy": strategy, "eval_steps": 1}
        trainer = trainer_for(tmp_path, eval_dataset=ROWS[:3], options=options)
        trainer.train()
        losses.append([(log["loss"], log["temperature"]) for log in trainer.state.log_history if "kl" in log])
    assert losses[0] == losses[1]


def test_teacher_is_frozen_in_eval_and_not_saved(tmp_path):
    teacher = tiny_gpt2(seed=3).train()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer = trainer_for(tmp_path, tiny_gpt2(seed=4), teacher, options={"max_steps": 2})
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert len(list(trainer.model.parameters())) == len(list(tiny_gpt2().parameters()))


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_resume_goes_on_exactly(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "group_by_length",
               "per_device_train_batch_size": 4}  # fmt: skip
    straight = trainer_for(tmp_path, options=options)
    straight.train()
    state = json.loads((tmp_path / "checkpoint-3" / "temperature.json").read_text())
    assert state["name"] == "dts" and 1.0 <= state["state"]["value"] <= 3.0
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = trainer_for(tmp_path, tiny_llama(seed=5), options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name
    assert again.temperature.state() == straight.temperature.state()


def test_resume_refuses_another_policy(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, options=options).train()
    other = trainer_for(tmp_path, temperature=2.0, options=options)
    with pytest.raises(UserError, match=r'temperature\.name: was "dts", now "constant"'):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ------------------------------------------------------------------------------------------------------- construction


def test_accepts_names_numbers_and_tokenised_rows(tmp_path):
    for role, seed in (("student", 0), ("teacher", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
    data = encoded()
    assert isinstance(data, EncodedDataset)
    trainer = DTSDistillationTrainer(
        str(tmp_path / "student"), str(tmp_path / "teacher"), 2.0, args=arguments(tmp_path / "run"), train_dataset=data
    )
    trainer.train()
    assert trainer.temperature.name == "constant" and trainer.state.global_step == 1


def test_label_ids_beyond_the_shared_vocabulary_are_refused(tmp_path):
    bad = EncodedDataset(["a"], [[1, 2, 400]], [1])
    with pytest.raises(UserError, match="token id 400"):
        trainer_for(tmp_path, rows=bad)


def test_padded_vocabularies_train_when_cut(tmp_path):
    student, teacher = tiny_llama(vocab=328, seed=0), tiny_llama(vocab=344, seed=1)
    with pytest.raises(UserError, match="truncate_to_tokenizer"):
        trainer_for(tmp_path, student, teacher)
    trainer = trainer_for(tmp_path, student, teacher, vocab_alignment="truncate_to_tokenizer")
    trainer.train()
    assert trainer.vocab_size == 320 and "328" in trainer.vocab_note and "344" in trainer.vocab_note


def test_model_card_is_ours_when_given(tmp_path):
    trainer = trainer_for(tmp_path, model_card=lambda: "# a card\n")
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# a card\n"
    plain = trainer_for(tmp_path / "plain")
    plain.create_model_card()
    assert "knowledge-distillation" in (tmp_path / "plain" / "README.md").read_text()


def test_without_a_count_the_loss_is_the_mean_over_its_own_labels(tmp_path):
    trainer, batch = trainer_for(tmp_path), PaddedCollator(2)([encoded()[i] for i in range(4)])
    trainer.model.train()
    alone = trainer.compute_loss(trainer.model, batch)
    counted = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count_targets(batch["labels"]))
    assert alone.item() == pytest.approx(counted.item(), rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_without_a_teacher_it_is_the_trainers_own_fine_tuning(tmp_path, packing):
    """The same gradients as the model's own loss, and a log that speaks of no teacher."""
    trainer = trainer_for(tmp_path, kd_ratio=0.0, packing=packing)
    alone = DistillationTrainer(
        tiny_llama(seed=0), None, kd_ratio=0.0, args=arguments(tmp_path, max_steps=2, logging_steps=1),
        train_dataset=ROWS, eval_dataset=ROWS[:3], processing_class=tiny_tokenizer(), packing=packing,
    )  # fmt: skip
    batch = alone.data_collator([encoded()[i] for i in range(4)])
    gradients = step_gradients(alone, [batch])
    assert largest_difference(gradients, step_gradients(trainer, [batch])) < 1e-5
    model = tiny_llama(seed=0)
    padded = PaddedCollator(2)([encoded()[i] for i in range(4)])
    padded.pop("row_id")
    model(**padded).loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(gradients, own) < 1e-5
    alone.train()
    log = next(log for log in alone.state.log_history if "ce_loss" in log)
    assert {"ce_loss", "student_entropy", "tokens_per_second"} <= set(log)
    assert not {"kl", "gap", "teacher_ce", "kd_loss", "top1_agreement", "temperature"} & set(log)
    held_out = alone.evaluate()
    assert held_out["eval_loss"] == pytest.approx(held_out["eval_ce_loss"]) and "eval_kl" not in held_out


def test_no_teacher_and_a_kd_ratio_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"teacher: got None with kd_ratio 0\.5"):
        DistillationTrainer(tiny_llama(), None, args=arguments(tmp_path), train_dataset=ROWS,
                            processing_class=tiny_tokenizer())  # fmt: skip


# ------------------------------------------------------------------------------- nothing is ignored without a word


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: the loss needs no logits"):
        trainer_for(tmp_path, **{name: lambda *args: {}})


def test_arguments_that_would_have_no_effect_are_refused(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class GKDConfig(TrainingArguments):
        lmbda: float = 0.5
        beta: float = 0.5

    with pytest.raises(UserError, match=r"args: GKDConfig has lmbda, beta, which would have no effect"):
        DistillationTrainer(tiny_llama(), tiny_llama(), args=GKDConfig(str(tmp_path), use_cpu=True),
                            train_dataset=ROWS, processing_class=tiny_tokenizer())  # fmt: skip
    with pytest.raises(UserError, match="label_smoothing_factor"):
        trainer_for(tmp_path, options={"label_smoothing_factor": 0.1})
    for name, value in (("split_batches", True), ("even_batches", False)):
        with pytest.raises(UserError, match=f"accelerator_config: got {name}: {value}, expected {name}: {not value}"):
            trainer_for(tmp_path, options={"accelerator_config": {name: value}})
    with pytest.raises(UserError, match="packing: got true and a data_collator"):
        trainer_for(tmp_path, packing=True, data_collator=PaddedCollator(2))
    with pytest.raises(UserError, match="expected a mapping with a name"):
        trainer_for(tmp_path, temperature={"rule": "gap"})


@pytest.mark.parametrize("pad_position", [0, 1])
def test_a_collator_that_gives_positions_gives_the_same_numbers(tmp_path, pad_position):
    """Positions of padding are no boundaries of rows."""
    padded = PaddedCollator(2)

    def with_positions(examples):
        batch = padded(examples)
        mask = batch["attention_mask"]
        return {**batch, "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, pad_position)}

    rows = encoded()
    found = []
    for collator in (padded, with_positions):
        trainer = trainer_for(tmp_path, rows=rows, eval_dataset=rows, data_collator=collator)
        metrics = trainer.evaluate()
        trainer.train()
        found.append((metrics["eval_loss"], metrics["eval_rows"], trainer.tokens_seen))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_label_below_zero_that_is_not_ignored_is_refused(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, -1, 7]}]
    with pytest.raises(UserError, match="row 0: token id -1 is outside"):
        trainer_for(tmp_path, rows=rows, data_collator=PaddedCollator(2))


# ------------------------------------------------------------------------------------------------- held-out rows


def test_several_held_out_sets_and_raw_rows(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset={"first": ROWS[:3], "second": ROWS[3:5]})
    found = trainer.evaluate()
    assert {"eval_first_loss", "eval_second_kl"} <= set(found)
    alone = trainer_for(tmp_path)
    assert alone.evaluate(ROWS[:3])["eval_loss"] == pytest.approx(found["eval_first_loss"], rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_fillers_are_single_tokens_that_count_for_nothing(tmp_path, packing):
    rows = encoded()
    tokenised = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in (rows[3], rows[4], rows[5])]
    for dataset in (rows, tokenised):  # with row numbers, and without
        options = {"per_device_eval_batch_size": len(dataset) + 2}
        trainer = trainer_for(tmp_path, eval_dataset=dataset, packing=packing, options=options)
        (batch,) = trainer.get_eval_dataloader()
        lengths = sorted((len(row["input_ids"]) for row in dataset), reverse=True)
        trainer.model.eval()
        trainer.compute_loss(trainer.model, batch)
        assert trainer.sums.eval_meter.reduce(trainer.accelerator)["tokens"] == sum(lengths)
        fed = batch["input_ids"].numel() if packing else batch["attention_mask"].sum()
        assert fed == sum(lengths) + 2
        values = trainer.evaluate()
        assert values["eval_labels"] == sum(count_targets(torch.tensor([row["labels"]])) for row in dataset)
        assert values["eval_rows"] == len(dataset)
        per_second = [values[f"eval_{name}_per_second"] * values["eval_runtime"] for name in ("samples", "steps")]
        assert per_second == pytest.approx([len(dataset), 1], rel=0.05)  # rounded to three digits


def test_an_evaluation_that_was_broken_off_leaves_nothing_to_the_next(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:6], options={"per_device_eval_batch_size": 2})
    expected = trainer.evaluate()

    class CtrlC(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(CtrlC())
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.remove_callback(CtrlC)
    again = trainer.evaluate()
    assert {key: again[key] for key in ("eval_rows", "eval_loss", "eval_kl")} == {
        key: expected[key] for key in ("eval_rows", "eval_loss", "eval_kl")
    }


def test_evaluation_does_not_move_the_random_generator(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:3])
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trainer.evaluate()
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------------------------------------- logs and state


def test_temperature_and_its_cosine_are_means_over_the_same_steps(tmp_path):
    """rule: paper is the plain cosine while the student is worse: two equal curves, whatever logging_steps is."""
    trainer = trainer_for(tmp_path, temperature={"name": "dts", "rule": "paper"},
                          options={"max_steps": 6, "logging_steps": 3})  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert len(logs) == 2 and logs[0]["temperature"] != logs[1]["temperature"]
    for log in logs:
        assert log["temperature"] == pytest.approx(log["temperature_cosine"], rel=1e-6)
        assert "ignored_gaps" not in log
    plain = trainer_for(tmp_path, temperature=2.0, options={"max_steps": 1, "logging_steps": 1})
    plain.train()
    assert "temperature_cosine" not in next(log for log in plain.state.log_history if "kl" in log)


def test_the_log_shows_what_the_policy_schedules(tmp_path):
    trainer = trainer_for(tmp_path, temperature={"name": "pocl", "stages": 2, "t_start": 1.0, "t_end": 2.0},
                          options={"max_steps": 4, "logging_steps": 2})  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert [log["kd_ratio"] for log in logs] == pytest.approx([0.7, 1.0])
    for log in logs:
        parts = (1 - log["kd_ratio"]) * log["ce_loss"] + log["kd_ratio"] * log["kd_loss"]
        assert log["loss"] == pytest.approx(parts, rel=0.05)


def test_a_second_train_is_a_new_run(tmp_path):
    trainer = trainer_for(tmp_path, options={"max_steps": 4, "logging_steps": 1})
    first = [trainer.train() and None for _ in range(2)]
    assert first == [None, None]
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert logs[0]["temperature"] == 3.0 and trainer.tokens_seen > 0


def test_resume_keeps_tokens_and_sums_that_were_not_logged_yet(tmp_path):
    options = {"max_steps": 4, "logging_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = trainer_for(tmp_path / "whole", options=options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    one, other = ([log for log in t.state.log_history if "kl" in log][-1] for t in (whole, resumed))
    assert whole.tokens_seen == resumed.tokens_seen
    for name in ("ce_loss", "kd_loss", "gap", "kl", "temperature", "temperature_min", "temperature_cosine"):
        assert one[name] == other[name], name


@pytest.mark.parametrize("packing", [False, True])
def test_plain_tokenised_rows_need_no_row_id(tmp_path, packing):
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in (encoded()[i] for i in range(6))]
    trainer = trainer_for(tmp_path, rows=rows, packing=packing, eval_dataset=rows[:2])
    trainer.train()
    assert trainer.evaluate()["eval_labels"] == sum(
        label != IGNORE_INDEX for row in rows[:2] for label in row["labels"][1:]
    )


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(tmp_path):
    options = {"max_steps": 20, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, options=options)
    data = trainer.train_dataset

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:  # nothing is saved at this step
                next(model.parameters()).data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(RunError, match=r"step 8: the loss has been non-finite \(NaN or Inf\) for 3 steps in a row"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    record = json.loads((tmp_path / "broken_step-8.rank0.json").read_text())
    assert record["step"] == 8 and len(record["rows"]) == 2
    assert all(data.row_ids[row["row"]] == row["id"] for row in record["rows"])


class Break(TrainerCallback):
    """Makes a weight no number: before the forward of the last step, or after its update."""

    def __init__(self, before: bool) -> None:
        self.before = before

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.before and state.global_step == state.max_steps - 1:
            next(model.parameters()).data.fill_(float("nan"))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.before and state.global_step == state.max_steps - 1:
            next(model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("before", [True, False], ids=["loss", "weights"])
@pytest.mark.parametrize("save_strategy", ["no", "steps", "epoch"])
def test_a_run_whose_last_step_breaks_is_not_done(tmp_path, save_strategy, before):
    options = {"max_steps": 4, "save_strategy": save_strategy, "save_steps": 2}
    trainer = trainer_for(tmp_path, callbacks=[Break(before)], options=options)
    with pytest.raises(RunError, match=r"step 4: the student has non-finite weights"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ([] if save_strategy == "no" else ["checkpoint-2"])


def test_a_step_that_was_broken_off_leaves_nothing_to_the_next(tmp_path):
    """Ctrl-C in a notebook between two micro-batches, then the same trainer goes on from its checkpoint."""
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
               "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    straight = trainer_for(tmp_path / "straight", options=options)
    straight.train()

    class CtrlC(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = trainer_for(tmp_path / "broken", callbacks=[CtrlC()], options=options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(CtrlC)
    trainer.train(resume_from_checkpoint=True)
    for ours, theirs in zip(trainer.state.log_history, straight.state.log_history, strict=True):
        names = {"loss", "kl", "temperature", "grad_norm"} & theirs.keys()
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert trainer.tokens_seen == straight.tokens_seen


def test_too_little_memory_for_the_student_is_not_called_wrong_input(tmp_path, monkeypatch):
    def move(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", move)
    with pytest.raises(torch.OutOfMemoryError):
        trainer_for(tmp_path)


@pytest.mark.parametrize(
    ("values", "total"), [((1.0, 2.0), 3.0), ((math.inf, -math.inf), math.nan), ((math.inf, 1.0), math.inf)]
)
def test_sums_of_ranks_that_are_no_numbers(values, total):
    class TwoProcesses:
        def gather(self, flat):
            return torch.tensor([[value] for value in values], dtype=torch.float64)

    meter = SumMeter()
    meter.add({"ce": torch.tensor(values[0])})
    assert meter.reduce(TwoProcesses())["ce"] == pytest.approx(total, nan_ok=True)


@pytest.mark.parametrize("knows", [False, True])
def test_a_teacher_of_ones_own_sees_borders_only_where_it_says_so(tmp_path, knows):
    live, seen = LiveTeacher(tiny_llama(seed=1)), []

    class Foreign:
        head = live.head
        takes_cu_seqlens = knows

        def states(self, batch, labels):
            seen.append("attention_mask" in batch)
            return live.states({key: value for key, value in batch.items() if key != "attention_mask"}, labels)

        def to(self, device):
            return self

    trainer_for(tmp_path, teacher=Foreign(), packing=True).train()
    assert set(seen) == {knows}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("vocab_alignment", "intersec", r"vocab_alignment: got 'intersec'.*'intersect'"),
        ("teacher_placement", "shard", r"teacher_placement: got 'shard'.*'sharded'"),
    ],
)
def test_a_mistyped_choice_is_not_taken_for_another(tmp_path, option, value, says):
    with pytest.raises(UserError, match=says):
        trainer_for(tmp_path, tiny_llama(seed=0), tiny_llama(seed=1), **{option: value})
