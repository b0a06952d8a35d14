"""Connections that end: uvicorn's own wait for ever for a client that sends, or reads, one byte a minute.

What leans on names of uvicorn's HTTP/1.1 class stands here alone.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """Cuts a connection whose request is not over ``seconds`` after its first byte, whatever it waits for.

    It counts from the connection, or on a kept one from the next request's first byte, to the last byte of the answer
    that the transport took: headers, body, queue, forward and a slow reader alike.
    """

    seconds: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first request's time begins."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """A kept connection's next request begins."""
        self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """The request is over; one that was sent behind it begins."""
        self._end()
        super().on_response_complete()
        if not self.cycle.response_complete or self.conn.trailing_data[0]:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to be timed."""
        self._end()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """An idle client; what it has not read by now is not kept for it."""
        self.transport.abort()

    def _begin(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def timed_protocol(seconds: float) -> type[TimedProtocol]:
    """The class for ``uvicorn.Config(http=...)``."""
    return type("TimedProtocol", (TimedProtocol,), {"seconds": seconds})
