"""``start``: from a teacher and data to a commented recipe. All that can be asked for is asked before anything is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.files import check_output, write_text_atomic
from dts_hf.recipe.loading import load_recipe
from dts_hf.starter.choices import Preset, choose
from dts_hf.starter.looking import look_at_data, look_at_teacher, read_config

QUESTIONS = {
    "teacher": "Teacher: a name of the Hub, a folder, or a .gguf file",
    "data": "Rows: a file, folder, pattern, or a data set of the Hub",
}


@dataclass(frozen=True)
class Started:
    """The recipe that was written.

    Attributes:
        path: the file.
        run: the run directory that it names.
        text: the file's text.
    """

    path: Path
    run: str
    text: str

    @property
    def next_commands(self) -> list[str]:
        """What to type now."""
        return [f"dts-hf doctor {self.path}", f"dts-hf train {self.path}", f"dts-hf chat {self.run}"]


def start(
    teacher: str | None,
    data: str | None,
    *,
    student: str | None = None,
    layers: int | None = None,
    output: Path | None = None,
    preset: Preset = "standard",
    overwrite: bool = False,
    ask: Callable[[str], str] | None = None,
) -> Started:
    """Look at teacher and data, and write a recipe that fits them.

    Args:
        teacher: Hub name, folder, or GGUF file; None: it is asked for.
        data: rows in any form that training takes; None: likewise.
        student: another model that learns; None: a part of the teacher.
        layers: how many of the teacher's layers that part has; None: half of them.
        output: the file to write; None: named after the data.
        preset: ``quick`` makes a few steps, to see whether all works; ``standard`` trains.
        overwrite: replace the file that is there.
        ask: puts a question to the person at the terminal; None: there is none.

    Raises:
        UserError: something is missing and nobody can be asked, a file is in the way, or what was given cannot be read.
    """
    if student is not None and layers is not None:
        raise UserError("init: give one of --student (a model) and --layers (of the teacher)")
    found = {name: given or _asked(name, ask) for name, given in (("teacher", teacher), ("data", data))}
    stem = _stem(found["data"])
    path = output or Path(f"{stem}.yaml")
    check_output(path, "recipe.yaml", overwrite)
    looked = look_at_teacher(found["teacher"])
    if student is not None:
        read_config(student, "--student")
    rows = look_at_data(found["data"], looked)
    run = f"runs/{path.stem}"
    _, text = choose(looked, rows, student=student, layers=layers, preset=preset, output=run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    except OSError as error:
        raise UserError(f"--output: {path}: cannot be written: {error.strerror}") from None
    load_recipe(path)  # it is good, or this is a fault of ours, and said
    return Started(path, run, text)


def _asked(name: str, ask: Callable[[str], str] | None) -> str:
    answer = ask(QUESTIONS[name]).strip() if ask is not None else ""
    if not answer:
        raise UserError(f"init: --{name} is missing: {QUESTIONS[name][0].lower()}{QUESTIONS[name][1:]}")
    return answer


def _stem(data: str) -> str:
    """A name for the file: that of the data, without what no file should be called."""
    words = Path(data.rstrip("/").partition(":")[0]).name.split(".")[0]
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in words).strip("_")
    return plain or "recipe"


def asks_on_a_terminal(prompt: Callable[[str], str]) -> Callable[[str], str] | None:
    """``prompt`` where somebody sits at a terminal; None where nobody does."""
    return prompt if sys.stdin.isatty() and sys.stderr.isatty() else None
