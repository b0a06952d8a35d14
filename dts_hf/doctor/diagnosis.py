"""What the doctor found, as plain data: checks with their problems. The screen and ``--json`` are made of this alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, cast

from dts_hf.errors import RunError, UserError
from dts_hf.files import jsonable

Status = Literal["ok", "skipped", "warning", "error"]
T = TypeVar("T")
FORMAT = 1


class Skipped(Exception):
    """A check cannot be made; its text is the reason."""


@dataclass(frozen=True)
class Problem:
    """``code`` is stable, for programs; ``text`` says what is wrong and ``advice`` what to do, for people."""

    code: str
    level: Literal["warning", "error"]
    text: str
    advice: str = ""


@dataclass
class Check:
    """One line of the screen.

    Attributes:
        name: one word, stable.
        summary: what was found, one sentence.
        problems: none where all is well.
        skipped: why the check was not made, or None.
        values: the numbers behind the summary, for programs.
        seconds: how long the check took.
    """

    name: str
    summary: str = ""
    problems: list[Problem] = field(default_factory=list)
    skipped: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def error(self, code: str, text: str, advice: str = "") -> None:
        """The run would fail, or its numbers would mean nothing."""
        self.problems.append(Problem(code, "error", text, advice))

    def warn(self, code: str, text: str, advice: str = "") -> None:
        """The run would go through, and probably not give what was wanted."""
        self.problems.append(Problem(code, "warning", text, advice))

    @property
    def status(self) -> Status:
        return worst(self.problems) or ("skipped" if self.skipped is not None else "ok")


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a row that are treated alike; ``aligned`` are learned, and the same for the teacher."""

    kind: Literal["masked", "learned", "aligned", "end", "padding"]
    tokens: int
    text: str


@dataclass(frozen=True)
class PicturedRow:
    """A row as the loss sees it."""

    id: str
    segments: list[Segment]


@dataclass
class Diagnosis:
    """Everything that one examination found.

    Attributes:
        recipe: the name of the recipe file.
        checks: in the order in which they were made.
        picture: rows as the loss sees them.
        memory: one entry per strategy: ``strategy``, ``devices``, ``placement`` of the teacher, bytes by part, ``total``,
            ``fits``.
        device: ``name`` and bytes of ``memory`` that a run could have on it.
        seconds: how long the examination took.
        on_check: called with the name of each check as it begins.
    """

    recipe: str
    checks: list[Check] = field(default_factory=list)
    picture: list[PicturedRow] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    on_check: Callable[[str], None] = lambda name: None

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Make one check: whatever it raises becomes a problem of that check, and the next ones are still made."""
        check = Check(name)
        self.checks.append(check)
        self.on_check(name)
        began = time.monotonic()
        try:
            yield check
        except Skipped as skipped:
            check.skipped = str(skipped)
        except (UserError, RunError) as error:
            said = [other.name for other in self.checks for problem in other.problems if problem.text == str(error)]
            if said:  # a stage refuses again what an earlier one has refused
                check.skipped = f"not checked: see '{said[0]}'"
            else:
                check.error(getattr(error, "code", "refused"), str(error))
        except Exception as error:  # a fault of one part must not hide the others
            reason = " ".join(str(error).split())[:400]
            memory = isinstance(error, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason
            text = f"memory ran out: {reason}" if memory else f"{type(error).__name__}: {reason}"
            check.error("out-of-memory" if memory else "failed", text)
        finally:
            check.seconds = round(time.monotonic() - began, 2)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    @property
    def problems(self) -> list[Problem]:
        return [problem for check in self.checks for problem in check.problems]

    @property
    def status(self) -> Status:
        return worst(self.problems) or "ok"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no word for NaN and infinity: they are null."""
        levels = [problem.level for problem in self.problems]
        checks = [{"name": check.name, "status": check.status, **asdict(check)} for check in self.checks]
        whole = {
            "format": FORMAT, "recipe": self.recipe, "status": self.status, "errors": levels.count("error"),
            "warnings": levels.count("warning"), "checks": checks, "device": self.device,
            "picture": [asdict(row) for row in self.picture], "memory": self.memory, "seconds": round(self.seconds, 1),
        }  # fmt: skip
        return cast("dict[str, Any]", jsonable(whole))


def worst(problems: list[Problem]) -> Literal["warning", "error"] | None:
    """The worst level among ``problems``; None where there is none."""
    return max((problem.level for problem in problems), key=("warning", "error").index, default=None)


def need(value: T | None, what: str) -> T:
    """``value``, or the end of the check that cannot do without it.

    Raises:
        Skipped: it is None.
    """
    if value is None:
        raise Skipped(f"not checked without {what}")
    return value
