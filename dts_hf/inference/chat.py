"""``dts-hf chat``: a conversation with a student, its teacher beside it; of a pipe, each line is a message."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dts_hf.console import say
from dts_hf.data.rows import Row
from dts_hf.errors import UserError, nearest
from dts_hf.evaluation.subject import find_subject
from dts_hf.files import read_json
from dts_hf.generation.engine import GenerationSettings
from dts_hf.inference.screens import Screen, lines_of_stdin, screen_for
from dts_hf.inference.speakers import Speaker, load_speaker, template_of
from dts_hf.runs.directory import RunDirectory

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT  what the system says, from a new conversation on; nothing: no system message",
    "/temperature": "NUMBER  of sampling; 0: the most likely token each time",
    "/help": "show these",
    "/exit": "leave (so do /quit and the end of the input)",
}
ALIASES = {"/quit": "/exit"}


class Conversation:
    """What was said, for each speaker with its own answers: student and teacher do not hear one another.

    Args:
        speakers: who answers.
        settings: limits and sampling.
        system: what the system says; empty: nothing.
    """

    def __init__(self, speakers: Sequence[Speaker], settings: GenerationSettings, system: str = "") -> None:
        self.speakers, self.settings, self.system = speakers, settings, system
        self.histories: list[list[dict[str, Any]]] = []
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        self.histories = [list(start) for _ in self.speakers]

    def ask(self, text: str, screen: Screen) -> list[str]:
        """Let each speaker answer ``text``.

        Raises:
            UserError: the conversation leaves no room for an answer.
        """
        self.turn += 1
        shown = [""] * len(self.speakers)
        labels = [speaker.label for speaker in self.speakers]
        for place, (speaker, history) in enumerate(zip(self.speakers, self.histories, strict=True)):
            tokens: list[int] = []

            def on_token(_row: int, token: int, place: int = place, tokens: list[int] = tokens) -> None:
                tokens.append(token)
                text = self.speakers[place].text(tokens)
                if not text.endswith("\ufffd"):  # the first half of a character
                    shown[place] = text
                    screen.show(list(zip(labels, shown, strict=True)), False)

            history.append({"role": "user", "content": text})
            try:
                (answer,) = speaker.answer([self._row(history, speaker)], self.settings, on_token=on_token)
            except UserError as error:
                history.pop()
                words = str(error).replace(f"row 'turn-{self.turn}': its prompt", "what was said, with this message,")
                raise UserError(words) from None
            shown[place] = speaker.text(answer.tokens)
            history.append({"role": "assistant", "content": shown[place]})
        screen.show(list(zip(labels, shown, strict=True)), True)
        return shown

    def _row(self, history: Sequence[dict[str, Any]], speaker: Speaker) -> Row:
        """The conversation as a prompt; a template of text holds the last message alone."""
        last = str(history[-1]["content"])
        messages = tuple(history) if speaker.template.name == "chat" else None
        return Row(f"turn-{self.turn}", last, "", ("",), messages=messages)

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; what to say about it, None: leave.

        Raises:
            UserError: no such command, or a wrong argument.
        """
        word, _, rest = line.partition(" ")
        word, rest = ALIASES.get(word, word), rest.strip()
        if word not in COMMANDS:
            raise UserError(
                f"{word}: no such command, expected one of {', '.join(COMMANDS)}.{nearest(word, COMMANDS)}"
            )
        if word == "/exit":
            return None
        if word == "/help":
            return "\n".join(f"{name:13} {about}" for name, about in COMMANDS.items())
        if word == "/temperature":
            self.settings = with_temperature(self.settings, rest)
            return f"temperature {self.settings.temperature:g}" if self.settings.do_sample else "the most likely token"
        if word == "/system":
            self.system = " ".join(shlex.split(rest)) if rest[:1] in "\"'" and rest else rest
        self.reset()
        return "a new conversation" + (f"; the system says: {self.system}" if self.system else "")


def with_temperature(settings: GenerationSettings, text: str) -> GenerationSettings:
    """``settings`` at another temperature of sampling; 0 is none.

    Raises:
        UserError: ``text`` is no number of at least 0.
    """
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"temperature: got {text!r}, expected a number of at least 0") from None
    if value == 0:
        return dataclasses.replace(settings, do_sample=False, temperature=1.0)
    return dataclasses.replace(settings, do_sample=True, temperature=value)


def check_can_chat(model: str) -> None:
    """Refuse what is known to be a classifier: a run of one, or its folder.

    Raises:
        UserError: it is one.
    """
    folder = Path(model)
    run = RunDirectory(folder)
    is_run = run.recipe_path.is_file() and run.final_path.is_dir()
    architectures = read_json((run.final_path if is_run else folder) / "config.json").get("architectures") or []
    if any("SequenceClassification" in str(name) for name in architectures):
        raise UserError(
            f"{model}: is a classifier, which gives classes and writes no text, so it cannot chat; expected a language model"
        )


def load_speakers(
    model: str,
    *,
    teacher: str | None = None,
    no_teacher: bool = False,
    template: str | None = None,
    dtype: str | None = None,
) -> list[Speaker]:
    """The student (or model), and its teacher where there is one.

    Args:
        model: Hub name, model folder, or run directory.
        teacher: another teacher than that of the run; a model has none of its own.
        no_teacher: the student alone.
        template: name of the prompt template of both; None: that of the run, or of the folder.
        dtype: of the weights of the student; None: as the run evaluates, for a model float32.

    Raises:
        UserError: a model cannot be loaded. A teacher that nobody named and that cannot be had is left out, and said.
    """
    if teacher is not None and no_teacher:
        raise UserError("chat: give one of --teacher and --no-teacher")
    check_can_chat(model)
    subject = find_subject(model)
    recipe, words = subject.recipe, template or template_of(subject)
    label = "model" if recipe is None and teacher is None else "student"
    weights = dtype or subject.dtype or "float32"
    speakers = [load_speaker(label, subject.location, template=words, key="model", dtype=weights)]
    own = recipe.teacher if recipe is not None else None
    if own is not None and own.kind == "self" and teacher is None and not no_teacher:
        say("the student alone: it was its own teacher; --teacher MODEL names the model that it began as")
        own = None
    if recipe is not None and recipe.teachers and teacher is None and not no_teacher:
        say(
            f"the student alone: it had several teachers ({', '.join(recipe.teachers)}); --teacher MODEL names one of them"
        )
    if teacher is not None:
        speakers.append(load_speaker("teacher", teacher, template=template or "auto", key="--teacher"))
    elif own is not None and not no_teacher:
        try:
            speakers.append(
                load_speaker(
                    "teacher", own.model, template=words, key="teacher.model", dtype=own.dtype, tokenizer=own.tokenizer
                )
            )
        except UserError as error:
            say(f"the student alone (--teacher MODEL names another teacher): {error}")
    return speakers


def talk(
    conversation: Conversation,
    lines: Iterable[str],
    screen: Screen,
    on_message: Callable[[str], None] = say,
) -> Iterator[list[str]]:
    """Answer each line, obey those that begin with a slash, until /exit or the end of ``lines``.

    Args:
        conversation: who answers.
        lines: what the user writes.
        screen: shows the answers.
        on_message: takes what commands say, and what went wrong with a line.

    Yields:
        the answers to each line.
    """
    for line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            if not text.startswith("/"):
                yield conversation.ask(text, screen)
                continue
            answer = conversation.command(text)
        except UserError as error:
            on_message(str(error))
            continue
        if answer is None:
            return
        on_message(answer)


def chat(
    model: str,
    *,
    system: str = "",
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 10,
    **speakers: Any,
) -> None:
    """A conversation over stdin and stdout.

    Args:
        model: Hub name, model folder, or run directory.
        system: what the system says; empty: nothing.
        temperature: of sampling; 0: the most likely token each time.
        max_new_tokens: longest answer, in tokens.
        seed: of sampling.
        speakers: as ``load_speakers`` takes them.

    Raises:
        UserError: a model cannot be loaded, or a wrong option.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=1, seed=seed)
    settings = with_temperature(settings, str(temperature))
    loaded = load_speakers(model, **speakers)
    conversation = Conversation(loaded, settings, system)
    if any(speaker.template.name != "chat" for speaker in loaded):
        say(
            f"template {loaded[0].template.name}: each message stands alone, what was said before is not shown to the model"
        )
    for _ in talk(conversation, lines_of_stdin(), screen_for(len(loaded))):
        pass
