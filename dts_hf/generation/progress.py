"""The progress of generation on stderr, where the work lasts: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dts_hf.console import harmless, say, working

SECONDS_BEFORE_BAR = 2.0


@contextlib.contextmanager
def progress_bar(title: str | None, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield ``show(rows done, tokens)``; the bar appears once the work has lasted ``SECONDS_BEFORE_BAR``."""
    if title is None:
        yield lambda _rows, _tokens: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))  # stdout is for results
    task = bar.add_task(escape(harmless(title)), total=total, rate="")
    began = time.monotonic()

    def show(rows: int, tokens: int) -> None:
        seconds = time.monotonic() - began
        work.done, work.note = rows, f", {tokens / max(seconds, 1e-9):.0f} tokens/s"
        if not bar.console.is_terminal:
            return  # ``working`` says it, a line at a time
        if seconds >= SECONDS_BEFORE_BAR:
            if not bar.live.is_started:
                bar.start()
            bar.update(task, completed=rows, rate=f"{tokens / seconds:.0f} tokens/s")

    with working(title, total, live=True) as work:
        try:
            yield show
        finally:
            if bar.live.is_started:
                bar.stop()
            elif not bar.console.is_terminal and time.monotonic() - began >= SECONDS_BEFORE_BAR:
                say(str(work))
