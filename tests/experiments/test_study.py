"""The study of temperature: what its programs make of planted results, and that its page is what they make."""

from __future__ import annotations

import importlib
import json
import random
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.experiments.families import power
from dts_hf.experiments.identity import run_id
from dts_hf.experiments.intervals import statistics_library
from dts_hf.experiments.sweep import Planned, Study
from dts_hf.recipe.loading import load_recipe
from dts_hf.runs.directory import RunDirectory
from tests.support.made_run import RECIPE, make_run
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_llama

pytest.importorskip("scipy")
SD = 0.45  # of a run, in points of ROUGE-L
FOLDER = Path(__file__).resolve().parents[2] / "studies" / "temperature"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Its programs, which keep their results here."""
    monkeypatch.syspath_prepend(str(FOLDER))
    programs: dict[str, ModuleType] = {
        name: importlib.import_module(module) for name, module in (("run", "run_stage"), ("page", "write_page"))
    }
    monkeypatch.setattr(programs["run"], "RESULTS", tmp_path / "results")
    return SimpleNamespace(**programs)


def plant(
    results: Path,
    seeds: list[int],
    interaction: float = 0.0,
    sd: float = 0.01,
    failed: int | None = None,
    reverse: float | None = None,
) -> None:
    """Results of stage A with a planted interaction of CE, and one of KL(student || teacher); KL has none."""
    draw = random.Random(seeds[0])
    kinds: list[tuple[str, float, float]] = [("forward_kl", 1.0, 0.0)]
    kinds = [(d, t, 0.9) for d in ("forward_kl", "reverse_kl") for t in (0.5, 1.0, 2.0, 4.0)] + kinds
    (results / "A").mkdir(parents=True, exist_ok=True)
    for divergence, t, ratio in kinds:
        for seed in seeds:
            ce = 3.0 + draw.gauss(0, sd) - (interaction if (divergence, t) == ("forward_kl", 2.0) else 0.0)
            scores = {"ce": ce, "kl": 1.0 + draw.gauss(0, sd), "n_tokens": 8000, "entropy": 2.0 + draw.gauss(0, sd)}
            if reverse is not None:
                scores["reverse_kl"] = 1.0 - (reverse if (divergence, t) == ("forward_kl", 2.0) else 0.0)
                scores["reverse_kl"] += draw.gauss(0, sd)
            broken = failed == seed and divergence == "reverse_kl" and t == 4.0
            settings = {"loss.divergence.name": divergence, "temperature.name": "constant", "temperature.value": t,
                        "loss.kd_ratio": ratio}  # fmt: skip
            found = {"id": f"{divergence}-{t}-{ratio}-{seed}", "seed": seed, "settings": settings, "teacher": {"ce": 2.5},
                     "failed": "its ce is no number" if broken else "", "scores": {} if broken else scores}  # fmt: skip
            (results / "A" / f"{found['id']}.json").write_text(json.dumps(found))


def text_of(study: SimpleNamespace) -> str:
    files = study.page.page()
    return next(text for path, text in files.items() if path.name == "RESULTS.md")


@pytest.mark.parametrize(("interaction", "words"), [(0.0, "cannot be told from none"), (0.2, "there is one")])
def test_a_planted_interaction_is_found_and_none_is_not(study, interaction, words) -> None:
    plant(study.run.RESULTS, [101, 102, 103], interaction)
    text = text_of(study)
    line = next(line for line in text.splitlines() if line.startswith("| CE on references"))
    assert words in line
    assert "forward KL, T = 1 (its own loss)" in text and "CE on the references is 2.500" in text
    kind = next(line for line in text.splitlines() if line.startswith("| forward KL, T = 2"))
    assert ("better by" in kind) == bool(interaction)
    entropy = text[text.index("### entropy of the student") :]
    assert "better" not in entropy[: entropy.index("Margin")]


@pytest.mark.parametrize(("reverse", "way"), [(0.2, "same"), (-0.2, "other"), (0.0, "")])
def test_the_page_says_where_another_endpoint_goes_the_other_way(study, reverse: float, way: str) -> None:
    plant(study.run.RESULTS, [101, 102, 103], 0.2, reverse=reverse)
    lines = text_of(study).splitlines()
    said = f"the {way} way round" if way else "cannot be told from none"
    name = "KL(student || teacher)" if way else "KL(teacher || student) and KL(student || teacher)"
    assert f"By {name}: {said} (intervals above)." in lines
    assert any(line.startswith("Both KLs lean: ") for line in lines)


def test_what_the_plan_calls_neither_better_nor_worse_is_called_neither(study) -> None:
    plan = (FOLDER / "PREREG.md").read_text(encoding="utf-8")
    described = plan[plan.index("described without a verdict") : plan.index("**Margins**")]
    endpoints = study.run.study()["endpoints"]
    neither = {key for key, about in endpoints.items() if about.get("neither")}
    assert neither == {"ece", "entropy"}
    assert "calibration error, entropy of the student" in " ".join(described.split())


def test_the_page_is_the_same_in_any_order_of_files(study) -> None:
    plant(study.run.RESULTS, [101, 102, 103], 0.1)
    first = study.page.page()
    for path in sorted((study.run.RESULTS / "A").glob("*.json")):
        path.rename(path.with_name(f"{random.Random(path.name).random()}.json"))
    assert study.page.page() == first
    assert any(path.suffix == ".svg" and "lowest to highest seed" in text for path, text in first.items())


def test_two_seeds_are_no_result_and_failed_runs_are_shown(study) -> None:
    plant(study.run.RESULTS, [101, 102])
    assert "fewer than 3 seeds" in text_of(study) and "### CE" not in text_of(study)
    plant(study.run.RESULTS, [103, 104], failed=104)
    text = text_of(study)
    assert "Failed: reverse KL, T = 4, seed 104: its ce is no number." in text
    assert "seeds that every kind has: 101, 102, 103" in text and "### CE" in text


def test_what_is_collected_holds_no_row_and_no_place(study, workplace) -> None:
    made = distill(recipe(temperature={"name": "constant", "value": 2.0}, evaluation={"models": ["student"]}))
    chosen = made.read_recipe()
    planned = Planned(run_id(chosen), "seed 42", (), made.path)
    begun = Planned("0123456789", "seed 43", (), workplace / "begun")
    begun.path.mkdir()
    (begun.path / "recipe.yaml").write_text((made.path / "recipe.yaml").read_text())
    study.run.collect("A", Study("recipe.yaml", workplace, [planned, begun]))
    (found,) = study.run.collected("A")  # what can go on is no result
    assert found["id"] == planned.id and found["failed"] == "" and found["scores"]["kl"] > 0
    assert len(found["log"]) == 2 and found["log"][0]["temperature"] == 2.0
    text = json.dumps(found)
    assert str(workplace) not in text and "train.jsonl" not in text and "apples" not in text


def test_a_run_that_diverged_is_collected_as_failed(study, tmp_path: Path) -> None:
    """In its files null stands for a number that is not finite: of its scores, and of what it said of the teacher."""
    teacher = {"eval_teacher_ce": 2.5, "eval_teacher_entropy": None, "eval_teacher_ece": 0.1}
    log = [{"kind": "train", "step": 1, "loss": None}, {"kind": "eval", **teacher}]
    write_rows(tmp_path / "rows.jsonl", 0, 2)
    rows = dict.fromkeys(("train", "validation"), str(tmp_path / "rows.jsonl"))
    run = make_run(tmp_path / "run", recipe={**RECIPE, "data": rows}, log=log)
    metrics = run.read_metrics()
    metrics["models"]["student"]["teacher_forced"] |= {"kl": None, "ce": 2.0}
    run.metrics_path.write_text(json.dumps(metrics))
    planned = Planned("0123456789", "seed 42", (), run.path)
    study.run.collect("A", Study("recipe.yaml", tmp_path, [planned]))
    (found,) = study.run.collected("A")
    assert found["failed"] == "its kl is no number" and "kl" not in found["scores"] and found["scores"]["ce"] == 2.0
    assert found["teacher"] == {"ce": 2.5, "ece": 0.1}


def test_names_with_bars_do_not_break_a_table(study) -> None:
    plant(study.run.RESULTS, [101, 102, 103], reverse=0.1)
    rows = [line for line in text_of(study).splitlines() if line.startswith("|") and "KL(" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)  # four columns


def test_stage_b_takes_the_best_constant_of_stage_a(study) -> None:
    with pytest.raises(UserError, match="stage B needs the results of stage A"):
        study.run.best_constant()
    plant(study.run.RESULTS, [101, 102, 103], 0.2)
    assert study.run.best_constant() == {"loss.divergence": ["forward_kl"], "temperature": [2.0]}


def found_in(study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, effect: float, studies: int) -> dict[str, float]:
    """How often studies like stage A find a difference of one kind, of any other kind, and the interaction."""
    kinds = [(d, t) for d in ("forward_kl", "reverse_kl") for t in (0.5, 1.0, 2.0, 4.0)] + [("sft", 1.0)]
    draw = random.Random(f"{effect}")
    counts = dict.fromkeys(("one", "others", "interaction"), 0)
    about = {"name": "score", "margin": 0.5, "higher": True}
    for _ in range(studies):
        runs = [
            {"seed": seed, "failed": "", "teacher": {},
             "scores": {"score": 30 + draw.gauss(0, SD) + effect * ((d, t) == ("forward_kl", 2.0))},
             "settings": {"loss.kd_ratio": 0.9 * (d != "sft"), "loss.divergence.name": d,
                          "temperature.name": "constant", "temperature.value": t}}
            for d, t in kinds
            for seed in (1, 2, 3)
        ]  # fmt: skip
        monkeypatch.setattr(study.page, "collected", lambda name, runs=runs: runs)
        stage = study.page.Stage("A", {})
        ((_, baseline, others),) = stage.families("forward KL, T = 1")
        lines = [line for line in study.page.table(stage, "score", about, baseline, others) if " by " in line]
        own = [line for line in lines if line.startswith("| forward KL, T = 2 ")]
        counts["one"] += len(own)
        counts["others"] += len(lines) > len(own)
        low, high = study.page.interaction(stage, "score").interval()
        counts["interaction"] += not low <= 0 <= high
    return {name: count / studies for name, count in counts.items()}


@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("studies", [60, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_simulated_studies_find_what_the_plan_says_can_be_found(
    study, monkeypatch, effect: float, studies: int
) -> None:
    """Planted ROUGE-L, with the spread between seeds that Dolly is known for; within 3 Monte Carlo deviations."""
    found = found_in(study, monkeypatch, effect, studies)
    library = statistics_library()
    critical, shift = library.t.ppf(0.975, 18), effect / (SD * (4 / 3) ** 0.5)
    expected = {
        "one": power(effect / SD, 8, 3),
        "interaction": library.nct.sf(critical, 18, shift) + library.nct.cdf(-critical, 18, shift),
    }
    for name, share in expected.items():
        assert abs(found[name] - share) <= 3 * (share * (1 - share) / studies) ** 0.5 + 0.5 / studies, (name, share)
    assert found["others"] <= 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5


def plant_stage(results: Path, stage: str, kinds: dict[str, tuple[dict[str, Any], float, list[int]]]) -> None:
    """Results of ``{name: (settings, CE, seeds)}``, without spread but for 0.01 from seed to seed."""
    (results / stage).mkdir(parents=True, exist_ok=True)
    draw = random.Random(stage)
    for name, (settings, ce, seeds) in kinds.items():
        for seed in seeds:
            known = {"loss.kd_ratio": 0.9, "loss.divergence.name": "forward_kl", "training.learning_rate": 8e-4}
            found = {"id": f"{name}-{seed}", "seed": seed, "settings": {**known, **settings}, "teacher": {}, "failed": "",
                     "scores": {"ce": ce + draw.gauss(0, 0.01)},
                     "log": [{"step": k, "temperature": t} for k, t in enumerate((2.0, 1.0))]}  # fmt: skip
            (results / stage / f"{found['id']}.json").write_text(json.dumps(found))


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """Cells by kind of the first table below ``title``."""
    lines = text[text.index(f"## {title}") :].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    found = {}
    for line in lines[begin + 1 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = cells[1:]
    return found


def test_stage_b_has_all_seeds_of_its_control_and_dts_beside_its_controls(study) -> None:
    seeds, more = [201, 202, 203, 204], [205, 206, 207, 208]
    constant = {"temperature.name": "constant", "temperature.value": 1.0}
    replays = {"temperature.name": "dts", "temperature.gap_source.replay of": "the same seed"}
    kinds = {name: ({"temperature.name": name}, 3.0, seeds) for name in ("cosine", "dts", "adakd", "dtkd")}
    kinds |= {
        "constant": (constant, 3.0, seeds), "more": (constant, 5.0, more),
        "rate": ({**constant, "training.learning_rate": 4e-4}, 3.0, seeds),
        "permuted": ({**replays, "temperature.gap_source.order": "permuted"}, 4.0, seeds),
        "blocks": ({**replays, "temperature.gap_source.order": "blocks"}, 3.0, seeds),
        "open": ({"temperature.name": "replay", "temperature.run of": "another seed"}, 3.0, seeds),
        "matched": ({"temperature.name": "cosine", "temperature.match_mean_of of": "the same seed"}, 3.0, seeds),
    }  # fmt: skip
    plant_stage(study.run.RESULTS, "B", kinds)
    text = text_of(study)
    policies = rows_of(text, "Policies against the best constant")
    assert set(policies) == {f"forward KL, {name}" for name in ("T = 1", "cosine", "cosine of the same seed", "dts",
                                                                "adakd", "dtkd")}  # fmt: skip
    assert policies["forward KL, T = 1"][0].startswith("4.0") and policies["forward KL, T = 1"][4] == "the baseline"
    of_dts = rows_of(text, "`dts` against what replays it")
    assert set(of_dts) == {"forward KL, dts", "forward KL, dts, gaps permuted of the same seed",
                           "forward KL, dts, gaps blocks of the same seed", "forward KL, replay of another seed",
                           "forward KL, cosine of the same seed"}  # fmt: skip
    assert of_dts["forward KL, dts, gaps permuted of the same seed"][4].startswith("worse by 0.9")
    rates = rows_of(text, "The constant at other learning rates")
    assert set(rates) == {"forward KL, T = 1", "forward KL, T = 1, learning rate 0.0004"}
    assert "| forward KL, dts | 1.500, 1.500, 1.500, 1.500 |" in text


def test_stage_c_tells_students_of_another_depth_apart(study) -> None:
    kinds = {
        f"{t}-{layers}": (
            {"temperature.name": "constant", "temperature.value": t, "student.init.layers": list(range(layers))},
            3.0 + (t == 2.0 and layers == 20), [301, 302, 303],
        )
        for t in (1.0, 2.0)
        for layers in (12, 20)
    }  # fmt: skip
    plant_stage(study.run.RESULTS, "C", kinds)
    text = text_of(study)
    assert "12 runs of 4 kinds" in text
    assert not rows_of(text, "T = 2 against T = 1\n")["forward KL, T = 2"][4].startswith("worse")
    deep = rows_of(text, "T = 2 against T = 1, 20 layers")
    assert deep["forward KL, T = 2, 20 layers"][4].startswith("worse by") and len(deep) == 2


def test_stage_c_compares_fine_tuned_teachers_where_they_can_be_compared(study) -> None:
    """T against T under each teacher on everything; teacher against teacher not on the distance to one's own teacher."""
    kinds = {}
    for t in (1.0, 2.0):
        for epochs, ce in ((None, 3.0), (1, 2.5), (10, 3.5)):
            tuned = {"teacher.epochs": epochs} if epochs else {}
            settings = {"temperature.name": "constant", "temperature.value": t, **tuned}
            kinds[f"{t}-{epochs}"] = (settings, ce + (t == 2.0 and epochs == 10), [301, 302, 303])
    plant_stage(study.run.RESULTS, "C", kinds)
    for path in sorted((study.run.RESULTS / "C").glob("*.json")):
        found = json.loads(path.read_text())
        found["scores"]["kl"] = 1.0 + found["scores"]["ce"] / 10
        found["teacher"] = {"ce": 2.0 + (found["settings"].get("teacher.epochs") or 0) / 10}
        path.write_text(json.dumps(found))
    text = text_of(study)
    heavy = rows_of(text, "T = 2 against T = 1, teacher fine-tuned for 10 epochs")
    assert heavy["forward KL, T = 2, teacher fine-tuned for 10 epochs"][4].startswith("worse by 0.9")
    teachers = text[text.index(f"## {study.page.OF_TEACHERS}") : text.index("# The findings")]
    assert "in this order: 2.000, 2.100, 3.000." in teachers and "KL(teacher" not in teachers
    rows = rows_of(text, study.page.OF_TEACHERS)
    assert rows["forward KL, T = 1, teacher fine-tuned for 1 epoch"][4].startswith("better by 0.4")
    finding = next(line for line in text.splitlines() if line.startswith("| F5 |"))
    assert "1 epoch: better by 0.4" in finding and "10 epochs: worse by 0.4" in finding
    assert (
        "- better: T = 1, teacher fine-tuned for 1 epoch\n- worse: T = 1, teacher fine-tuned for 10 epochs\n"
        in teachers
    )


def test_stage_c_is_planned_with_the_teachers_of_its_epochs(study, monkeypatch, tmp_path: Path) -> None:
    """They are made once, by the recipe that lies there; a stage that only looks makes none."""
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text('{"instruction": "a", "output": "b"}\n')
    stage, folder, asked = study.run.study()["stages"]["C"], tmp_path / "runs", []

    def train(words: list[str], check: bool) -> None:
        asked.append(words)
        for step in (9, 18, 27, 90, 100, 110, 120, 130, 140, 150):  # not in the order of their names
            tiny_llama(seed=step).save_pretrained(folder / "teacher" / f"checkpoint-{step}")
        make_run(folder / "teacher")

    monkeypatch.setattr(study.run.subprocess, "run", train)
    assert len(list(study.run.stage_c(stage, tmp_path, folder, make=False))) == 1 and not asked
    depths, tuned = (part.runs for part in study.run.stage_c(stage, tmp_path, folder, make=True))
    assert [len(depths), len(tuned), len(asked)] == [12, 12, 1] and "teacher.yaml" in asked[0][4]
    models = [next(given for given in run.overrides if given.startswith("teacher.model=")) for run in tuned]
    assert {model.rpartition("-")[2].strip('"') for model in models} == {"9", "150"}
    assert len({run.id for run in [*depths, *tuned]}) == 24
    assert len(list(study.run.stage_c(stage, tmp_path, folder, make=True))) == 2 and len(asked) == 1
    first = study.run.checkpoints(folder / "teacher")
    assert [path.name for path in first[:3]] == ["checkpoint-9", "checkpoint-18", "checkpoint-27"]


def test_stage_b_is_planned_with_the_run_that_each_control_replays(study, tmp_path: Path) -> None:
    plant(study.run.RESULTS, [101, 102, 103])
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text('{"instruction": "a", "output": "b"}\n')
    stage = study.run.study()["stages"]["B"]
    control, rates, policies, controls = (part.runs for part in study.run.stage_b(stage, tmp_path, tmp_path / "runs"))
    assert [len(part) for part in (control, rates, policies, controls)] == [8, 8, 16, 16]
    seeds = [run.label.rpartition(" ")[2] for run in control]
    assert seeds == [str(seed) for seed in stage["control_seeds"]]
    dts = {run.label.rpartition(" ")[2]: str(run.path.resolve()) for run in policies if "=dts " in run.label}
    for run in controls:
        seed = run.label.rpartition(" ")[2]
        replayed = {other for other, path in dts.items() if any(path in given for given in run.overrides)}
        another = any("replay" in given and '"run"' in given for given in run.overrides)
        assert len(replayed) == 1 and (replayed != {seed}) == another, run.label


def test_every_recipe_of_the_study_loads() -> None:
    base = load_recipe(FOLDER / "recipe.yaml", [])
    assert base.data.train_share == 0.9 and base.training["max_steps"] == 40
    tuned = load_recipe(FOLDER / "teacher.yaml", [])
    assert tuned.teacher is None and tuned.training["save_strategy"] == "epoch"


def test_the_page_that_lies_here_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    assert importlib.import_module("write_page").main(["--check"]) == 0


def test_plans_are_balanced_and_every_run_differs(study, tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text('{"instruction": "a", "output": "b"}\n')
    stage: dict[str, Any] = study.run.study()["stages"]["A"]
    planned = study.run.planned(stage, tmp_path, tmp_path / "runs", stage["seeds"]).runs
    assert len(planned) == len({run.id for run in planned}) == 27
    assert [run.label.rpartition(" ")[2] for run in planned] == [
        str(seed) for seed in stage["seeds"] for _ in range(9)
    ]
    with pytest.raises(UserError, match=r"expected a folder with train\.jsonl"):
        study.run.overrides_of(tmp_path / "runs")
    assert not RunDirectory(planned[0].path).read_metrics()
