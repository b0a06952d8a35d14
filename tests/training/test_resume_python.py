"""``DistillationTrainer.train(resume_from_checkpoint=...)``: it ends as a run without a break, or says why not."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from transformers import Trainer, TrainerCallback

from dts_hf.errors import UserError
from dts_hf.runs.checkpoints import mark_complete, read_complete, remove, why_incomplete
from dts_hf.temperature import build_policy
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.trainers import ROWS, arguments, losses, plain, trainer_for

CONSTANT = {
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_weights(one, other):
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


def losses_by_step(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "kl" in log}


# ----------------------------------------------------------------------------------------------- another length of run


@pytest.mark.parametrize("checkpoint", [True, "checkpoint-2"], ids=["finished", "middle"])
@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({"max_steps": 3}, {"max_steps": 7}),  # the old end is in the middle of an epoch of four steps
        ({"num_train_epochs": 1, "max_steps": -1}, {"num_train_epochs": 2, "max_steps": -1}),
        ({"max_steps": 3, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
         {"max_steps": 5, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}),
    ],
    ids=["steps", "epochs", "warmup"],
)  # fmt: skip
def test_a_longer_run_goes_on_where_nothing_is_scheduled_over_its_length(tmp_path, was, now, checkpoint):
    more = {"temperature": 2.0, "rows": ROWS, "eval_dataset": ROWS[:3]}
    ends = {"logging_steps": 2, "eval_strategy": "epoch"}
    straight = trainer_for(tmp_path / "straight", options={**CONSTANT, **ends, **now}, **more)
    straight.train()
    trainer_for(tmp_path / "run", options={**CONSTANT, **ends, **was}, **more).train()
    resumed = trainer_for(tmp_path / "run", tiny_llama(seed=9), options={**CONSTANT, **ends, **now}, **more)
    output = resumed.train(checkpoint if checkpoint is True else str(tmp_path / "run" / checkpoint))
    assert resumed.state.global_step == straight.state.global_step == output.global_step
    assert_equal_weights(resumed, straight)
    assert losses_by_step(resumed).items() >= losses_by_step(straight).items()
    evaluated = [
        [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
        for trainer in (resumed, straight)
    ]
    assert evaluated[0][-1] == evaluated[1][-1] and len(evaluated[0]) >= len(evaluated[1])
    assert resumed.tokens_seen == straight.tokens_seen


@pytest.mark.parametrize("checkpoint", ["checkpoint-4", "checkpoint-2"], ids=["finished", "middle"])
@pytest.mark.parametrize(
    ("options", "temperature", "named"),
    [
        ({"lr_scheduler_type": "linear"}, 2.0, r"learning rate \(linear\)"),
        ({}, {"name": "dts"}, r"temperature \(dts\)"),
        ({"lr_scheduler_type": "cosine"}, "linear", r"learning rate \(cosine\) and temperature \(linear\)"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, 2.0, "constant_with_warmup"),
    ],
    ids=["learning rate", "temperature", "both", "relative warm-up"],
)
def test_a_run_of_another_length_is_refused_by_name(tmp_path, options, temperature, named, checkpoint):
    options = {**CONSTANT, "max_steps": 4, **options}
    trainer_for(tmp_path, temperature=temperature, options=options).train()
    middle = checkpoint == "checkpoint-2"
    for other in [{"max_steps": 8}, {"max_steps": 2}] if middle else [{"max_steps": -1, "num_train_epochs": 3}]:
        longer = trainer_for(tmp_path, tiny_llama(seed=9), temperature=temperature, options={**options, **other})
        with pytest.raises(UserError, match=rf"{checkpoint}: written by a run of 4 steps; .*{named}"):
            longer.train(str(tmp_path / checkpoint))
        assert longer.state.global_step == 0
    same = trainer_for(tmp_path, tiny_llama(seed=9), temperature=temperature, options=options)
    assert same.train(str(tmp_path / checkpoint)).global_step == 4


def test_a_checkpoint_behind_the_end_of_the_run_is_refused(tmp_path):
    """It would train nothing and return the weights of another step."""
    options = {**CONSTANT, "max_steps": 4}
    trainer_for(tmp_path, temperature=2.0, options=options).train()
    for other in ({"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.5}):
        shorter = trainer_for(tmp_path, temperature=2.0, options={**options, **other})
        with pytest.raises(UserError, match=r"checkpoint-4: its step is 4, behind the end of a run of [23] steps"):
            shorter.train(resume_from_checkpoint=True)
    straight = trainer_for(tmp_path / "straight", temperature=2.0, options={**options, "max_steps": 3})
    straight.train()
    shorter = trainer_for(tmp_path, tiny_llama(seed=9), temperature=2.0, options={**options, "max_steps": 3})
    assert shorter.train(str(tmp_path / "checkpoint-2")).global_step == 3
    assert_equal_weights(shorter, straight)


def test_a_finished_run_resumed_as_it_was_has_nothing_to_do(tmp_path):
    options = {**CONSTANT, "max_steps": 3, "logging_steps": 2}
    first = trainer_for(tmp_path, options=options)
    loss = first.train().training_loss
    again = trainer_for(tmp_path, tiny_llama(seed=9), options=options)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 3 and output.training_loss == loss
    assert_equal_weights(again, first)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_loss_that_train_returns_is_that_of_the_whole_run(tmp_path, step):
    """Also where the checkpoint holds sums that were not logged yet, and where it is the last one."""
    options = {**CONSTANT, "max_steps": 6, "logging_steps": 3}
    straight = trainer_for(tmp_path, options=options).train()
    resumed = trainer_for(tmp_path, options=options)
    output = resumed.train(str(tmp_path / f"checkpoint-{step}"))
    assert output.training_loss == straight.training_loss == output.metrics["train_loss"]
    assert resumed.state.log_history[-1]["train_loss"] == straight.training_loss


def test_a_checkpoint_that_does_not_know_the_sum_gives_the_mean_over_the_steps_since(tmp_path):
    """As those of version 0.1."""
    options = {**CONSTANT, "max_steps": 6, "logging_steps": 5, "save_steps": 4}
    trainer_for(tmp_path, options=options).train()
    progress = tmp_path / "checkpoint-4" / "progress.json"
    values = json.loads(progress.read_text())
    del values["total_loss"]
    progress.write_text(json.dumps(values))
    record = read_complete(tmp_path / "checkpoint-4")
    mark_complete(tmp_path / "checkpoint-4", **{key: record[key] for key in record if key not in ("format", "files")})
    output = trainer_for(tmp_path, options=options).train(str(tmp_path / "checkpoint-4"))
    each = trainer_for(tmp_path / "each", options={**options, "logging_steps": 1, "save_strategy": "no"})
    each.train()
    assert output.training_loss == pytest.approx(sum(losses(each)[4:]) / 2, abs=1e-4)


# ------------------------------------------------------------------------------------------- what cannot be resumed


def test_a_checkpoint_of_the_weights_alone_is_refused(tmp_path):
    options = {**CONSTANT, "max_steps": 2, "save_only_model": True}
    trainer_for(tmp_path, options=options).train()
    trainer = trainer_for(tmp_path, options=options)
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        with pytest.raises(UserError, match=r"it holds the weights alone \(training\.save_only_model\)"):
            trainer.train(checkpoint)


def test_a_checkpoint_of_another_trainer_is_called_that(tmp_path):
    Trainer(tiny_llama(), arguments(tmp_path, **CONSTANT, max_steps=2), train_dataset=plain()[:1] * 8).train()
    trainer = trainer_for(tmp_path, options=CONSTANT)
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        with pytest.raises(UserError, match=r"it was not written by dts_hf: it has no complete\.json"):
            trainer.train(checkpoint)
    with pytest.raises(UserError, match=r"those of transformers \(its Trainer, or one of TRL's\)\. Its weights can"):
        trainer.train(True)
    (tmp_path / "checkpoint-3").write_text("a file")
    with pytest.raises(UserError, match=r"checkpoint-3: it is a file, expected a folder"):
        trainer.train(str(tmp_path / "checkpoint-3"))
    with pytest.raises(
        UserError, match=r"checkpoint-3: it is a file, expected a folder; checkpoint-2: it was not written"
    ):
        trainer.train(True)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"those of another program, such as accelerate"):
        trainer.train(str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "rank_0.json").write_text("{}")
    with pytest.raises(UserError, match="the save was interrupted"):
        trainer.train(str(tmp_path / "checkpoint-2"))


def test_another_loss_is_refused_by_name(tmp_path):
    options = {**CONSTANT, "max_steps": 4}
    was = {"divergence": {"name": "jsd", "beta": 0.3}, "temperature": {"name": "dts", "t_init": 3.0}, "kd_ratio": 0.5}
    trainer_for(tmp_path, options=options, **was).train()
    changes = [
        ({"divergence": {"name": "jsd", "beta": 0.4}}, r"\n  divergence\.options\.beta: was 0\.3, now 0\.4\n"),
        ({"divergence": "forward_kl"}, r"numbers of neither:\n  divergence\.name: was \"jsd\", now \"forward_kl\"\n"),
        ({"kd_ratio": 0.7}, r"\n  kd_ratio: was 0\.5, now 0\.7\n"),
        ({"temperature_scaling": "none"}, r"temperature_scaling: was \"squared\", now \"none\""),
        ({"temperature": {"name": "dts", "t_init": 2.0}}, r"temperature\.options\.t_init: was 3\.0, now 2\.0"),
        (
            {"temperature": {"name": "dts", "t_init": 3.0, "rule": "paper"}},
            r"options\.rule: was \"gap\", now \"paper\"",
        ),
        ({"temperature": 2.0}, r"numbers of neither:\n  temperature\.name: was \"dts\", now \"constant\"\nSet"),
    ]
    for change, named in changes:
        trainer = trainer_for(tmp_path, options=options, **{**was, **change})
        with pytest.raises(UserError, match=named) as caught:
            trainer.train(str(tmp_path / "checkpoint-2"))
        assert "its loss is not the one that it was trained with" in str(caught.value)
        assert trainer.state.global_step == 0
    same = trainer_for(tmp_path, options=options, **was, logits_budget_mb=1)  # how work is cut up is no change
    assert same.train(str(tmp_path / "checkpoint-2")).global_step == 4


def test_an_object_that_has_moved_is_the_same_policy(tmp_path):
    options = {**CONSTANT, "max_steps": 4}
    for policy in ({"name": "dts", "range": "auto", "support_max": 40}, {"name": "ctkd"}, build_policy("dts")):
        folder = tmp_path / str(getattr(policy, "name", None) or policy["name"])
        trainer = trainer_for(folder, options=options, temperature=policy)
        trainer.train()
        assert trainer.train(str(folder / "checkpoint-2")).global_step == 4
        assert trainer_for(folder, options=options, temperature=policy).train(True).global_step == 4


def test_other_rows_that_were_tokenised_elsewhere_are_refused(tmp_path):
    options = {**CONSTANT, "max_steps": 4}
    rows = plain()
    trainer_for(tmp_path, rows=rows, options=options).train()
    other_token, other_label = ([{**row} for row in rows] for _ in range(2))
    other_token[5]["input_ids"] = [*rows[5]["input_ids"][:-1], 7]
    other_label[5]["labels"] = [*rows[5]["labels"][:-1], -100]
    for changed in (other_token, other_label, [*rows[1:], rows[0]], datasets.Dataset.from_list(other_token)):
        with pytest.raises(
            UserError, match=r"the rows of train_dataset are others \(their tokens, labels, or order\)"
        ):
            trainer_for(tmp_path, rows=changed, options=options).train(True)
    padded = [
        {"input_ids": [*row["input_ids"], 2, 2], "labels": [*row["labels"], -100, -100],
         "attention_mask": [*[1] * len(row["labels"]), 0, 0]} for row in rows
    ]  # fmt: skip
    for same in (rows, datasets.Dataset.from_list(rows), padded, Own(rows)):
        assert trainer_for(tmp_path, rows=same, options=options).train(True).global_step == 4


class Own(torch.utils.data.Dataset):
    """Rows of a class of one's own."""

    def __init__(self, rows, change=lambda row: row):
        self.rows, self.change = rows, change

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.change(self.rows[index])


def test_rows_that_are_made_anew_each_time_are_not_compared(tmp_path):
    """As by an augmentation: nobody can tell whether they are others."""
    options, drawn = {**CONSTANT, "max_steps": 4}, iter(range(10_000))

    def other(row):
        return {**row, "input_ids": [next(drawn) % 300, *row["input_ids"][1:]]}

    trainer = trainer_for(tmp_path, rows=Own(plain(), other), options=options)
    assert trainer.train_dataset.digest is None
    trainer.train()
    assert trainer_for(tmp_path, rows=Own(plain(), other), options=options).train(True).global_step == 4


def test_checkpoints_of_another_program_stay(tmp_path, capsys):
    """Also where a checkpoint is to be written there, and where old ones are removed."""
    Trainer(
        tiny_llama(), arguments(tmp_path, **CONSTANT, max_steps=4), train_dataset=[{**plain()[0]} for _ in range(16)]
    ).train()
    theirs = {path.name: (path / "model.safetensors").read_bytes() for path in tmp_path.glob("checkpoint-*")}
    (tmp_path / "checkpoint-6").write_text("a file")
    options = {**CONSTANT, "max_steps": 6, "save_steps": 3, "save_total_limit": 1}
    trainer_for(tmp_path, options={**options, "save_steps": 2}).train()
    said = capsys.readouterr().err
    for step in (2, 4, 6):
        assert f"checkpoint-{step} was not written by dts_hf and is in the way of a checkpoint" in said
    assert {*theirs} == {"checkpoint-2", "checkpoint-4"} and (tmp_path / "checkpoint-6.other").read_text() == "a file"
    for name, weights_then in theirs.items():
        assert (tmp_path / f"{name}.other" / "model.safetensors").read_bytes() == weights_then
    Trainer(
        tiny_llama(), arguments(tmp_path, **CONSTANT, max_steps=2), train_dataset=[{**plain()[0]} for _ in range(16)]
    ).train()
    trainer_for(tmp_path, options=options).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-?")) == ["checkpoint-2", "checkpoint-6"]


def test_what_a_kill_leaves_of_a_removed_checkpoint_is_still_ours(tmp_path, monkeypatch):
    trainer_for(tmp_path, options={**CONSTANT, "max_steps": 2}).train()
    folder = tmp_path / "checkpoint-2"
    monkeypatch.setattr("shutil.rmtree", lambda *_: None)
    remove(folder)
    assert [path.name for path in folder.iterdir()] == ["rank_0.json"]
    assert "the save was interrupted" in (why_incomplete(folder) or "")


class StopAt2(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 2


def test_a_run_that_a_callback_has_ended_has_nothing_left_and_says_so(tmp_path, caplog):
    """As a run without a break; who stops by the clock, to go on later, must know."""
    options = {**CONSTANT, "save_steps": 1, "max_steps": 4}
    assert trainer_for(tmp_path, options=options, callbacks=[StopAt2()]).train().global_step == 2
    again = trainer_for(tmp_path, options=options)
    assert again.train(True).global_step == 2
    assert "a callback ended the run at step 2 of 4" in caplog.text
    assert again.train(str(tmp_path / "checkpoint-1")).global_step == 4


def test_what_is_left_of_a_run_may_have_no_label(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4,
               "train_sampling_strategy": "sequential"}  # fmt: skip
    rows = plain()[:8]
    rows[4:] = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[4:]]
    straight = trainer_for(tmp_path, rows=rows, options=options)
    straight.train()
    again = trainer_for(tmp_path, tiny_llama(seed=9), rows=rows, options=options)
    assert again.train(str(tmp_path / "checkpoint-1")).global_step == 2
    assert_equal_weights(again, straight)


# ------------------------------------------------------------------------------------------------- the order of the rows


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "arrow"])
@pytest.mark.parametrize("packing", [False, True])
def test_tokenised_rows_grouped_by_length_resume_exactly(tmp_path, make, packing):
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3,
               "train_sampling_strategy": "group_by_length"}  # fmt: skip
    more = {"rows": make(plain()), "options": options, "packing": packing}
    straight = trainer_for(tmp_path, tiny_gpt2(seed=0), tiny_gpt2(seed=1), **more)
    straight.train()
    torch.manual_seed(99)
    again = trainer_for(tmp_path, tiny_gpt2(seed=5), tiny_gpt2(seed=1), **more)
    torch.manual_seed(98)
    again.train(str(tmp_path / "checkpoint-3"))
    assert losses_by_step(again) == losses_by_step(straight)
    assert_equal_weights(again, straight)
