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
from contextlib import contextmanager, redirect_stderr, suppress
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
_NAME_OF_SECRET = re.compile(r"_(?:TOKEN|KEY|SECRET|PASSWORD)$")
#: What a variable must be called whose value is a secret, so that it is masked too; and that in words.
SECRET_VARIABLE = r"[A-Z][A-Z0-9_]*_(TOKEN|KEY|SECRET|PASSWORD)"
SECRET_VARIABLE_EXPECTED = (
    "expected the name of an environment variable in capitals that ends with _TOKEN, _KEY, _SECRET or _PASSWORD (whose "
    "values are masked everywhere)"
)
_ODD = re.compile(r"(?=\D{0,99}\d)[^\s:\\]{16,}")  # no word, and no path or address
SHORTEST_SECRET = 8  # a shorter value would mask ordinary words
LONGEST_LINE, MOST_LINES = 2000, 60  # characters and lines of a message
MASK = "***"
SECONDS_BETWEEN_LINES = 30.0  # of work that would be silent
#: What the keys of well-known services look like: a kept list, after the rules of gitleaks 8 (config/gitleaks.toml) and the
#: services' own descriptions, in expressions of our own. Each is long and odd enough to be nothing else: no hash, no name of
#: a model, no entry of a vocabulary. ``_TOKEN_START`` stands before all but the last five.
KINDS_OF_SECRETS = {  # a name such as hf_llama7b is no token: the Hub's have 34 characters after the prefix
    "a Hugging Face token": r"(?:hf_|api_org_)[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9_.=-]{20,}",
    "a GitHub token": r"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
    "a GitLab token": r"gl(?:pat|ptt|dt|rt|cbt|oas|agent)-(?=[\w-]{0,99}\d)(?=[a-z\d_-]{0,99}[A-Z])[A-Za-z0-9_-]{20,}",
    "an AWS key": r"(?:AKIA|ASIA|ABIA|ACCA)(?=[A-Z]{0,15}[2-7])[A-Z2-7]{16}(?![A-Za-z0-9])"
    r"|(?i:(?:aws_)?secret_?(?:access_?)?key)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "an OpenAI or Anthropic key": r"sk-(?:(?:proj|svcacct|admin|ant-[a-z]+\d\d|or-v1)-(?=[\w-]{0,99}\d)[A-Za-z0-9_-]{24,}"
    r"|(?=[A-Za-z]{0,99}\d)[A-Za-z0-9]{32,})",
    "a Google key": r"(?:AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])|ya29\.[A-Za-z0-9_-]{30,}|GOCSPX-[A-Za-z0-9_-]{28})",
    "a Slack token": r"(?:xox[abeoprs]-(?=[\w-]{0,19}\d{6})[A-Za-z0-9-]{10,}|xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{20,}"
    r"|hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{30,})",
    "a Stripe key": r"(?:[rs]k_(?:live|test|prod)_(?=[A-Za-z]{0,99}\d)[A-Za-z0-9]{24,}|whsec_[A-Za-z0-9+/]{32,})",
    "a package registry's token": r"(?:npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])|pypi-AgE[A-Za-z0-9_-]{50,}|rubygems_[a-f0-9]{48}"
    r"|dckr_(?:pat|oat)_[A-Za-z0-9_-]{27,})",
    "a JSON web token": r"eyJ[A-Za-z0-9_-]{14,}\.eyJ[A-Za-z0-9_-]{14,}\.[A-Za-z0-9_-]{10,}",
    "a key of an AI or cloud service": r"(?:gsk_[A-Za-z0-9]{48,}|r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])|xai-[A-Za-z0-9]{70,}"
    r"|pplx-[A-Za-z0-9]{40,}|nvapi-[A-Za-z0-9_-]{60,}|wandb_v1_[A-Za-z0-9_]{40,}|KGAT_[a-f0-9]{32}|dapi[a-f0-9]{32}(?![a-f0-9])"
    r"|do[opr]_v1_[a-f0-9]{64}|hv[bs]\.(?=[a-z\d_-]{0,99}[A-Z])[A-Za-z0-9_-]{24,}"
    r"|tskey-[a-z]+-(?=[a-z\d-]{0,99}[A-Z])[A-Za-z0-9-]{20,}|glsa_[A-Za-z0-9]{32}_[a-f0-9]{8}"
    r"|lin_api_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{40,}|NRAK-[A-Z0-9]{27}|shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}"
    r"|SG\.[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{39,50}|(?:bot)?\d{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])"
    r"|discord(?:app)?\.com/api/webhooks/\d+/[A-Za-z0-9_-]{50,}|AGE-SECRET-KEY-1[A-Z0-9]{50,})",
    "a key by the name of its variable": r"(?<![A-Za-z0-9_])[A-Z][A-Z0-9_]{0,60}_(?:KEY|TOKEN|SECRET|PASSWORD)"
    r"[\"']?\s{0,9}[=:]\s{0,9}[\"']?(?=[A-Za-z/+_.=-]{0,99}\d)[A-Za-z0-9/+_.=-]{20,}",
    "an authorization": r"(?i:authorization[\"']?\s*[=:]\s*[\"']?(?:bearer|basic) )[A-Za-z0-9/+_.=~-]{12,}",
    "a signed URL": r"(?<=[?&;])"
    r"(?i:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig)=[A-Za-z0-9%/+_.-]{20,}={0,2}",
    "a connection string": r"(?<=[;?&])(?i:AccountKey|SharedAccessKey|SharedAccessSignature)=[A-Za-z0-9%/+]{40,}={0,2}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{0,20000}?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\\n|\s)*(?:[A-Z][A-Za-z-]+: .*|[A-Za-z0-9+/=]{16,}))*)",
}
_TOKEN_START = "(?<![A-Za-z0-9])"
_BY_THEIR_PLACE = 5  # of the kinds, the last ones, which begin where they please
_KINDS = [*KINDS_OF_SECRETS.values()]
_SECRET = re.compile(
    "|".join((f"{_TOKEN_START}(?:{'|'.join(_KINDS[:-_BY_THEIR_PLACE])})", *_KINDS[-_BY_THEIR_PLACE:]))
)
#: Masked up to their prefix, which says whose they were. The last is the beginning of one that a message has cut: no word
#: has capitals, small letters and digits.
_OF_THE_HUB = tuple(
    re.compile(_TOKEN_START + pattern)
    for pattern in (
        r"(hf_oauth_|hf_jwt_)[A-Za-z0-9_.=-]{20,}",
        r"(hf_|api_org_)[A-Za-z0-9]{30,}",
        r"(hf_|api_org_)(?=[a-z0-9]{0,99}[A-Z])(?=[A-Z0-9]{0,99}[a-z])(?=[A-Za-z]{0,99}\d)[A-Za-z0-9]{10,}",
    )
)
_USER_IN_URL = re.compile(r"(?<=://)(?!git@)[^/\s?#]{1,500}(?=@)")  # a password may hold an @ itself
_TOKEN_IN_QUERY = re.compile(
    r"(?<=[?&#;])((?:access_|auth_)?token|api_key|password|signature)=[^&\s'\"]+", re.IGNORECASE
)
# Control characters (a terminal acts on ESC), marks that steer the reading direction, halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def masked(text: str) -> str:
    """``text`` with access tokens of the Hub, of the environment and in URLs replaced by stars."""
    for value in sorted(_secrets_of_the_environment(), key=len, reverse=True):
        text = text.replace(value, MASK)
    for token in _OF_THE_HUB:
        text = token.sub(rf"\g<1>{MASK}", text)
    text = _SECRET.sub(MASK, text)
    return _TOKEN_IN_QUERY.sub(rf"\1={MASK}", _USER_IN_URL.sub(MASK, text))


def secrets_in(text: str, urls: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line, what it looks like) of every access token in ``text``, the environment's own included.

    Args:
        text: of a file.
        urls: look for names and passwords in URLs, too; a vocabulary holds ``://`` and ``@`` for themselves.
    """
    own = _secrets_of_the_environment()
    for number, line in enumerate(text.splitlines(), start=1):
        if any(secret in line for secret in own):
            yield number, "a token of this machine's environment"
        elif found := _SECRET.search(line):
            yield number, _kind_of(found)
        elif urls and (_USER_IN_URL.search(line) or _TOKEN_IN_QUERY.search(line)):
            yield number, "a URL with a user name, password or token in it"


def _kind_of(found: re.Match[str]) -> str:
    patterns = ((kind, re.compile(pattern)) for kind, pattern in KINDS_OF_SECRETS.items())
    return next(kind for kind, pattern in patterns if pattern.match(found.string, found.start()))


def harmless(text: object) -> str:
    r"""``text`` as a terminal may have it: tokens masked, and control characters written out (``\x1b``)."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), masked(str(text)))


def harmless_json(text: str) -> str:
    r"""JSON as a terminal may have it: the same values, in which ``json`` has left DEL, C1 and the direction marks."""
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in "\r\n" else f"\\u{ord(match[0]):04x}", text)


def printable(text: str) -> str:
    """``harmless(text)``, cut where nobody would read on."""
    lines = [_shortened(line) for line in harmless(text).split("\n")]
    if len(lines) > MOST_LINES:  # with the last line no more than these, or it would be cut again
        lines[MOST_LINES - 1 :] = [f"... and {len(lines) - MOST_LINES + 1} lines more"]
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
    yield from _unusable(value, place, _secrets_of_the_environment())


def _unusable(value: Any, place: str, secrets: set[str]) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        own = any(secret in value for secret in secrets)
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
            for _, problem in _unusable(key, "", secrets):
                yield place or "recipe", f"a key {problem}"
            yield from _unusable(item, f"{place}.{key}" if place else str(key), secrets)
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from _unusable(item, f"{place}.{number}", secrets)


def _secrets_of_the_environment() -> set[str]:
    values = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    named = {value for name, value in os.environ.items() if _NAME_OF_SECRET.search(name)}
    return {value for value in values if len(value) >= SHORTEST_SECRET} | {*filter(_ODD.fullmatch, named)}


def say(text: str) -> None:
    """Print to stderr: stdout belongs to what a command returns. Names of the user's files may be in ``text``."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: object, *, error: bool = False) -> None:
    """Print a result to stdout, or an error in full to stderr. All that a command writes passes here, ``say`` or a table."""
    print(harmless(text), file=sys.stderr if error else sys.stdout, flush=True)


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


_going_on: list[Work] = []  # the innermost last


@contextmanager
def working(what: str, total: int = 0, *, live: bool = False) -> Iterator[Work]:
    """Say every ``SECONDS_BETWEEN_LINES`` how far a piece of work is: one line, by the first process.

    Of pieces within each other the innermost alone is told.

    Args:
        what: what is being done, as a participle.
        total: how much of it there is; 0: nobody knows. ``Work.advance`` tells how much is done.
        live: a progress bar shows the same on a terminal, where no line is written then.
    """
    work, ended = Work(what, total), threading.Event()

    def tell() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            if _going_on[-1] is work:
                say(str(work))

    silent = os.environ.get("RANK", "0") != "0" or (live and sys.stderr.isatty())
    thread = threading.Thread(target=tell, name="dts_hf-working", daemon=True)
    _going_on.append(work)
    if not silent:
        thread.start()
    try:
        yield work
    finally:
        ended.set()
        if not silent:
            thread.join()
        _going_on.remove(work)


@contextmanager
def guarded_logs() -> Iterator[None]:
    """Within it what libraries log and warn of is ``harmless``, too: they quote paths, addresses and answers of servers."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with suppress(Exception):  # wrong arguments of a library's message: logging says so, and the work goes on
            made.msg, made.args = harmless(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: harmless(form(*args, **kwargs))
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = form


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
