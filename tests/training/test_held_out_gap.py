"""``gap_source: held_out``: the gap of a fixed set of held-out rows drives the temperature, and nothing else moves."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.errors import UserError
from dts_hf.reporting.facts import Facts
from dts_hf.reporting.plots import draw_temperature
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.temperature import TemperaturePolicy, Temperatures, build_temperature
from tests.support.classifiers import SST2, classifier, rows_of
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, losses, plain, temperatures, trainer_for
from tests.support.warm import run_warm

#: None of ROWS is among them.
HELD_OUT = [
    {"id": f"h{i}", "instruction": "Say" + " more" * (i % 3), "input": "", "output": "no " * (1 + i % 4) + "yes"}
    for i in range(11)
]
OPTIONS = {"per_device_train_batch_size": 4, "max_steps": 7}


def dts(every=3, rows=5, **options):
    return {"name": "dts", "gap_source": {"held_out": {"every": every, "rows": rows}}, "momentum": 0.5, **options}


def train(trainer):
    trainer.train()
    return trainer


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if "kl" in log]


def dense_gap(student, teacher, rows):
    """Student CE - teacher CE in nats per label, row by row in float64."""
    found, labels = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept = targets != -100
            for model, sign in ((student, 1), (teacher, -1)):
                logits = model.double().eval()(ids).logits[0, :-1][kept]
                found += sign * torch.nn.functional.cross_entropy(logits, targets[kept], reduction="sum").item()
            labels += int(kept.sum())
    return found / labels


class Traced(TemperaturePolicy):
    """T of each step from a list."""

    name = "traced"
    reads = "nothing"

    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    @property
    def temperature(self):
        return self.trace[round(self.progress * len(self.trace))]

    def forward(self, student_logits, teacher_logits, rows):
        value = student_logits.new_full((), self.temperature)
        return Temperatures(value, value)


# --------------------------------------------------------------------------------------------------- what is measured


def test_it_is_the_dense_gap_of_rows_spread_over_the_held_out_ones(tmp_path):
    trainer = trainer_for(tmp_path, tiny_llama(seed=0), eval_dataset=HELD_OUT, temperature=dts(), options=OPTIONS)
    trainer._measure_held_out(trainer.temperature.probe)
    places = [0, 2, 4, 6, 8]  # five of eleven
    rows = [plain(HELD_OUT)[place] for place in places]
    expected = dense_gap(tiny_llama(seed=0), tiny_llama(seed=1, layers=3), rows)
    assert trainer.temperature.gaps.gap == pytest.approx(expected, abs=1e-5)
    evaluated = trainer.evaluate(eval_dataset=[HELD_OUT[place] for place in places])
    assert trainer.temperature.gaps.gap == pytest.approx(evaluated["eval_gap"], abs=1e-6)
    assert abs(expected - trainer.evaluate()["eval_gap"]) > 1e-3  # these rows, and not all


def test_it_drives_the_temperature_from_the_step_after_it_on(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, temperature=dts(every=3), options=OPTIONS)
    measured, measure = [], trainer._measure_held_out

    def note(probe):
        measure(probe)
        measured.append((trainer.state.global_step, trainer.temperature.gaps.gap))

    next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "HeldOutGapCallback").measure = note
    train(trainer)
    assert [step for step, _ in measured] == [0, 3, 6]
    gaps = [value for _, value in measured]
    in_force = [gaps[0]] * 3 + [gaps[1]] * 3 + [gaps[2]]
    assert logged(trainer, "held_out_gap") == pytest.approx(in_force, abs=1e-9)
    assert all(abs(a - b) > 1e-4 for a, b in zip(in_force, logged(trainer, "gap")))
    # A policy that is told of these gaps at these steps goes the same way
    other, seen = build_temperature("dts", momentum=0.5), []
    for step in range(7):
        other.gaps.gap = in_force[step]
        other.begin_step(step / 7)
        seen.append(other.temperature)
    assert seen == pytest.approx([one[0] for one in temperatures(trainer)], abs=1e-6)
    assert all(value >= 0 for value in logged(trainer, "probe_seconds"))


def test_training_and_random_numbers_do_not_notice(tmp_path):
    """Dropout, two micro-batches, packing: bit-equal losses where the same temperatures come from a list."""

    def run(temperature, **more):
        torch.manual_seed(0)
        student = tiny_gpt2(seed=0)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        options = {**OPTIONS, "gradient_accumulation_steps": 2}
        trainer = trainer_for(
            tmp_path,
            student,
            tiny_gpt2(seed=1),
            temperature=temperature,
            kd_ratio=0.7,
            packing=True,
            options=options,
            **more,
        )
        return train(trainer)

    one = run(dts(every=2), eval_dataset=HELD_OUT)
    trace = []
    policy = build_temperature(**dts(every=2))
    for step, gap in enumerate(logged(one, "held_out_gap")):
        policy.gaps.gap = gap
        policy.begin_step(step / 7)
        trace.append(policy.temperature)
    two = run(Traced(trace))
    assert logged(one, "temperature") == pytest.approx(logged(two, "temperature"), abs=1e-6)
    assert losses(one) == losses(two)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    assert len({round(value, 4) for value in logged(one, "temperature")}) > 3
    still = run(2.0)
    assert losses(still) != losses(one)


def test_a_resume_is_exact(tmp_path):
    options = {**OPTIONS, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}

    def make(folder, student=0):
        more = {"eval_dataset": HELD_OUT, "temperature": dts(every=3)}
        return trainer_for(tmp_path / folder, tiny_llama(seed=student), options=options, **more)

    straight, resumed = train(make("run")), make("run", student=5)
    resumed.train(str(tmp_path / "run" / "checkpoint-4"))
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "temperature.json").read_text())["state"]
    assert state["gap"] == pytest.approx(logged(straight, "held_out_gap")[4], abs=1e-9)  # measured at step 3
    for of_log in (losses, temperatures):
        assert of_log(resumed)[-4:] == of_log(straight)[-4:]
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_step_without_a_finite_gap_keeps_the_temperature_and_is_counted(tmp_path):
    policy = build_temperature(**dts())
    policy.gaps.gap = None
    policy.begin_step(0.0)
    before = policy.temperature
    policy.begin_step(0.5)
    assert policy.temperature == before and policy.counters() == {"ignored_gaps": 1}
    assert math.isnan(policy.log_values()["held_out_gap"])


def facts(first, count):
    """Rows whose answers nothing but their own row tells."""
    draw = random.Random(first)
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(2 * count)]
    return [
        {"id": f"f{first + i}", "instruction": words[2 * i], "input": "", "output": words[2 * i + 1]}
        for i in range(count)
    ]


def test_after_the_first_epoch_it_keeps_a_signal_that_the_training_rows_have_lost(tmp_path):
    """The student comes to know the training rows better than its teacher does, and the held-out ones never."""
    rows, held_out = facts(0, 8), facts(100, 8)
    options = {"per_device_train_batch_size": 8, "max_steps": 40, "learning_rate": 1e-2}
    teacher = tiny_llama(seed=1)
    train(trainer_for(tmp_path, teacher, rows=[*rows, *held_out], kd_ratio=0.0, options={**options, "max_steps": 30}))

    def run(spec):
        more = {"rows": rows, "eval_dataset": held_out, "temperature": spec, "kd_ratio": 0.1, "options": options}
        return train(trainer_for(tmp_path, None, copy.deepcopy(teacher), **more))

    measured, held = run({"name": "dts", "momentum": 0.5}), run(dts(every=5, rows=8))
    assert logged(measured, "gap")[0] > 0 > logged(measured, "gap")[-1]
    assert logged(held, "held_out_gap")[-1] > 0.1
    assert measured.temperature.temperature == pytest.approx(measured.temperature.cosine, abs=1e-2)
    assert held.temperature.temperature > held.temperature.cosine + 0.1


# ----------------------------------------------------------------------------------------------- with everything else


@pytest.mark.parametrize(
    ("strategy", "wrapper", "dtype"),
    [
        ("ddp", "DistributedDataParallel", "float64"),
        ("zero3", "DeepSpeedEngine", "float32"),
        ("fsdp2", "FSDPLlamaForCausalLM", "float32"),
    ],
)
def test_two_processes_have_one_temperature_and_that_of_one_process(tmp_path, strategy, wrapper, dtype):
    done = run_warm(WORKERS / "held_out_gap_worker.py", 2, [tmp_path, dtype], strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_warm(WORKERS / "held_out_gap_worker.py", 1, [tmp_path / "alone", dtype])
    assert alone.returncode == 0, alone.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one = json.loads((tmp_path / "alone" / "0.json").read_text())
    assert first["world"] == 2 and one["world"] == 1 and first["wrapper"] == wrapper
    assert first["states"] == second["states"]
    for name in ("gaps", "temperatures"):
        assert first[name] == pytest.approx(one[name], abs=1e-9 if dtype == "float64" else 1e-4)
    assert len({round(gap, 6) for gap in first["gaps"]}) == 3


def test_each_of_several_teachers_has_the_gap_of_its_own_rows(tmp_path):
    def routed(rows):
        return [{**row, "teacher": "one" if i % 2 else "two"} for i, row in enumerate(rows)]

    more = {"train_dataset": routed(ROWS), "eval_dataset": routed(HELD_OUT), "teacher_column": "teacher"}
    named = {"one": tiny_llama(seed=1), "two": tiny_llama(seed=2)}
    from dts_hf.training.trainer import DistillationTrainer

    trainer = DistillationTrainer(
        tiny_llama(seed=0), teachers=named, temperature_per_teacher=True, temperature=dts(rows=11),
        args=arguments(tmp_path, **OPTIONS), processing_class=tiny_tokenizer(), **more,
    )  # fmt: skip
    trainer._measure_held_out(trainer.temperature.probe)
    gaps = {name: trainer.temperature.of_teacher(name).gaps.gap for name in named}
    for parity, name in ((1, "one"), (0, "two")):
        rows = [row for i, row in enumerate(plain(HELD_OUT)) if i % 2 == parity]
        expected = dense_gap(tiny_llama(seed=0), tiny_llama(seed=1 if name == "one" else 2), rows)
        assert gaps[name] == pytest.approx(expected, abs=1e-5)
    assert {"held_out_gap/one", "held_out_gap/two"} <= train(trainer).state.log_history[0].keys()


def test_classifiers_have_it_too(tmp_path):
    trainer = ClassificationDistillationTrainer(
        classifier(seed=0), classifier(seed=1), task=SST2, args=arguments(tmp_path, **OPTIONS), temperature=dts(rows=6),
        train_dataset=rows_of(SST2, 16), eval_dataset=rows_of(SST2, 9), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    train(trainer)
    assert len(set(logged(trainer, "held_out_gap"))) == 3
    accuracy = trainer.evaluate()
    assert accuracy["eval_rows"] == 9  # what the probe saw is not among what evaluate gathers


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (None, "there are none"),
        ({"a": HELD_OUT, "b": HELD_OUT}, r"several sets of them \(a, b\)"),
        (lambda: iter(HELD_OUT), "a stream of them"),
    ],
    ids=["none", "several", "stream"],
)
def test_without_rows_to_choose_from_it_is_refused_by_name(tmp_path, held_out, words):
    with pytest.raises(UserError, match=f"^temperature.gap_source: got held_out.*{words}.*eval_dataset"):
        trainer_for(tmp_path, eval_dataset=held_out, temperature=dts())


def test_held_out_rows_that_are_set_later_are_read_and_measured(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, temperature=dts(rows=4))
    trainer._measure_held_out(trainer.temperature.probe)
    before, trainer.eval_dataset = trainer.temperature.gaps.gap, ROWS[:4]
    trainer._measure_held_out(trainer.temperature.probe)
    expected = dense_gap(tiny_llama(seed=0), tiny_llama(seed=1, layers=3), plain(ROWS[:4]))
    assert trainer.temperature.gaps.gap == pytest.approx(expected, abs=1e-5) and abs(before - expected) > 1e-3


def test_a_running_mean_has_followed_before_it_is_asked(tmp_path):
    """The teacher of a step's end is the one that an evaluation there has."""
    options = {"max_steps": 4, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 1}
    teacher, measured = SelfTeacher("ema", ema_rate=0.5), dts(every=1, rows=len(HELD_OUT))
    trainer = train(
        trainer_for(tmp_path, teacher=teacher, eval_dataset=HELD_OUT, temperature=measured, options=options)
    )
    evaluated = [log["eval_gap"] for log in trainer.state.log_history if "eval_gap" in log]
    assert logged(trainer, "held_out_gap")[1:] == pytest.approx(evaluated[:-1], abs=1e-6)


def test_the_figure_of_the_temperature_shows_it(tmp_path):
    trainer = train(trainer_for(tmp_path, eval_dataset=HELD_OUT, temperature=dts(), options=OPTIONS))
    log = [{**line, "kind": "train"} for line in trainer.state.log_history if "kl" in line]
    assert "Held-out gap" in draw_temperature(Facts("run", {}, {}, log, {}, {}, {})).caption


def test_rows_without_labels_are_refused(tmp_path):
    rows = plain(HELD_OUT)[:4]
    for silent in (rows[0], rows[2]):
        silent["labels"] = [-100] * len(silent["labels"])
    trainer = trainer_for(tmp_path, rows=plain(), eval_dataset=rows, temperature=dts(rows=2))
    with pytest.raises(UserError, match="none of the 2 held-out rows that it looks at has a label"):
        trainer.train()
