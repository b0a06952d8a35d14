"""The adaptive fraction and the replay buffer through ``DistillationTrainer``: loss, gradient, resume, log, refusals."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import TrainerCallback

from dts_hf.errors import UserError
from dts_hf.on_policy.coin import coin
from dts_hf.teachers.asked_ahead import TICKET
from dts_hf.teachers.cached.teacher import STATES, CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.cached import cache_of
from tests.support.served import running, served_tiny
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, trainer_for

SEED = 7
#: Text that ends at once as often as not, and some that does not.
SHORT = {"max_new_tokens": 6}


def adaptive(**options):
    """All steps are the student's, and one batch fills the buffer."""
    chosen = {"capacity": 8, **options}
    return {"fraction": 1.0, "adaptive": chosen, **SHORT}


def replaying(folder, on_policy=None, options=None, **more):
    given = {"eval_strategy": "steps", "eval_steps": 100, "max_steps": 6, **(options or {})}
    chosen = adaptive() if on_policy is None else on_policy
    defaults = {"temperature": {"name": "dts"}, "model": tiny_llama(seed=0), "processing_class": tiny_tokenizer()}
    rows = more.pop("rows", ROWS)
    defaults["eval_dataset"] = rows[:3]
    return DistillationTrainer(
        args=arguments(folder, **given), train_dataset=rows, on_policy=chosen,
        **{**defaults, **({} if "teachers" in more else {"teacher": tiny_llama(seed=1, layers=3)}), **more},
    )  # fmt: skip


#: Text that has nothing of ``ROWS``: the more these are learned, the worse it gets.
OTHER = [{"instruction": "Q", "input": "", "output": text} for text in ("zzqx! zzqx!", "#&%;#&%;", "WVWVWV")]
RISING = {"eval_dataset": OTHER, "kd_ratio": 0.1}


class Recorder(TrainerCallback):
    """The branch, the gradient, and the numbers of the rows of each step; and how often the teacher was asked for states."""

    def __init__(self, trainer):
        self.trainer, self.branches, self.gradients, self.numbers, self.asked = trainer, [], [], [], []
        self.replayed = []  # batches
        self.trainer.add_callback(self)
        for one in trainer._teachers():
            one.states = self.counted(one.states)
        self.count = 0
        trainer.compute_loss = self.seen(trainer.compute_loss)

    def counted(self, states):
        def asked(*args, **kwargs):
            self.count += 1
            return states(*args, **kwargs)

        return asked

    def seen(self, compute):
        def computed(model, inputs, *args, **kwargs):
            if model.training:
                self.numbers[-1] += list(inputs.get("replay_numbers", ()))
                self.replayed += [dict(inputs)] if self.trainer._branch == "replay" else []
            return compute(model, inputs, *args, **kwargs)

        return computed

    def on_step_begin(self, *_, **kwargs):
        self.count = 0
        self.numbers.append([])

    def on_pre_optimizer_step(self, *_, model, **kwargs):
        parts = [p.grad.detach().double().flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(parts))
        self.branches.append(self.trainer._branch)
        self.asked.append(self.count)


def line(trainer, name):
    return [log.get(name) for log in trainer.state.log_history if "kl" in log or "generated_kl" in log]


def expected_branches(steps, phi=1.0, full_after=1):
    """By the rule and the coins, where the buffer is full after so many steps of generation."""
    found, generated = [], 0
    for step in range(steps):
        u = coin(SEED, step)
        if u >= phi:
            found.append("data")
        elif u < phi * (1 - step / steps) or generated < full_after:
            found.append("generate")
            generated += 1
        else:
            found.append("replay")
    return found


#: Rows of which the teacher reads more than the student, most of them.
HINTED = [{**row, "hint": "" if k % 5 == 0 else f"It says {row['output']}"} for k, row in enumerate(ROWS)]


def several(**how):
    return {"teachers": {"a": tiny_llama(seed=1, layers=3), "b": tiny_llama(seed=2, hidden=48)}, **how}


TEACHERS = {
    "one": lambda: {"teacher": tiny_llama(seed=1, layers=3)},
    "routed": lambda: several(teacher_column="who", rows=[{**row, "who": "aab"[k % 3]} for k, row in enumerate(ROWS)]),
    "weighted": lambda: several(teacher_weights={"a": 0.25, "b": 0.75}),
    "told more": lambda: {"rows": HINTED, "teacher_prefix_column": "hint"},
    "base": lambda: {"rows": HINTED, "teacher_prefix_column": "hint", "teacher": SelfTeacher()},
}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("teachers", "kept"),
    [
        ("one", "states"),
        ("one", "rows"),
        ("routed", "states"),
        ("weighted", "states"),
        ("told more", "states"),
        ("told more", "rows"),
        ("base", "states"),
    ],
)
def test_replayed_rows_give_the_loss_and_the_gradient_of_when_they_were_generated(tmp_path, packing, kept, teachers):
    """The learning rate is 0, and the buffer holds one step: a replay is the last generated step in another order."""
    options = {"learning_rate": 0.0, "max_steps": 6, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2,
               "per_device_train_batch_size": 4}  # fmt: skip
    more = TEACHERS[teachers]()
    trainer = replaying(tmp_path, adaptive(replay=kept), options, packing=packing, temperature=2.0, **more)
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.branches == expected_branches(6)
    losses, kl, of = line(trainer, "loss"), line(trainer, "generated_kl"), None
    replays = 0
    for step, branch in enumerate(recorder.branches):
        if branch == "generate":
            of = step
            assert recorder.asked[step] > 0
            continue
        replays += 1
        assert sorted(recorder.numbers[step]) == sorted(recorder.numbers[of])
        assert recorder.numbers[step] != recorder.numbers[of]
        assert losses[step] == pytest.approx(losses[of], rel=1e-6)
        assert kl[step] == pytest.approx(kl[of], rel=1e-6)
        scale = recorder.gradients[of].norm()
        assert scale > 1e-4 and (recorder.gradients[step] - recorder.gradients[of]).norm() < 1e-6 * scale
        assert (recorder.asked[step] == 0) == (kept == "states")
        assert all(
            ("teacher_input_ids" in batch) == ("teacher_prefix_column" in more and kept == "rows")
            for batch in recorder.replayed
        )
    assert replays
    assert line(trainer, "replayed_share") == [float(branch == "replay") for branch in recorder.branches]
    assert line(trainer, "generated_share") == [float(branch == "generate") for branch in recorder.branches]


@pytest.mark.parametrize("kind", ["remote", "cached"])
def test_teachers_elsewhere_are_not_asked_again(tmp_path, kind):
    """Neither in the step, nor ahead of it by the collator; the loss is that of the live teacher."""
    options = {"learning_rate": 0.0, "max_steps": 6}
    live = replaying(tmp_path / "live", options=options)
    live.train()
    teacher = tiny_llama(seed=1, layers=3)
    with contextlib.ExitStack() as stack:
        if kind == "remote":
            url = stack.enter_context(running(served_tiny()))
            one = RemoteTeacher(url)
        else:
            one = CachedTeacher(cache_of(tmp_path / "cache", teacher), LiveTeacher(teacher))
        trainer = replaying(tmp_path / kind, options=options, teacher=one, eval_dataset=ROWS[:3])
        recorder = Recorder(trainer)
        trainer.train()
    assert recorder.branches == expected_branches(6) and "replay" in recorder.branches
    assert line(trainer, "loss") == pytest.approx(line(live, "loss"), rel=1e-5)
    assert [count == 0 for count in recorder.asked] == [branch == "replay" for branch in recorder.branches]
    assert all(not any(key in batch for key in (TICKET, STATES)) for batch in recorder.replayed)


def test_states_of_a_row_are_those_that_the_teacher_gives(tmp_path):
    """Also after the student has moved, and in the teacher's own dtype."""
    teacher = tiny_llama(seed=1, layers=3).to(torch.bfloat16)
    trainer = replaying(tmp_path, options={"max_steps": 5}, teacher=teacher)
    trainer.train()
    for number in trainer.replay.draw(8, seed=0, step=0):
        row = trainer.replay[number]
        ids, labels = row.input_ids[None].long(), row.labels[None].long()
        again = trainer.teacher.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
        kept = row.states[""]
        assert kept.dtype == again.dtype == torch.bfloat16 and len(kept) == row.label_count
        assert torch.allclose(kept.float(), again.float(), atol=0.05, rtol=0.02)  # alone, and in a batch, in bfloat16


class Moving(LiveTeacher):
    """A teacher that is a running mean of the student."""

    mean = "of the student's weights"


def test_a_teacher_that_moves_is_asked_again(tmp_path):
    """What it said of a row is not what it would say now."""
    trainer = replaying(tmp_path, options={"max_steps": 6}, teacher=Moving(tiny_llama(seed=1, layers=3)))
    recorder = Recorder(trainer)
    trainer.train()
    assert "replay" in recorder.branches and all(recorder.asked)
    assert not any(trainer.replay[number].states for number in trainer.replay.draw(8, seed=0, step=0))


def test_phi_follows_the_held_out_loss(tmp_path):
    """The trainer's own log against the rule, written out once more here."""
    steps = 12
    options = {"max_steps": steps, "eval_steps": 1, "learning_rate": 0.02,
               "per_device_train_batch_size": 2}  # fmt: skip
    chosen = {"adaptive": {"eps": 0.05, "step": 0.3, "capacity": 4}, **SHORT}
    trainer = replaying(tmp_path, chosen, options, **RISING)
    recorder = Recorder(trainer)
    trainer.train()
    evals = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evals) == steps
    phi, compared_with, phis = 0.0, evals[0], []
    for loss in evals:
        phis.append(phi)  # that of the step before this evaluation
        if loss >= compared_with + 0.05:
            phi, compared_with = min(round(phi + 0.3, 12), 1.0), loss
    assert line(trainer, "on_policy_fraction") == phis
    assert phis[-1] > 0.0, "the run was to be one whose held-out loss rises"
    branches, generated = [], 0
    for step, share in enumerate(phis):
        u = coin(SEED, step)
        full = generated >= 2  # steps of two rows
        branches.append("data" if u >= share else "replay" if full and u >= share * (1 - step / steps) else "generate")
        generated += branches[-1] == "generate"
    assert recorder.branches == branches and {"data", "generate"} <= set(branches)


def weights(trainer):
    return torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


@pytest.mark.parametrize(
    "on_policy",
    [
        {"fraction": 0.0, **SHORT},
        {"adaptive": {"eps": 1e9}, **SHORT},
        {"adaptive": {"eps": 1e9, "replay": "none"}, "fraction": 0.0, **SHORT},
    ],
    ids=["fraction 0", "a share that stays 0", "and no buffer"],
)
def test_without_a_step_of_the_student_it_is_the_plain_run(tmp_path, on_policy):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2}
    runs = []
    for number, given in enumerate((None, on_policy)):
        trainer = trainer_for(tmp_path / str(number), options=options, on_policy=given, eval_dataset=ROWS[:3])
        trainer.train()
        runs.append((weights(trainer), line(trainer, "loss"), line(trainer, "temperature")))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]


def test_without_replay_every_step_of_the_share_generates(tmp_path):
    trainer = replaying(
        tmp_path,
        {"fraction": 0.6, "adaptive": {"replay": "none"}, **SHORT},
        {"max_steps": 10, "per_device_train_batch_size": 1},
    )
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.branches == ["generate" if coin(SEED, step) < 0.6 else "data" for step in range(10)]
    assert trainer.replay is None and line(trainer, "replayed_share") == [None] * 10


def test_capacity_one_replays_one_row(tmp_path):
    trainer = replaying(tmp_path, adaptive(capacity=1), {"max_steps": 8, "per_device_train_batch_size": 3})
    recorder = Recorder(trainer)
    trainer.train()
    replays = [numbers for numbers, what in zip(recorder.numbers, recorder.branches, strict=True) if what == "replay"]
    assert replays and all(len(numbers) == 3 and len(set(numbers)) == 1 for numbers in replays)
    assert len(trainer.replay) == 1


def test_rows_that_only_fill_a_batch_stay_out_of_it(tmp_path):
    """Five rows in batches of two over an epoch: and rows whose labels are all masked are neither asked nor kept."""
    rows = [{"input_ids": list(range(5, 15)), "labels": [-100] * 5 + list(range(10, 15))} for _ in range(4)]
    rows[1] = {**rows[1], "labels": [-100] * 10}
    options = {"per_device_train_batch_size": 2, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 100}
    trainer = trainer_for(
        tmp_path, rows=rows, options=options, on_policy=adaptive(capacity=100), eval_dataset=ROWS[:3], temperature=1.0
    )
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.branches == ["generate"] * 8  # never full
    without = sum(numbers.count(-1) for numbers in recorder.numbers)
    assert without == 4 and len(trainer.replay) == 16 - without  # one of four rows, in two of four batches an epoch


# ------------------------------------------------------------------------------------------------------------- resume

RESUMED = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "eval_steps": 2, "learning_rate": 0.02,
           "per_device_train_batch_size": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "told"), [("states", None), ("rows", None), ("states", "live"), ("rows", "live"), ("states", "ema")]
)
def test_a_run_that_is_resumed_ends_as_one_without_a_break(tmp_path, kept, told):
    """Also where the teacher is told more, and where it moves with the student."""
    more = {} if told is None else {"rows": HINTED, "teacher_prefix_column": "hint"}
    more |= {**RISING, "eval_dataset": [{**row, "hint": "Q"} for row in OTHER] if told else OTHER}
    if told == "ema":
        more["teacher"] = SelfTeacher("ema", ema_rate=0.3)
    chosen = {"fraction": 0.5, "adaptive": {"eps": 0.05, "step": 0.1, "capacity": 4, "replay": kept}, **SHORT}
    straight = replaying(tmp_path / "run", chosen, RESUMED, **more)
    recorder = Recorder(straight)
    straight.train()
    resumed = replaying(tmp_path / "run", chosen, RESUMED, model=tiny_llama(seed=9), **more)
    again = Recorder(resumed)
    resumed.train(str(tmp_path / "run" / "checkpoint-5"))
    assert again.branches == recorder.branches[5:] and set(again.branches) == {"data", "generate", "replay"}
    assert again.numbers == recorder.numbers[5:]
    assert torch.equal(weights(straight), weights(resumed))
    for name in ("loss", "on_policy_fraction", "replay_rows", "replay_mb", "replayed_share", "generated_length"):
        assert line(resumed, name) == line(straight, name), name
    assert straight.adaptive.state() == resumed.adaptive.state() and straight.adaptive.fraction > 0.5
    assert_same_buffers(straight.replay, resumed.replay)


def assert_same_buffers(one, other):
    order = one.draw(len(one), seed=0, step=0)
    assert order == other.draw(len(other), seed=0, step=0)
    for number in order:
        first, second = one[number], other[number]
        assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)
        assert first.row_id == second.row_id and first.states.keys() == second.states.keys()
        assert all(torch.equal(states, second.states[name]) for name, states in first.states.items())
        assert (first.side is None) == (second.side is None)
        assert first.side is None or torch.equal(first.side, second.side)


def test_a_second_run_begins_anew(tmp_path):
    """``train`` again, without a checkpoint: neither the share nor the rows of the first are left."""
    options = {"max_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 3}
    trainer = replaying(tmp_path, adaptive(capacity=20), options)
    trainer.train()
    first = (line(trainer, "loss"), trainer.adaptive.state())
    trainer.adaptive.fraction = 0.1
    trainer.train()
    assert (line(trainer, "loss"), trainer.adaptive.state()) == first
    assert sorted(trainer.replay.draw(6, seed=0, step=0)) == [0, 1, 2, 3, 4, 5]


def test_other_settings_are_no_resume(tmp_path):
    replaying(tmp_path, adaptive(), {**RESUMED, "max_steps": 5}, temperature=2.0).train()
    with pytest.raises(UserError, match=r"on_policy\.adaptive\.capacity: was 8, now 9"):
        replaying(tmp_path, adaptive(capacity=9), {**RESUMED, "max_steps": 5}, temperature=2.0).train(True)
    with pytest.raises(UserError, match=r"share of replayed steps \(on_policy\.adaptive\)"):
        replaying(tmp_path, adaptive(), {**RESUMED, "max_steps": 9}, temperature=2.0).train(True)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "more", "match"),
    [
        ({"eval_strategy": "no"}, {"eval_dataset": ROWS[:2]}, r"training\.eval_strategy is 'no', expected steps"),
        ({"eval_strategy": "steps"}, {"eval_dataset": {"a": ROWS[:2], "b": ROWS[:2]}}, "2 sets by name, expected one"),
    ],
)
def test_without_a_held_out_loss_it_is_refused(tmp_path, options, more, match):
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, options=options, on_policy=adaptive(), **more)


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        ({"adaptive": {"epsilon": 1}}, r"on_policy\.adaptive: 'epsilon' is no option of it, expected eps"),
        ({"adaptive": {"eps": -1}}, r"on_policy\.adaptive\.eps: got -1"),
        ({"adaptive": {"step": 0}}, r"on_policy\.adaptive\.step: got 0"),
        ({"adaptive": {"capacity": 0}}, r"on_policy\.adaptive\.capacity: got 0"),
        ({"adaptive": {"replay": "state"}}, r"adaptive\.replay: got 'state', expected one of states, rows, none.*'states'"),
        ({"adaptive": True}, r"on_policy\.adaptive: got True, expected a mapping"),
        ({"adaptive": {}, "schedule": "linear", "end_fraction": 1.0}, r"schedule: got 'linear' beside adaptive"),
        ({"backend": "vllmm"}, r"on_policy\.backend: got 'vllmm', expected one of own, vllm"),
        ({"vllm_memory": 1.5}, r"on_policy\.vllm_memory: got 1\.5"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_are_named(tmp_path, chosen, match):
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, on_policy=chosen)
