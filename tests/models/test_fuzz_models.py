"""Damaged models, tokenizers and chat templates: each is read, or refused by a ``UserError``, in bounded time and memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from dts_hf.data.chat_templates import end_of_turn_ids, get_template, render_messages
from dts_hf.data.rows import Row
from dts_hf.models.loading import load_model, load_tokenizer
from tests.support.fuzzing import cases, damaged, mutated, survive
from tests.support.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(3600)  # for all cases of a test; each has a limit of its own
TEMPLATES = [
    path.read_bytes() for path in sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
]
#: Statements that take for ever, fill the memory or are none of Jinja's.
SNIPPETS = [
    b"{{ 'a' * 10**10 }}", b"{% if false %}{{ 'a' * 10**10 }}{% endif %}", b"{{ 10**10**10 }}", b"{{ 1 // 0 }}",
    b"{% include 'x' %}", b"{% import 'os' as os %}", b"{% extends 'x' %}", b"{{ ''.__class__.__mro__ }}", b"{% if",
    b"{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", b"{{ '%9999999999d' % 1 }}",
    b"{% set n = 99999 %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}", b"{{ lipsum(10**7) }}",
    b"{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    b"{% set ns = namespace(x=['a']) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    b"{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(64) }}", b"{{ 'a'.center(10**10) }}",
    b"{{ 'a' | center(10**10) }}", b"{% set s = 'a' * 10**6 %}{{ s.replace('a', s) }}", b"{{ messages * 10**9 }}",
    b"{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", b"{{ '{:9999999999}'.format(1) }}", b"{{ x.y.z }}",
    b"{{ raise_exception('no') }}", b"{% for k in messages %}{% break %}{% endfor %}", b"\xff", b"\x00", b"{#", b"{" * 3000,
    b"(" * 3000, b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}", b"{% if 1 %}" * 300,
]  # fmt: skip
JSON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
ROW = Row(id="r", instruction="x", input="", references=("y",), messages=({"role": "user", "content": "x"},))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of all cases holds ``model`` and nothing else."""
    folder = tmp_path_factory.mktemp("fuzz_models") / "here"
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    load_model(str(folder / "model"), key="warm up")
    load_tokenizer(str(folder / "model"), key="warm up")
    return folder / "model"


@pytest.fixture(autouse=True)
def _in_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good.parent)


def with_file(good: Path, name: str, content: bytes, read: Callable[[], Any]) -> Any:
    """What ``read`` makes of the model while one file is another one."""
    kept = (good / name).read_bytes()
    (good / name).write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return survive(read)
    finally:
        (good / name).write_bytes(kept)


@cases(500)
@given(content=st.sampled_from(TEMPLATES).flatmap(lambda content: damaged(content, SNIPPETS)))
def test_templates(content: bytes, good: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = content.decode("utf-8", errors="replace")

    def use() -> str:
        end_of_turn_ids(tokenizer, get_template("chat"))
        return render_messages(ROW, [{"role": "user", "content": "x"}], tokenizer, for_answer=True)

    text = survive(use)
    event("rendered" if text else "refused")
    assert text is None or len(text) < 1_000_000


@cases(500)
@given(
    data=st.data(),
    name=st.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]),
)
def test_files_of_json(data: st.DataObject, name: str, good: Path) -> None:
    content = (good / name).read_bytes()
    if data.draw(st.booleans()):
        changed = data.draw(mutated([json.loads(content)]))
        content = json.dumps(changed).encode("utf-8", errors="surrogatepass")
    else:
        content = data.draw(damaged(content, [b"[" * 100_000, b'"a": NaN,', b"\xff", b"{", b"9" * 5000]))
    model = with_file(good, name, content, lambda: load_model(str(good), key="model"))
    tokenizer = with_file(good, name, content, lambda: load_tokenizer(str(good), key="model"))
    event(f"model {model is not None}, tokenizer {tokenizer is not None}")


@cases(300)
@given(content=st.data())
def test_weights(content: st.DataObject, good: Path) -> None:
    whole = (good / "model.safetensors").read_bytes()
    changed = content.draw(damaged(whole[:3000], [b"\xff" * 8, b"{}", b"[" * 5000])) + whole[3000:]
    with_file(good, "model.safetensors", changed, lambda: load_model(str(good), key="model"))
