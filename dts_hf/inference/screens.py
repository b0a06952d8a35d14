"""Where the answers of a conversation appear: a terminal, in columns where it is wide, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from dts_hf.console import printable

#: A terminal of so many columns shows two answers side by side.
WIDE = 100


class Screen(Protocol):
    """Shows answers while they are made."""

    def show(self, texts: Sequence[tuple[str, str]], done: bool) -> None:
        """Show (label, text so far) of each speaker; ``done``: this is all of it."""


class Pipe:
    """The answers on stdout once they are whole; with a label where there are several."""

    def show(self, texts: Sequence[tuple[str, str]], done: bool) -> None:
        """Print them when all is there."""
        if done:
            for label, text in texts:
                print(f"{label}: {printable(text)}" if len(texts) > 1 else printable(text), flush=True)


class OneAfterTheOther:
    """The tokens as they come, the second answer below the first."""

    def __init__(self) -> None:
        self.printed: dict[str, str] = {}

    def show(self, texts: Sequence[tuple[str, str]], done: bool) -> None:
        """Print what is new; a label before the first piece of each answer."""
        for label, text in texts:
            if not text and not done:
                continue
            if label not in self.printed:
                print(f"{chr(10) if self.printed else ''}{label}> ", end="")
            before = self.printed.get(label, "")
            print(printable(text[len(before) :]), end="", flush=True)
            self.printed[label] = text
        if done:
            print(flush=True)
            self.printed.clear()


class SideBySide:
    """A live table with a column for each speaker."""

    def __init__(self) -> None:
        from rich.live import Live

        self.live: Live | None = None

    def show(self, texts: Sequence[tuple[str, str]], done: bool) -> None:
        """Draw the table again; once all is there it stays."""
        from rich.live import Live

        table = self._table(texts)
        if self.live is None:
            self.live = Live(table, refresh_per_second=8, vertical_overflow="visible")
            self.live.start()
        self.live.update(table, refresh=done)
        if done:
            self.live.stop()
            self.live = None

    def _table(self, texts: Sequence[tuple[str, str]]) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True)
        for label, _ in texts:
            table.add_column(label, ratio=1)
        table.add_row(*(Text(printable(text)) for _, text in texts))
        return table


def screen_for(speakers: int) -> Screen:
    """The screen for so many speakers on the stdout of this process."""
    from rich.console import Console

    if not sys.stdout.isatty():
        return Pipe()
    return SideBySide() if speakers > 1 and Console().width >= WIDE else OneAfterTheOther()


def lines_of_stdin() -> Iterator[str]:
    """What the user writes, line by line until the end of the input; a terminal is asked for each."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
