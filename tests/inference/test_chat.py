"""A conversation: each speaker has its own history, commands change it, a template of text sees the last message alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dts_hf.data.chat_templates import get_template
from dts_hf.errors import UserError
from dts_hf.generation.engine import GenerationSettings
from dts_hf.inference.chat import Conversation, load_speakers, talk
from dts_hf.inference.screens import OneAfterTheOther, SideBySide
from dts_hf.inference.speakers import Speaker
from tests.support.tiny import tiny_llama, tiny_tokenizer


class Recorder:
    def __init__(self) -> None:
        self.shown: list[list[tuple[str, str]]] = []
        self.ends = 0

    def show(self, texts: Sequence[tuple[str, str]], done: bool) -> None:
        self.shown.append(list(texts))
        self.ends += done


def speaker(label: str, seed: int, template: str = "chat") -> Speaker:
    return Speaker(label, tiny_llama(seed=seed), tiny_tokenizer(), get_template(template))


def conversation(template: str = "chat") -> Conversation:
    speakers = [speaker("student", 0, template), speaker("teacher", 1, template)]
    return Conversation(speakers, GenerationSettings(max_new_tokens=6, batch_size=1))


def test_tokens_are_streamed_and_each_keeps_its_own_answers() -> None:
    talked, screen = conversation(), Recorder()
    first = talked.ask("Name a fruit", screen)
    assert (
        screen.ends == 1
        and len(screen.shown) > 2
        and screen.shown[-1] == list(zip(("student", "teacher"), first, strict=True))
    )
    lengths = [len(texts[0][1]) for texts in screen.shown]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    talked.ask("And another", screen)
    for place, history in enumerate(talked.histories):
        assert [message["role"] for message in history] == ["user", "assistant"] * 2
        assert history[1]["content"] == first[place]
    assert talked._row(talked.histories[0], talked.speakers[0]).messages is not None


def test_a_template_of_text_gets_the_last_message_alone() -> None:
    talked = conversation("alpaca")
    talked.ask("Name a fruit", Recorder())
    row = talked._row([*talked.histories[0], {"role": "user", "content": "And another"}], talked.speakers[0])
    assert row.messages is None and row.instruction == "And another"


def test_commands() -> None:
    talked, said = conversation(), []
    lines = [
        "Name a fruit",
        "/temperature 0.7",
        "/system Be brief",
        "/temprature 1",
        "/temperature hot",
        "/help",
        "",
        "/exit",
        "no",
    ]
    answers = list(talk(talked, lines, Recorder(), said.append))
    assert len(answers) == 1
    assert talked.settings.do_sample and talked.settings.temperature == 0.7
    assert talked.histories == [[{"role": "system", "content": "Be brief"}]] * 2
    assert any("Did you mean '/temperature'?" in text for text in said) and any("got 'hot'" in text for text in said)
    assert "/reset" in said[-1]


def test_quit_is_exit_and_a_classifier_cannot_chat(tmp_path: Path) -> None:
    assert not list(talk(conversation(), ["/quit", "Name a fruit"], Recorder(), print))
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    with pytest.raises(UserError, match=r"is a classifier, .* so it cannot chat"):
        load_speakers(str(tmp_path))


def test_a_conversation_that_is_too_long_is_said_and_can_be_reset() -> None:
    talked, said = conversation(), []
    answers = list(talk(talked, ["word " * 900, "/reset", "Name a fruit"], Recorder(), said.append))
    assert len(answers) == 1 and said[0].startswith("what was said, with this message, leaves no room")
    with pytest.raises(UserError, match="positions"):
        Conversation(talked.speakers, GenerationSettings(max_new_tokens=2000)).ask("x", Recorder())


def test_screens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [("ap", ""), ("apple", ""), ("apple", "pe"), ("apple", "pear")]
    screen = OneAfterTheOther()
    for number, (one, two) in enumerate(steps):
        screen.show([("student", one), ("teacher", two)], number == len(steps) - 1)
    assert capsys.readouterr().out == "student> apple\nteacher> pear\n"
    screen.show([("model", "")], True)
    assert capsys.readouterr().out == "model> \n"
    monkeypatch.setenv("COLUMNS", "120")
    wide = SideBySide()
    for number, (one, two) in enumerate(steps):
        wide.show([("student", one), ("teacher", two)], number == len(steps) - 1)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "pear" in line]
    assert row.index("apple") < row.index("pear")
