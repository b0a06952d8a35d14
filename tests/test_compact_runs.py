"""``dts-hf cache-teacher --compact K``, then ``teacher.kind: cached``, by recipe and command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.language_modeling import caching
from dts_hf.language_modeling.caching import CacheOptions, cache_teacher
from dts_hf.recipe.loading import load_recipe
from tests.support.cached_runs import CACHED, cache, invoke, log_of, quick
from tests.support.examined import recipe as examined
from tests.support.examined import texts
from tests.support.recipes import recipe
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer

COOL = {"name": "constant", "value": 0.3}


@pytest.fixture
def student(workplace):
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    return {"model": "student"}


@pytest.mark.parametrize(
    "data", [pytest.param({}, marks=pytest.mark.soak), {"packing": True}], ids=["padded", "packed"]
)
def test_with_every_token_kept_a_run_is_the_live_run(student, data):
    sections = {"student": student, "data": data}
    cache(**sections, options=CacheOptions("float32", compact=TINY_VOCAB))
    live, cached = quick(folder="live", **sections), quick(CACHED, "cached", **sections)
    for key in ("loss", "kl", "temperature", "teacher_ce", "teacher_entropy", "gap"):
        torch.testing.assert_close(log_of(cached, key), log_of(live, key), rtol=1e-5, atol=2e-6)


def test_what_the_label_gives_is_exact_and_the_rest_near(student):
    """64 of 320 tokens at T = 0.3: the teacher's cross-entropy and entropy are its own, and the soft loss is close."""
    cache(student=student, temperature=COOL, options=CacheOptions("float32", compact=64))
    sections = {"student": student, "temperature": COOL}
    live, cached = quick(folder="live", **sections), quick(CACHED, "cached", **sections)
    for key in ("teacher_ce", "teacher_entropy", "teacher_entropy_at_t"):
        torch.testing.assert_close(log_of(cached, key)[:1], log_of(live, key)[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_of(cached, "kd_loss"), log_of(live, "kd_loss"), rtol=0.05, atol=1e-3)


def test_the_temperatures_of_the_recipe_decide(student):
    """The same K is enough for a cool teacher and too little for a warm one; nothing is written then."""
    compact = CacheOptions(compact=64)
    with pytest.raises(UserError, match=r"at T = 3, .* It would take \d+ tokens .* states, exact"):
        cache(student=student, options=compact)
    assert not list(Path("states").glob("*.safetensors"))
    manifest = cache(student=student, temperature=COOL, options=compact)
    assert [error["temperature"] for error in manifest.compact["errors"]] == [0.3]
    with pytest.raises(UserError, match=r"at T = 3, .*--compact K"):
        quick(CACHED, student=student)
    quick(CACHED, student=student, temperature=COOL)


def test_what_cannot_be_served_is_refused_before_anything_is_written(student):
    for sections in ({"temperature": {"name": "taid"}}, {"loss": {"divergence": {"name": "logit_mse"}}}):
        with pytest.raises(UserError, match="with a compact teacher cache"):
            cache(student=student, options=CacheOptions(compact=64), **sections)
    assert not list(Path("states").glob("*.safetensors"))


def test_the_command(student, caplog):
    Path("recipe.yaml").write_text(recipe(student=student).to_yaml())
    to = ("cache-teacher", "recipe.yaml", "--output", "states")
    done = invoke(*to, "--compact", 16)
    assert done.exit_code == 2 and "expected 0.95 at least" in done.output and "--force" in done.output
    done = invoke(*to, "--compact", 16, "--force", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["compact"]
    assert facts["forced"] and facts["top_k"] == 16 and {1.0, 3.0} < {e["temperature"] for e in facts["errors"]}
    assert all(said in done.stderr for said in ("16 of 320 tokens and the tail", "mass 0.", "16 logits (float16)"))
    assert invoke(*to, "--verify").exit_code == 0
    run = invoke("train", "recipe.yaml", "teacher.kind=cached", "teacher.cache=states", "training.max_steps=2",
                 "output.report=false", "evaluation.models=[]")  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "(forced)" in caplog.text
    for words, said in (
        (("--compact", 17), "another cache"),
        (("--compact", 400), "from 1 to the vocabulary of 320"),
        (("--compact", 16, "--dtype", "int8"), "got 'int8' for a compact cache"),
        (("--force",), "--force: belongs to --compact"),
    ):
        done = invoke(*to, *words, "temperature.name=constant", "temperature.value=0.1")
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output


def test_the_doctor_says_what_is_kept_and_runs_the_loss_on_it(workplace):
    cool = examined(temperature=COOL)
    cache_teacher(load_recipe(cool), Path("states"), CacheOptions(compact=64))
    teacher = {"model": "teacher", "dtype": "float32", "kind": "cached", "cache": "states"}
    diagnosis = diagnose(examined(temperature=COOL, teacher=teacher))
    assert "64 of 320 logits a label" in diagnosis["states"].summary and "T 0.3 mass" in diagnosis["states"].summary
    assert diagnosis["steps"].status == diagnosis["effect"].status == "ok", texts(diagnosis)
    warm = {"name": "constant", "value": 4.0}
    said = texts(diagnose(examined(temperature=warm, teacher=teacher)))
    assert "at T = 4" in said and "--compact K" in said


def test_rows_are_measured_from_the_first_to_the_last(student, monkeypatch):
    """Also where there are fewer than are wanted."""
    seen = []
    own = caching.pilot
    monkeypatch.setattr(caching, "pilot", lambda live, rows, *more: own(live, seen.extend(rows) or seen, *more))
    manifest = cache(student=student, temperature=COOL, options=CacheOptions(compact=64))
    assert len(seen) == manifest.rows and manifest.compact["errors"][0]["labels"] == manifest.labels
