"""A recipe whose teacher has another tokenizer, from the file to the finished run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.doctor.report import screen
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import CacheOptions
from dts_hf.recipe.schema import Teacher
from dts_hf.runs.directory import RunDirectory
from dts_hf.serving.serve import ServeOptions, load_served
from dts_hf.teachers.cached.reader import StateCache
from tests.support.alignment import tokenizer_of
from tests.support.cached_runs import cache, invoke, log_of, quick
from tests.support.recipes import recipe
from tests.support.served import running
from tests.support.tiny import tiny_llama

TEACHER = {"model": "other", "dtype": "float32", "alignment": "overlap"}


@pytest.fixture
def two_families(workplace):
    """The student's folder is ``teacher``, which has the tokenizer of the tiny models; that of its teacher is ``other``."""
    tokenizer = tokenizer_of("byte_level", 900)
    tiny_llama(vocab=len(tokenizer), seed=3, layers=3).save_pretrained("other")
    tokenizer.save_pretrained("other")
    return workplace


def other(**sections):
    return recipe(**{"student": {"model": "teacher"}, "teacher": TEACHER, **sections})


def examined(found):
    Path("recipe.yaml").write_text(found.to_yaml())
    return diagnose("recipe.yaml")


def test_a_recipe_trains_and_scores_both(two_families, capsys):
    run = distill(other(evaluation={"every_steps": None}))
    assert isinstance(run, RunDirectory)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if "aligned_share" in line]
    assert train and all(0 < line["aligned_share"] < 1 and 0 < line["common_mass"] <= 1 for line in train)
    metrics = json.loads((run.path / "metrics.json").read_text())["models"]
    assert {"teacher", "student_before", "student"} <= {*metrics} and metrics["student"]["teacher_forced"][
        "n_tokens"
    ] > 0
    said = capsys.readouterr().err
    assert "train: " in said and "labels are the same for the teacher" in said
    manifest = json.loads((run.path / "data_manifest.json").read_text())
    assert manifest["splits"]["train"]["alignment"]["pairs"] > 0


def test_dual_space_from_a_recipe(two_families):
    """The maps train beside the student, and its folder has none of them; the doctor takes its steps with them."""
    asked = other(teacher={**TEACHER, "alignment": "dual_space"}, evaluation={"every_steps": None})
    run = distill(asked)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if "aligned_share" in line]
    assert train and all(line["projector_ce"] > 0 and line["kd_teacher_space"] > 0 for line in train)
    weights = load_file(run.final_path / "model.safetensors")
    assert {*weights} <= {*AutoModelForCausalLM.from_pretrained(run.final_path).state_dict()}
    assert not list(run.final_path.glob("projectors*"))
    found = examined(asked)
    assert {problem.code for problem in found.problems if problem.level == "error"} == {"teacher-untrained"}
    checks = {check.name: check for check in found.checks}
    assert "error" not in (checks["effect"].status, checks["steps"].status)


def test_the_doctor_shows_what_is_the_same(two_families):
    found = examined(other())
    codes = {problem.code for problem in found.problems if problem.level == "error"}
    assert codes == {"teacher-untrained"}  # random weights, and nothing about tokenizers, templates or ends
    checks = {check.name: check for check in found.checks}
    assert 0 < checks["alignment"].values["share"] < 1 and "the same for the teacher" in checks["alignment"].summary
    assert "tokens are in both" in checks["tokenizers"].summary and checks["tokenizers"].values["common"] > 100
    compared = checks["cross-entropy"].values
    assert 0 < compared["teacher_common_mass"] < 1 and 0 < compared["common_mass"] <= 1 and compared["labels"] > 0
    kinds = {segment.kind for row in found.picture for segment in row.segments}
    assert {"masked", "learned", "aligned", "end"} <= kinds
    assert "error" not in (checks["effect"].status, checks["steps"].status)
    shown = Console(width=120, record=True, force_terminal=True, file=io.StringIO())
    shown.print(screen(found))
    assert "underlined: the same for the teacher" in shown.export_text()


def test_the_doctor_refuses_a_teacher_of_which_nothing_is_the_same(two_families):
    rows = [{"id": f"r{k}", "instruction": "Say", "input": "", "output": "ŧ" * (1 + k % 3)} for k in range(12)]
    tokenizer = tokenizer_of("word_piece", 900)
    tiny_llama(vocab=len(tokenizer), seed=3).save_pretrained("other")
    tokenizer.save_pretrained("other")
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = examined(other())
    assert next(problem.code for problem in found.problems if problem.level == "error") == "nothing-aligned"


@pytest.mark.parametrize("alignment", ["overlap", "dual_space"])
def test_a_recipe_trains_from_a_cache_or_a_server_as_with_the_live_teacher(two_families, alignment):
    """One cache for both ways of comparing; of the teacher's folder its tokenizer is left."""
    live = {**TEACHER, "alignment": alignment}
    told = {"student": {"model": "teacher"}, "data": {"packing": True}}
    cache(teacher=TEACHER, **told)
    runs = [quick(live, "live", **told)]
    with running(load_served(Teacher(**TEACHER), "auto", ServeOptions())) as url:
        remote = {**live, "kind": "remote", "url": url, "cache": "kept"}
        runs.append(quick(remote, "remote", **told))
        cache("kept", teacher=remote, **told)
    tokenizer_of("byte_level", 900).save_pretrained("tokenizer")
    shutil.rmtree("other")
    for folder in ("states", "kept"):
        section = {**live, "kind": "cached", "cache": folder, "tokenizer": "tokenizer"}
        runs.append(quick(section, f"cached-{folder}", **told))
        Path("recipe.yaml").write_text(recipe(teacher=section, **told).to_yaml())
        verified = invoke("cache-teacher", "recipe.yaml", "--verify")
        assert verified.exit_code == 0, verified.output
    for run in runs[1:]:
        for key in ("loss", "kl", "temperature", "teacher_ce", "gap", "aligned_share"):
            torch.testing.assert_close(log_of(run, key), log_of(runs[0], key), rtol=1e-5, atol=2e-6)


def test_a_compact_cache_is_refused_before_anything_is_loaded(two_families):
    with pytest.raises(UserError, match=r"--compact: got 8 with teacher.alignment: overlap"):
        cache(student={"model": "teacher"}, teacher=TEACHER, options=CacheOptions(compact=8))


@pytest.mark.parametrize("kind", ["cached", "remote"])
def test_the_doctor_looks_at_states_from_elsewhere(two_families, kind):
    told = {"student": {"model": "teacher"}}
    live = examined(other())
    cache(teacher=TEACHER, **told)
    with running(load_served(Teacher(**TEACHER), "auto", ServeOptions())) as url:
        more = {"cache": "states"} if kind == "cached" else {"url": url}
        found = examined(other(teacher={**TEACHER, "kind": kind, **more}))
    checks, of_live = ({check.name: check for check in one.checks} for one in (found, live))
    assert (
        "nats per label" in checks["states"].summary if kind == "cached" else "from http" in checks["states"].summary
    )
    expected = {
        name: of_live["cross-entropy"].values[name] for name in ("teacher_common_mass", "labels", "teacher_ce")
    }
    assert {name: checks["cross-entropy"].values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "error" not in (checks["effect"].status, checks["steps"].status)
    manifest = StateCache("states").manifest
    assert of_live["states"].values["labels"] == manifest.labels
    if kind == "remote":  # of four rows, which all have the same answer
        assert checks["states"].values["labels"] == 4 * manifest.labels // manifest.rows


def test_without_alignment_the_tokenizers_must_be_one(two_families):
    with pytest.raises(UserError, match=r"different tokenizers.*teacher.alignment: overlap"):
        distill(other(teacher={"model": "other", "dtype": "float32"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {**TEACHER, "alignment": "overlop"}}, 'teacher.alignment: got "overlop"'),
        (
            {"teacher": {"kind": "self", "alignment": "overlap"}},
            "kind 'self', but a student that teaches itself has its own",
        ),
        ({"teacher": {**TEACHER, "vocab_alignment": "intersect"}}, "leave the latter out"),
        ({"data": {"responses": "teacher"}}, "teacher.alignment: overlap and data.responses: teacher"),
        ({"student": {"init": {"from": "teacher", "layers": 2}}}, "has the teacher's tokenizer"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything(two_families, sections, message):
    with pytest.raises(UserError, match=message):
        other(**sections)


def test_one_of_several_has_the_students_tokenizer(two_families):
    several = {name: {"model": "other", "weight": 0.5, "alignment": "overlap"} for name in ("a", "b")}
    with pytest.raises(UserError, match=r"teachers.a.alignment: overlap, but only a teacher that is alone"):
        other(teacher=None, teachers=several)
