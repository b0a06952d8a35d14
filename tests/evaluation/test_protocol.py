"""The evaluation protocol: its published defaults, its fingerprint, and what may stand in one table."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import describe_protocol
from dts_hf.evaluation.instruct import generation_settings
from dts_hf.evaluation.protocol import (
    PROTOCOLS,
    Protocol,
    check_comparable,
    check_same_rows,
    custom_protocol,
    get_protocol,
)
from dts_hf.generation.engine import GenerationSettings
from dts_hf.recipe.schema import Evaluation
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_the_defaults_are_those_of_the_literature() -> None:
    assert Protocol() == PROTOCOLS["minillm"]
    assert Protocol().values() == {
        "template": "alpaca",
        "max_prompt_length": 256,
        "max_new_tokens": 256,
        "no_repeat_ngram_size": 6,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seeds": [10, 20, 30, 40, 50],
        "backend": "dts_hf",
        "rouge": "rougeL F-measure of rouge_score 0.1.2, Porter stemmer, best reference",
    }
    assert generation_settings(Protocol(), 8, 30) == GenerationSettings(256, 8, True, 1.0, 30, 6)


def test_the_module_is_light() -> None:
    """A recipe that names a protocol, and ``dts-hf list protocols``, do not wait for torch."""
    code = (
        "import sys, dts_hf.evaluation.protocol; assert not {'torch', 'transformers', 'evaluate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_variants_differ_and_are_named() -> None:
    fingerprints = {name: describe_protocol(get_protocol(name), TOKENIZER)["fingerprint"] for name in PROTOCOLS}
    assert len(set(fingerprints.values())) == len(PROTOCOLS) >= 5
    assert all(name == protocol.name and protocol.about for name, protocol in PROTOCOLS.items())
    assert get_protocol("quick").runs == (10,) and get_protocol("minillm").runs == (10, 20, 30, 40, 50)
    with pytest.raises(UserError, match=r"got 'minilm'.*Did you mean 'minillm'"):
        get_protocol("minilm")
    (names, _) = typing.get_args(Evaluation.model_fields["protocol"].annotation)
    assert {*typing.get_args(names), "chat"} == set(PROTOCOLS), "in a recipe data.prompt_template says the template"


def test_a_change_is_in_the_name_and_a_way_back_is_not() -> None:
    changed = get_protocol("minillm").changed(max_new_tokens=64, seeds=[1], template=None)
    assert changed.name == "minillm, max_new_tokens=64, seeds=1"
    assert changed.changed(max_new_tokens=256, seeds=[10, 20, 30, 40, 50]).name == "minillm"
    assert get_protocol("minillm").changed(no_repeat_ngram_size=0) == PROTOCOLS["no_ngram"]
    assert custom_protocol(max_new_tokens=9).name == "custom" and custom_protocol() == PROTOCOLS["minillm"]
    greedy = custom_protocol(do_sample=False, seeds=[3])
    assert greedy.name == "greedy" and greedy.runs == (3,), "the seed of greedy text is a label only"
    with pytest.raises(UserError, match="seeds"):
        Protocol(seeds=(1, 1))
    with pytest.raises(UserError, match="backend"):
        Protocol(backend="sglang")


def test_a_recipe_takes_the_values_of_its_protocol_where_it_gives_none() -> None:
    given = Evaluation.model_validate({"protocol": "minillm", "max_new_tokens": 64})
    assert (given.max_new_tokens, given.no_repeat_ngram_size, given.do_sample) == (64, 6, True)
    assert given.seeds == [10, 20, 30, 40, 50]
    assert Evaluation.model_validate(given.model_dump()) == given
    assert Evaluation().max_new_tokens == 128 and not Evaluation().do_sample
    with pytest.raises(ValueError, match="protocol"):
        Evaluation.model_validate({"protocol": "minilm"})


def test_the_fingerprint_follows_the_protocol_and_nothing_else() -> None:
    def fingerprint(protocol: Protocol, chat: bool = True) -> str:
        described = describe_protocol(protocol, tiny_tokenizer(chat=chat))
        json.dumps(described, allow_nan=False)
        return described["fingerprint"]

    base = Protocol()
    greedy = base.changed(do_sample=False)
    assert len(fingerprint(base)) == 16 and fingerprint(base) == fingerprint(Protocol(name="another name"))
    assert fingerprint(greedy) == fingerprint(greedy.changed(seeds=[11, 12], temperature=0.5)), "nothing is drawn"
    assert fingerprint(base) == fingerprint(base, chat=False), "the alpaca text does not use the chat template"
    changes = [
        {"max_new_tokens": 13},
        {"no_repeat_ngram_size": 3},
        {"temperature": 0.7},
        {"seeds": [10, 20]},
        {"template": "chat"},
        {"max_prompt_length": 255},
        {"backend": "vllm"},
        {"do_sample": False},
    ]
    different = [fingerprint(base), *(fingerprint(base.changed(**change)) for change in changes)]
    assert len(set(different)) == len(different)
    assert fingerprint(PROTOCOLS["chat"]) != fingerprint(PROTOCOLS["chat"], chat=False)


def test_the_fingerprint_follows_what_the_tokenizer_puts_around_a_text() -> None:
    plain, with_bos, other_end = tiny_tokenizer(), tiny_tokenizer(bos=True), tiny_tokenizer()
    other_end.eos_token = "<|endoftext|>"
    assert (
        len({describe_protocol(Protocol(), tokenizer)["tokenizer"] for tokenizer in (plain, with_bos, other_end)}) == 3
    )
    chats = [
        describe_protocol(PROTOCOLS["chat"], tokenizer)["tokenizer"] for tokenizer in (plain, with_bos, other_end)
    ]
    assert chats[0] == chats[1] != chats[2], "the chat template writes its special tokens itself"
    assert describe_protocol(Protocol(), plain) == describe_protocol(Protocol(), tiny_tokenizer(pad="own")), (
        "padding is never attended to"
    )


def test_only_equal_protocols_stand_in_one_table() -> None:
    minillm, quick = (describe_protocol(PROTOCOLS[name], TOKENIZER) for name in ("minillm", "quick"))
    renamed = {**minillm, "name": "other", "dtype": "bfloat16"}
    check_comparable({})
    check_comparable({"a": minillm})
    check_comparable({"a": minillm, "b": renamed, "c": minillm})
    with pytest.raises(UserError) as error:
        check_comparable({"a": minillm, "b": renamed, "c": quick})
    for part in (
        "a and c",
        "max_new_tokens (256 and 64)",
        "no_repeat_ngram_size (6 and 0)",
        "do_sample (True and False)",
    ):
        assert part in str(error.value)
    assert "template" not in str(error.value) and "fingerprint" not in str(error.value)
    other = describe_protocol(PROTOCOLS["minillm"], tiny_tokenizer(pad="own"))
    other |= {"tokenizer": "x", "fingerprint": "y"}
    check_comparable({"a": minillm, "b": other}, ignore=("tokenizer",))
    with pytest.raises(UserError, match="tokenizer"):
        check_comparable({"a": minillm, "b": other})
    with pytest.raises(UserError, match="old: its scores carry no protocol"):
        check_comparable({"a": minillm, "old": {}})


def test_only_scores_on_the_same_rows_are_compared() -> None:
    entry = {"rows_sha256": "a" * 16, "n": 5}
    check_same_rows({"a": entry, "b": dict(entry)})
    with pytest.raises(UserError, match="a and b were scored on other rows"):
        check_same_rows({"a": entry, "b": {**entry, "rows_sha256": "b" * 16}})
    with pytest.raises(UserError, match=r"another number of answered rows \(5 and 4\)"):
        check_same_rows({"a": entry, "b": {**entry, "n": 4}})
