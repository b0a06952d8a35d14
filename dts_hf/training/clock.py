"""How long training took, and since when: what is no training (an evaluation, a checkpoint) can be left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingClock:
    """Seconds of a training, all attempts together, and of its laps, which end where a log line is written.

    Attributes:
        seconds_before: of training, in the attempts before this one.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Training starts now, and with it the first lap."""
        self.seconds_before = 0.0
        self._began = self._lap_began = time.monotonic()
        self._ended: float | None = None

    def stop(self) -> None:
        """Training has come to its end."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of training, up to now or to its end."""
        return self.seconds_before + (self._ended or time.monotonic()) - self._began

    def new_lap(self) -> float:
        """Seconds of the lap that ends here; the next one begins."""
        now = time.monotonic()
        seconds, self._lap_began = now - self._lap_began, now
        return seconds

    @contextmanager
    def exclude(self, *, from_total: bool) -> Iterator[None]:
        """What happens inside belongs to no lap and, with ``from_total``, to no training either."""
        entered, began, lap_began = time.monotonic(), self._began, self._lap_began
        try:
            yield
        finally:
            seconds = time.monotonic() - entered
            # From what it was at the start, not from what it is: an evaluation inside has moved it already.
            self._lap_began = lap_began + seconds
            if from_total:
                self._began = began + seconds
