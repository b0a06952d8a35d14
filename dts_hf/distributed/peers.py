"""No process of a run waits for ever for one that has died.

On a CPU (gloo) a collective fails as soon as the process at the other end is gone. On GPUs (NCCL) it may not: it waits
for the group's timeout, half an hour by default and needed for slow steps such as the saving of a large model. So the
processes also hold a plain connection to the first one, which the operating system closes when its owner dies, however
that happens; a machine that loses its power is found by TCP keep-alive.
"""

from __future__ import annotations

import _thread
import hmac
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch

from dts_hf.errors import ExitCode, Interrupted, UserError

logger = logging.getLogger(__name__)
#: After the loss of a process, for the others to end by an error of their own with more to say, seconds.
GRACE_SECONDS = 15.0
#: For all processes to connect, seconds. Where a firewall forbids it the run goes on without this watch.
CONNECT_SECONDS = 20.0
#: How much later than another process the first one may find the same wrong input, seconds.
SAME_INPUT_SECONDS = 5.0
#: A silent machine counts as lost after IDLE + INTERVAL * COUNT seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
#: Last words of a process, one byte: done, asked to stop, failed, or wrong input. None at all: it was killed.
_DONE, _STOP, _FAILED, _WRONG = b"D", b"S", b"F", b"W"


def watch_peers() -> None:
    """Start to watch the other processes of the default group; all of them call it, once, at the same place.

    A process that dies ends the others within ``GRACE_SECONDS`` with the status 1; one that was asked to stop outside
    of training passes the request on. ``say_goodbye`` ends the watch. Without a group nothing is watched.
    """
    global _watch
    if _watch is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world > 1:
        connections = _as_first(world) if rank == 0 else _to_first(rank)
        _watch = _Watch(connections, rank)


def say_goodbye(error: BaseException | None) -> None:
    """Tell the others how this process ends: with its work done (None), with a request to stop, or with an error.

    Of a ``UserError`` it finds out whether the first process ends with one, too: then that one says what is wrong.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is None:
        return
    if error is None or getattr(error, "everywhere", False):
        watch.close(_DONE)  # the others do not need to be told
    elif isinstance(error, UserError):
        watch.close(_WRONG)
        error.everywhere = watch.first_is_wrong_too()
    else:
        watch.close(_STOP if isinstance(error, Interrupted) else _FAILED)


class _Watch:
    """A thread that reads what the others say; the first process hands bad news on to all."""

    def __init__(self, connections: dict[int, socket.socket], rank: int) -> None:
        self.connections, self.rank = connections, rank
        self.closing = self.ending = self.first_is_wrong = False
        self.first_has_ended = threading.Event()
        for connection in connections.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):  # not everywhere
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._run, name="dts_hf-peers", daemon=True).start()

    def close(self, word: bytes) -> None:
        self.closing = True
        self._tell(word)
        for connection in self.connections.values():
            _quietly(connection.shutdown, socket.SHUT_WR)  # what was said still arrives

    def first_is_wrong_too(self) -> bool:
        """Whether the first process, another one than this, ends with wrong input now; call it after ``close``."""
        if 0 in self.connections:
            self.first_has_ended.wait(SAME_INPUT_SECONDS)
        return self.first_is_wrong

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    word = _quietly(key.fileobj.recv, 1) or b""  # type: ignore[union-attr]
                    if word in (b"", _DONE):
                        selector.unregister(key.fileobj)
                    self._hear(key.data, word)

    def _hear(self, rank: int, word: bytes) -> None:
        """Act on one word of process ``rank``, empty where it is gone."""
        if rank == 0 and word in (b"", _DONE, _WRONG):
            self.first_is_wrong |= word == _WRONG
            self.first_has_ended.set()
        if self.closing or self.ending or word == _DONE:
            return
        self.ending = True
        self._tell(_STOP if word == _STOP else _FAILED, but=rank)
        if word == _STOP:
            _thread.interrupt_main(signal.SIGTERM)  # does nothing where our handler is not in place (any more)
            how = (rank, "was asked to stop", ExitCode.INTERRUPTED)
        else:
            how = (rank, "ended with an error" if word else "was killed or lost", ExitCode.FAILED)
        threading.Thread(target=self._end, args=how, name="dts_hf-end", daemon=True).start()  # more may be said

    def _tell(self, word: bytes, but: int | None = None) -> None:
        for rank, connection in self.connections.items():
            if rank != but:
                _quietly(connection.sendall, word)

    def _end(self, rank: int, how: str, code: ExitCode) -> None:
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            if self.closing:
                return  # this process ends by itself
            time.sleep(0.1)
        who = "another process" if rank == 0 and self.rank else f"process {rank}"
        text = f"{who} of this run {how}, so process {self.rank} stops. Go on with the same command and --resume"
        print(text, file=sys.stderr, flush=True)
        os._exit(code)


_watch: _Watch | None = None


def _as_first(world: int) -> dict[int, socket.socket]:
    """Listen, tell the others where, and take their connections."""
    token = secrets.token_hex(16)
    try:
        listener = _listen()
    except OSError as error:
        logger.warning("lost processes are not watched for: cannot listen (%s)", error)
        torch.distributed.broadcast_object_list([None])
        return {}
    found: dict[int, socket.socket] = {}
    with listener:
        torch.distributed.broadcast_object_list([(listener.getsockname()[1], token)])
        until = time.monotonic() + CONNECT_SECONDS
        while len(found) < world - 1 and time.monotonic() < until:
            listener.settimeout(max(until - time.monotonic(), 0.01))
            connection = _quietly(listener.accept)
            if connection is not None:
                rank = _introduced(connection[0], token)
                if rank is None:
                    connection[0].close()
                else:
                    found[rank] = connection[0]
    if len(found) < world - 1:
        logger.warning("%d of %d processes are not watched for a sudden end", world - 1 - len(found), world)
    return found


def _listen() -> socket.socket:
    """On every interface: a machine may take its own name for its loopback address (Debian), which others cannot reach."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # no IPv6 here
        return socket.create_server(("", 0))


def _to_first(rank: int) -> dict[int, socket.socket]:
    held: list[Any] = [None]
    torch.distributed.broadcast_object_list(held)
    if held[0] is None:
        return {}
    port, token = held[0]
    try:
        first = (os.environ.get("MASTER_ADDR", "localhost"), port)
        connection = socket.create_connection(first, timeout=CONNECT_SECONDS)
        connection.sendall(f"{token}{rank:08d}".encode())
    except OSError as error:
        logger.warning("process %d is not watched: cannot connect to the first one (%s)", rank, error)
        return {}
    return {0: connection}


def _introduced(connection: socket.socket, token: str) -> int | None:
    """The rank of the process at the other end; None for somebody else's."""
    connection.settimeout(5)
    wanted = len(token) + 8
    heard = b""
    while len(heard) < wanted and (part := _quietly(connection.recv, wanted - len(heard))):
        heard += part
    known = len(heard) == wanted and hmac.compare_digest(heard[: len(token)], token.encode())
    return int(heard[len(token) :]) if known else None


def _quietly(call: Any, *args: Any) -> Any:
    """The result of ``call``, None where the other end has gone."""
    try:
        return call(*args)
    except OSError:
        return None
