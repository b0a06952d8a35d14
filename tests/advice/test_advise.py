"""From a recipe to advice: constructed teachers and students, samples that agree, files, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from typer.testing import CliRunner, Result

from dts_hf.advice.advise import Advice, advise
from dts_hf.advice.guidance import RULES
from dts_hf.advice.measured import Situation
from dts_hf.advice.proposal import MOST_ARMS
from dts_hf.advice.rules import Verdict
from dts_hf.advice.sample import situation_of
from dts_hf.cli.app import app
from dts_hf.distill import task_of
from dts_hf.errors import UserError
from dts_hf.experiments.sweep import plan
from dts_hf.models.loading import load_tokenizers
from dts_hf.recipe.loading import load_recipe
from dts_hf.task import Models
from dts_hf.temperature import build_temperature
from tests.support import advised, examined
from tests.support.recorded import a_run

#: What each of the constructed cases is there for, and no other one may say.
OWN = {
    "sharp": "sharp-teacher", "flat": "flat-teacher", "over-fitted": "over-fitted-teacher",
    "random": "revisit-f6-random-student", "sgd": "revisit-f2-sgd", "coarse": "revisit-f4-coarse-labels",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def case(name: str) -> Path:
    """The recipe of a constructed case."""
    if name == "coarse":
        examined.save_model("teacher", 2)
        examined.classifier("classifier")
        return examined.task_recipe(
            student={"init": {"from": "teacher", "layers": 1}}, temperature={"name": "constant"}
        )
    scale = {"sharp": 3.0, "flat": 1 / 3}.get(name, 1.0)
    sections: dict[str, Any] = {
        "random": {"student": {"init": {"from": "config", "layers": 1}}},
        "sgd": {"training": {"optim": "sgd", "learning_rate": 0.1}},
    }.get(name, {})
    return advised.workplace(scale, 4 if name == "over-fitted" else None, **sections)


def case_of_policy(temperature: dict[str, Any]) -> Path:
    return advised.workplace(temperature=temperature)


def situation_from(path: Path) -> Situation:
    """What a recipe says by itself, with nothing loaded."""
    loaded = load_recipe(path)
    policy = build_temperature(loaded.temperature.name, **loaded.temperature.options)
    policy.begin_run()
    return situation_of(loaded, policy, TrainingArguments("out", use_cpu=True))


def fired(advice: Advice) -> set[str]:
    return {one.rule.id for one in advice.with_verdict(Verdict.FIRES)}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["advise", *arguments])


# ------------------------------------------------------------------------------------------------------ what is advised


@pytest.mark.parametrize("name", [*OWN, "plain"])
def test_six_cases_have_six_pieces_of_advice(name: str) -> None:
    said = fired(advise(case(name)))
    assert said & {*OWN.values()} == ({OWN[name]} if name in OWN else set())


def test_a_pretrained_classifier_with_a_new_head_is_not_taken_for_random() -> None:
    """Before its first step it guesses, whatever its body knows."""
    case("coarse")
    recipe = examined.task_recipe(student={"model": "teacher"}, temperature={"name": "constant"})
    advice = advise(recipe)
    assert advice.found.values["student_ce"].value > 0.95 * math.log(2) and advice.found.situation.student == "loaded"
    said = fired(advice)
    assert "revisit-f6-pretrained-student" in said and "revisit-f6-random-student" not in said


def test_a_seventh_cannot_say() -> None:
    advice = advise(case("sharp"), rows=8)
    assert advice.found.situation.rows == 8 and not fired(advice) & {one.id for one in RULES if one.reads}
    said = advice.with_verdict(Verdict.CANNOT_SAY)
    assert {"sharp-teacher", "over-fitted-teacher", "support-ceiling"} <= {one.rule.id for one in said}
    assert all(re.search(r"\d+ labels of training rows, expected 2,000 at least", one.measured) for one in said)


def test_sharp_and_over_fitted_differ_in_what_held_out_rows_say() -> None:
    sharp, known = (advise(case(name)).found.values for name in ("sharp", "over-fitted"))
    assert abs(sharp["ce_ratio"].value - 1.0) < 0.1 and sharp["over_confidence"].value > 0.3
    assert known["ce_ratio"].value > 100 and abs(known["over_confidence"].value) < 0.05
    assert known["matching_t"].value > 1.4  # its entropy on rows that it knows has a long way to go


@pytest.mark.parametrize("samples", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_samples_of_64_rows_agree(samples: int) -> None:
    """The same set of rules fires in 90 % of them at least."""
    for name in ("over-fitted", *(("sharp", "flat", "plain") if samples > 3 else ())):
        recipe = case(name)
        found = Counter(frozenset(fired(advise(recipe, rows=64, seed=seed))) for seed in range(samples))
        assert found.most_common(1)[0][1] >= 0.9 * samples, found


def test_the_same_seed_gives_the_same_numbers() -> None:
    recipe = case("plain")
    first, again, other = (advise(recipe, rows=16, seed=seed).found.values["gap"] for seed in (5, 5, 6))
    assert first == again != other


def test_the_sample_grows_until_it_has_enough_labels() -> None:
    advised.workplace()
    rows = [{**row, "output": row["output"][:20]} for row in advised.rows_of(3)]
    advised.write_rows("train.jsonl", rows)
    situation = advise("recipe.yaml").found.situation
    assert 64 < situation.rows < 130 and 2000 <= situation.labels < 2100
    assert situation.held_out_rows == 64


def test_numbers_are_those_of_the_trainer() -> None:
    """Before the first step it finds the same on all held-out rows."""
    recipe = advised.workplace()
    found = advise(recipe, rows=200).found.values
    loaded = load_recipe(recipe)
    task: Any = task_of(loaded)
    tokenizers = load_tokenizers(loaded)
    data, teacher = task.encode(task.load_rows(), tokenizers[0]), task.load_teacher()
    models = Models(task.load_student(teacher, 42), teacher, *tokenizers)
    scores = task.make_trainer(task.training_arguments("run"), models, data).evaluate()
    for ours, theirs in {
        "student_ce": "ce_loss",
        "teacher_ce": "teacher_ce",
        "kl": "kl",
        "agreement": "top1_agreement",
        "ece": "teacher_ece",
    }.items():
        assert found[f"held_out_{ours}"].value == pytest.approx(scores[f"eval_{theirs}"], rel=1e-3), scores


def test_without_held_out_rows_what_needs_them_cannot_be_said() -> None:
    advice = advise(case("over-fitted"), ["data.validation=null"])
    silent = {one.rule.id: one.measured for one in advice.with_verdict(Verdict.CANNOT_SAY)}
    assert {"over-fitted-teacher", "sharp-teacher"} <= {*silent} and "data.validation" in silent["sharp-teacher"]


def test_answers_that_an_earlier_run_has_kept_are_used_and_none_are_made() -> None:
    recipe = advised.workplace(data={"responses": "teacher", "teacher_max_new_tokens": 40, "max_repetition": 1.0})
    before = advise(recipe)
    assert "those of the data" in before.found.notes[0] and not before.found.situation.own_answers
    assert not list(Path("cache").rglob("*.jsonl"))
    loaded = load_recipe(recipe)
    task: Any = task_of(loaded)
    task.answer(task.load_teacher(), load_tokenizers(loaded)[0], task.load_rows())  # as dts-hf train does
    after = advise(recipe)
    assert "an earlier run has kept" in after.found.notes[0] and after.found.situation.own_answers
    assert after.found.values["correct"].value > 0.95 > before.found.values["correct"].value
    beside = {one.rule.id: one for one in after.judged}
    assert beside["flat-teacher"].verdict is beside["over-fitted-teacher"].verdict is Verdict.ELSEWHERE


def test_a_search_for_layers_is_not_waited_for() -> None:
    recipe = advised.workplace(student={"init": {"from": "teacher", "layers": 1, "choose": "search"}})
    assert any("evenly spaced layers" in note for note in advise(recipe, rows=4).found.notes)


@pytest.mark.parametrize(
    ("temperature", "situation"),
    [
        ({"name": "pocl", "t_end": 3.0, "kd_start": 0.4}, {"hottest": 3.0, "moves": True, "kd_ratio": 0.4}),
        ({"name": "annealing", "t_max": 4}, {"hottest": 4.0, "moves": True, "kd_ratio": 1.0}),
        ({"name": "adakd", "keep": 0.5}, {"hottest": math.exp(0.5), "moves": True, "kd_ratio": 0.5}),
        ({"name": "adakd", "c": 0, "keep": "auto"}, {"hottest": 1.0, "moves": False, "kd_ratio": 0.5}),
        ({"name": "constant", "value": 1.0, "teacher_value": 3.0}, {"hottest": 3.0, "moves": False}),
        ({"name": "taid", "value": 2.0}, {"hottest": 2.0, "moves": False}),
        ({"name": "ats"}, {"hottest": 2.0, "moves": False}),
        ({"name": "ats", "tau_y": 1.5, "tau_rest": 3.0}, {"hottest": 3.0, "moves": False}),
        ({"name": "ats", "value": 4.0}, {"hottest": 4.0, "moves": False}),
        ({"name": "cist"}, {"hottest": None, "moves": True}),
        ({"name": "dts", "range": "auto"}, {"hottest": None, "moves": True}),
    ],
)
def test_what_a_policy_says_of_itself_is_in_the_situation(
    temperature: dict[str, Any], situation: dict[str, Any]
) -> None:
    found = dataclasses.asdict(situation_from(advised.recipe(temperature=temperature)))
    assert {key: found[key] for key in situation} == pytest.approx(situation)


def test_a_control_is_as_hot_as_the_run_that_it_repeats() -> None:
    assert situation_from(advised.recipe(temperature={"name": "replay", "run": a_run()})).hottest == 4.0
    with pytest.raises(UserError, match=r"temperature\.run: .*nowhere"):
        advise(case_of_policy({"name": "replay", "run": "nowhere"}), rows=4)


@pytest.mark.parametrize("temperature", [{"name": "cist"}, {"name": "dts", "range": "auto"}])
def test_where_nobody_knows_how_high_t_goes_rules_that_ask_do_not_apply(temperature: dict[str, Any]) -> None:
    advice = advise(case_of_policy(temperature), rows=4)
    assert f"how high T goes with {temperature['name']} only training knows" in advice.found.notes[0]
    reasons = {one.rule.id: one.measured for one in advice.with_verdict(Verdict.ELSEWHERE)}
    for rule in ("support-ceiling", "gradient-share", "compact-cache", "no-compact-cache"):
        assert "only training knows" in reasons[rule]


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_shows_little_and_explains_all() -> None:
    case("sharp")
    short = run("recipe.yaml")
    assert short.exit_code == 0, short.output
    assert "sharp-teacher" in short.stdout and "near-student" not in short.stdout
    explained = run("recipe.yaml", "--explain")
    for rule in RULES:
        assert f"{rule.id}: " in explained.stdout and rule.source in explained.stdout
    assert explained.stdout.count("image classification only") == sum(rule.id.startswith("revisit") for rule in RULES)


@pytest.mark.parametrize("name", ["sharp", "coarse", "moving"])
def test_the_sweep_it_writes_can_be_run(name: str) -> None:
    """Four arms at most, labels alone and a constant forward KL among them, three seeds each."""
    recipe = case("plain" if name == "moving" else name)
    more = ["temperature={name: dts, rule: gap}", "loss.divergence=reverse_kl"] if name == "moving" else []
    written = run(str(recipe), *more, "--write", "sweep.yaml")
    assert written.exit_code == 0, written.output
    study = plan("sweep.yaml", [], Path("study"), {}, {}, [])
    arms = [load_recipe("sweep.yaml", [*one.overrides, "sweep=null"]) for one in study.runs]
    assert len(arms) <= 3 * MOST_ARMS and Counter(arm.training["seed"] for arm in arms) == dict.fromkeys(
        (1, 2, 3), len(arms) // 3
    )
    assert any(arm.loss.kd_ratio == 0 for arm in arms)
    constant = [arm for arm in arms if arm.temperature.name == "constant" and arm.loss.kd_ratio > 0]
    assert any(arm.loss.divergence.name == "forward_kl" for arm in constant)
    if name == "moving":
        assert any(arm.temperature.name == "dts" and arm.loss.divergence.name == "reverse_kl" for arm in arms)
    dry = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--dry-run", "--output", "study"])
    assert dry.exit_code == 0 and "missing" in dry.output


def test_files_hold_every_number() -> None:
    case("plain")
    result = run("recipe.yaml", "--output", "advice", "--json")
    assert result.exit_code == 0, result.output
    printed, written = json.loads(result.stdout), json.loads(Path("advice/advice.json").read_text())
    assert printed["values"] == written["values"] and {rule["id"] for rule in printed["rules"]} == {
        one.id for one in RULES
    }
    with Path("advice/curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    entropy = [line for line in lines if (line["rows"], line["curve"]) == ("train", "entropy")]
    assert [float(line["value"]) for line in entropy] == [point["value"] for point in printed["curves"]["entropy"]]
    page = Path("advice/advice.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "http" not in re.sub(r"data:[^\"]*", "", page)
    for rule in RULES:
        assert f">{rule.id}<" in page


def test_texts_of_a_stranger_are_no_html() -> None:
    from dts_hf.advice.report import render

    advice = dataclasses.replace(advise(case("plain"), rows=4), name="<script>alert(1)</script>")
    assert "<script>" not in render(advice)


def test_names_of_files_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case("plain")
    monkeypatch.setattr("dts_hf.advice.advise.look", lambda *args: pytest.fail("it was measured"))
    Path("there.yaml").write_text("")
    for options, said in (
        (["--write", "there.yaml"], "is there already"), (["--write", "recipe.yaml"], "is there already"),
        (["--write", "sweep.txt"], "ends in .yaml"), (["--write", "no/sweep.yaml"], "is no folder"),
        (["--output", "there.yaml"], "is a file"), (["loss.kd_ratoi=1"], "kd_ratio"),
    ):  # fmt: skip
        result = run("recipe.yaml", *options)
        assert result.exit_code == 2 and said in result.output, (options, result.output)


OWN_STUDENT = ("student.init=null", "student.model=teacher")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher=null", "loss.kd_ratio=0", *OWN_STUDENT], "teacher: is missing"),
        (
            ["teacher=null", *OWN_STUDENT, "teachers={a: {model: teacher, weight: 1}}"],
            "teachers: got several",
        ),
        ([*OWN_STUDENT, "teacher={kind: self, model: null, dtype: null}"], "kind: self"),
    ],
)
def test_recipes_without_a_teacher_to_look_at_are_refused(overrides: list[str], said: str) -> None:
    case("plain")
    with pytest.raises(UserError, match=said):
        advise("recipe.yaml", overrides)


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        advise("recipe.yaml")


def test_a_teacher_that_gives_no_numbers_is_refused() -> None:
    case("plain")
    model = advised.teacher()
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained("teacher")
    with pytest.raises(UserError):
        advise("recipe.yaml", rows=4)
