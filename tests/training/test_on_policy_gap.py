"""The gap in a run on data and on the student's own text: what the temperature is told, and what it must not notice."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.statistics import GENERATED_LABELS
from dts_hf.reporting.curves import curve
from dts_hf.reporting.facts import Facts
from dts_hf.reporting.plots import draw_losses, draw_temperature
from dts_hf.temperature import StepStats, build_temperature
from dts_hf.temperature.parts.recorded_run import OWN_TEXT, read_trace
from tests.support.launching import WORKERS
from tests.support.recorded import record
from tests.support.tiny import tiny_llama
from tests.support.trainers import ROWS, losses, trainer_for
from tests.support.warm import run_warm

OPTIONS = {"per_device_train_batch_size": 4, "max_steps": 8}
#: The steps of OPTIONS that the coin of this seed gives to the student.
MIXED = {"fraction": 0.5, "max_new_tokens": 6, "seed": 1}
DTS = {"name": "dts", "momentum": 0.5, "t_min": 0.5}


def make(folder, temperature=DTS, student=0, options=None, **on_policy):
    more = {"temperature": temperature, "on_policy": {**MIXED, **on_policy}, "options": {**OPTIONS, **(options or {})}}
    return trainer_for(folder, tiny_llama(seed=student), **more)


def train(trainer):
    trainer.train()
    return trainer


def lines(trainer):
    return [log for log in trainer.state.log_history if "kl" in log]


def own_steps(trainer):
    return ["generated_ce_loss" in line for line in lines(trainer)]


def trace_of(gaps):
    """T of each step where a policy is told ``gaps``; of None it is told nothing."""
    policy, seen = build_temperature(**DTS), []
    for step, gap in enumerate(gaps):
        policy.begin_step(step / len(gaps))
        seen.append(policy.temperature)
        if gap is not None:
            policy.end_step(StepStats(2.0 + gap, 2.0, 1.0, 10))
    return seen


# ------------------------------------------------------------------------------------------------------ gap_on: data


def test_the_temperature_is_that_of_the_data_steps_alone(tmp_path):
    trainer = train(make(tmp_path))
    own, found = own_steps(trainer), lines(trainer)
    assert 2 < sum(own) < 7 and own[0] != own[-1]
    assert [("gap" in line, "generated_gap" in line) for line in found] == [(not one, one) for one in own]
    expected = trace_of([line.get("gap") for line in found])
    assert [line["temperature"] for line in found] == pytest.approx(expected, abs=1e-6)
    told_all = trace_of([line.get("gap", line.get("generated_gap")) for line in found])
    assert max(abs(a - b) for a, b in zip(expected, told_all)) > 0.05  # it would have been led elsewhere
    assert len({round(line["temperature"], 6) for line in found}) == len(found)  # the schedule goes on


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_rows_of_own_text_all_run_at_one_temperature(tmp_path, granularity):
    trainer = train(make(tmp_path, {**DTS, "granularity": granularity}))
    for line, own in zip(lines(trainer), own_steps(trainer)):
        spread = line["temperature_max"] - line["temperature_min"]
        assert spread == 0 if own else line["step"] == 1 or spread > 1e-3
    assert not trainer.temperature.holding or own_steps(trainer)[-1]


def test_a_policy_for_any_text_is_told_of_all_steps(tmp_path):
    trainer, told = make(tmp_path, "adakd"), []
    end_step = trainer.temperature.end_step
    trainer.temperature.end_step = lambda stats: (told.append(stats.kd), end_step(stats))
    assert len(lines(train(trainer))) == len(told) == 8 and any(own_steps(trainer))


def test_the_gap_of_held_out_rows_goes_on_in_steps_on_own_text(tmp_path):
    spec = {**DTS, "gap_source": {"held_out": {"every": 2, "rows": 4}}}
    more = {"temperature": spec, "on_policy": MIXED, "options": OPTIONS, "eval_dataset": ROWS[:6]}
    trainer = train(trainer_for(tmp_path, **more))
    found = [line["held_out_gap"] for line in lines(trainer)]
    assert any(own_steps(trainer)) and len({round(gap, 6) for gap in found}) == 4
    # Step k is at the gap that was measured before it; what a policy is told at the end of a step acts in the next one
    expected = trace_of([*found[1:], None])
    assert [line["temperature"] for line in lines(trainer)] == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------------------------- gap_on: teacher_argmax


def test_first_choices_are_measured_and_change_neither_loss_nor_weights(tmp_path):
    """With a temperature that does not follow them, both runs are one to the bit."""
    one, two = (train(make(tmp_path, 2.0, gap_on=gap_on)) for gap_on in ("data", "teacher_argmax"))
    assert losses(one) == losses(two)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    for a, b, own in zip(lines(one), lines(two), own_steps(one), strict=True):
        moved = {name for name in a if a[name] != b[name] and not name.endswith(("_second", "_seconds"))}
        assert moved == ({"generated_ce_loss", "generated_teacher_ce", "generated_gap"} if own else set())


def test_the_gap_of_first_choices_is_that_of_the_dense_models(tmp_path):
    trainer, seen = make(tmp_path, 2.0, gap_on="teacher_argmax", fraction=1.0, options={"max_steps": 1}), []
    compute = trainer.compute_loss

    def note(model, inputs, *rest, **more):
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return compute(model, inputs, *rest, **more)

    trainer.compute_loss = note
    train(trainer)
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double()
    (batch,), kept = seen, seen[0]["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        log_q, log_p = (model(**inputs).logits[:, :-1][kept].log_softmax(-1) for model in (student, teacher))
    choice = log_p.argmax(-1, keepdim=True)
    gap = (log_p - log_q).gather(-1, choice).mean().item()
    assert lines(trainer)[0]["generated_gap"] == pytest.approx(gap, abs=1e-5)
    own = batch["labels"][:, 1:][kept]
    of_text = (log_p - log_q).gather(-1, own.unsqueeze(-1)).mean().item()
    assert gap > 0 > of_text  # the sign that it has on data, and the one of the text itself


def test_the_temperature_follows_both_kinds_of_gap(tmp_path):
    trainer = train(make(tmp_path, gap_on="teacher_argmax"))
    gaps = [line.get("gap", line.get("generated_gap")) for line in lines(trainer)]
    assert any(own_steps(trainer)) and None not in gaps
    assert [line["temperature"] for line in lines(trainer)] == pytest.approx(trace_of(gaps), abs=1e-6)


# ------------------------------------------------------------------------------------------------- what holds for both


@pytest.mark.parametrize("gap_on", ["data", "teacher_argmax"])
def test_a_resume_is_exact(tmp_path, gap_on):
    options = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
    straight = train(make(tmp_path / "run", options=options, gap_on=gap_on))
    resumed = make(tmp_path / "run", student=4, options=options, gap_on=gap_on)
    resumed.train(str(tmp_path / "run" / "checkpoint-4"))
    ends = [lines(trainer)[-1] for trainer in (straight, resumed)]
    names = {name for name in ends[0] if not name.endswith(("_second", "_seconds"))}
    assert {name: ends[0][name] for name in names} == {name: ends[1][name] for name in names}
    assert straight.temperature.state() == resumed.temperature.state()
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("gap_on", ["data", "teacher_argmax"])
def test_two_processes_have_one_temperature_and_that_of_one_process(tmp_path, gap_on):
    done = run_warm(WORKERS / "on_policy_gap_worker.py", 2, [tmp_path, gap_on], "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_warm(WORKERS / "on_policy_gap_worker.py", 1, [tmp_path / "alone", gap_on])
    assert alone.returncode == 0, alone.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one = json.loads((tmp_path / "alone" / "0.json").read_text())
    assert first["world"] == 2 and one["world"] == 1 and any(one["own"]) and not all(one["own"])
    assert first["state"] == second["state"] and first["own"] == one["own"]
    assert first["temperatures"] == pytest.approx(one["temperatures"], abs=1e-9)
    assert first["gaps"] == pytest.approx(one["gaps"], abs=1e-9)


def test_a_line_with_both_kinds_keeps_them_apart(tmp_path):
    each, together = train(make(tmp_path, 2.0)), train(make(tmp_path, 2.0, options={"logging_steps": 8}))
    (line,), own = lines(together), own_steps(each)

    def mean(name, of_own):
        """Over the steps of one kind, weighted by their labels."""
        steps = [(one, rows) for one, rows, is_own in zip(lines(each), labels, own) if is_own == of_own]
        return sum(one[name] * rows for one, rows in steps) / sum(rows for _, rows in steps)

    labels = labels_of_steps(tmp_path)
    for name in ("ce_loss", "teacher_ce", "gap"):
        assert line[name] == pytest.approx(mean(name, False), abs=1e-6)
        assert line[f"generated_{name}"] == pytest.approx(mean(f"generated_{name}", True), abs=1e-6)
    for name in ("kd_loss", "kl"):
        assert line[f"data_{name}"] == pytest.approx(mean(name, False), abs=1e-6)
        assert line[f"generated_{name}"] == pytest.approx(mean(name, True), abs=1e-6)
    assert not any(name.startswith("data_") for one in lines(each) for name in one)


def labels_of_steps(folder):
    """How many labels each step of the run has."""
    trainer, counts = make(folder, 2.0), []
    add = trainer.sums.mean_log.add
    callback = trainer._temperature_callback
    trainer.sums.reset = lambda: None
    trainer.sums.mean_log.add = lambda totals: (counts.append(totals["rows"]), add(totals))
    assert callback.sums is trainer.sums
    train(trainer)
    return counts


def test_what_cannot_be_is_refused_by_name_and_the_rest_is_said(tmp_path, caplog):
    with pytest.raises(UserError, match=r"on_policy.gap_on: got 'teacher_argmax', but the divergence 'dkd'"):
        trainer_for(tmp_path, divergence="dkd", on_policy={**MIXED, "gap_on": "teacher_argmax"})
    with pytest.raises(UserError, match=r"on_policy.gap_on: got 'labels', expected one of data, teacher_argmax"):
        make(tmp_path, gap_on="labels")
    with pytest.raises(UserError, match=r"gap_on: got 'data' with fraction 1 and temperature.range 'auto'"):
        make(tmp_path, {"name": "dts", "range": "auto"}, fraction=1.0)
    with caplog.at_level(logging.INFO, logger="dts_hf"):
        make(tmp_path, fraction=1.0)
        make(tmp_path, fraction=1.0, gap_on="teacher_argmax")
    said = [one.getMessage() for one in caplog.records]
    assert any(
        "so 'dts' follows its schedule alone; gap_on 'teacher_argmax' or temperature.gap_source" in one for one in said
    )
    assert sum("first choices are the labels of the gap" in one for one in said) == 1


def test_gaps_of_such_a_run_are_no_trace_to_replay_and_its_temperatures_are(tmp_path):
    columns = {"gap": [1.0, None, 2.0], "generated_ce_loss": [None, 2.0, None], "temperature": [3.0, 2.0, 1.5]}
    run = record(tmp_path / "run", columns)
    text = (tmp_path / "run" / "log.jsonl").read_text().replace('"generated_ce_loss": null, ', "")
    (tmp_path / "run" / "log.jsonl").write_text(text)
    assert read_trace("run", run, "temperature") == [3.0, 2.0, 1.5]
    with pytest.raises(
        UserError, match=r"log.jsonl: line 3 is about text of the student's own.*without data.on_policy"
    ):
        read_trace("gap_source.replay", run, "gap")


def test_the_card_names_it(tmp_path):
    trainer = make(tmp_path, gap_on="teacher_argmax")
    assert "with the teacher's first choices as labels" in trainer.card(None)
    assert "held in steps on the student's own text" in make(tmp_path).card(None)
    assert "own text" not in trainer_for(tmp_path, temperature=DTS).card(None)


def test_the_figures_of_a_mixed_run_have_no_holes_where_the_text_was_its_own(tmp_path):
    trainer = train(make(tmp_path))
    log = [{**line, "kind": "train"} for line in lines(trainer)]
    own = own_steps(trainer)
    assert OWN_TEXT in {statistic.log for statistic in GENERATED_LABELS}
    gap = curve(log, "gap")
    assert gap.steps == [line["step"] for line, one in zip(log, own) if not one] and gap.finite == gap.values
    assert len(curve(log, "temperature").finite) == len(log)
    facts = Facts("run", {"loss": {"kd_ratio": 0.5}}, {}, log, {}, {}, {})
    for draw in (draw_temperature, draw_losses):
        assert draw(facts).figure is not None
    alone = [{**line, "kind": "train"} for line in lines(train(make(tmp_path, fraction=1.0)))]
    for draw in (draw_temperature, draw_losses):
        assert draw(Facts("run", {"loss": {"kd_ratio": 0.5}}, {}, alone, {}, {}, {})).figure is not None
