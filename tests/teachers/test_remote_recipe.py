"""A recipe whose teacher is behind an address: what it trains, what it writes, and what it must not write."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dts_hf.distill import distill
from dts_hf.errors import RunError, UserError
from dts_hf.language_modeling.caching import cache_teacher
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Teacher
from dts_hf.serving.serve import ServeOptions, load_served, serve_teacher
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.identity import differences
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.recipes import recipe
from tests.support.served import TOKEN, running, served_tiny
from tests.support.tiny import tiny_llama, tiny_tokenizer

LIVE = {"model": "teacher", "dtype": "float32"}
STUDENT = {"model": "student"}


@pytest.fixture
def place(workplace):
    tiny_llama(seed=3).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    return workplace


def test_a_recipe_with_a_remote_teacher_trains_as_with_a_local_one_and_keeps_no_token(place, monkeypatch) -> None:
    local = distill(recipe(student=STUDENT, teacher=LIVE, output={"dir": "local", "report": False}))
    monkeypatch.setenv("SOME_TEACHER_TOKEN", TOKEN)
    with running(load_served(Teacher(**LIVE), "chat", ServeOptions()), TOKEN) as url:
        teacher = {**LIVE, "kind": "remote", "url": url, "token_env": "SOME_TEACHER_TOKEN"}
        remote = distill(recipe(student=STUDENT, teacher=teacher, output={"dir": "remote"}))
    for a, b in zip(logs(local), logs(remote), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6) and b["temperature"] == pytest.approx(a["temperature"])
    assert not (remote.path / "predictions" / "teacher.jsonl").exists()
    for path in remote.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    kept = load_recipe(remote.path / "recipe.yaml").required_teacher
    assert (kept.url, kept.token_env) == (url, "SOME_TEACHER_TOKEN")


def logs(run):
    return [line for line in run.read_log() if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "remote"}, "expected the address of the server as well: url"),
        ({"url": "http://x:1"}, "url: belongs to kind 'remote', got kind 'live'"),
        (
            {"kind": "remote", "url": "http://x:1", "missing": "live"},
            "missing: belongs to kind 'cached', got kind 'remote'",
        ),
        ({"kind": "remote", "url": "http://x:1", "placement": "sharded"}, "kind 'remote' need no backbone"),
        ({"kind": "remote", "url": "http://x:1", "token_env": TOKEN}, "expected the name of an environment variable"),
        ({"kind": "remote", "url": f"http://user:{TOKEN}@x:1"}, "a URL with a user name, password or token in it"),
    ],
)
def test_what_does_not_fit_is_told_by_key_and_shows_no_token(section, words) -> None:
    with pytest.raises(UserError) as error:
        recipe(teacher={**LIVE, **section})
    assert words in str(error.value) and TOKEN not in str(error.value)


def test_the_command_serves_the_teacher_of_a_recipe_until_it_is_stopped(place) -> None:
    Path("recipe.yaml").write_text(
        recipe(student=STUDENT, teacher={**LIVE, "kind": "remote", "url": "http://x:1"}).to_yaml()
    )
    command = [sys.executable, "-m", "dts_hf", "serve-teacher", "recipe.yaml", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if "serving teacher (float32, H 32, V 320) at " in line:
                    break
            teacher = RemoteTeacher(line.rpartition(" at ")[2].strip(), tokenizer=tiny_tokenizer())
            assert teacher.description.identity.model == "teacher"
        finally:
            server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(20) == 75 and "Traceback" not in rest, rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "which other machines reach, without --token-env"),
        ({"token_env": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN is not set here"),
        ({"token_env": "SHORT_TOKEN"}, "has 5 characters, expected 16 at least"),
    ],
)
def test_a_server_is_not_opened_to_everybody(monkeypatch, options, words) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "abcde")
    with pytest.raises(UserError) as error:
        serve_teacher("no/model", ServeOptions(**options))
    assert words in str(error.value) and "abcde" not in str(error.value)


def test_a_server_of_another_teacher_is_refused_and_the_card_names_its_own(place) -> None:
    tiny_llama(seed=1, layers=3).save_pretrained("elsewhere")
    model = AutoModelForCausalLM.from_pretrained("elsewhere")
    with running(served_tiny(model)) as url:  # some/teacher in float32
        named = {**LIVE, "model": "some/teacher", "kind": "remote", "url": url}
        for change, words in (
            ({"model": "Qwen/Qwen3-8B"}, "model: 'some/teacher' at the server, 'Qwen/Qwen3-8B' here"),
            ({"dtype": "bfloat16"}, "type of the weights: float32 in the server, bfloat16 here"),
            ({"model": "teacher"}, "configuration: xxh3"),  # a folder, of four layers
        ):
            with pytest.raises(UserError, match="serves another teacher than the recipe's") as error:
                distill(recipe(student=STUDENT, teacher={**named, **change}, output={"dir": "refused"}))
            assert words in str(error.value)
        run = distill(recipe(student=STUDENT, teacher={**named, "model": "elsewhere"}, output={"dir": "run"}))
    card = run.card_path.read_text()
    assert "distilled with `dts_hf` from `some/teacher` in float32, on another machine" in card


def test_an_address_that_is_taken_is_a_sentence(place) -> None:
    with running(load_served(Teacher(**LIVE), "chat", ServeOptions())) as url, pytest.raises(RunError) as error:
        serve_teacher("teacher", ServeOptions(port=int(url.rsplit(":", 1)[1])))
    assert "cannot listen on 127.0.0.1, port " in str(error.value)


def test_what_a_server_answered_is_kept_in_a_cache_and_trains_without_it(place) -> None:
    """``cache-teacher`` of a recipe with an address: the same files as of the model here, its versions and kernel apart."""
    local = cache_teacher(recipe(student=STUDENT, teacher=LIVE), Path("local"))
    with running(load_served(Teacher(**LIVE), "chat", ServeOptions())) as url:
        kept = cache_teacher(recipe(student=STUDENT, teacher={**LIVE, "kind": "remote", "url": url}), Path("kept"))
    assert (kept.rows, kept.labels, kept.data) == (local.rows, local.labels, local.data)
    assert differences(kept.identity, local.identity) == []
    ours, theirs = StateCache("kept"), StateCache("local")
    for row in range(len(ours)):
        torch.testing.assert_close(ours.row(row), theirs.row(row), rtol=0, atol=1e-5)
    runs = [
        distill(recipe(student=STUDENT, teacher=section, output={"dir": name, "report": False}))
        for name, section in (("a", LIVE), ("b", {**LIVE, "kind": "cached", "cache": "kept"}))
    ]
    assert [line["loss"] for line in logs(runs[1])] == pytest.approx(
        [line["loss"] for line in logs(runs[0])], rel=1e-6
    )
