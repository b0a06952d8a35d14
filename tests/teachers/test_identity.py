"""Teachers are told apart by name, and wrong states by what they make of labels."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dts_hf.data.chat_templates import get_template
from dts_hf.errors import UserError
from dts_hf.models.head import Head, head_of
from dts_hf.teachers.identity import TeacherIdentity, differences, identity_of, shared_name
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_test import BOUNDS, compare_labels, compare_live, judge, label_logprobs
from tests.support.tiny import tiny_llama, tiny_tokenizer


def identity(model=None, tokenizer=None, template="chat"):
    model = tiny_llama() if model is None else model
    return identity_of(model, tokenizer or tiny_tokenizer(), get_template(template), name="./somewhere/teacher")


def test_an_identity_survives_json_and_names_no_path():
    one = identity()
    again = TeacherIdentity.from_json(json.loads(json.dumps(one.as_json())), "file")
    assert again == one and one.model == "teacher" and "somewhere" not in json.dumps(one.as_json())
    assert differences(one, again) == []
    with pytest.raises(UserError, match="lacks head"):
        TeacherIdentity.from_json({k: v for k, v in one.as_json().items() if k != "head"}, "file")


def test_what_differs_is_said_in_words():
    one = identity()
    moved = tiny_llama()
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert [line.split(":")[0] for line in differences(one, identity(moved))] == ["weights"]
    assert [line.split(":")[0] for line in differences(one, identity(tiny_llama(vocab=352)))] == [
        "configuration", "weights", "vocabulary V of the head", "weight of the head"
    ]  # fmt: skip
    assert any("type of the weights" in line for line in differences(one, identity(tiny_llama().bfloat16())))
    assert [line.split(":")[0] for line in differences(one, identity(template="alpaca"))] == ["prompt template"]
    chat = tiny_tokenizer()
    chat.chat_template = chat.chat_template.replace("assistant", "helper")
    assert [line.split(":")[0] for line in differences(one, identity(tokenizer=chat))] == ["prompt template"]
    more = tiny_tokenizer()
    more.add_tokens(["<new>"])
    assert any("tokenizer's vocabulary" in line for line in differences(one, identity(tokenizer=more)))


def test_rules_are_compared_within_a_version_alone():
    one = identity()
    other = dataclasses.replace(one, tokenizer_rules="xxh3:0")
    assert differences(one, other)
    assert not differences(one, dataclasses.replace(other, versions={"transformers": "4.0", "tokenizers": "0.1"}))


@pytest.mark.parametrize(
    ("name", "shown"), [("owner/model", "owner/model"), ("package:p/f.gguf", "package:p/f.gguf"), ("/a/b/c", "c")]
)
def test_a_shared_name_is_no_path(name, shown):
    assert shared_name(name) == shown


def some_states(model, count=3, length=9):
    ids = torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(0))
    states = LiveTeacher(model).states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    return states, ids[:, 1:].reshape(-1)


@pytest.mark.parametrize("bias", [False, True])
def test_label_logprobs_are_those_of_the_dense_softmax(bias, monkeypatch):
    monkeypatch.setattr("dts_hf.teachers.self_test._IDS", 100)  # a vocabulary in pieces, the last one short
    monkeypatch.setattr("dts_hf.teachers.self_test._ROWS", 7)
    states, targets = some_states(tiny_llama())
    head = Head(head_of(tiny_llama()).weight.detach(), torch.randn(320) if bias else None, 1.5, 10.0)
    dense = head(states).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(label_logprobs(states, head, targets).double(), dense, rtol=0, atol=1e-5)


def test_stored_states_pass_and_wrong_ones_do_not():
    model = tiny_llama()
    states, targets = some_states(model)
    head = head_of(model)
    stored = label_logprobs(states, head, targets)
    assert judge(compare_labels(stored, states, head, targets), "float32", "cache") is None
    assert judge(compare_labels(stored, states.bfloat16(), head, targets), "bfloat16", "cache") is None
    seen = {}
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.update(before=args[0]))
    some_states(model)
    hook.remove()
    wrong = {
        "before the norm": (seen["before"][:, :-1].reshape(-1, 32), head, targets),
        "shifted by one": (states.roll(1, 0), head, targets),
        "another head": (states, head_of(tiny_llama(seed=5)), targets),
        "a vocabulary cut": (states, head.cut(300), targets.clamp(max=299)),
        "other labels": (states, head, targets.roll(1)),
        "non-finite": (states * float("nan"), head, targets),
    }
    for name, (found, with_head, labels) in wrong.items():
        for dtype in BOUNDS:
            with pytest.raises(UserError, match="self-test failed"):
                judge(compare_labels(stored, found, with_head, labels), dtype, name)


def test_scored_again_by_the_live_teacher():
    model = tiny_llama()
    states, _ = some_states(model)
    head = head_of(model)
    same = compare_live(states, states, head, (1.0, 4.0))
    assert same.nats == 0.0 and same.states == 0.0 and judge(same, "float32", "cache") is None
    near = compare_live(states.bfloat16(), states, head, (1.0, 4.0))
    assert 0 < near.kl[4.0] < near.kl[1.0] < 1e-3 and judge(near, "bfloat16", "cache") is None
    with pytest.raises(UserError, match="self-test failed"):
        judge(compare_live(states * 1.02, states, head), "float32", "cache")
    with pytest.raises(UserError, match="self-test failed"):
        judge(compare_live(states.roll(1, 0), states, head), "int8", "cache")
