"""Access tokens of well-known services: refused in recipes by key and line, masked wherever a person or a file reads on."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.console import KINDS_OF_SECRETS, guarded_logs, masked, say, secrets_in, show
from dts_hf.errors import Interrupted, RunError, UserError
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.environment import environment
from tests.support.tokens import FAKE_TOKENS, NO_TOKENS, PLANTED

RECIPE = """\
# A comment with a word of the key: run_name
student: {init: {from: teacher, layers: 1}}
teacher: {model: some/teacher}
data: {train: rows.jsonl}
training:
  seed: 1
  run_name: TOKEN
output: {dir: runs/x}
"""
EXAMPLES = [(kind, token) for kind, tokens in FAKE_TOKENS.items() for token in tokens]


def test_every_kind_is_known_and_masked() -> None:
    assert FAKE_TOKENS.keys() == KINDS_OF_SECRETS.keys()
    for kind, token in EXAMPLES:
        for text in (f"one\ntwo {token} three", f"one\n'{token}' three", f"one\nx={token}\t three"):
            assert list(secrets_in(text)) == [(2, kind)], (kind, text)
            assert token not in masked(text) and masked(text).endswith(" three"), (kind, masked(text))
            assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize("text", NO_TOKENS)
def test_plain_words_are_no_secrets(text: str) -> None:
    assert not list(secrets_in(text)) and masked(text) == text
    assert load_from(text).training["run_name"] == text


def test_a_password_may_hold_an_at_sign_and_a_fragment_a_token() -> None:
    assert masked("https://user:p@ss@host/x") == "https://***@host/x"
    assert "abc" not in masked("http://x#access_token=abc")


def test_keys_of_the_environment_are_known_by_the_names_of_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "an-odd-value-1234567")
    monkeypatch.setenv("MY_TOKEN", "disabled-by-default")
    assert masked("x an-odd-value-1234567 disabled-by-default") == "x *** disabled-by-default"


@pytest.mark.parametrize(
    "piece", ["sk-proj-", "glpat-", "xoxb-", "sk_live_", "hf_", "eyJ", "tskey-a-", "hvs.", "://a", "A_KEY="]
)
def test_a_text_that_nearly_holds_tokens_takes_no_time(piece: str) -> None:
    """It took the square of its length: ten seconds for what takes a hundredth of one."""
    began = time.process_time()
    masked(piece * (60_000 // len(piece)))
    assert time.process_time() - began < 3


def test_a_vocabulary_is_no_secret(tmp_path: Path) -> None:
    """Pieces of every token are in it, as a tokenizer trained on code has them."""
    pieces = [token[:length] for _, token in EXAMPLES for length in range(2, 14)]
    text = json.dumps({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, indent=1)
    assert not list(secrets_in(text, urls=False))


def load_from(value: str) -> Recipe:
    values = {
        "student": {"init": {"from": "teacher", "layers": 1}},
        "teacher": {"model": "some/teacher"},
        "data": {"train": "rows.jsonl"},
        "training": {"run_name": value},
        "output": {"dir": "runs/x"},
    }
    return Recipe.from_dict(values)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_recipe_with_a_token_is_refused_by_key_and_line(kind: str, tmp_path: Path) -> None:
    path, token = tmp_path / "recipe.yaml", PLANTED[kind]
    path.write_text(RECIPE.replace("TOKEN", json.dumps(token)))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: line 7: training.run_name: holds "), text
    assert token not in text and "\n" not in text
    # The same from the command line, where there is no line; and as a key
    path.write_text(RECIPE.replace("TOKEN", "x"))
    with pytest.raises(UserError, match=r"command line: training.run_name: holds ") as caught:
        load_recipe(path, [f"training.run_name={json.dumps(token)}"])
    assert token not in str(caught.value)
    values = {"training": {"lr_scheduler_kwargs": {token: 1}}}
    with pytest.raises(UserError, match=r"a key holds ") as caught:
        Recipe.from_dict(values)
    assert token not in str(caught.value)


def test_a_token_in_a_comment_is_no_business_of_the_check(tmp_path: Path) -> None:
    """It never leaves the file: what a run saves is written anew."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TOKEN", "x").replace("run_name\n", PLANTED["a GitHub token"] + "\n"))
    assert "ghp_" not in load_recipe(path).to_yaml()


def test_no_token_in_messages_logs_warnings_and_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [token for _, token in EXAMPLES]
    monkeypatch.setattr(sys, "argv", ["dts-hf", *(f"training.run_name={token}" for token in tokens)])
    told = [json.dumps(environment(torch.device("cpu")))]
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("foreign").addHandler(handler)
    try:
        with guarded_logs():
            for token in tokens:
                told += [str(error(f"at {token}")) for error in (UserError, RunError)]
                say(f"reading {token}")
                show(f"read {token}")
                logging.getLogger("foreign").warning("got %s from %d", token, 5)
                told.append(warnings.formatwarning(f"no {token}", UserWarning, "x.py", 1))
    finally:
        logging.getLogger("foreign").removeHandler(handler)
    printed = capsys.readouterr()
    told += [printed.out, printed.err]
    assert printed.err.count("from 5") == len(tokens) == "".join(told).count("UserWarning: no ")
    assert not [token for token in tokens if token in "\n".join(told)]


def test_the_traceback_of_a_bug_has_no_token_and_does_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = PLANTED["a GitHub token"]
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TOKEN", "x"))

    def fail(*_: object, **__: object) -> None:
        raise KeyError(f"\x1b[2J {token} \u202e")

    monkeypatch.setattr(importlib.import_module("dts_hf.distill"), "distill", fail)
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1 and "Traceback" in result.stderr and "KeyError" in result.stderr
    assert token not in result.output and "\x1b" not in result.output and "\u202e" not in result.output


def test_what_stops_a_run_is_shown_as_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TOKEN", "x"))

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("SIGTERM: saved in runs/\u202ex\x1b[2J", everywhere=True)

    monkeypatch.setattr(importlib.import_module("dts_hf.distill"), "distill", stop)
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 75 and "runs/\\u202ex\\x1b[2J" in result.stderr
