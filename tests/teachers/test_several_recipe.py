"""``teachers:`` of a recipe, from its check to the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.models.description import describe_model
from dts_hf.recipe.loading import load_recipe
from dts_hf.reporting.facts import describe_several, gather
from dts_hf.runs.directory import RunDirectory
from dts_hf.training.temperature_callback import TemperatureCallback
from tests.support.several_recipes import NAMES, SECTIONS, make_place, several, values_of_several, write_routed
from tests.support.tiny import tiny_llama


@pytest.fixture
def place(workplace: Path) -> Path:
    return make_place(workplace)


def test_a_run_names_every_teacher_in_log_card_report_and_record(place: Path) -> None:
    sections: dict[str, Any] = {"loss": {"temperature_per_teacher": True}, "output": {"report": True}}
    run = distill(several(**sections, training={"save_strategy": "steps", "save_steps": 2}))
    train = [line for line in run.read_log() if line["kind"] == "train"]
    assert train
    for line in train:
        for name in NAMES:
            keys = ("labels", "ce_loss", "kd_loss", "teacher_ce", "teacher_entropy", "temperature")
            assert {f"{key}/{name}" for key in keys} <= {*line}
    models = run.read_metrics()["models"]
    assert [*models] == ["teacher_math", "teacher_code", "student_before", "student"]
    assert models["teacher_math"]["parameters"] > models["teacher_code"]["parameters"]
    assert all(
        {*models[f"teacher_{name}"]["teacher_forced"]} == {"ce", "ece", "entropy", "n_tokens"} for name in NAMES
    )
    forced = [models[f"teacher_{name}"]["teacher_forced"]["n_tokens"] for name in NAMES]
    assert sum(forced) == models["student"]["teacher_forced"]["n_tokens"] and min(forced) > 0
    manifest = run.read_data_manifest()
    assert manifest["splits"]["train"]["teachers"] == {"math": 8, "code": 4}
    assert manifest["splits"]["validation"]["teachers"]["math"] > 0
    assert {"teachers.math", "teachers.code"} <= {*manifest["models"]} and "teacher" not in manifest["models"]
    card, report = (run.path / "README.md").read_text(), run.report_path.read_text()
    for text in (card, report):
        assert all(
            f"{name}" in text and "8 training rows" in text and "one for each teacher" in text for name in NAMES
        )
    facts = json.loads((run.final_path / "dts_hf.json").read_text())["distillation"]
    assert facts["teachers"] == ["math", "code"] and facts["temperature_per_teacher"] is True
    state = json.loads((run.path / "checkpoint-2" / "temperature.json").read_text())
    assert {*state["state"]} == {*NAMES}
    assert run.predictions_names() == ["teacher_code", "teacher_math", "student_before", "student"]


def test_weights_take_the_place_of_the_column(place: Path) -> None:
    sections = {name: {**SECTIONS[name], "weight": weight} for name, weight in zip(NAMES, (0.25, 0.75), strict=True)}
    run = distill(several(teachers=sections, data={"teacher_column": None}, evaluation={"models": ["student"]}))
    line = [line for line in run.read_log() if line["kind"] == "train"][-1]
    assert line["labels/math"] == line["labels/code"]
    assert line["kd_loss"] == pytest.approx(0.25 * line["kd_loss/math"] + 0.75 * line["kd_loss/code"], rel=1e-5)
    assert dict(describe_several(gather(run)))["teacher `code`"].count("weight 0.75") == 1


def test_each_row_is_answered_by_its_own_teacher(place: Path) -> None:
    data = {"responses": "teacher", "teacher_max_new_tokens": 6}
    run = distill(several(data=data, evaluation={"models": ["student"]}))
    answers = run.read_data_manifest()["teacher_answers"]
    assert {*answers} == {*NAMES} and answers["math"]["fingerprint"] != answers["code"]["fingerprint"]
    assert sum(one["answered"] for one in answers.values()) <= 17
    for name in NAMES:
        kept = place / "cache" / "teacher_answers" / f"{answers[name]['fingerprint']}.manifest.json"
        said_by = json.loads(kept.read_text())["identity"]["teacher"]
        model = AutoModelForCausalLM.from_pretrained(place / name)
        assert said_by["weights"] == describe_model(model, name)["weights"]


def test_the_recipe_of_the_page_trains(place: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "several_teachers.md").read_text()
    text, rows = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("yaml", "json"))
    for name, folder in (("small", "student"), ("math-teacher", "math"), ("code-teacher", "code")):
        text = text.replace(f"{{model: {name}", f"{{model: {folder}")
    first, second = (json.loads(line) for line in rows.splitlines())
    for name, row in (("math", first), ("code", second)):
        lines = [json.dumps({**row, "instruction": f"{row['instruction']} {k}"}) for k in range(30)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    (place / "several.yaml").write_text(text)
    quick = ["training.max_steps=2", "training.use_cpu=true", "evaluation.models=[]", "output.report=false"]
    run = distill(load_recipe(place / "several.yaml", quick))
    assert run.read_data_manifest()["splits"]["train"]["teachers"].keys() == {"math", "code"}
    weighted = (
        page.split("```yaml\n")[2].split("```")[0].replace("large-teacher", "math").replace("other-teacher", "code")
    )
    sections = yaml.safe_load(weighted)["teachers"]
    assert several(teachers=sections, data={"teacher_column": None}).teachers["other"].weight == 0.3


def state_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.final_path / "model.safetensors")


def test_broken_off_and_resumed_it_ends_bit_for_bit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "loss": {"temperature_per_teacher": True},
        "training": {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-2},
        "evaluation": {"models": ["student"], "every_steps": None},
    }
    straight = distill(several(**sections, output={"dir": "straight"}))
    on_step_end = TemperatureCallback.on_step_end

    def broken(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        on_step_end(self, args, state, *rest, **more)

    monkeypatch.setattr(TemperatureCallback, "on_step_end", broken)
    with pytest.raises(KeyboardInterrupt):
        distill(several(**sections))
    monkeypatch.setattr(TemperatureCallback, "on_step_end", on_step_end)
    resumed = distill(several(**sections), resume=True)
    one, other = state_of(straight), state_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)

    def logged(run: RunDirectory) -> list[dict[str, Any]]:
        lines = [line for line in run.read_log() if line["kind"] == "train"]
        return [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]

    assert logged(straight) == logged(resumed) and len(logged(resumed)) == 4


def test_a_resume_finds_that_one_of_the_teachers_has_changed(place: Path) -> None:
    sections: dict[str, Any] = {"training": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
    run = distill(several(**sections))
    run.metrics_path.unlink()
    tiny_llama(seed=77).save_pretrained("code")
    with pytest.raises(UserError, match=r"(?s)its models are not those.*teachers\.code\.") as refusal:
        distill(several(**sections), resume=True)
    assert "teachers.math" not in str(refusal.value)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"domain": "codes"}, r"data.train: extra.jsonl: row 'row-90': got 'codes'.*Did you mean 'code'"),
        ({"domain": None}, r"data.train: extra.jsonl: row 'row-90': no teacher in its column 'domain'"),
    ],
    ids=str,
)
def test_a_wrong_row_is_named_with_its_file_before_anything_is_written(place: Path, cells, said) -> None:
    write_routed(place / "extra.jsonl", 90, 1, **cells)
    with pytest.raises(UserError, match=said):
        distill(several(data={"train": ["train.jsonl", "extra.jsonl"]}))
    assert not (place / "run" / "recipe.yaml").exists()
    if cells["domain"] is None:
        run = distill(
            several(data={"train": ["train.jsonl", "extra.jsonl"], "default_teacher": "code"},
                    evaluation={"models": ["student"]}))  # fmt: skip
        assert run.read_data_manifest()["splits"]["train"]["teachers"] == {"math": 8, "code": 5}


def test_a_source_may_have_a_column_of_its_own(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    other = [{"topic": row.pop("domain"), **row, "id": f"o{k}"} for k, row in enumerate(rows)]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    sources = ["train.jsonl", {"source": "other.jsonl", "columns": {"teacher": "topic"}}]
    run = distill(several(data={"train": sources}, evaluation={"models": ["student"]}, training={"max_steps": 1}))
    assert run.read_data_manifest()["splits"]["train"]["teachers"] == {"math": 16, "code": 8}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"model": "math"}}, "teacher and teachers: got both"),
        ({"data": {"teacher_column": None}}, "expected a weight for each of math, code, or a column"),
        ({"teachers": {"m": {"model": "math", "weight": 0.5}}}, "got weights beside a column"),
        ({"teachers": {"m m": {"model": "math"}}}, "got the name 'm m'"),
        ({"teachers": {"m": {"modell": "math"}}}, "teachers.m.modell: unknown key"),
        ({"data": {"default_teacher": "cod"}}, "data.default_teacher: got 'cod', .*Did you mean 'code'"),
        ({"data": {"columns": {"teacher": "x"}}}, "data.teacher_column is the key for that"),
        ({"student": {"init": {"from": "teacher", "layers": 1}}}, "student.init: from teacher, but there are several"),
        ({"task": {"name": "glue", "subset": "rte"}}, "classifiers have one teacher"),
        ({"teachers": {**SECTIONS, "c": {"model": "code", "vocab_alignment": "intersect"}}}, "vocab_alignment differs"),
        ({"teachers": None}, "data.teacher_column: is for several teachers"),
        ({"teachers": {**SECTIONS, "c": {"model": "code", "kind": "cached"}}}, "teachers.c: .*the folder of the cache"),
        ({"teachers": {**SECTIONS, "c": {"model": "code", "kind": "remote"}}}, "teachers.c: .*address of the server"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_when_the_recipe_is_read(workplace, sections, said) -> None:
    with pytest.raises(UserError, match=said):
        several(**sections)


def test_weights_and_the_answers_of_teachers_do_not_go_together(workplace) -> None:
    sections = {name: {**SECTIONS[name], "weight": 0.5} for name in NAMES}
    with pytest.raises(UserError, match=r"data.responses: teacher, but every teacher has every row"):
        several(teachers=sections, data={"teacher_column": None, "responses": "teacher"})


def test_paths_are_relative_to_the_file_that_says_them_and_the_recipe_loads_again(place: Path) -> None:
    folder = place / "recipes"
    folder.mkdir()
    text = json.dumps(
        values_of_several(teachers={name: {"model": f"../{name}", "dtype": "float32"} for name in NAMES})
    )
    (folder / "several.yaml").write_text(text)
    loaded = load_recipe(folder / "several.yaml")
    assert loaded.teachers is not None
    assert {Path(section.model).resolve() for section in loaded.teachers.values()} == {place / name for name in NAMES}
    (place / "again.yaml").write_text(loaded.to_yaml())
    assert load_recipe(place / "again.yaml") == loaded
    assert loaded.with_teacher("code").all_teachers == {"teacher": loaded.all_teachers["teachers.code"]}
