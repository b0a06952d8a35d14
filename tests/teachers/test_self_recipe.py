"""``teacher.kind: self`` and ``data.teacher_prefix_column`` of a recipe, from its check to the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dts_hf.distill import distill
from dts_hf.doctor.diagnosis import Diagnosis
from dts_hf.doctor.language_modeling import LanguageModelWalk
from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import cache_teacher
from dts_hf.recipe.schema import EMA_RATE, Recipe
from dts_hf.reporting.facts import describe_teacher, gather
from dts_hf.reporting.model_card import models_of
from dts_hf.runs.directory import RunDirectory
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.training.memory_estimate import estimate_memory
from dts_hf.training.model_shape import shapes_from_configs
from dts_hf.training.workload import Workload, launched_plan, plans
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer

LORA = {"r": 4, "alpha": 8}


@pytest.fixture
def place(workplace: Path) -> Path:
    tiny_llama(seed=5).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    for name, count in (("train", 12), ("valid", 4)):
        rows = [
            {"id": f"{name}{i}", "instruction": f"Name it {i}", "input": "", "output": "apples and pears",
             "proof": "" if i % 4 == 0 else f"They are apples {i}"} for i in range(count)
        ]  # fmt: skip
        (workplace / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workplace


def values(**sections: Any) -> dict[str, Any]:
    base = recipe(student={"model": "student"}).model_dump(mode="json", exclude_unset=True)
    base["teacher"], base["output"] = {"kind": "self"}, {**base["output"], "report": False}
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if section is not None else None
    return base


def taught_by_itself(**sections: Any) -> Recipe:
    return Recipe.from_dict(values(**sections))


def test_defaults_are_those_of_python(workplace):
    section, spec = taught_by_itself().teacher, SelfTeacher()
    assert section is not None
    assert (section.weights, section.ema_rate, section.ema_every) == (spec.weights, spec.ema_rate, spec.ema_every)
    assert EMA_RATE == 0.05  # the weight of the new weights
    description = type(section).model_fields["ema_rate"].description
    assert description is not None and "NEW" in description


def test_it_has_the_students_type_and_its_mean_float32(workplace):
    for student, teacher, dtype in (
        ({}, {}, "float32"),
        ({"dtype": "bfloat16"}, {}, "bfloat16"),
        ({"dtype": "bfloat16"}, {"weights": "ema"}, "float32"),
        ({"dtype": "bfloat16", "lora": LORA}, {"weights": "ema"}, "bfloat16"),
        ({}, {"dtype": "bfloat16"}, "bfloat16"),
    ):
        one = taught_by_itself(student=student, teacher=teacher)
        assert one.teacher is not None and one.teacher.dtype == dtype
        assert Recipe.from_dict(one.model_dump(mode="json")) == one  # what a run directory keeps loads again


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"model": "other"}}, 'model: got "other"'),
        ({"teacher": {"ema_rate": 0.5}}, "ema_rate"),
        ({"teacher": {"weights": "ema", "ema_rate": 0.0}}, "ema_rate"),
        ({"teacher": {"weights": "ema", "ema_every": 0}}, "ema_every"),
        ({"teacher": {"weights": "now"}}, "weights"),
        ({"teacher": {"quantization": "int8"}}, "quantization: got 'int8'"),
        ({"teacher": {"placement": "sharded"}}, "placement: got 'sharded'"),
        ({"teacher": {"revision": "main"}}, "revision"),
        ({"teacher": {"weights": "ema", "dtype": "bfloat16"}}, "expected float32"),
        ({"teacher": {"dtype": "bfloat16"}, "student": {"lora": LORA}}, "teacher.dtype"),
        ({"teacher": {"cache": "folder"}}, "belongs to kind 'cached'"),
        ({"teacher": {"kind": "live", "model": "m", "weights": "ema"}}, "belongs to kind 'self'"),
        ({"data": {"responses": "teacher"}}, "data.responses: teacher"),
        ({"student": {"model": None, "init": {"from": "teacher", "layers": 1}}}, "student.init: from teacher"),
        ({"task": {"name": "glue", "subset": "sst2"}}, "teacher.kind: self"),
        ({"teacher": None, "teachers": {"a": {"kind": "self", "weight": 1.0}}}, "teachers.a.kind: self"),
        ({"data": {"teacher_prefix_column": "proof", "columns": {"teacher_prefix": "x"}}}, "data.columns"),
        (
            {"data": {"teacher_prefix_column": "proof"}, "teacher": {"kind": "cached", "model": "m", "cache": "c"}},
            "cached",
        ),
        ({"data": {"teacher_prefix_column": "proof"}, "teacher": None, "loss": {"kd_ratio": 0.0}}, "no teacher"),
        (
            {"data": {"train": {"source": "t.jsonl", "columns": {"teacher_prefix": "x"}}}},
            "without data.teacher_prefix_column",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_when_the_recipe_is_read(workplace, sections, said):
    made = values(**sections)
    if sections.get("teacher", {}) and sections["teacher"].get("kind", "self") != "self":
        made["teacher"] = sections["teacher"]
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(made)
    assert said in str(caught.value)


def test_it_is_neither_cached_nor_served(workplace):
    with pytest.raises(UserError, match=r"teacher\.kind: self has no states to cache"):
        cache_teacher(taught_by_itself(), workplace / "cache")


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_tells_what_taught_it(place, capfd, lora):
    asked = taught_by_itself(
        student={"lora": lora}, teacher={"weights": "ema", "ema_rate": 0.1}, data={"teacher_prefix_column": "proof"},
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"},
    )  # fmt: skip
    run = distill(asked)
    said = " ".join(capfd.readouterr().err.split())
    assert (
        "with a running mean of its weights (rate 0.1 every step)" in said
        and "the teacher reads a text before 9" in said
    )
    facts = gather(run)
    assert describe_teacher(facts) == (
        "itself, with a running mean of its weights (the new ones count 0.1 at every step), which also reads the text of "
        "column `proof`"
    )
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert {*metrics["models"]} == {"student_before", "student"}  # nobody is scored twice
    assert [name for name, _ in models_of(facts.recipe)] == ["./student"]
    manifest = RunDirectory(run.path).read_data_manifest()
    assert manifest["splits"]["train"]["prefixed"] == 9 and "teacher" not in manifest["models"]
    ends = {name: load_file(run.path / "checkpoint-4" / name) for name in ("ema.safetensors",)}
    output = asked.output.model_copy(update={"dir": "again"})
    training = {**asked.training, "resume_from_checkpoint": str(run.path / "checkpoint-2")}
    resumed = distill(asked.model_copy(update={"output": output, "training": training}))
    again = load_file(resumed.path / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(again[name], value) for name, value in ends["ema.safetensors"].items())


@pytest.mark.parametrize(
    "teacher", [{"weights": "base"}, {"weights": "ema", "ema_rate": 0.1}, {"kind": "live"}], ids=str
)
def test_text_of_its_own_is_judged_with_what_the_teacher_alone_reads(place, teacher):
    """SDFT and OPSD from a recipe, to the run directory and on from a checkpoint."""
    made = values(
        student={"lora": LORA}, data={"teacher_prefix_column": "proof", "on_policy": {"fraction": 0.6, "max_new_tokens": 5}},
        training={"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "eval_strategy": "epoch"},
    )  # fmt: skip
    made["loss"] = {"kd_ratio": 1.0}
    made["teacher"] |= teacher
    if teacher.get("kind") == "live":
        made["teacher"] = {"kind": "live", "model": "student", "dtype": "float32"}
    run = distill(Recipe.from_dict(made))
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    shares = [line["generated_share"] for line in log if "generated_share" in line]
    assert {*shares} == {0.0, 1.0}, "steps of both kinds"
    assert all(line["generated_kl"] > 1e-5 for line in log if line.get("generated_share") == 1.0)
    made["output"] |= {"dir": "again"}
    made["training"] |= {"resume_from_checkpoint": str(run.path / "checkpoint-3")}
    again = distill(Recipe.from_dict(made))
    ends = [load_file(one.path / "checkpoint-6" / "adapter_model.safetensors") for one in (run, again)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_an_earlier_checkpoint_teaches_as_a_live_teacher(place):
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = distill(taught_by_itself(training=training))
    live = {"kind": "live", "model": str(first.path / "checkpoint-2"), "dtype": "float32"}
    made = values(output={"dir": "second"}, training={"max_steps": 1})
    made["teacher"] = live
    assert (distill(Recipe.from_dict(made)).path / "final").is_dir()


def test_the_estimate_counts_what_there_is(place):
    work = Workload(rows=2, tokens=64, labelled=64, teacher_dtype="float32", device="cpu")
    full, adapter = taught_by_itself(), taught_by_itself(student={"lora": LORA})
    shapes = shapes_from_configs(full)
    assert shapes is not None and shapes[1] == shapes[0]
    copied = estimate_memory(*shapes, work, launched_plan(full, 1))
    assert copied.teacher == 4 * shapes[0].parameters
    shared = estimate_memory(*shapes, work, launched_plan(adapter, 1))
    assert shared.teacher == 0
    mean = Workload(rows=2, tokens=64, labelled=64, device="cpu", lora_parameters=1000, running_mean=4000.0)
    assert estimate_memory(*shapes, mean, launched_plan(adapter, 1)).teacher == 4000
    assert {plan.strategy for plan in plans(2, launched_plan(adapter, 2))} == {"ddp", "zero2"}


@pytest.mark.parametrize("prefix", [None, "proof"])
def test_the_doctor_shows_both_sides_and_finds_nothing_wrong(place, tmp_path, prefix):
    diagnosis = Diagnosis("recipe.yaml")
    asked = taught_by_itself(student={"lora": LORA}, data={"teacher_prefix_column": prefix})
    LanguageModelWalk(diagnosis, asked, tmp_path, None).walk()
    failed = {check.name for check in diagnosis.checks if check.status == "error"}
    assert failed <= {"cross-entropy"}  # its weights are random, which the doctor says
    texts = {row.id: "".join(segment.text for segment in row.segments) for row in diagnosis.picture}
    of_teacher = [name for name in texts if name.endswith(", for the teacher")]
    assert bool(of_teacher) == (prefix is not None)
    for name in of_teacher:
        own = texts[name.removesuffix(", for the teacher")]
        assert len(texts[name]) >= len(own) and "They are" not in own
    assert prefix is None or any("They are apples" in texts[name] for name in of_teacher)
    effect = diagnosis["effect"]
    assert (effect.status == "skipped") == (prefix is None)
