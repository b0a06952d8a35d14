"""A chat template that would run for ever or fill the memory is refused before it is used; real ones never are."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from dts_hf.data.chat_templates import end_of_turn_ids, get_template, render_messages
from dts_hf.data.rows import Row
from dts_hf.data.template_limits import BUDGET, _Counting, check_limits
from dts_hf.errors import UserError
from tests.support.fuzzing import limited
from tests.support.tiny import tiny_tokenizer

REAL = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
ROW = Row("r", "x", "", ("y",), messages=({"role": "user", "content": "x"},))
DIGITS = "{% set l = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] %}"
TOO_MUCH = {
    "a long string": "{{ 'a' * 10**10 }}",
    "a long string where nobody comes": "{% if false %}{{ 'a' * 10**10 }}{% endif %}",
    "a long list": "{{ ([0] * 10**9) | length }}",
    "a power": "{{ 10**10**10 }}",
    "a power of a variable": "{% set n = 9999999 %}{{ n ** n }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "nested ranges of n": "{% set n = 99999 %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}",
    "nested lists": DIGITS + "{% for a in l %}" * 9 + "{% endfor %}" * 9,
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=3) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x=1) %}{% for i in range(64) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a filter that formats": "{{ '%9999999999d' | format(1) }}",
    "a method that formats": "{{ '{:9999999999}'.format(1) }}",
    "a width": "{{ '{:{}}'.format(1, 9999999999) }}",
    "a filter": "{{ 'a' | center(10**10) }}",
    "a method": "{{ 'a'.center(9999999999) }}",
    "zeros": "{{ 'a'.zfill(10**9) }}",
    "replacements": "{% set s = 'a' * 10**6 %}{{ s.replace('a', s) }}",
    "indents": "{{ ('x\n' * 10**5) | indent(10**5) }}",
    "filler": "{{ lipsum(10**7) }}",
    "a comment": "{#" + "x" * 10**6 + "#}",
}
BROKEN = {
    "include": "{% include 'x' %}",
    "division": "{{ 1 // 0 }}",
    "syntax": "{% if",
    "undefined": "{{ x.y.z }}",
    "no filter": "{{ 'a' | nothing }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "refusal": "{{ raise_exception('not for me') }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
}


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_much_is_refused_before_it_is_rendered(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited(30):  # many times what it takes
        with pytest.raises(
            UserError, match=r"the tokenizer's chat template (takes far too long|has 1,000,004 characters)"
        ):
            render_messages(ROW, ROW.prompt_messages, tokenizer, for_answer=True)
        with pytest.raises(UserError):
            end_of_turn_ids(tokenizer, get_template("chat"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_broken_template_is_one_message(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn_ids(tokenizer, get_template("chat")) == [tokenizer.eos_token_id]
    with pytest.raises(
        UserError, match=r"row 'r': the tokenizer's chat template refuses this conversation: ."
    ) as caught:
        render_messages(ROW, ROW.prompt_messages, tokenizer, for_answer=True)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_template_costs_a_thousandth_of_the_budget(path: Path) -> None:
    check_limits(path.read_text())
    sandbox = _Counting()
    conversation = [{"role": role, "content": "word " * 200} for role in ("user", "assistant") * 3]
    given = {"messages": conversation, "tools": None, "bos_token": "<s>", "eos_token": "</s>"}
    text = "".join(sandbox.from_string(path.read_text()).generate(**given))
    assert len(text) > 1000 and BUDGET - sandbox.left < BUDGET / 100, (BUDGET - sandbox.left) / BUDGET


def test_the_trial_renders_as_transformers_does() -> None:
    """Else it would miss what a template does."""
    tokenizer = tiny_tokenizer()
    for path in REAL:
        if path.stem == "bare":  # writes what HF alone knows
            continue
        tokenizer.chat_template = path.read_text()
        given = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None}
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        found = "".join(
            _Counting().from_string(path.read_text()).generate(**given, **special, add_generation_prompt=False)
        )
        assert found == tokenizer.apply_chat_template(given["messages"], tokenize=False), path.stem


@pytest.mark.parametrize(
    "template",
    ["{{ '=' * 80 }}", "{{ 'in %s of 20241231' % 'x' }}", "{{ '{} <|reserved_200000|>'.format(1) }}", "{{ 2 ** 10 }}",
     "{% for i in range(1000) %}{{ i }}{% endfor %}", "{{ 'x' | indent(12) }}", "{{ messages | tojson(indent=4) }}",
     "{% set ns = namespace(n=1000000) %}{{ ns.n + 1000000 }}", "{{ (messages * 3) | length }}"],
)  # fmt: skip
def test_what_a_template_may_well_do(template: str) -> None:
    check_limits(template)


def test_tools_of_the_row_are_no_matter_of_the_budget() -> None:
    """A conversation may be long: the budget is that of the trial alone."""
    tokenizer = tiny_tokenizer()
    long = "word " * 1_000_000
    text = render_messages(ROW, [{"role": "user", "content": long}], tokenizer, for_answer=True)
    assert long in text and json.dumps(text)
