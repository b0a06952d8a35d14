"""Advice on teachers of every kind: the numbers of the live one, or a refusal before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import is_torchao_available

from dts_hf.advice.advise import Advice, advise
from dts_hf.advice.rules import Verdict
from dts_hf.distill import task_of
from dts_hf.errors import UserError
from dts_hf.language_modeling.caching import CacheOptions, cache_teacher
from dts_hf.models import loading
from dts_hf.models.loading import load_tokenizers
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Teacher
from dts_hf.serving.serve import ServeOptions, load_served
from dts_hf.task import Models
from tests.support import advised
from tests.support.quantized import round_layers
from tests.support.served import running
from tests.support.tiny import tiny_llama, tiny_tokenizer

LIVE = {"model": "teacher", "dtype": "float32"}
OWN = {"student": {"model": "student"}}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained teacher, rows, and a student that is not cut out of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    advised.workplace()
    tiny_llama(seed=7).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    return tmp_path


def assert_same_advice(found: Advice, live: Advice) -> None:
    for name, one in live.found.values.items():
        assert found.found.values[name].value == pytest.approx(one.value, rel=1e-4, abs=1e-5), name
    assert found.found.situation == live.found.situation
    assert [one.verdict for one in found.judged] == [one.verdict for one in live.judged]
    assert [arm.values for arm in found.arms] == [arm.values for arm in live.arms]


@contextmanager
def elsewhere(kind: str, sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The section of a teacher whose states are in a cache, or come from a server."""
    if kind == "cached":
        cache_teacher(load_recipe(advised.recipe(**sections)), Path("states"))
        yield {**LIVE, "kind": "cached", "cache": "states"}
        return
    with running(load_served(Teacher(**LIVE), "chat", ServeOptions())) as url:
        yield {**LIVE, "kind": "remote", "url": url}


@pytest.mark.parametrize("kind", ["cached", "remote"])
@pytest.mark.parametrize("student", ["own", "cut"])
def test_a_teacher_elsewhere_gets_the_advice_of_the_live_one(kind: str, student: str) -> None:
    """Also where the student is cut out of it, whose weights are then loaded for that alone."""
    sections = OWN if student == "own" else {}
    live = advise(advised.recipe(**sections), rows=64)
    assert live.with_verdict(Verdict.FIRES) and live.found.situation.labels > 2000
    with elsewhere(kind, sections) as teacher:
        assert_same_advice(advise(advised.recipe(teacher=teacher, **sections), rows=64), live)


def test_a_student_that_is_trained_for_a_quantised_form_is_measured_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its first step, and its held-out scores, see it."""
    whole = advise(advised.recipe(**OWN), rows=200).found.values
    monkeypatch.setattr(loading, "prepare_for_quantization", lambda model, quantize, key: round_layers(model))
    rounded = {"student": {"model": "student", "quantize": {"scheme": "int8_weight_only"}}}
    path = advised.recipe(**rounded)
    found = advise(path, rows=200).found.values
    assert found["held_out_teacher_ce"] == whole["held_out_teacher_ce"]
    assert abs(found["held_out_kl"].value / whole["held_out_kl"].value - 1) > 1e-3
    loaded = load_recipe(path)
    task: Any = task_of(loaded)
    tokenizers = load_tokenizers(loaded)
    data, teacher = task.encode(task.load_rows(), tokenizers[0]), task.load_teacher()
    models = Models(task.load_student(teacher, 42), teacher, *tokenizers)
    scores = task.make_trainer(task.training_arguments("run"), models, data).evaluate()
    for ours, theirs in {"student_ce": "ce_loss", "kl": "kl", "agreement": "top1_agreement"}.items():
        assert found[f"held_out_{ours}"].value == pytest.approx(scores[f"eval_{theirs}"], rel=1e-3), scores


@pytest.mark.skipif(is_torchao_available(), reason="torchao is installed")
def test_without_torchao_a_quantised_student_is_refused() -> None:
    with pytest.raises(UserError, match="needs the package torchao"):
        advise(advised.recipe(student={"model": "student", "quantize": {"scheme": "int8_weight_only"}}), rows=4)


@pytest.mark.parametrize("kind", ["live", "cached", "remote"])
@pytest.mark.parametrize("alignment", ["overlap", "dual_space"])
def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_loaded(kind: str, alignment: str) -> None:
    more = {"cached": {"cache": "nowhere"}, "remote": {"url": "http://127.0.0.1:1"}}.get(kind, {})
    teacher = {**LIVE, "model": "nowhere", "kind": kind, "alignment": alignment, **more}
    with pytest.raises(UserError, match=rf"^teacher\.alignment: {alignment}, .*expected a teacher with the tokenizer"):
        advise(advised.recipe(teacher=teacher, **OWN), rows=4)


def test_a_compact_cache_is_refused_before_anything_is_measured() -> None:
    cache_teacher(load_recipe(advised.recipe(**OWN)), Path("kept"), CacheOptions(compact=256, forced=True))
    with pytest.raises(UserError, match=r"teacher\.cache: .*kept is compact and has lost the tail"):
        advise(advised.recipe(teacher={**LIVE, "kind": "cached", "cache": "kept"}, **OWN), rows=4)
