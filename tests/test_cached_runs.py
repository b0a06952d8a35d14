"""``dts-hf cache-teacher``, then ``teacher.kind: cached``: the run of the live teacher, by recipe and command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import CacheOptions
from tests.support.cached import edit_manifest
from tests.support.cached_runs import CACHED, LIVE, QUICK, SGD, cache, invoke, log_of, quick
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def student(workplace):
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    return {"model": "student"}


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run.final_path).state_dict()


@pytest.mark.parametrize("data", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_cached_run_is_the_live_run(student, data):
    """By recipe; the teacher's folder is gone by then."""
    cache(student=student, data=data)
    scored = {"student": student, "data": data, "evaluation": {"rows": 1, "every_steps": None, "max_new_tokens": 1}}
    live = quick(folder="live", **scored)
    shutil.rmtree("teacher")
    cached = quick(CACHED, "cached", **scored)
    for key in ("loss", "kl", "temperature", "teacher_ce", "gap"):
        torch.testing.assert_close(log_of(cached, key), log_of(live, key), rtol=1e-5, atol=2e-6)
    ours, theirs = weights(cached), weights(live)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6
    entries = cached.read_metrics()["models"]
    assert {*entries} == {"student_before", "student"}  # a teacher that is not there is not scored
    assert entries["student"]["teacher_forced"]["kl"] == pytest.approx(
        live.read_metrics()["models"]["student"]["teacher_forced"]["kl"], rel=1e-4
    )


def test_a_student_that_is_cut_out_of_a_cached_teacher(workplace):
    cache()
    live, cached = quick(folder="live"), quick(CACHED, "cached")
    torch.testing.assert_close(log_of(cached, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)


def test_a_temperature_that_is_changed_after_writing(student):
    """T is no part of a cache: every T gives the live value."""
    cache(student=student)
    for number, t in enumerate((0.5, 3.0)):
        sections = {"student": student, "temperature": {"name": "constant", "value": t}}
        live, cached = quick(folder=f"live{number}", **sections), quick(CACHED, f"cached{number}", **sections)
        torch.testing.assert_close(log_of(cached, "kd_loss"), log_of(live, "kd_loss"), rtol=1e-5, atol=2e-6)


def test_missing_rows_are_an_error_or_answered(student, caplog):
    cache(student=student)
    write_rows(Path("train.jsonl"), 0, 14)
    with pytest.raises(UserError, match=r"train_dataset: 2 of 14 rows are not in the cache .*'row-12', 'row-13'"):
        distill(recipe(student=student, teacher=CACHED))
    live = quick(folder="live", student=student)
    filled = quick({**CACHED, "missing": "live"}, "filled", student=student)
    torch.testing.assert_close(log_of(filled, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)


def test_another_teacher_is_refused(student):
    cache(student=student)
    shutil.copytree("teacher", "other")
    with pytest.raises(
        UserError, match=r"teacher.cache: .* is of another teacher: model: 'teacher' in the cache, 'other'"
    ):
        distill(recipe(student=student, teacher={**CACHED, "model": "other"}))
    with pytest.raises(UserError, match="type of the weights: float32 in the cache, bfloat16 here"):
        distill(recipe(student=student, teacher={**CACHED, "dtype": "bfloat16"}))
    tiny_llama(seed=77, layers=4).save_pretrained("teacher")
    with pytest.raises(UserError, match=r"is of another teacher: weights: xxh3.*weight of the head"):
        distill(recipe(student=student, teacher={**CACHED, "missing": "live"}))


def test_another_teacher_in_the_same_folder_is_refused(student):
    """By its weights wherever it is loaded, else by its configuration; other weights alone nobody sees who loads none."""
    cache(student=student)
    cut = {"student": {"init": {"from": "teacher", "layers": 2}}, "teacher": CACHED}
    tiny_llama(seed=77, layers=4).save_pretrained("teacher")
    with pytest.raises(UserError, match="is of another teacher: weights: xxh3"):
        distill(recipe(**cut))
    tiny_llama(seed=77, layers=3).save_pretrained("teacher")
    with pytest.raises(UserError, match="is of another teacher: configuration: xxh3"):
        distill(recipe(student=student, teacher=CACHED))


def write_long_rows():
    """Of which an input is shortened to fit a limit."""
    rows = [{"id": f"row-{n}", "instruction": "Say yes", "input": "word " * 12, "output": "yes"} for n in range(4)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_another_length_limit_is_named(student):
    write_long_rows()
    cache(student=student)
    with pytest.raises(
        UserError, match=r"is in it with other tokens or labels \(it was made with .*max_prompt_length 64"
    ):
        distill(recipe(student=student, teacher=CACHED, data={"max_prompt_length": 40}))


@pytest.fixture
def killed(student):
    """The sections of a run of a cached teacher, of which checkpoint-3 is left as if it had been killed before its end."""
    sections = {
        "student": student,
        "teacher": CACHED,
        "training": {**SGD, "save_strategy": "steps", "save_steps": 3},
        "output": {"dir": "run", "report": False},
        **QUICK,
    }
    cache(student=student)
    distill(recipe(**sections))
    (Path("run") / "metrics.json").unlink()
    shutil.rmtree("run/final")
    shutil.rmtree("run/checkpoint-6")
    return sections


def test_a_resume_finds_another_cache(student, killed):
    cache(student=student, options=CacheOptions(dtype="bfloat16", overwrite=True))
    with pytest.raises(UserError, match="its models are not those that it was started with") as refused:
        distill(recipe(**killed), resume=True)
    assert 'teacher_states.cache.dtype: was "float32", now "bfloat16"' in str(refused.value)
    cache(student=student, options=CacheOptions(overwrite=True))
    assert distill(recipe(**killed), resume=True).read_metrics()["training"]["steps"] == 6


def test_a_resume_may_find_its_cache_in_another_folder(killed):
    Path("states").rename("moved")
    moved = recipe(**{**killed, "teacher": {**CACHED, "cache": "moved"}})
    assert distill(moved, resume=True).read_metrics()["training"]["steps"] == 6


def test_the_command(student):
    values = recipe(student=student)
    Path("recipe.yaml").write_text(values.to_yaml())
    done = invoke("cache-teacher", "recipe.yaml")
    assert done.exit_code == 2 and "--output: is missing" in done.output
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["rows"] == 17 and facts["dtype"] == "float32" and "17 rows" in done.stderr
    before = {path.name: path.stat().st_mtime_ns for path in Path("states").glob("states-*")}
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states")
    assert done.exit_code == 0 and "complete already" in done.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("states").glob("states-*")}
    done = invoke("cache-teacher", "recipe.yaml", "teacher.kind=cached", "teacher.cache=states", "--verify")
    assert done.exit_code == 0 and "whole, " in done.stdout
    edit_manifest(Path("states"), lambda manifest: manifest["identity"].update(logit_scale=1.01))
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states", "--verify")
    assert done.exit_code == 2 and "the self-test failed" in " ".join(done.output.split()), done.output
    edit_manifest(Path("states"), lambda manifest: manifest["identity"].update(logit_scale=1.0))
    shard = Path("states/states-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-40] + b"\0" * 40)
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states", "--verify")
    assert done.exit_code == 2 and "states-00000.safetensors: sha256" in done.output
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states", "--dtype", "int8")
    assert done.exit_code == 2 and "holds shards of another cache" in done.output
    done = invoke("cache-teacher", "recipe.yaml", "--output", "states", "--dtype", "int8", "--overwrite")
    assert (
        done.exit_code == 0 and invoke("cache-teacher", "recipe.yaml", "--output", "states", "--verify").exit_code == 0
    )


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"kind": "cached"}, "expected the folder of the cache as well"),
        ({"cache": "states"}, "cache: belongs to kind 'cached' or 'remote', got kind 'live'"),
        ({"missing": "live"}, "missing: belongs to kind 'cached'"),
        ({"kind": "cached", "cache": "states", "placement": "sharded"}, "need no backbone"),
        ({"kind": "casched", "cache": "states"}, "casched"),
    ],
)
def test_what_a_recipe_may_not_say(workplace, teacher, said):
    with pytest.raises(UserError, match=said):
        recipe(teacher={**LIVE, **teacher})


def test_a_sharded_teacher_is_not_cached(workplace):
    with pytest.raises(UserError, match=r"teacher.placement: sharded, but each process"):
        cache(teacher={**LIVE, "placement": "sharded"})


def test_answers_of_the_teacher_are_cached(workplace):
    cache(data={"responses": "teacher", "teacher_max_new_tokens": 6})
    data = {"responses": "teacher", "teacher_max_new_tokens": 6}
    live, cached = quick(folder="live", data=data), quick(CACHED, "cached", data=data)
    torch.testing.assert_close(log_of(cached, "loss"), log_of(live, "loss"), rtol=1e-5, atol=2e-6)
