"""One server's HTTP side as a trainer needs it: kept connections, patience with what passes, and a plain last word.

A question may be asked any number of times: the answer depends on its tokens alone. So whatever may be over in a moment (no
connection, a full queue, a restart, a damaged answer) is tried again with growing pauses; everything else ends at once.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from dts_hf.console import masked
from dts_hf.errors import RunError, UserError
from dts_hf.teachers.wire import PROTOCOL, PROTOCOL_HEADER, WireError

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
#: Answers that say that it may go better later; 408: the body came too slowly.
_AGAIN = (408, 429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0
#: After so many answers in a row that are no answers it is not the line that is to blame.
_MOST_DAMAGED = 3


class _Bearer(AuthBase):
    """The token, on requests to this server alone; without one, nothing: requests would look into ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Refused(RunError):
    """The server refuses a question, and would refuse it again.

    Args:
        message: its words.
        status: of HTTP.
    """

    def __init__(self, message: object, status: int) -> None:
        super().__init__(message)
        self.status = status


class OtherTeacher(RunError):
    """The server has another teacher than the one that the run began with."""


class _Again(Exception):
    """It may go better later: ``str`` says what went wrong, ``wait`` what the server asks for, seconds."""

    def __init__(self, cause: str, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.wait = wait


class Connection:
    """Requests to one server.

    Args:
        url: such as ``http://teacher.example:8765``.
        token: that it wants; None: none.
        patience: how long a request is tried again before it fails, seconds.
        timeout: how long the server may be silent, seconds.
        key: what errors call the address; that of the token's variable is ``token_env`` beside it.
        told: headers of every request.
    """

    def __init__(
        self, url: str, token: str | None, *, patience: float, timeout: float = 180.0, key: str = "teacher.url",
        told: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.url, self.patience, self.timeout = checked_url(url, key), patience, timeout
        self._key = key
        self._told = {PROTOCOL_HEADER: str(PROTOCOL)} if told is None else dict(told)
        self.retries = 0
        self._random = random.Random()  # not the global one, whose numbers belong to the training
        self._token = token
        self._session: requests.Session | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_session": None}  # for workers that are spawned: sockets stay here

    def get(self, path: str, most: int, read: Callable[[bytes], Read]) -> Read:
        """``read`` of the body at ``path``; see ``post``."""
        return self._patiently("GET", path, None, {}, most, read)

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], most: int, read: Callable[[bytes], Read]
    ) -> Read:
        """Send ``body`` and return ``read`` of the answer's.

        Args:
            path: from the root.
            body: safetensors, or whatever ``headers`` say.
            headers: beside those of every request.
            most: bytes of an answer; a longer one is not read.
            read: raises ``WireError`` where the answer is damaged.

        Raises:
            OtherTeacher: the server says so.
            Refused: it refuses.
            RunError: ``patience`` is at its end.
        """
        return self._patiently("POST", path, body, headers, most, read)

    def _patiently(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], most: int,
        read: Callable[[bytes], Read],
    ) -> Read:  # fmt: skip
        until, pause, damaged, tries = time.monotonic() + self.patience, _FIRST_PAUSE, 0, 0
        while True:
            tries += 1
            try:
                return read(self._once(method, path, body, headers, most))
            except WireError as error:
                damaged += 1
                if damaged >= _MOST_DAMAGED:
                    raise RunError(f"{self.url}{path}: {damaged} damaged answers: {masked(str(error))}") from None
                cause, wait = f"a damaged answer: {error}", 0.0
            except _Again as error:
                cause, wait = str(error), error.wait
            wait = max(wait, pause * self._random.uniform(0.5, 1.0))
            if time.monotonic() + wait > until:
                raise RunError(
                    f"{self.url}{path}: no answer in {self.patience:g} s and {tries} tries; the last: {masked(cause)}"
                )
            if tries == 3:
                logger.warning("%s%s: still trying: %s", self.url, path, masked(cause))
            self.retries += 1
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], most: int) -> bytes:
        told = {**self._told, "Accept-Encoding": "identity", **headers}
        try:
            with self._open().request(
                method, self.url + path, data=body, headers=told, timeout=(10.0, self.timeout), stream=True,
                allow_redirects=False,
            ) as response:  # fmt: skip
                status = response.status_code
                content = self._read(response, most if status == 200 else 2000)
                wait = response.headers.get("Retry-After", "")
                location = response.headers.get("Location", "")
        except (requests.RequestException, OSError) as error:
            raise _Again(_plain(error)) from None
        if status == 200:
            return content
        words = " ".join(content.decode("utf-8", "replace").split())[:500]
        sentence = f"{self.url}{path}: {status} {masked(words)}"
        if status in _AGAIN:
            raise _Again(f"{status} {words}", min(float(wait), 60.0) if wait.isdecimal() else 0.0)
        if status in range(300, 400):
            place = "".join(letter for letter in location if letter.isprintable())[:300]
            raise RunError(
                f"{self.url}{path}: {status}, a redirection to {masked(place) or 'nowhere'}, which is not followed: the "
                f"token goes to the address of {self._key} alone. Put the server's own address there"
            )
        if status == 401:
            variable = token_key(self._key)
            raise Refused(f"{sentence}. Set the variable that {variable} names to the server's token", status)
        if status == 409:
            raise OtherTeacher(sentence)
        raise Refused(sentence, status)

    def _read(self, response: requests.Response, most: int) -> bytes:
        """The body, as long as it is not longer than it may be, and not slower than ``timeout``."""
        content, until = bytearray(), time.monotonic() + self.timeout
        for piece in response.iter_content(1 << 20):
            content += piece
            if len(content) > most:
                if response.status_code == 200:
                    raise WireError(f"it has more than {most:,} bytes")
                break
            if time.monotonic() > until:
                raise _Again(f"the answer had not come to its end after {self.timeout:g} s")
        declared = response.headers.get("Content-Length", "")
        if response.status_code == 200 and declared.isdecimal() and int(declared) != len(content):
            raise _Again(f"got {len(content):,} of {declared} bytes")
        return bytes(content)

    def _open(self) -> requests.Session:
        """A session of this process: sockets must not be shared with a parent."""
        if self._session is None or self._process != os.getpid():
            self._session, self._process = requests.Session(), os.getpid()
            self._session.auth = _Bearer(self._token)
            # A proxy is for what is far away; the token of a server here would be told to it
            self._session.trust_env = not is_loopback(urlsplit(self.url).hostname or "")
        return self._session


def token_of(variable: str | None, key: str = "token_env") -> str | None:
    """The token in an environment variable, which is named in a recipe where the token must not be.

    Args:
        variable: its name; None: there is no token.
        key: what errors call it.

    Raises:
        UserError: the variable is empty or not set, or its value cannot be sent.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"{key}: the environment variable {variable} is not set here, expected the server's token in it"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{key}: the value of {variable} has characters that no HTTP header may carry")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_key(key: str) -> str:
    """What the option is called that names the variable of the token, beside that of the address."""
    return f"{key.removesuffix('url')}token_env"


def checked_url(url: str, key: str = "teacher.url") -> str:
    """``url`` without a slash at its end.

    Args:
        url: of a server.
        key: what errors call it.

    Raises:
        UserError: it is no address of a server, or holds a password.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable, parts = False, urlsplit("")
    if "@" in url:
        raise UserError(f"{key}: holds a user or a password; name the variable of the token in {token_key(key)}")
    if not usable or parts.query or parts.fragment or any(letter.isspace() for letter in url):
        raise UserError(f"{key}: got {url!r}, expected an address such as http://127.0.0.1:8765")
    return url.rstrip("/")


def _plain(error: BaseException) -> str:
    """The innermost words: requests wraps urllib3, which wraps the socket."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(
        inner, BaseException
    ):
        error = inner
    words = " ".join(str(error).split()) or type(error).__name__
    return words.split(": ", 1)[-1] if words.startswith(("<", "HTTPConnection")) else words
