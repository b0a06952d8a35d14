"""What a person sees: lines on stderr, with tokens masked and control characters written out."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

# Their values are masked wherever they appear, whatever they look like.
SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
SHORTEST_SECRET = 8  # a shorter value would mask ordinary words
LONGEST_LINE, MOST_LINES = 2000, 60  # characters and lines of a message
MASK = "***"
SECONDS_BETWEEN_LINES = 30.0  # of work that would be silent
_TOKEN = re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{10,}")
#: What the keys of well-known services look like, from the rules of gitleaks: long and odd enough to be nothing else.
KINDS_OF_SECRETS = {  # a name such as hf_llama7b is no token: the Hub's have 34 characters after the prefix
    "a Hugging Face token": r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
    "an OpenAI or Anthropic key": r"\bsk-(?:proj-|svcacct-|admin-|ant-(?:api|admin)\d\d-)?[A-Za-z0-9_-]{32,}",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Stripe key": r"\b[rs]k_(?:live|test|prod)_[A-Za-z0-9]{10,}",
    "a package registry's token": r"\b(?:npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{50,})",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{14,}\.eyJ[A-Za-z0-9_-]{14,}\.[A-Za-z0-9_-]{10,}",
    "a signed URL": r"(?<=[?&])(?:X-Amz-(?:Signature|Security-Token)|X-Goog-Signature|sig)=[A-Za-z0-9%/+_.-]{20,}={0,2}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf_|api_org_)[A-Za-z0-9]{30,}")
_SECRET = re.compile("|".join(f"(?:{pattern})" for pattern in KINDS_OF_SECRETS.values()))
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_TOKEN_IN_QUERY = re.compile(
    r"(?<=[?&])((?:access_|auth_)?token|api_key|password|signature)=[^&\s'\"]+", re.IGNORECASE
)
# Control characters (a terminal acts on ESC), marks that reverse the reading direction, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def masked(text: str) -> str:
    """``text`` with access tokens of the Hub, of the environment and in URLs replaced by stars."""
    for value in sorted(_secrets_of_the_environment(), key=len, reverse=True):
        text = text.replace(value, MASK)
    for token in (_HUB_TOKEN, _TOKEN):
        text = token.sub(rf"\g<1>{MASK}", text)
    text = _SECRET.sub(MASK, text)
    return _TOKEN_IN_QUERY.sub(rf"\1={MASK}", _USER_IN_URL.sub(MASK, text))


def secrets_in(text: str, urls: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line, what it looks like) of every access token in ``text``, the environment's own included.

    Args:
        text: of a file.
        urls: look for names and passwords in URLs, too; a vocabulary holds ``://`` and ``@`` for themselves.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if any(secret in line for secret in _secrets_of_the_environment()):
            yield number, "a token of this machine's environment"
        elif _SECRET.search(line):
            yield number, next(kind for kind, pattern in KINDS_OF_SECRETS.items() if re.search(pattern, line))
        elif urls and (_USER_IN_URL.search(line) or _TOKEN_IN_QUERY.search(line)):
            yield number, "a URL with a user name, password or token in it"


def printable(text: str) -> str:
    r"""``masked(text)`` with control characters written out (``\x1b``), and cut where nobody would read on."""
    text = _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), masked(text))
    lines = [_shortened(line) for line in text.split("\n")]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"... and {len(lines) - MOST_LINES} lines more"]
    return "\n".join(lines)


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    end = LONGEST_LINE // 4
    return f"{line[: LONGEST_LINE - end]} ... {line[-end:]}"


def unusable_texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) of every text below ``value`` that no recipe may hold.

    A recipe is saved in the run directory and shared, so it holds no token, not even inside a longer text. A control
    character or half of a surrogate pair is part of no name, and PyYAML reads some of them back as a space.
    """
    if isinstance(value, str):
        own = any(secret in value for secret in _secrets_of_the_environment())
        if own or _SECRET.search(value):
            yield place, "holds an access token. Recipes are saved and shared: run 'hf auth login' or set HF_TOKEN"
        elif _USER_IN_URL.search(value) or _TOKEN_IN_QUERY.search(value):
            yield (
                place,
                "holds a URL with a user name, password or token in it. Recipes are saved and shared: leave it out",
            )
        elif match := _NO_TEXT.search(value):
            yield (
                place,
                f"holds the character U+{ord(match[0]):04X}, which belongs to no name (a control character or alike)",
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            for _, problem in unusable_texts(key):
                yield place or "recipe", f"a key {problem}"
            yield from unusable_texts(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from unusable_texts(item, f"{place}.{number}")


def _secrets_of_the_environment() -> set[str]:
    values = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    return {value for value in values if len(value) >= SHORTEST_SECRET}


def say(text: str) -> None:
    """Print to stderr: stdout belongs to what a command returns. Names of the user's files may be in ``text``."""
    print(printable(text), file=sys.stderr, flush=True)


def gb(value: float) -> str:
    """Bytes for people: ``850 MB``, ``12.3 GB``."""
    return f"{value / 1e6:,.0f} MB" if value < 0.95e9 else f"{value / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for people, as exactly as an estimate is: ``0.8 s``, ``45 s``, ``6 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


class Work:
    """How far a piece of work is; see ``working``.

    Args:
        what: what is being done, as a participle: ``loading the teacher``.
        total: how much of it there is; 0: nobody knows.
    """

    def __init__(self, what: str, total: int = 0) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self.began = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count

    def __str__(self) -> str:
        seconds = time.monotonic() - self.began
        share = f": {self.done:,} of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        left = (
            f", about {duration(seconds / self.done * (self.total - self.done))} left"
            if self.total and self.done
            else ""
        )
        return f"{self.what}{share}{self.note}, {duration(seconds)} so far{left}"


@contextmanager
def working(what: str, total: int = 0, *, live: bool = False) -> Iterator[Work]:
    """Say every ``SECONDS_BETWEEN_LINES`` how far a piece of work is: one line, by the first process.

    Args:
        what: what is being done, as a participle.
        total: how much of it there is; 0: nobody knows. ``Work.advance`` tells how much is done.
        live: a progress bar shows the same on a terminal, where no line is written then.
    """
    work, ended = Work(what, total), threading.Event()

    def tell() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            say(str(work))

    silent = os.environ.get("RANK", "0") != "0" or (live and sys.stderr.isatty())
    thread = threading.Thread(target=tell, name="dts_hf-working", daemon=True)
    if not silent:
        thread.start()
    try:
        yield work
    finally:
        ended.set()
        if not silent:
            thread.join()


@contextmanager
def quiet() -> Iterator[None]:
    """Within it libraries keep progress bars, warnings and log to themselves: what matters is said at the end."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
