"""``teachers:`` of which some are cached or behind an address: the runs of the teachers in memory, by recipe and command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.doctor.dry_run import dry_run
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import cache_teacher
from dts_hf.recipe.schema import Recipe
from dts_hf.reporting.facts import describe_several, gather
from dts_hf.runs.directory import RunDirectory
from dts_hf.teachers.cached.reader import StateCache
from tests.support.cached_runs import QUICK, SGD, invoke, log_of
from tests.support.served import running, served_tiny
from tests.support.several_recipes import NAMES, SECTIONS, make_place, several, write_routed
from tests.support.tiny import tiny_llama

CACHED = {name: {**SECTIONS[name], "kind": "cached", "cache": f"states/{name}"} for name in NAMES}
WEIGHTS = {"math": 0.25, "code": 0.75}


@pytest.fixture
def place(workplace: Path) -> Path:
    return make_place(workplace)


def weighted(sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**section, "weight": WEIGHTS[name]} for name, section in sections.items()}


def quick(folder: str, teachers: dict[str, Any], **sections: Any) -> RunDirectory:
    """A run without scores and figures."""
    output = {"dir": folder, "report": False}
    return distill(
        several(
            **{"training": {**SGD, "logging_steps": 1}, "teachers": teachers, "output": output, **QUICK, **sections}
        )
    )


def write(recipe: Recipe, path: str = "recipe.yaml") -> str:
    Path(path).write_text(recipe.to_yaml())
    return path


def assert_same(one: RunDirectory, other: RunDirectory) -> None:
    for key in ("loss", "kl", "temperature", "teacher_ce", "gap"):
        torch.testing.assert_close(log_of(one, key), log_of(other, key), rtol=1e-5, atol=2e-6)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run.final_path).state_dict() for run in (one, other))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6


@pytest.mark.parametrize("way", ["routed", "weighted"])
def test_a_run_of_two_caches_is_the_run_of_the_two_teachers(place, way):
    """``cache-teacher`` without more caches each; the folders of the teachers are gone by then."""
    live, cached, data = SECTIONS, CACHED, {}
    if way == "weighted":
        live, cached, data = weighted(SECTIONS), weighted(CACHED), {"teacher_column": None}
    done = invoke("cache-teacher", write(several(teachers=cached, data=data)), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["teachers"]
    rows = dict.fromkeys(NAMES, 17) if way == "weighted" else {"math": 11, "code": 6}
    assert {name: facts["rows"] for name, facts in found.items()} == rows
    expected = quick("live", live, data=data)
    for name in NAMES:
        shutil.rmtree(name)
    run = quick("cached", cached, data=data)
    assert_same(run, expected)
    models = run.read_data_manifest()["models"]
    assert {"teachers.math_states", "teachers.code_states"} <= {*models} and "teachers.math" not in models
    said = dict(describe_several(gather(run)))
    assert "out of a cache" in said["teacher `math`"]


def test_one_teacher_is_cached_and_the_other_is_scored(place):
    cache_teacher(several(), Path("states/code"), None, "code")
    teachers = {"math": SECTIONS["math"], "code": CACHED["code"]}
    run = distill(several(teachers=teachers, evaluation={"rows": 1, "every_steps": None, "max_new_tokens": 1}))
    assert {*run.read_metrics()["models"]} == {"teacher_math", "student_before", "student"}
    forced = run.read_metrics()["models"]["teacher_math"]["teacher_forced"]
    assert forced["n_tokens"] > 0


def test_one_is_behind_an_address_and_the_other_cached(place):
    cache_teacher(several(), Path("states/code"), None, "code")
    expected = quick("live", SECTIONS)
    model = AutoModelForCausalLM.from_pretrained("math").eval()
    with running(served_tiny(model)) as url:
        section = {**SECTIONS["math"], "kind": "remote", "url": url}
        with pytest.raises(
            UserError, match=r"teachers\.math\.url: .* serves another teacher than the recipe's: dtype|type"
        ):
            quick("wrong", {"math": {**section, "dtype": "bfloat16"}, "code": CACHED["code"]})
        run = quick("far", {"math": section, "code": CACHED["code"]})
    assert_same(run, expected)


def test_missing_rows_are_an_error_of_that_teacher_or_answered_by_it(place):
    for name in NAMES:
        cache_teacher(several(), Path(f"states/{name}"), None, name)
    write_routed(Path("train.jsonl"), 0, 14)
    with pytest.raises(
        UserError, match=r"teachers\.math: train_dataset: 1 of 9 rows are not in the cache .*'row-13'"
    ) as no:
        quick("run", CACHED)
    assert "teachers.math.missing: live" in str(no.value)
    expected = quick("live", SECTIONS)
    filled = quick("filled", {name: {**section, "missing": "live"} for name, section in CACHED.items()})
    assert_same(filled, expected)


def test_another_teacher_is_refused_by_its_name(place):
    for name in NAMES:
        cache_teacher(several(), Path(f"states/{name}"), None, name)
    crossed = {**CACHED, "code": {**CACHED["code"], "cache": "states/math"}}
    with pytest.raises(
        UserError, match=r"^teachers\.code\.cache: .*math is of another teacher: model: 'math' in the cache"
    ):
        quick("run", crossed)
    tiny_llama(seed=77, layers=2).save_pretrained("code")
    live = {**CACHED, "code": {**CACHED["code"], "missing": "live"}}
    with pytest.raises(UserError, match=r"^teachers\.code\.cache: .* is of another teacher: weights: xxh3"):
        quick("run", live)


def test_answers_of_each_rows_own_teacher_are_cached(place):
    data = {"responses": "teacher", "teacher_max_new_tokens": 6}
    done = invoke("cache-teacher", write(several(teachers=CACHED, data=data)))
    assert done.exit_code == 0, done.output
    assert_same(quick("cached", CACHED, data=data), quick("live", SECTIONS, data=data))


def test_a_resume_finds_that_one_of_the_caches_is_another(place):
    for name in NAMES:
        cache_teacher(several(), Path(f"states/{name}"), None, name)
    sections = {"training": {**SGD, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}, "teachers": CACHED,
                "output": {"dir": "run", "report": False}, **QUICK}  # fmt: skip
    straight = quick("straight", CACHED, training={**SGD, "logging_steps": 1})
    run = distill(several(**sections))
    run.metrics_path.unlink()
    shutil.rmtree("run/final")
    shutil.rmtree("run/checkpoint-6")
    Path("states/math").rename("moved")
    moved = {**sections, "teachers": {**CACHED, "math": {**CACHED["math"], "cache": "moved"}}}
    code = Path("states/code")
    code.rename("kept")
    tiny_llama(seed=7, layers=2).save_pretrained("code")
    cache_teacher(several(), code, None, "code")
    with pytest.raises(
        UserError, match=r"(?s)its models are not those.*teachers\.code_states\.cached_teacher\.weights"
    ) as no:
        distill(several(**moved), resume=True)
    assert "teachers.math" not in str(no.value)
    shutil.rmtree(code)
    Path("kept").rename(code)
    assert_same(distill(several(**moved), resume=True), straight)


def test_what_the_command_caches_and_what_it_refuses(place):
    path = write(several())
    done = invoke("cache-teacher", path)
    assert done.exit_code == 2 and "in which each teacher has one of its own (or teachers.NAME.cache" in " ".join(
        done.output.split()
    )
    done = invoke("cache-teacher", path, "--output", "states", "--teacher", "maths")
    assert done.exit_code == 2 and "got 'maths', expected one of math, code. Did you mean 'math'" in " ".join(
        done.output.split()
    )
    done = invoke("cache-teacher", path, "--output", "only", "--teacher", "code")
    assert done.exit_code == 0 and StateCache("only").manifest.rows == 6
    done = invoke("cache-teacher", path, "--output", "states")
    assert done.exit_code == 0 and [StateCache(f"states/{name}").manifest.rows for name in NAMES] == [11, 6]
    done = invoke("cache-teacher", path, "--output", "states", "--verify")
    assert done.exit_code == 0 and done.stdout.count("whole, ") == 2
    shard = Path("states/code/states-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-40] + b"\0" * 40)
    done = invoke("cache-teacher", path, "--output", "states", "--verify")
    assert done.exit_code == 2 and "teachers.code: " in done.output and "sha256" in done.output
    write_routed(Path("train.jsonl"), 0, 3, domain="cod")
    done = invoke("cache-teacher", path, "--output", "none", "--teacher", "math")
    assert done.exit_code == 2 and "got 'cod' in the column 'domain'" in " ".join(done.output.split())
    write_routed(Path("train.jsonl"), 0, 3, domain="math")
    write_routed(Path("valid.jsonl"), 50, 3, domain="math")
    done = invoke("cache-teacher", path, "--output", "none", "--teacher", "code")
    assert done.exit_code == 2 and "teachers.code: no row has the teacher code in its column 'domain'" in " ".join(
        done.output.split()
    )


def test_two_names_of_one_cache_are_one_teacher(place):
    same = dict.fromkeys(NAMES, CACHED["math"])
    done = invoke("cache-teacher", write(several(teachers=same)))
    assert done.exit_code == 0 and StateCache("states/math").manifest.rows == 17
    assert_same(quick("cached", same), quick("live", dict.fromkeys(NAMES, SECTIONS["math"])))
    apart = {"math": CACHED["math"], "code": {**CACHED["math"], "missing": "live"}}
    done = invoke("cache-teacher", write(several(teachers=apart)))
    assert done.exit_code == 2 and "math and code are of different sections and have the same cache" in " ".join(
        done.output.split()
    )


def test_doctor_looks_at_each_cache_and_a_dry_run_says_where_states_come_from(place):
    for name in NAMES:
        cache_teacher(several(), Path(f"states/{name}"), None, name)
    path = Path(write(several(teachers=CACHED)))
    diagnosis = diagnose(path)
    problems = [problem.text for problem in diagnosis.problems if problem.level == "error"]
    assert all("it knows nothing of these rows" in text for text in problems), problems  # they are untrained
    assert [diagnosis[f"states/{name}"].values["rows"] for name in NAMES] == [11, 6]
    assert all(entry["teacher"] == 0 for entry in diagnosis.memory)
    parts = dry_run(several(teachers={"math": SECTIONS["math"], "code": CACHED["code"]})).plan["parts"]
    assert "load teacher and student" in parts and "teachers.code's states come out of states/code" in parts
