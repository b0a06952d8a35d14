"""The controls of a policy that reacts: a finished run's gaps replayed in some order, its temperatures, its mean T."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from statistics import fmean, pstdev

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import RowStats, StepStats, build_temperature
from tests.support.controls import CONTROLS, trainer_for
from tests.support.launching import WORKERS
from tests.support.recorded import a_run, record
from tests.support.warm import run_warm

STEPS = 400


def simulated(policy, gaps=None, seed=0, steps=STEPS, noise=0.2, source=None):
    """An invented run whose noisy gap falls from 8 to 0.3 nats. Returns (temperatures, gaps).

    ``source`` takes the gaps so far and gives the one that the policy is told.
    """
    generator = random.Random(seed)
    policy.begin_run(steps)
    temperatures, measured = [], []
    for step in range(steps):
        policy.begin_step(step / steps)
        temperatures.append(policy.temperature)
        gap = 0.3 + 7.7 * math.exp(-step / steps / 0.15) if gaps is None else gaps[step]
        stats = StepStats(2.0 + gap * (1 + generator.gauss(0, noise)), 2.0, 1.0, 10)
        measured.append(stats.gap)
        told = stats if source is None else StepStats(2.0 + source(measured), 2.0, 1.0, 10)
        policy.end_step(told)
    return temperatures, measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of ``dts`` with its log: (path, temperatures, gaps)."""
    temperatures, gaps = simulated(build_temperature("dts"))
    columns = {"gap": gaps, "temperature": temperatures, "teacher_temperature": temperatures}
    return record(tmp_path_factory.mktemp("recorded") / "run", columns), temperatures, gaps


def replaying(run, order, **options):
    return build_temperature("dts", gap_source={"replay": run, "order": order}, **options)


# ---------------------------------------------------------------------------------------------------------- the gaps


def test_recorded_gaps_give_the_recorded_temperatures_whatever_this_run_measures(measured):
    run, temperatures, _ = measured
    assert simulated(build_temperature("dts", gap_source={"replay": run}), gaps=[5.0] * STEPS)[0] == temperatures


@pytest.mark.parametrize("order", ["permuted", "blocks"])
def test_every_order_plays_each_gap_as_often_as_the_run_had_it(measured, order):
    run, _, gaps = measured
    for seed in (None, 1, 2):
        policy = replaying(run, order, seed=seed)
        policy.begin_run(STEPS)
        assert Counter(policy.gaps.recorded) == Counter(gaps[:-1]) and policy.gaps.recorded != gaps[:-1]


def test_the_mean_temperature_of_each_control(measured):
    """The table of the page. A permutation plays large gaps late, where they count, so it stays hotter than the run."""
    run, temperatures, _ = measured
    wanted = fmean(temperatures)
    past = random.Random(7)
    seen = {
        # Drawn from the past, as this package once did: half of all gaps never, the first ones over and over
        "shuffled": [
            fmean(simulated(build_temperature("dts"), seed=seed, source=past.choice)[0]) for seed in range(4)
        ],
        "cosine": [fmean(simulated(build_temperature("cosine"))[0])],
        **{
            order: [fmean(simulated(replaying(run, order, seed=seed), seed=seed + 1)[0]) for seed in range(4)]
            for order in ("permuted", "blocks")
        },
    }
    off = {name: fmean(means) - wanted for name, means in seen.items()}
    assert off["cosine"] == pytest.approx(-0.27, abs=0.04) and off["shuffled"] == pytest.approx(0.33, abs=0.04)
    assert off["permuted"] == pytest.approx(0.18, abs=0.03) and off["blocks"] == pytest.approx(0.17, abs=0.06)


def test_permuted_gaps_have_lost_their_timing_and_blocks_keep_their_neighbours(measured):
    run, _, gaps = measured
    seen = {}
    for order in ("permuted", "blocks"):
        policy = replaying(run, order, seed=3)
        policy.begin_run()
        played = policy.gaps.recorded
        halves = [fmean(part) for part in (played[: STEPS // 2], played[STEPS // 2 :])]
        kept = sum(pair in set(itertools.pairwise(gaps)) for pair in itertools.pairwise(played)) / STEPS
        seen[order] = (halves[0] / halves[1], kept)
    first, second = fmean(gaps[: STEPS // 2]), fmean(gaps[STEPS // 2 :])
    assert first / second > 4  # as it was
    assert 0.5 < seen["permuted"][0] < 2 and seen["permuted"][1] < 0.05
    assert seen["blocks"][0] < first / second and seen["blocks"][1] > 0.9


@pytest.mark.parametrize(("block", "expected"), [(1, 1), (7, 7), (100, 100), (10_000, 399), (None, 19)])
def test_blocks_have_the_length_that_was_asked_for(measured, block, expected):
    run, _, gaps = measured
    options = {} if block is None else {"block": block}
    policy = build_temperature("dts", gap_source={"replay": run, "order": "blocks", **options}, seed=5)
    policy.begin_run()
    place = {gap: k for k, gap in enumerate(gaps)}
    played = [place[gap] for gap in policy.gaps.recorded]
    starts = [0, *(k for k in range(1, 399) if played[k] != played[k - 1] + 1), 399]
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    # Two blocks that were neighbours may be so again, and the last one is what is left
    assert all(length % expected == 0 or length % expected == 399 % expected for length in lengths)
    assert expected in lengths


def test_blocks_of_a_short_run_are_no_permutation_of_single_steps(tmp_path):
    """A twentieth of 39 gaps is one: such a control was `permuted` under another name."""
    gaps = [3.0 - 0.05 * k for k in range(40)]
    run = record(tmp_path / "run", {"temperature": [2.0] * 40, "teacher_temperature": [2.0] * 40, "gap": gaps})
    policy = build_temperature("dts", gap_source={"replay": run, "order": "blocks"})
    policy.begin_run()
    pairs = set(itertools.pairwise(policy.gaps.recorded))
    assert {(gaps[k], gaps[k + 1]) for k in range(0, 38, 2)} <= pairs and policy.gaps.recorded != gaps[:-1]


def test_a_permutation_is_that_of_its_seed_and_touches_no_generator(measured):
    run = measured[0]
    before = random.getstate(), torch.get_rng_state().clone()
    runs = [simulated(replaying(run, "permuted", seed=seed))[0] for seed in (None, 0, 1, 1)]
    assert runs[0] == runs[1] != runs[2] == runs[3]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_gap_that_was_no_number_stays_one_wherever_it_goes(tmp_path):
    gaps = [1.0, None, 0.5, 0.25, 2.0, 1.5]
    run = record(tmp_path / "run", {"gap": gaps})
    policy = build_temperature("dts", gap_source={"replay": run})
    policy.begin_run(6)
    seen = []
    for step in range(6):
        policy.begin_step(step / 6)
        seen.append(policy.temperature)
        policy.end_step(StepStats(3.0, 2.0, 1.0, 10))
    assert seen[2] == seen[1] and seen[3] != seen[2] and policy.counters()["ignored_gaps"] == 1
    policy = replaying(run, "permuted", seed=1)
    policy.begin_run(6)
    assert policy.gaps.recorded.count(None) == 1


# -------------------------------------------------------------------------------------------------- the temperatures


def test_replay_gives_the_trace_of_both_models(tmp_path):
    student, teacher = [3.0, 2.5, 2.0, 1.5, 1.25], [4.0, 1.0, 2.0, 3.0, 1.0]
    policy = build_temperature(
        "replay", run=record(tmp_path / "run", {"temperature": student, "teacher_temperature": teacher})
    )
    policy.begin_run(5)
    logits = torch.randn(3, 7)
    seen = []
    for step in range(5):
        policy.begin_step(step / 5)
        answer = policy(logits, logits, RowStats(*[torch.zeros(3)] * 4))
        seen.append((answer.student.item(), answer.teacher.item(), policy.temperature))
        assert answer.scale is None  # the factor is T_s T_t
        policy.end_step(StepStats(9.0, 2.0, 1.0, 10))
    assert seen == list(zip(student, teacher, student))


@pytest.mark.parametrize("steps", [3, 7, 49, 837, 10_001])
def test_each_step_finds_its_own_entry(tmp_path, steps):
    trace = [1.0 + k for k in range(steps)]
    policy = build_temperature(
        "replay", run=record(tmp_path / "run", {"temperature": trace, "teacher_temperature": trace})
    )
    policy.begin_run(steps)
    seen = []
    for step in range(steps):
        policy.begin_step(step / steps)
        seen.append(policy.temperature)
    assert seen == trace


@pytest.mark.parametrize("t_min", [0.5, 1.0, 1.9])
def test_the_matched_cosine_has_the_mean_of_the_run(measured, t_min):
    run, temperatures, _ = measured
    for steps in (STEPS, 37, 1000):  # of this run: it need not be as long
        policy = build_temperature("cosine", match_mean_of=run, t_min=t_min)
        seen = simulated(policy, steps=steps)[0]
        assert fmean(seen) == pytest.approx(fmean(temperatures), abs=1e-9) and min(seen) >= t_min
        plain = build_temperature("cosine", t_init=policy.matched.recorded[0], t_min=t_min)
        assert simulated(plain, steps=steps)[0] == seen  # nothing else is different


def test_a_mean_below_the_floor_is_refused_with_what_can_be_had(tmp_path):
    run = record(tmp_path / "run", {"temperature": [1.5, 1.25, 1.0, 0.75]})
    with pytest.raises(UserError, match=r"match_mean_of: the mean T of .* is 1.125, .* t_min 2 .* 2 or more"):
        build_temperature("cosine", match_mean_of=run, t_min=2.0).begin_run()
    policy = build_temperature(
        "cosine", match_mean_of=record(tmp_path / "flat", {"temperature": [2.0 - 1e-7] * 4}), t_min=2.0
    )
    policy.begin_run(4)  # a run at the floor, by its fp32 sums
    assert simulated(policy, steps=4)[0] == [2.0] * 4


# ------------------------------------------------------------------------------------------------- what a log may be


def test_a_line_of_several_steps_stands_for_each_of_them_and_says_so(tmp_path, caplog):
    gaps = [float(k) for k in range(1, 14)]
    run = record(tmp_path / "run", {"gap": gaps, "temperature": gaps, "teacher_temperature": gaps}, every=5)
    policy = build_temperature("replay", run=run)
    policy.begin_run(13)
    student = [pair[0] for pair in policy.trace.recorded]
    assert student == [3.0] * 5 + [8.0] * 8  # the last three take the last line's
    assert "2 lines for 13 steps" in caplog.text and "logging_steps: 1" in caplog.text


def test_lines_of_a_life_that_did_not_last_do_not_count(tmp_path):
    run = record(tmp_path / "run", {"gap": [1.0, 2.0, 3.0]})
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    old = [re.sub(r'"gap": [\d.]+', '"gap": 9.0', line) for line in lines]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join([*old, *lines[2:]]) + "\n")
    policy = build_temperature("dts", gap_source={"replay": run})
    policy.begin_run(3)
    assert policy.gaps.recorded == [9.0, 2.0]


def broken(folder, change):
    run = record(
        folder / "run", {"gap": [1.0, 2.0, 3.0, 4.0], "temperature": [2.0] * 4, "teacher_temperature": [2.0] * 4}
    )
    change(folder / "run")
    return run


def without(name):
    return lambda run: (run / name).unlink()


def with_text(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "run: no such folder, expected the run directory of a finished run"),
        (without("log.jsonl"), "log.jsonl: no such file"),
        (without("metrics.json"), "metrics.json: no such file"),
        (with_text("metrics.json", "{"), "metrics.json: got None for training.steps"),
        (with_text("metrics.json", '{"training": {"steps": 0}}'), "got 0 for training.steps"),
        (with_text("metrics.json", '{"training": {"steps": 1000}}'), "ends with step 4 of a run of 1,000 steps"),
        (with_text("metrics.json", '{"training": {"steps": 3}}'), "ends with step 4 of a run of 3 steps"),
        (with_text("log.jsonl", ""), "holds no line about training; expected a run with training.logging_steps 1"),
        (
            with_text("log.jsonl", '{"kind": "train", "step": 4, "loss": 1.0}\n'),
            "none of its 1 lines about training has a",
        ),
        (with_text("log.jsonl", '{"kind": "train", "step": 4, "gap": null}\n'), "none of its 1 lines"),
        (with_text("log.jsonl", "[1]\n"), "line 1 is no line of a log"),
        (with_text("log.jsonl", '{"kind": "train"}\n'), "line 1 is no line of a log"),
        (
            with_text("log.jsonl", '{"kind": "train", "step": 4, "gap": "1", "temperature": "1"}\n'),
            "line 1 is no line",
        ),
        (with_text("log.jsonl", "\x00\n"), "line 1 is no line of a log"),
    ],
)
@pytest.mark.parametrize("control", ["gap_source.replay", "run", "match_mean_of"])
def test_a_run_that_cannot_be_read_is_refused_by_name(tmp_path, control, change, words):
    run = broken(tmp_path, change)
    policy = {
        "gap_source.replay": lambda: build_temperature("dts", gap_source={"replay": run}),
        "run": lambda: build_temperature("replay", run=run),
        "match_mean_of": lambda: build_temperature("cosine", match_mean_of=run),
    }[control]()  # the folder may be gone when a run is resumed, so it is not looked at yet
    with pytest.raises(UserError, match=rf"^temperature.{control}: .*{words}"):
        policy.begin_run()


def test_a_run_of_one_step_has_no_gap_that_acted(tmp_path):
    run = record(tmp_path / "run", {"gap": [1.0]})
    with pytest.raises(UserError, match=r"gap_source.replay: .* has one optimizer step, expected two or more"):
        build_temperature("dts", gap_source={"replay": run}).begin_run()


def test_the_nearest_run_is_named(tmp_path):
    record(tmp_path / "dts_gap", {"gap": [1.0, 2.0]})
    with pytest.raises(UserError, match="Did you mean 'dts_gap'"):
        build_temperature("replay", run=str(tmp_path / "dts_gpa")).begin_run()


def test_a_run_of_another_length_is_refused():
    for options in ({"name": "replay", "run": a_run(12)}, {"name": "dts", "gap_source": {"replay": a_run(12)}}):
        policy = build_temperature(**options)
        policy.begin_run(12)
        with pytest.raises(UserError, match=r"has 12 optimizer steps and this run 13; .* training.max_steps: 12"):
            policy.begin_run(13)


def test_no_step_is_taken_before_the_run_was_read():
    logits, rows = torch.randn(2, 5), RowStats(*[torch.zeros(2)] * 4)
    for options in (
        {"name": "replay", "run": "x"},
        {"name": "dts", "gap_source": {"replay": "x"}},
        {"name": "cosine", "match_mean_of": "x"},
    ):
        policy = build_temperature(**options)
        policy.begin_step(0.0)
        with pytest.raises(ValueError, match="begin_run"):
            policy(logits, logits, rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"name": "dts", "gap_source": "shuffled"},
            r"got 'shuffled', expected .*\{replay: RUN, order: permuted\}.* no control",
        ),
        ({"name": "dts", "gap_source": "measure"}, "Did you mean 'measured'"),
        ({"name": "dts", "gap_source": None}, "gap_source: got None"),
        ({"name": "dts", "gap_source": {}}, "gap_source.replay: is missing"),
        ({"name": "dts", "gap_source": {"replay": 3}}, "gap_source.replay: got 3"),
        (
            {"name": "dts", "gap_source": {"replay": "x", "ordr": "blocks"}},
            "gap_source.ordr: unknown .*Did you mean 'order'",
        ),
        (
            {"name": "dts", "gap_source": {"replay": "x", "order": "block"}},
            "gap_source.order: .*Did you mean 'blocks'",
        ),
        ({"name": "dts", "gap_source": {"replay": "x", "order": ["a"]}}, "gap_source.order"),
        ({"name": "dts", "gap_source": {"replay": "x", "block": 3}}, "gap_source.block: got 3 with order 'recorded'"),
        ({"name": "dts", "gap_source": {"replay": "x", "order": "blocks", "block": 0}}, "gap_source.block: got 0"),
        ({"name": "dts", "gap_source": {"replay": "x", "order": "blocks", "block": True}}, "gap_source.block"),
        ({"name": "dts", "gap_source": {"replay": "x"}, "granularity": "token"}, "gap_source: .* granularity 'batch'"),
        ({"name": "dts", "gap_source": {"replay": "x"}, "seed": 1}, "seed: got 1, but nothing is drawn"),
        ({"name": "dts", "gap_source": "held_ou"}, "Did you mean 'held_out'"),
        (
            {"name": "dts", "gap_source": "held_out", "granularity": "token"},
            "got held-out rows with granularity 'token'",
        ),
        ({"name": "dts", "gap_source": "held_out", "seed": 1}, "seed: got 1, but nothing is drawn"),
        ({"name": "dts", "gap_source": {"held_out": {"evry": 3}}}, "held_out.evry: unknown .*Did you mean 'every'"),
        ({"name": "dts", "gap_source": {"held_out": {"every": 0}}}, "held_out.every: got 0"),
        ({"name": "dts", "gap_source": {"held_out": {"rows": None}}}, "held_out.rows: got null"),
        ({"name": "dts", "gap_source": {"held_out": 3}}, "held_out: got 3, expected a mapping"),
        ({"name": "dts", "gap_source": {"held_out": {}, "replay": "x"}}, "replay: got 'x' beside held_out"),
        ({"name": "replay"}, "temperature.run: is missing"),
        ({"name": "replay", "run": 3}, "temperature.run: got 3"),
        ({"name": "replay", "run": ""}, "temperature.run: got ''"),
        ({"name": "cosine", "match_mean_of": "x", "t_init": 3}, "temperature.t_init: got 3 with match_mean_of"),
        ({"name": "cosine", "match_mean_of": "x", "t_min": 0}, "temperature.t_min"),
        ({"name": "constant", "teacher_value": 0}, "temperature.teacher_value"),
        ({"name": "constant", "teacher_value": "3"}, "temperature.teacher_value"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        build_temperature(**options)


# ------------------------------------------------------------------------------------- a fixed T for each of the two


def test_constant_of_two_is_the_dense_loss_and_each_of_them_moves_it():
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(6, 9, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    head = Head(torch.eye(9, dtype=torch.float64))

    def ours(student, teacher, scaling="squared"):
        policy = build_temperature("constant", value=student, teacher_value=teacher)
        loss = DistillationLoss(temperature=policy, kd_ratio=1.0, temperature_scaling=scaling)
        states = z_s.clone().requires_grad_()
        output = loss(states, head, z_t, head, torch.zeros(6, dtype=torch.int64), 6)
        return output.loss.item(), torch.autograd.grad(output.loss, states)[0], output.sums

    def dense(student, teacher, factor):
        states = z_s.clone().requires_grad_()
        p, log_q = (z_t / teacher).softmax(-1), (states / student).log_softmax(-1)
        loss = factor * (p * (p.log() - log_q)).sum(-1).mean()
        return loss.item(), torch.autograd.grad(loss, states)[0]

    for scaling, factor in (("squared", 6.0), ("none", 1.0)):  # the factor is T_s T_t
        value, grad, sums = ours(2.0, 3.0, scaling)
        expected, expected_grad = dense(2.0, 3.0, factor)
        assert value == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
        assert (sums["temperature"] / 6, sums["teacher_temperature"] / 6) == (2.0, 3.0)
    value, grad, _ = ours(2.0, 3.0)
    for other in (ours(2.5, 3.0), ours(2.0, 2.5)):
        assert abs(other[0] - value) > 1e-3 and (other[1] - grad).abs().max() > 1e-3
    assert ours(2.0, None)[0] == ours(2.0, 2.0)[0]


# ------------------------------------------------------------------------------------------------ what the page says


def test_momentum_per_row_only_delays_the_cosine():
    policy = build_temperature("dts", granularity="token", t_min=0.01)
    seen, curve = [], []
    for step in range(1000):
        policy.begin_step(step / 1000)
        policy.end_step(StepStats(2.0, 2.0, 1.0, 10))
        seen.append(policy.cosine)
        curve.append(3.0 * (1 + math.cos(math.pi * step / 1000)) / 2)
    assert all(abs(seen[step] - curve[step - 9]) < 2e-3 for step in range(100, 950))  # m / (1 - m) = 9
    assert max(abs(seen[step] - curve[step]) for step in range(100, 950)) > 0.03


def test_momentum_in_batch_delays_a_little_and_smooths_a_lot():
    still = simulated(build_temperature("dts"), steps=1000, noise=0.0)[0]
    at_once = simulated(build_temperature("dts", momentum=0.0), steps=1000, noise=0.0)[0]
    assert max(abs(a - b) for a, b in zip(still, at_once)) == pytest.approx(0.037, abs=0.005)
    scatter = {}
    for momentum, smooth in ((0.0, at_once), (0.9, still)):
        noisy = simulated(build_temperature("dts", momentum=momentum), steps=1000)[0]
        scatter[momentum] = pstdev([a - b for a, b in zip(noisy[300:600], smooth[300:600])])
    assert scatter[0.9] / scatter[0.0] == pytest.approx(0.25, abs=0.06)  # sqrt((1 - m) / (1 + m)) = 0.23


def per_row(gap, **options):
    """(T of rows with these gaps, the policy), half-way through a run, without momentum."""
    policy = build_temperature("dts", momentum=0.0, t_min=0.01, **options)
    for progress in (0.0, 0.5):
        policy.begin_step(progress)
        policy.end_step(StepStats(2.0 + gap.mean().item(), 2.0, 1.0, len(gap)))
    policy.begin_step(0.5)
    logits, ce = torch.zeros(len(gap), 2, dtype=torch.float64), torch.full_like(gap, 2.0)
    return policy(logits, logits, RowStats(gap + 2.0, ce, ce, ce, gap)).student.flatten(), policy


def test_token_and_batch_differ_in_level():
    gap = torch.tensor([3.0, -1.0], dtype=torch.float64)
    # alpha is 1/2 at the mean gap of 1, and 3/4 and 0 on the tokens: T = 3 (1/2 + alpha / 2)
    assert per_row(gap, granularity="batch")[0].tolist() == pytest.approx([2.25])
    assert per_row(gap, granularity="token")[0].tolist() == pytest.approx([2.625, 1.5])  # their mean is 2.06


def test_rule_paper_per_token_fires_where_the_student_beats_the_teacher():
    gap = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.39
    seen, policy = per_row(gap, granularity="token", rule="paper")
    fired = seen > policy.cosine + 1e-9
    assert torch.equal(fired, gap < -1) and 0.02 < fired.double().mean() < 0.06
    assert policy.cosine == pytest.approx(1.5) and 1.53 < seen.mean() < 1.57
    assert per_row(gap, granularity="batch", rule="paper")[0].tolist() == pytest.approx([1.5])


# ------------------------------------------------------------------------------------------------ through the Trainer


def logged(trainer, name="temperature"):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of ``dts`` by the Trainer, decoupled so that student and teacher differ: (trainer, folder with its log)."""
    folder = tmp_path_factory.mktemp("source")
    trainer = trainer_for(folder / "out", {"name": "dts", "decoupled": True, "momentum": 0.5})
    trainer.train()
    names = ("gap", "temperature", "teacher_temperature")
    return trainer, record(folder / "run", {name: logged(trainer, name) for name in names})


def test_a_replay_trains_at_the_recorded_temperatures(source, tmp_path):
    trainer, run = source
    again = trainer_for(tmp_path, {"name": "replay", "run": run}, student=3)
    again.train()
    for name in ("temperature", "teacher_temperature"):
        assert logged(again, name) == pytest.approx(logged(trainer, name), rel=1e-6)  # sums of fp32
    assert len(set(logged(again))) > 3 and logged(again) != logged(again, "teacher_temperature")
    assert logged(again, "gap") != logged(trainer, "gap")


def test_the_recorded_gaps_of_another_student_give_its_schedule_to_the_bit(source, tmp_path):
    trainer, run = source
    temperature = {"name": "dts", "momentum": 0.5, "gap_source": {"replay": run}}
    again = trainer_for(tmp_path, temperature, student=3)
    again.train()
    assert again.temperature.state()["value"] == trainer.temperature.state()["value"]
    assert logged(again, "gap") != logged(trainer, "gap")


@pytest.mark.parametrize("control", CONTROLS)
def test_a_resume_needs_the_recorded_run_no_more(source, tmp_path, control):
    run = str(tmp_path / "run")
    shutil.copytree(source[1], run)
    whole = trainer_for(tmp_path / "whole", CONTROLS[control](run), save_strategy="steps", save_steps=3)
    whole.train()
    shutil.rmtree(run)
    record(tmp_path / "run", {name: [9.0] * 6 for name in ("gap", "temperature", "teacher_temperature")})
    for gone in (False, True):  # changed, then deleted
        if gone:
            shutil.rmtree(run)
        resumed = trainer_for(tmp_path / f"resumed{gone}", CONTROLS[control](run), student=5)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert (
            logged(resumed)[-3:] == logged(whole)[-3:]
            and logged(resumed, "kd_loss")[-3:] == logged(whole, "kd_loss")[-3:]
        )
        assert resumed.temperature.state() == whole.temperature.state()
        for key, value in resumed.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[key])
    with pytest.raises(UserError, match="no such folder"):
        trainer_for(tmp_path / "new", CONTROLS[control](run)).train()


def test_a_run_of_another_length_is_refused_before_the_first_step(source, tmp_path):
    trainer = trainer_for(tmp_path, {"name": "replay", "run": source[1]}, max_steps=7)
    with pytest.raises(UserError, match="has 6 optimizer steps and this run 7"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.planned_steps() == 7
    by_epochs = trainer_for(tmp_path, {"name": "replay", "run": source[1]}, max_steps=-1, num_train_epochs=1.5)
    assert by_epochs.planned_steps() == 6
    by_epochs.train()
    assert by_epochs.state.global_step == 6


def test_the_trainer_refuses_supports_before_training_and_out_of_reach_in_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"temperature.support_max: got 1e.06, but teacher and student share"):
        trainer_for(tmp_path, {"name": "dts", "range": "auto", "support_max": 1e6})
    trainer = trainer_for(tmp_path, {"name": "dts", "range": "auto", "support_max": 30.0, "support_min": 1.0})
    with pytest.raises(UserError, match=r"temperature.support_min: got 1, but in the first step"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_two_temperatures_reach_the_loss_of_the_trainer(tmp_path):
    found = {}
    for options in ({"value": 2.0}, {"value": 2.0, "teacher_value": 4.0}, {"value": 3.0, "teacher_value": 4.0}):
        trainer = trainer_for(tmp_path, {"name": "constant", **options}, max_steps=1)
        trainer.train()
        assert logged(trainer) == [options["value"]]
        assert logged(trainer, "teacher_temperature") == [options.get("teacher_value", 2.0)]
        found[tuple(options.values())] = (logged(trainer, "kd_loss")[0], logged(trainer, "grad_norm")[0])
    losses, norms = zip(*found.values())
    assert all(abs(a - b) > 1e-4 for column in (losses, norms) for a, b in itertools.pairwise(column))


def test_all_processes_have_what_the_first_one_read(source, tmp_path):
    done = run_warm(WORKERS / "controls_worker.py", 2, [source[1], str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and "6 optimizer steps and this run 7" in first["refused"]
    assert len(first["replay"]["recorded"]) == 6 and len(first["permuted"]["recorded"]) == 5
